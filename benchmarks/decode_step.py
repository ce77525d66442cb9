"""What a step of sampling dispatches, beside the plain model's step with its own cache.

On a GPU the host's work is the floor of a step, however fast the kernels are.

    python benchmarks/decode_step.py                # 28 layers, on a CPU

A Qwen2 of 28 layers, 64 wide, so that the time is the host's; 8 responses to one prompt of 64
tokens (plain: 8 rows with a cache each). `operations` are all that PyTorch dispatches in one step,
`kernels` those of them that are no view. Milliseconds: the median of 30 steps. What a GPU would be
given is counted too, with kernels for attention and norms that do nothing in place of its own.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine import cache
from engine.policy import Policy
from engine.sampler import Request, Sampler

LAYERS, ROWS, PROMPT, STEPS = 28, 8, 64, 30


def make_lm(dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(dtype).eval()


def our_step(dtype: torch.dtype) -> Callable[[], object]:
    sampler = Sampler(Policy(make_lm(dtype)), [], 10**4, max_in_flight=ROWS)
    sampler.submit(Request(0, list(range(PROMPT)), ROWS))
    sampler.policy(sampler.admit, sampler.waiting.popleft())
    return lambda: sampler.policy(sampler.step)


def plain_step(dtype: torch.dtype) -> Callable[[], object]:
    lm, cache = make_lm(dtype), DynamicCache()
    lm(torch.arange(PROMPT).expand(ROWS, -1), past_key_values=cache)
    last = torch.zeros(ROWS, 1, dtype=torch.int64)

    def step() -> None:
        logits = lm(last, past_key_values=cache).logits[:, -1].float()
        last.copy_(logits.softmax(-1).multinomial(1))

    return step


@torch.library.custom_op("decode_step::attention", mutates_args=())
def attention(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(q), torch.zeros(q.shape[1], len(q))


@torch.library.custom_op("decode_step::norm", mutates_args=())
def norm(x: Tensor) -> Tensor:
    return x.clone()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The sampler takes the GPU's way, on this CPU: its attention is one operation, and so is a
    norm."""
    kept = cache.on_gpu, torch.ops.aten._flash_attention_forward, F.rms_norm
    cache.on_gpu = lambda x: True
    torch.ops.aten._flash_attention_forward = lambda q, *others, **options: attention(q)
    F.rms_norm = lambda x, *others: norm(x)
    try:
        yield
    finally:
        cache.on_gpu, torch.ops.aten._flash_attention_forward, F.rms_norm = kept


class Count(TorchDispatchMode):
    """Of what is dispatched inside: operations, and kernels."""

    def __init__(self):
        super().__init__()
        self.operations = self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        view = function.is_view or function is torch.ops.aten._unsafe_view.default
        self.kernels += not view
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def main() -> None:
    print(
        "| type | side | operations | kernels | kernels a layer | ms |\n|---|---|---|---|---|---|"
    )
    for dtype in (torch.float32, torch.bfloat16):
        sides = {"ours": our_step(dtype), "plain model": plain_step(dtype)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        counts = {}
        for name, step in sides.items():
            step()
            with Count() as counts[name]:
                step()
        for _ in range(STEPS):
            for name, step in sides.items():
                started = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - started))
        with as_on_a_gpu():
            step = our_step(dtype)
            step()
            with Count() as counts["ours, on a GPU"]:
                step()
        for name, n in counts.items():
            cells = f"{n.operations} | {n.kernels} | {n.kernels / LAYERS:.0f}"
            cells += f" | {median(times[name]):.1f}" if name in times else " | "
            print(f"| {str(dtype).removeprefix('torch.')} | {name} | {cells} |")


if __name__ == "__main__":
    main()
