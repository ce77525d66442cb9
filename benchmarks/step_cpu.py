"""One GRPO step on a CPU: ours against TRL's GRPOTrainer, and the update alone against the plain
model and against prefix_grouper, the peer with the same idea.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step_cpu.py                  # P=1536 G=8 C=160, as a table
    python benchmarks/step_cpu.py --group 8 32 --sides ours prefix_grouper
    python benchmarks/step_cpu.py --group 8 32 --turns 8    # updates in one process, taking turns
    python benchmarks/step_cpu.py --curve          # G = 2 to 32 at P=768 C=96: curve.png too

All sides: the same Qwen2 from disk (6 layers, 512 wide, 8 heads over 2 key heads, float32, about
21 million parameters), the same prompt of P tokens, G responses of exactly C tokens at temperature
1 (no token ends one), beta > 0, one AdamW step, no activation checkpointing. Each side runs in a
process of its own, so that its peak memory is its own: the figure is the growth of the resident
set over what it was with model, reference and optimizer made. The first step warms up and is
left out; times are medians of the others. With --turns, the updates of ours and of prefix_grouper
follow each other in one process, so that both meet the same machine; only times are taken.

    step    sample, reward, reference log-probabilities, forward and backward, optimizer
    update  the step without sampling

The floors are what the machine can do at its measured rates: an update's matrix products, and for
sampling the reading of the prompt and C steps that each read all weights once.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BETA, RATE = 0.04, 1e-6


def make_model(folder: Path, prompt_tokens: int) -> None:
    """A random model, its tokenizer, and a prompt of exactly so many tokens."""
    from tiny_model import learn_tokenizer, tiny_model

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(3000)]
    tokenizer = learn_tokenizer([" ".join(rng.choices(words, k=200)) for _ in range(300)])
    lm = tiny_model(
        tokenizer, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    lm.generation_config.eos_token_id = []
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.encode(" ".join(rng.choices(words, k=prompt_tokens)))[:prompt_tokens]
    while len(tokenizer.encode(tokenizer.decode(ids))) != prompt_tokens:
        ids = tokenizer.encode(" ".join(rng.choices(words, k=prompt_tokens)))[:prompt_tokens]
    (folder / "prompt.txt").write_text(tokenizer.decode(ids))


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def load(folder: Path):
    from engine.model import load_lm

    return load_lm(str(folder), torch.float32)


def prompt_ids(folder: Path, tokenizer) -> list[int]:
    return tokenizer.encode((folder / "prompt.txt").read_text())


# ------------------------------------------------------------------------------------- the sides


Step = Callable[[], tuple[float, float]]  # makes a step; seconds of all, and of its update


def ours(folder: Path, group: int, length: int) -> Step:
    """The programs' own functions: Sampler, group_advantages, update."""
    import grpo
    from engine.parallel import gathered, shard
    from engine.policy import Policy
    from engine.sampler import Request, Sampler
    from rollout import Rollout
    from settings import TrainSettings

    lm, tokenizer = load(folder)
    frozen, _ = load(folder)
    policy = shard(Policy(lm).eval(), torch.device("cpu"))
    reference = shard(Policy(frozen.requires_grad_(False).eval()), torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), RATE, fused=True)  # as grpo.py has it
    settings = TrainSettings(beta=BETA, max_tokens_per_micro_batch=10**9)
    prompt, seeds = prompt_ids(folder, tokenizer), count()

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        with gathered(policy):
            sampler = Sampler(policy, [], length, max_in_flight=group)
            sampler.submit(Request(0, prompt, group, seed=(next(seeds),)))
            ((_, samples),) = sampler.collect()
        sampled = time.perf_counter()
        rewards = torch.arange(group) % 2.0  # equal ones would cost no update
        advantages = grpo.group_advantages(rewards, group)
        rollout = Rollout(0, None, prompt, samples, [], rewards, advantages)
        grpo.update(policy, reference, optimizer, [rollout], settings)
        ended = time.perf_counter()
        return ended - started, ended - sampled

    return step


def layers_alone(folder: Path, group: int, length: int) -> Step:
    """Ours, with an attention that answers at once: what the model's own layers take, in
    transformers' code, and all else that a step does."""
    from engine.cache import SharedCache
    from engine.packed import Row

    Row.attend = SharedCache.attend = lambda self, layer, q, *others: q.transpose(1, 2)
    return ours(folder, group, length)


def trl(folder: Path, group: int, length: int, repeats: int) -> dict:
    """TRL's trainer, which makes all steps itself; sampling is what its `_generate` takes, the
    update is the rest of a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from engine.model import load_tokenizer

    generating, steps, updates = [], [], []

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            started = time.perf_counter()
            try:
                return super()._generate(*args, **kwargs)
            finally:
                generating.append(time.perf_counter() - started)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.base = resident_mb()

        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            steps.append(time.perf_counter() - self.started)
            updates.append(steps[-1] - generating[-1])

    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=group, num_generations=group,
            max_completion_length=length, generation_kwargs={"min_new_tokens": length}, beta=BETA,
            learning_rate=RATE, max_steps=repeats + 1, use_cpu=True, bf16=False,
            gradient_checkpointing=False, loss_type="grpo", report_to=[], save_strategy="no",
            logging_steps=10**6, disable_tqdm=True,
        )  # fmt: skip
        prompts = [{"prompt": (folder / "prompt.txt").read_text()}] * (repeats + 1)
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(folder),
            processing_class=load_tokenizer(str(folder)),
            reward_funcs=lambda completions, completion_ids, **_: [
                float(ids[0] % 2) for ids in completion_ids
            ],
            train_dataset=Dataset.from_list(prompts), args=config, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return figures(list(zip(steps, updates)), clock.base)


def responses_for(group: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (group, length), generator=torch.Generator().manual_seed(0))


def update_of(lm, logprobs_of: Callable, frozen, group: int) -> Step:
    """An update in which `logprobs_of(model)` gives [G, C]."""
    import grpo

    optimizer = torch.optim.AdamW(lm.parameters(), RATE, fused=True)
    advantages = torch.randn(group, generator=torch.Generator().manual_seed(0))

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        with torch.no_grad():
            ref = logprobs_of(frozen)
        new = logprobs_of(lm)
        mask = torch.ones_like(new, dtype=torch.bool)
        loss = grpo.policy_loss(new, new.detach(), ref, advantages, mask, 0.2, BETA).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return seconds, seconds

    return step


def naive(folder: Path, group: int, length: int) -> Step:
    """The plain model over G whole sequences; logits at the responses only."""
    lm, tokenizer = load(folder)
    frozen, _ = load(folder)
    prompt = torch.tensor(prompt_ids(folder, tokenizer))
    responses = responses_for(group, length, len(tokenizer))
    ids = torch.cat([prompt.expand(group, -1), responses], dim=1)

    def logprobs(model):
        logits = model(ids, logits_to_keep=length + 1).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none")
        return -losses.view(group, length)

    return update_of(lm, logprobs, frozen, group)


def prefix_grouper(folder: Path, group: int, length: int) -> Step:
    """The peer: one padded row a prompt, attention ungrouped into prompt and responses."""
    from prefix_grouper import PrefixGrouper
    from transformers import AttentionInterface

    def attend(module, query, key, value, attention_mask, scaling, prefix_grouper, **_):
        def sdpa(q, k, v, padding, *_):
            # Nothing is padded here, so only the causal mask is left to make.
            n, m = q.shape[2], k.shape[2]
            mask = None if n == m else torch.ones(n, m, dtype=torch.bool).tril(m - n)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=n == m, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2)

        return prefix_grouper.forward(sdpa, query, key, value), None

    AttentionInterface.register("prefix_grouper", attend)
    lm, tokenizer = load(folder)
    frozen, _ = load(folder)
    prompt = torch.tensor([prompt_ids(folder, tokenizer)])
    responses = responses_for(group, length, len(tokenizer))
    grouper = PrefixGrouper.from_ungrouped_masks(
        torch.ones_like(prompt), torch.ones_like(responses), group, device="cpu"
    )
    ids = grouper.concat_input(
        prompt, torch.ones_like(prompt), responses, torch.ones_like(responses)
    )
    own = torch.arange(length) + prompt.shape[1]
    positions = torch.cat([torch.arange(prompt.shape[1]), own.repeat(group)])[None]
    for model in (lm, frozen):
        model.config._attn_implementation = "prefix_grouper"

    def logprobs(model):
        hidden = model.model(
            ids, position_ids=positions, use_cache=False, prefix_grouper=grouper
        ).last_hidden_state
        _, _, states, _ = grouper.split_output(hidden, include_prefix_last=1)
        logits = model.lm_head(states[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none")
        return -losses.view(group, length)

    return update_of(lm, logprobs, frozen, group)


def figures(times: list[tuple[float, float]], base: float) -> dict:
    """Of the seconds of steps and their updates, without the first, and of resident memory."""
    steps, updates = zip(*times[1:])
    return {"step": median(steps), "update": median(updates), "memory": peak_mb() - base}


SIDES = {f.__name__: f for f in (ours, layers_alone, trl, naive, prefix_grouper)}


def measure_side(side: str, folder: Path, group: int, length: int, repeats: int) -> dict:
    if side == "trl":
        return trl(folder, group, length, repeats)
    from engine.parallel import processes

    with processes():
        step = SIDES[side](folder, group, length)
        base = resident_mb()
        return figures([step() for _ in range(repeats + 1)], base)


# ------------------------------------------------------------------------------------ the floors


def matrix_rate() -> float:
    """float32 operations a second of a large matrix product on this machine, at its best."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def read_rate() -> float:
    """Bytes a second in which this machine reads weights that fit no cache, in a product with 8
    vectors as a step of sampling makes it, at its best."""
    x, weights = torch.randn(8, 4096), torch.randn(8192, 4096)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        F.linear(x, weights)
        times.append(time.perf_counter() - started)
    return weights.nbytes / min(times)


def layer_weights(config: dict) -> int:
    """Of all layers: how many weights a token goes through."""
    h, m, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = h * config["num_key_value_heads"] // config["num_attention_heads"]
    return layers * (2 * h * h + 2 * h * kv + 3 * h * m)


def floors(folder: Path, prompt: int, group: int, length: int) -> dict[str, float]:
    """Seconds that sampling and an update cannot do without. An update: forward of policy and
    reference and backward (twice a forward) over the distinct tokens, the head at the responses
    only."""
    config = json.loads((folder / "config.json").read_text())
    h, layers, head = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    head *= h
    weights, rate = layer_weights(config), matrix_rate()

    def forward(tokens: int, pairs: float, answers: int) -> float:
        return 2 * tokens * weights + 4 * h * layers * pairs + 2 * answers * head

    pairs = prompt**2 / 2 + group * (length * prompt + length**2 / 2)
    update = 4 * forward(prompt + group * length, pairs, group * length) / rate
    prefill = forward(prompt, prompt**2 / 2, 1) / rate
    sample = prefill + length * 4 * (weights + head) / read_rate()
    return {"step": sample + update, "sample": sample, "update": update}


# ---------------------------------------------------------------------------------------- running


def run_side(side: str, folder: Path, group: int, length: int, repeats: int) -> dict:
    command = [sys.executable, __file__, "--side", side, str(folder), str(group), str(length),
               str(repeats)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_machine() -> None:
    import transformers

    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    for name in ("trl", "prefix_grouper"):
        from importlib.metadata import version

        versions.append(f"{name} {version(name)}")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          + ", ".join(versions))  # fmt: skip


def compare(prompt: int, group: int, length: int, repeats: int, sides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, prompt)
        print(f"P={prompt} G={group} C={length}")
        got = {side: run_side(side, folder, group, length, repeats) for side in sides}
        least = floors(folder, prompt, group, length)
    mine = got["ours"] | {"sample": got["ours"]["step"] - got["ours"]["update"]}
    print("| side | step s | x | update s | x | memory MB | x |")
    print("|---|---|---|---|---|---|---|")
    for side, f in got.items():
        cells = [f"{f[k]:.2f} | {f[k] / mine[k]:.1f}" for k in ("step", "update")]
        cells.append(f"{f['memory']:.0f} | {f['memory'] / mine['memory']:.1f}")
        if side in ("naive", "prefix_grouper"):
            cells[0] = " | "
        print(f"| {side} | " + " | ".join(cells) + " |")
    for what, seconds in least.items():
        times = mine[what] / seconds
        print(f"floor of the {what}: {seconds:.2f} s; ours takes {times:.2f} times as long")


def take_turns(prompt: int, group: int, length: int, turns: int) -> None:
    """The updates of ours and of prefix_grouper, in turns."""
    from engine.parallel import processes

    with tempfile.TemporaryDirectory() as name, processes():
        make_model(Path(name), prompt)
        sides = [side(Path(name), group, length) for side in (ours, prefix_grouper)]
        times = [[step()[1] for step in sides] for _ in range(turns + 1)][1:]
    mine, theirs = zip(*times)
    ratios = sorted(b / a for a, b in times)
    print(f"P={prompt} G={group} C={length}, {turns} updates each: ours {median(mine):.2f} s, "
          f"prefix_grouper {median(theirs):.2f} s, {median(ratios):.2f} times as long "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip


def curve(prompt: int, length: int, repeats: int) -> None:
    sizes, rows = (2, 4, 8, 16, 32), {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), prompt)
        for group in sizes:
            for side, row in rows.items():
                row.append(run_side(side, Path(name), group, length, repeats))
    print(f"P={prompt} C={length}\n| G | ours s | TRL s | x | ours MB | TRL MB | x |")
    print("|---|---|---|---|---|---|---|")
    for group, a, b in zip(sizes, rows["ours"], rows["trl"]):
        cells = [f"{a[k]:{f}} | {b[k]:{f}}" for k, f in (("step", ".2f"), ("memory", ".0f"))]
        ratios = [f"{b[k] / a[k]:.1f}" for k in ("step", "memory")]
        print(f"| {group} | {cells[0]} | {ratios[0]} | {cells[1]} | {ratios[1]} |")
    plot(sizes, rows)


def plot(sizes: tuple[int, ...], rows: dict[str, list[dict]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    names = {"ours": "this project", "trl": "TRL"}
    labels = {"step": "seconds per step", "memory": "peak memory, MB"}
    for axis, (what, label) in zip(axes, labels.items()):
        for side, row in rows.items():
            axis.plot(sizes, [f[what] for f in row], marker="o", label=names[side])
        axis.set(xlabel="responses per prompt (G)", ylabel=label, xscale="log")
        axis.set_ylim(bottom=0)
        axis.set_xticks(sizes, [str(s) for s in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("curve.png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", nargs=5, metavar=("SIDE", "MODEL", "G", "C", "REPEATS"))
    parser.add_argument("--curve", action="store_true", help="step time and memory over G")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt (P)")
    parser.add_argument("--group", type=int, nargs="+", default=[8], help="responses (G)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--length", type=int, help="tokens of each response (C)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, help="updates in one process, taking turns")
    args = parser.parse_args()
    if args.side:
        side, folder, group, length, repeats = args.side
        print(json.dumps(measure_side(side, Path(folder), int(group), int(length), int(repeats))))
        return
    print_machine()
    if args.curve:
        curve(args.prompt or 768, args.length or 96, args.repeats)
        return
    for group in args.group:
        if args.turns:
            take_turns(args.prompt or 1536, group, args.length or 160, args.turns)
        else:
            compare(args.prompt or 1536, group, args.length or 160, args.repeats, args.sides)


if __name__ == "__main__":
    main()
