"""Is it right on a GPU? The packed row and the sampler against the plain model, in bfloat16.

    python benchmarks/gpu_check.py                 # on a GPU
    python benchmarks/gpu_check.py --small         # the same on this CPU, with fewer families

Tiny random models of several families, and a Qwen2 with key biases as large as Qwen2.5's. Exact is
the plain model in float32; an error is the root mean square of the difference from it, here as a
multiple of the plain model's own in bfloat16.

    packed     log-probabilities of the packed row
    sampled    those that sampling wrote down for its tokens
    outside    share of tokens whose pi_update / pi_sampled is outside 1 +- 0.2
    gradient   of a weighted sum of the packed row's log-probabilities

It fails (exit 1) where a multiple is over 1.5, or more than 0.5% are outside.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from test_families import biased, model

from engine.packed import Group, pack_row, response_logprobs
from engine.policy import Policy
from engine.sampler import Request, Sampler

FAMILIES = "qwen2 qwen3 llama mistral_window gemma3_text phi3 qwen3_moe".split()


def make(name: str, dtype: torch.dtype, device: torch.device):
    """The same weights, rounded to bfloat16, in any type."""
    if name == "qwen2 biased":
        return biased(dtype, 0).to(device)
    lm = model(name.replace("_window", " window"), torch.float32).bfloat16()
    for parameter in lm.parameters():
        parameter.data *= 0.3  # as peaked as a trained model, not more
    return lm.to(dtype).to(device)


def plain_logprobs(lm, groups: list[Group]) -> Tensor:
    """Of all response tokens, each response read as a sequence of its own."""
    found = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]], device=lm.device)
            logits = lm(ids).logits[0, len(group.prompt) - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(1, ids[0, len(group.prompt) :, None])
            found.append(chosen[:, 0])
    return torch.cat(found)


def gradient(lm, logprobs: Tensor) -> Tensor:
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1))
    (logprobs * weights.to(logprobs.device)).sum().backward()
    grads = [p.grad for p in lm.parameters() if p.grad is not None]
    return torch.cat([grad.float().flatten() for grad in grads])


def check(name: str, device: torch.device) -> list[float]:
    """[packed, sampled, outside, gradient], as the module's docstring says."""
    exact_lm, plain_lm, lm = (
        make(name, dtype, device) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    policy = Policy(lm)
    sampler = Sampler(policy, [], 50, max_in_flight=8)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(50, (n,), generator=generator).tolist() for n in (200, 17, 90)]
    for i, prompt in enumerate(prompts):
        sampler.submit(Request(i, prompt, 5, seed=(i,)))
    done = {}
    while complete := sampler.collect():
        done.update(complete)
    groups = [Group(p, [s.tokens for s in done[i]]) for i, p in enumerate(prompts)]
    sampled = torch.tensor([x for i in range(len(prompts)) for s in done[i] for x in s.logprobs])
    row = pack_row(groups, device)
    sides = {
        "exact": (exact_lm, plain_logprobs(exact_lm, groups)),
        "plain": (plain_lm, plain_logprobs(plain_lm, groups)),
        "packed": (lm, policy(response_logprobs, row)[row.mask]),
    }
    gradients = {side: gradient(*x) for side, x in sides.items()}
    exact, plain, packed = (x.detach() for _, x in sides.values())
    own = (plain - exact).square().mean().sqrt()
    apart = (packed - sampled.to(device)).exp()
    off = [gradients[side] - gradients["exact"] for side in ("packed", "plain")]
    return [
        float((packed - exact).square().mean().sqrt() / own),
        float((sampled.to(device) - exact).square().mean().sqrt() / own),
        float(((apart - 1).abs() > 0.2).float().mean()),
        float(off[0].norm() / off[1].norm()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="on this CPU")
    small = parser.parse_args().small
    if not (small or torch.cuda.is_available()):
        raise SystemExit("no GPU here; --small tries the script on the CPU")
    device = torch.device("cpu" if small else "cuda")
    print("| model | packed x | sampled x | outside | gradient x | |\n|---|---|---|---|---|---|")
    failed = False
    for name in ["qwen2 biased", *FAMILIES[: 2 if small else None]]:
        packed, sampled, outside, grad = check(name, device)
        good = max(packed, sampled, grad) <= 1.5 and outside <= 0.005
        failed |= not good
        cells = f"{packed:.2f} | {sampled:.2f} | {outside:.2%} | {grad:.2f}"
        print(f"| {name} | {cells} | {'right' if good else 'WRONG'} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
