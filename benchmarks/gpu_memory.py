"""Does --dry_run tell the truth on a GPU? A step's measured peaks beside those it foretells.

    python benchmarks/gpu_memory.py                # Qwen2.5-1.5B's shape, on one GPU
    python benchmarks/gpu_memory.py --small        # the script on this CPU, which measures nothing

Random weights of the true shape; one group of G responses of C tokens to a prompt of P tokens is
sampled and trained on with grpo.py's own functions. Each figure is the most that was allocated in
a phase, in GB.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import dry_run
import grpo
from engine.model import prepare
from engine.parallel import gathered, processes, shard
from engine.policy import Policy
from engine.sampler import Request, Sampler
from rollout import Rollout
from settings import DryRunSettings, TrainSettings

SHAPE = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
SMALL = SHAPE | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1000,
}  # fmt: skip


def measured(settings: TrainSettings, shape: dict, prompt_tokens: int, small: bool) -> dict:
    """phase -> GB; nan on a CPU."""
    peaks = {}

    def note(phase: str) -> None:
        peaks[phase] = float("nan") if small else torch.cuda.max_memory_allocated() / 1e9
        if not small:
            torch.cuda.reset_peak_memory_stats()

    with processes() as device:
        computing = torch.float32 if small else torch.bfloat16
        config = Qwen2Config(attn_implementation="sdpa", **shape)
        policies = []
        for trained in (True, False):
            with torch.device(device):
                lm = Qwen2ForCausalLM(config).to(torch.float32 if trained else computing)
            prepare(lm, settings, trained)
            policies.append(shard(Policy(lm.eval()), device, computing))
        policy, reference = policies
        optimizer = torch.optim.AdamW(policy.parameters(), settings.learning_rate, fused=True)
        note("loading")
        prompt, group = [5] * prompt_tokens, settings.group_size
        with gathered(policy):
            sampler = Sampler(policy, [], settings.max_new_tokens, max_in_flight=group)
            sampler.submit(Request(0, prompt, group))
            ((_, samples),) = sampler.collect()
        note("sampling")
        rewards = torch.arange(group) % 2.0
        advantages = grpo.group_advantages(rewards, group)
        for _ in range(2):  # at the second, Adam's moments are there
            rollout = Rollout(0, None, prompt, samples, [], rewards, advantages)
            grpo.update(policy, reference, optimizer, [rollout], settings)
            note("update")
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="on this CPU")
    small = parser.parse_args().small
    if not (small or torch.cuda.is_available()):
        raise SystemExit("no GPU here; --small tries the script on the CPU")
    shape, (p, g, c) = (SMALL, (50, 4, 20)) if small else (SHAPE, (3000, 32, 850))
    settings = TrainSettings(
        group_size=g, max_new_tokens=c, max_in_flight=g, max_tokens_per_micro_batch=p + g * c
    )
    with tempfile.TemporaryDirectory() as folder:
        Qwen2Config(**shape).save_pretrained(folder)
        settings.model = folder
        how = DryRunSettings(processes=1, prompt_tokens=p)
        phases = dry_run.run_phases(settings, how, grpo.add_gradient)
    adam = phases["optimizer"].peak.get("Adam's moments", 0)
    told = {name: sum(phase.peak.values()) / 1e9 for name, phase in phases.items()}
    told["update"] += adam / 1e9  # the dry run's update comes before Adam has any
    found = measured(settings, shape, p, small)
    print("| phase | dry run GB | measured GB | measured / dry run |\n|---|---|---|---|")
    for name, size in found.items():
        print(f"| {name} | {told[name]:.2f} | {size:.2f} | {size / told[name]:.2f} |")


if __name__ == "__main__":
    main()
