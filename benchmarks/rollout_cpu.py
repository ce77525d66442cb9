"""Sampling G responses of exactly C tokens to one prompt of P tokens on a CPU: ours against
transformers' `generate` and its continuous batching, `generate_batch`.

    python benchmarks/rollout_cpu.py               # P=1536 G=8 C=160

The model of step_cpu.py, float32, temperature 1, no token ends a response. Medians of 3 after a
warm-up; generate_batch shares the prompt's blocks and its figure includes what it sets up per call.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from step_cpu import load, make_model, prompt_ids
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from engine.policy import Policy
from engine.sampler import Request, Sampler

P, G, C = 1536, 8, 160


def ours(lm, prompt: list[int]) -> int:
    sampler = Sampler(Policy(lm), [], C, max_in_flight=G)
    sampler.submit(Request(0, prompt, G))
    ((_, samples),) = sampler.collect()
    lm.config._attn_implementation = "sdpa"
    return sum(len(s.tokens) for s in samples)


def generate(lm, prompt: list[int]) -> int:
    ids = torch.tensor([prompt])
    out = lm.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=C,
        num_return_sequences=G, pad_token_id=0,
    )  # fmt: skip
    return out[:, P:].numel()


def generate_batch(lm, prompt: list[int]) -> int:
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=C, num_return_sequences=G, eos_token_id=-1
    )
    blocks = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=P + G, page_size=64)
    out = lm.generate_batch([prompt], config, blocks)
    return sum(len(o.generated_tokens) for o in out.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), P)
        lm, tokenizer = load(Path(name))
        prompt = prompt_ids(Path(name), tokenizer)
    print("| sampler | s | tokens/s | x |\n|---|---|---|---|")
    fastest = None
    for side in (ours, generate, generate_batch):
        times = []
        for _ in range(4):
            started = time.perf_counter()
            tokens = side(lm, prompt)
            times.append(time.perf_counter() - started)
            assert tokens == G * C, f"{side.__name__} made {tokens} tokens"
        seconds = median(times[1:])
        fastest = fastest or seconds
        cells = f"{seconds:.2f} | {tokens / seconds:.0f} | {seconds / fastest:.1f}"
        print(f"| {side.__name__} | {cells} |")


if __name__ == "__main__":
    main()
