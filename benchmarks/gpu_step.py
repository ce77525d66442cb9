"""Rollout and update at the true size on one GPU: ours against the naive path, in one run.

    python benchmarks/gpu_step.py                  # Qwen2.5-7B's shape, P=3000 G=32 C=850
    python benchmarks/gpu_step.py --profile        # and where the time goes
    python benchmarks/gpu_step.py --small          # a toy size, to try the script on a CPU

Random bfloat16 weights; every response has exactly C tokens. The rollout is measured over its first
`--rollout_tokens` tokens per response. The update is forward and backward with activation
checkpointing over one group; the optimizer is left out on both sides, since float32 Adam of a 7B
does not fit beside it on one card, and costs both the same. The naive path is the plain model:
`generate` with num_return_sequences, and padded whole sequences, as many at a time as --naive_rows.
Printed last: a check that both updates have the same gradient (on a model of two layers).
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.packed import Group, pack_row, response_logprobs
from engine.policy import Policy
from engine.sampler import Request, Sampler

SHAPE = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
SMALL = SHAPE | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip


def make_lm(shape: dict, device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        lm = Qwen2ForCausalLM(Qwen2Config(attn_implementation="sdpa", **shape)).to(dtype)
    lm.generation_config.eos_token_id = None
    return lm.eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(device: torch.device, work, repeats: int = 2) -> tuple[float, float]:
    """(best seconds, peak GB of device memory) of `work()`, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return min(times[1:]), peak


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds, _ = measure(device, lambda: [a @ b for _ in range(10)])
    return 10 * 2 * n**3 / seconds


def take_back(lm) -> None:
    """Leave a model as it was before a Policy was made of it."""
    lm.config._attn_implementation = "sdpa"
    for module in lm.modules():
        vars(module).pop("forward", None)


def our_rollout(lm, prompt: list[int], group: int, tokens: int):
    def work():
        sampler = Sampler(Policy(lm), [], tokens, max_in_flight=group)
        sampler.submit(Request(0, prompt, group))
        sampler.collect()
        take_back(lm)

    return work


def read_rate(device: torch.device) -> float:
    """Bytes a second that the device reads of its memory."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**25, device=device)
    seconds, _ = measure(device, x.sum)
    return x.nbytes / seconds


def decode_floor(lm, rate: float) -> float:
    """Seconds in which a step of sampling can read all weights once."""
    read = sum(p.nbytes for n, p in lm.named_parameters() if "embed_tokens" not in n)
    return read / rate


def naive_rollout(lm, prompt: list[int], group: int, tokens: int):
    ids = torch.tensor([prompt], device=lm.device)
    return lambda: lm.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=tokens,
        num_return_sequences=group, pad_token_id=0,
    )  # fmt: skip


def our_update(lm, prompt: list[int], responses: torch.Tensor):
    def work():
        row = pack_row([Group(prompt, responses.tolist())], lm.device)
        lm.zero_grad()
        Policy(lm)(response_logprobs, row).mean().backward()
        take_back(lm)

    return work


def naive_update(lm, prompt: list[int], responses: torch.Tensor, rows: int):
    ids = torch.cat([torch.tensor(prompt).expand(len(responses), -1), responses], 1).to(lm.device)
    length = responses.shape[1]

    def work():
        lm.zero_grad()
        for part in ids.split(rows):
            logits = lm(part, logits_to_keep=length + 1, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), part[:, -length:].flatten())
            (-loss * len(part) / len(ids)).backward()

    return work


def gradient_difference(shape: dict, device, dtype, prompt, responses) -> float:
    """||ours - naive|| / ||naive|| over all gradients of a model of two layers."""
    lm = make_lm(shape | {"num_hidden_layers": 2}, device, dtype)
    gradients = []
    for work in (our_update(lm, prompt, responses), naive_update(lm, prompt, responses, 4)):
        work()
        gradients.append([p.grad.float().clone() for p in lm.parameters()])
    difference = sum(float((a - b).square().sum()) for a, b in zip(*gradients))
    return (difference / sum(float(b.square().sum()) for b in gradients[1])) ** 0.5


def update_operations(shape: dict, prompt: int, group: int, length: int) -> float:
    """Of forward, recomputed forward and backward over the distinct tokens."""
    h, m = shape["hidden_size"], shape["intermediate_size"]
    kv = h * shape["num_key_value_heads"] // shape["num_attention_heads"]
    linear = 2 * (prompt + group * length) * (2 * h * h + 2 * h * kv + 3 * h * m)
    pairs = prompt**2 / 2 + group * (length * prompt + length**2 / 2)
    head = 2 * group * length * h * shape["vocab_size"]
    return 4 * (shape["num_hidden_layers"] * (linear + 4 * h * pairs) + head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a toy size")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--rollout_tokens", type=int, default=128, help="per response")
    parser.add_argument("--naive_rows", type=int, default=2, help="sequences per naive pass")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        raise SystemExit("no GPU here; --small tries the script on the CPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, (P, G, C) = (SMALL, (96, 4, 24)) if args.small else (SHAPE, (3000, 32, 850))
    new_tokens = min(args.rollout_tokens, C)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(shape["vocab_size"], (P,), generator=generator).tolist()
    responses = torch.randint(shape["vocab_size"], (G, C), generator=generator)

    rate = matrix_rate(device, dtype)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {dtype}, torch "
          f"{torch.__version__}: {rate / 1e12:.1f} TFLOP/s in a matrix product")  # fmt: skip
    lm = make_lm(shape, device, dtype)
    print(f"{lm.num_parameters():,} parameters, P={P} G={G} C={C}")
    reading = read_rate(device)
    floor = decode_floor(lm, reading)
    print(f"memory: {reading / 1e12:.2f} TB/s; a decode step reads the weights in "
          f"{1000 * floor:.2f} ms")  # fmt: skip
    for name, rollout in (("ours", our_rollout), ("naive", naive_rollout)):
        seconds, peak = measure(device, rollout(lm, prompt, G, new_tokens))
        first, _ = measure(device, rollout(lm, prompt, G, 1))
        step = (seconds - first) / (new_tokens - 1)
        print(f"rollout, {name}: {G * new_tokens / seconds:.0f} tokens/s, peak {peak:.1f} GB; a "
              f"decode step {1000 * step:.2f} ms, {step / floor:.1f} times the floor")  # fmt: skip

    lm.train().gradient_checkpointing_enable({"use_reentrant": False})
    floor = update_operations(shape, P, G, C) / rate
    for name, work in (
        ("ours", our_update(lm, prompt, responses)),
        ("naive", naive_update(lm, prompt, responses, args.naive_rows)),
    ):
        seconds, peak = measure(device, work)
        print(f"update, {name}: {seconds:.2f} s, peak {peak:.1f} GB, {floor / seconds:.0%} of the "
              "matrix rate on distinct tokens")  # fmt: skip
    if args.profile:
        key = f"self_{device.type}_time_total"
        for training, work in (
            (False, our_rollout(lm, prompt, G, 8)),
            (True, our_update(lm, prompt, responses)),
        ):
            lm.train(training)
            with torch.profiler.profile() as profile:
                work()
            print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))
    del lm
    error = gradient_difference(shape, device, dtype, prompt[:200], responses[:4, :50])
    print(f"gradient against naive, two layers: relative difference {error:.1e}")


if __name__ == "__main__":
    main()
