"""How much memory of a GPU training takes, before it is tried, and what to set where it runs out.

    python memory.py                              # the README's table: 7B and 14B on 8 x 80 GB
    python memory.py MODEL PROCESSES [GB]         # any model's name or folder

All figures are bytes per process. A process holds its 1/W share of the weights and of Adam's two
moments in float32, and of the reference in the compute type, of c bytes a number. On top of that
come, one after the other,

    while sampling   all the weights in the compute type, the keys and values of what is in flight,
                     and the logits of one token of each response
    in an update     its share of the gradients, two layers and the embeddings in the compute type
                     and one's whole gradient, the activations of one micro-batch, and the logits of
                     a piece of it

and the larger of the two is what must fit. tests/test_memory.py holds it against a small model's
measured bytes. What PyTorch's allocator loses to fragments, and CUDA itself, is not counted: leave
a tenth.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

import lora
from parallel import compute_dtype

CHUNK = 1024  # tokens whose logits exist at once (shared_prompt.response_logprobs)
GB = 1e9
LENGTH = "max_tokens_per_micro_batch"


@dataclass(frozen=True)
class Job:
    """What decides the memory: the model's shape and some of grpo.py's settings."""

    config: PreTrainedConfig
    parameters: int
    layer_parameters: int  # of one layer
    trained: int  # parameters that are
    processes: int
    prompt: int  # tokens
    group_size: int
    max_new_tokens: int
    max_in_flight: int
    max_tokens_per_micro_batch: int
    reference: bool = True
    checkpointing: bool = True
    c: int = 2  # bytes of a number of the compute type


def job_of(config: PreTrainedConfig, processes: int, prompt: int, settings, c: int = 2) -> Job:
    """settings: of grpo.py. The parameters are counted on a model without numbers."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    layer = sum(p.numel() for p in lm.base_model.layers[0].parameters())
    everything = sum(p.numel() for p in lm.parameters())
    adapter = settings.lora_rank * sum(
        sum(module.weight.shape)
        for module in lm.base_model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    )
    return Job(
        config=config,
        parameters=everything,
        layer_parameters=layer,
        trained=adapter or everything,
        processes=processes,
        prompt=prompt,
        group_size=settings.group_size,
        max_new_tokens=settings.max_new_tokens,
        max_in_flight=settings.max_in_flight,
        max_tokens_per_micro_batch=settings.max_tokens_per_micro_batch,
        reference=bool(settings.beta),
        checkpointing=settings.activation_checkpointing,
        c=c,
    )


def kept(job: Job) -> dict[str, int]:
    """What a process holds all the time."""
    return {
        "weights, float32": 4 * job.parameters // job.processes,
        "Adam's moments, float32": 8 * job.trained // job.processes,
        "reference": job.reference * job.c * job.parameters // job.processes,
    }


def cache_width(max_new_tokens: int) -> int:
    """Tokens that the cache has room for when a response is that long (Batch.begin_step)."""
    room = 0
    for width in range(1, max_new_tokens):  # the last token is drawn, and not read
        if width > room:
            room += max(64, width // 2)
    return room


def key_value_bytes(config: PreTrainedConfig, c: int) -> int:
    """Of one token, in one layer."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head * c


def sampling(job: Job) -> dict[str, int]:
    responses = max(job.max_in_flight, job.group_size)
    prompts = -(-responses // job.group_size)
    tokens = responses * cache_width(job.max_new_tokens) + prompts * job.prompt
    # While the cache grows, one layer of it is there twice.
    layers = job.config.num_hidden_layers + 1
    return {
        "sampling: whole weights": job.c * job.parameters,
        "sampling: keys and values": layers * tokens * key_value_bytes(job.config, job.c),
        # In the compute type, then in float32: itself, softmax, its sum and a copy of that.
        "sampling: logits": responses * job.config.vocab_size * (job.c + 16),
    }


def layer_activations(config: PreTrainedConfig, c: int) -> int:
    """Bytes per token that one layer keeps for its backward pass."""
    d, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or d // heads
    wide, narrow = heads * head, config.num_key_value_heads * head
    norms = 2 * (d * (4 if c < 4 else 0) + d * 4 + d * c)  # float32 inside
    attention = c * (wide + 2 * narrow) + c * wide + 4 * heads  # q, k, v, output, log-sum-exp
    mlp = 4 * c * config.intermediate_size  # gate, its activation, up, their product
    return norms + 2 * c * d + attention + mlp


def updating(job: Job) -> dict[str, int]:
    config, tokens = job.config, job.max_tokens_per_micro_batch
    layers = config.num_hidden_layers
    outer = job.parameters - layers * job.layer_parameters  # embeddings, head, last norm
    full = job.trained == job.parameters  # an adapter's gradients are small
    inner = layer_activations(config, job.c)
    saved = config.hidden_size * job.c if job.checkpointing else inner
    # In its backward pass a layer is computed again, and holds the gradients of its widest part
    # and of its weights: in the compute type, and in float32 to be summed over the processes.
    backward = tokens * (job.checkpointing * inner + 3 * job.c * config.intermediate_size)
    backward += full * (job.c + 4) * job.layer_parameters
    # Softmax, and the gradient before and after it, in float32; backward begins with that.
    logits = CHUNK * config.vocab_size * 12
    return {
        "update: gradients, float32": 4 * job.trained // job.processes,
        "update: weights of two layers, embeddings": job.c * (2 * job.layer_parameters + outer),
        "update: gradients of the embeddings": full * (job.c + 4) * outer,
        "update: kept of all layers": tokens * layers * saved,
        "update: one layer backward, or logits": max(backward, logits),
    }


def peak(job: Job) -> int:
    always = sum(kept(job).values())
    return always + max(sum(sampling(job).values()), sum(updating(job).values()))


# ----------------------------------------------------------------------- where memory runs out


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's, Python's own, or that of PyTorch's CPU allocator, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@contextmanager
def explained(
    phase: str, model: str, settings, prompt: int, device: torch.device
) -> Iterator[None]:
    """Where memory runs out inside, SystemExit that names the setting that would have fitted."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        config = AutoConfig.from_pretrained(lora.base_of(model) or model)
        c = compute_dtype(device).itemsize
        job = job_of(config, dist.get_world_size(), prompt, settings, c)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        raise SystemExit(
            f"out of memory ({phase}): by the estimate of memory.py for {total / GB:.0f} GB, "
            f"{advice(phase, job, total)}\n{error}"
        ) from error


def advice(phase: str, job: Job, total: int) -> str:
    """What to set, by the formula, so that `phase` ("loading", "sampling" or "update") fits into
    `total` bytes."""
    room = 0.9 * total - sum(kept(job).values())

    def largest(setting: str, part, least: int) -> int:
        value = getattr(job, setting) // 2
        while value >= least and sum(part(replace(job, **{setting: value})).values()) > room:
            value //= 2
        return value if value >= least else 0

    if phase == "sampling" and (value := largest("max_in_flight", sampling, job.group_size)):
        return f"--max_in_flight {value} should fit"
    least = job.prompt + job.max_new_tokens
    if phase == "update" and (value := largest(LENGTH, updating, least)):
        return f"--max_tokens_per_micro_batch {value} should fit"
    smaller = (
        "" if job.trained < job.parameters else ", --lora_rank 16 (only an adapter is trained)"
    )
    reference = ", --beta 0 (no reference)" if job.reference else ""
    return f"it takes more processes{smaller}{reference} or a shorter --max_new_tokens"


# --------------------------------------------------------------------------------- the command

QWEN = {  # their published shapes
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "Qwen2.5-14B": Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48,
        num_attention_heads=40, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip


def print_table(jobs: dict[str, Job]) -> None:
    parts = {name: kept(job) | sampling(job) | updating(job) for name, job in jobs.items()}
    print("| GB per GPU | " + " | ".join(jobs) + " |\n|---|" + "---|" * len(jobs))
    for part in next(iter(parts.values())):
        print(f"| {part} | " + " | ".join(f"{p[part] / GB:.1f}" for p in parts.values()) + " |")
    print("| **most at once** | " + " | ".join(f"**{peak(j) / GB:.1f}**" for j in jobs.values())
          + " |")  # fmt: skip


def main() -> None:
    from grpo import Settings

    if len(sys.argv) not in (1, 3, 4):
        raise SystemExit("usage: python memory.py [MODEL PROCESSES [GB]]")
    configs, processes, total = QWEN, 8, 80 * GB
    if len(sys.argv) > 1:
        configs = {sys.argv[1]: AutoConfig.from_pretrained(sys.argv[1])}
        processes = int(sys.argv[2])
        total = float(sys.argv[3]) * GB if len(sys.argv) == 4 else total
    jobs = {}
    for name, config in configs.items():
        job = job_of(config, processes, 3000, Settings())
        for part, setting in ((sampling, "max_in_flight"), (updating, LENGTH)):
            while sum((kept(job) | part(job)).values()) > 0.9 * total and getattr(job, setting) > 1:
                job = replace(job, **{setting: getattr(job, setting) // 2})
        flags = f"--max_in_flight {job.max_in_flight} --{LENGTH} {job.max_tokens_per_micro_batch}"
        jobs[f"{name}, {processes} GPUs, {flags}"] = job
    print_table(jobs)


if __name__ == "__main__":
    main()
