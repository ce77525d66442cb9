"""One step of training at its true size, on any machine, in a minute or two: nothing is computed.

    python grpo.py --dry_run True --processes 8 --model FOLDER [any settings of grpo.py]

PyTorch's fake tensors have shapes and no contents. With a fake process group and the model's
config.json (no weights, no tokenizer) the very code of a step runs on them, with the kernels of a
GPU. What is alive is counted by kind, and what is computed, sent, and read:

    loading      what a process keeps: its share of the weights, and of the reference
    held-out     sampling, where each window has a prompt of its own
    sampling     the whole weights, and all keys and values of what is in flight, at its longest
    update       a full micro-batch through the reference and the policy, and backward
    optimizer    the first step, which makes Adam's moments

Not counted: what the allocator loses to fragments, CUDA itself, NCCL's buffers. Leave a tenth.
Times are floors: everything at the rates given, nothing waits for anything.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedConfig

from batches import MicroBatch, micro_batches
from engine.ledger import Ledger
from engine.model import choose_dtype, load_config, on_meta, prepare
from engine.parallel import gathered, shard
from engine.policy import Policy, logits_of
from engine.sampler import Sample, Sampler, draw
from rollout import Rollout, windows_at_once
from settings import MODEL, DryRunSettings, TrainSettings, UserError

LARGEST_GROUP = 10**7  # tokens; as a row of more, this program's own lists would fill its memory


@dataclass
class Phase:
    """What one phase of a step takes of a process."""

    peak: dict[str, int]  # bytes by kind, at the moment when most were alive
    flops: int = 0
    received: int = 0  # bytes, from the other processes


# ------------------------------------------------------------------------------------ the phases


class GpuNorm(torch.autograd.Function):
    """What a GPU's RMS norm makes and keeps: the CPU's is made of several operations."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


@contextmanager
def machine(processes: int, gpu: bool) -> Iterator[Ledger]:
    """Inside, tensors are fake, this is one of so many processes, and kernels are a GPU's."""
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (processes,))
        with ExitStack() as inside:
            inside.enter_context(patch("torch.distributed.init_device_mesh", lambda *_: mesh))
            if gpu:
                for module in ("attention", "cache"):
                    inside.enter_context(patch(f"engine.{module}.on_gpu", lambda x: True))
                inside.enter_context(patch("torch.nn.functional.rms_norm", GpuNorm.apply))
            inside.enter_context(FakeTensorMode())
            yield Ledger()
    finally:
        dist.destroy_process_group()


def fake_policy(
    settings: TrainSettings, config: PreTrainedConfig, computing: torch.dtype, trained: bool
) -> Policy:
    kept = torch.float32 if trained else computing
    with unset_fake_temporarily(), torch.device("meta"):
        lm = on_meta(config, kept, "sdpa")
        prepare(lm, settings, trained)
    fakes: dict[Tensor, Tensor] = {}  # what is one tensor under two names stays so
    for module in lm.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trains = tensor.requires_grad
                    kind = isinstance(tensor, torch.nn.Parameter)
                    fakes[tensor] = torch.nn.Parameter(fake, trains) if kind else fake
                tensors[name] = fakes.get(tensor)
    return shard(Policy(lm.eval()), torch.device("cpu"), computing)


def run_phases(
    settings: TrainSettings, how: DryRunSettings, add_gradient: Callable, gpu: bool = True
) -> dict[str, Phase]:
    """Each phase of a step, as the process with most to do has it; "update": of one micro-batch.
    add_gradient: grpo's. gpu: by the GPU's kernels, in its types; else the CPU's."""
    config, phases = load_config(settings.model), {}
    computing = choose_dtype(settings.dtype, torch.device("cuda" if gpu else "cpu"))

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        ledger.peak, flops, received = dict(ledger.now), ledger.flops, ledger.received
        yield
        peak = {kind: size for kind, size in ledger.peak.items() if size}
        phases[name] = Phase(peak, ledger.flops - flops, ledger.received - received)

    with machine(how.processes, gpu) as ledger:
        policy = fake_policy(settings, config, computing, trained=True)
        reference = fake_policy(settings, config, computing, False) if settings.beta else None
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, settings.learning_rate, fused=True)
        micro = full_micro_batch(settings, how)
        ledger.name(policy.parameters(), "weights")
        ledger.name(reference.parameters() if reference else (), "reference")
        with ledger:
            with phase("loading"):
                for model in filter(None, (policy, reference)):
                    with ledger.making("gathered weights"), gathered(model):  # as its probe does
                        pass
            if settings.eval_candidates:
                with phase("held-out"):
                    windows = windows_at_once(settings, how.prompt_tokens)
                    sample(policy, settings, how, ledger, windows, windows)
            with phase("sampling"):
                responses = max(settings.max_in_flight, settings.group_size)
                prompts = -(-responses // settings.group_size)
                sample(policy, settings, how, ledger, prompts, responses)
            policy.train()
            for _ in range(2):  # at the second, all gradients are there
                with phase("update"):
                    add_gradient(policy, reference, micro, settings)
                    ledger.name((p.grad for p in trained if p.grad is not None), "gradients")
            with phase("optimizer"), ledger.making("Adam's moments"):
                torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
                optimizer.step()
    return phases


@torch.no_grad()
def sample(
    policy: Policy,
    settings: TrainSettings,
    how: DryRunSettings,
    ledger: Ledger,
    prompts: int,
    responses: int,
) -> None:
    """The moment when most is in flight: all responses at their longest, one more prompt is read,
    and a last token is drawn for each."""
    limit = settings.max_new_tokens
    sampler = Sampler(policy, [], limit, settings.temperature, max_in_flight=responses)
    cache, prompt = sampler.cache, [0] * how.prompt_tokens

    def last_step(policy: Policy) -> None:
        _, read = sampler.read_prompt(prompt, 0)
        with ledger.making("keys and values"):
            for i in range(prompts):
                cache.add(read, len(prompt), len(range(i, responses, prompts)))
            cache.own_len[:] = limit - 1
            positions, _ = cache.begin_step()
        del read
        sampler.read_prompt(prompt, 0)
        last = torch.zeros(responses, 1, dtype=torch.int64)
        hidden = policy.lm.base_model(
            input_ids=last, position_ids=positions, use_cache=False, shared=cache
        ).last_hidden_state[:, 0]
        draw(logits_of(policy.lm, hidden), torch.zeros(responses), settings.temperature)

    with gathered(policy):
        policy(last_step)


def full_micro_batch(settings: TrainSettings, how: DryRunSettings) -> MicroBatch:
    """The largest row that an update may make of one group after the other."""
    length = how.response_tokens or settings.max_new_tokens
    tokens = how.prompt_tokens + settings.group_size * length
    if tokens > LARGEST_GROUP:
        raise UserError(
            f"--dry_run: {settings.group_size} responses of {length:,} tokens to a prompt of "
            f"{how.prompt_tokens:,} are {tokens:,} tokens; no machine updates more than "
            f"{LARGEST_GROUP:,} at once"
        )
    samples = [Sample([0] * length, [0.0] * length) for _ in range(settings.group_size)]
    groups = 1 + settings.max_tokens_per_micro_batch // tokens
    rollouts = [
        Rollout(i, None, [0] * how.prompt_tokens, samples, [], None, torch.ones(len(samples)))
        for i in range(groups)
    ]
    rows = micro_batches(rollouts, settings.max_tokens_per_micro_batch, torch.device("cpu"))
    return max(rows, key=lambda micro: micro.row.tokens.numel())


# ------------------------------------------------------------------------------------- the report


def table(settings: TrainSettings, how: DryRunSettings, add_gradient: Callable) -> str:
    """The phases of a step and what a whole step takes, to print."""
    if settings.preset == "toy" and settings.model == MODEL:
        raise UserError("--dry_run: --preset toy makes its own model when it trains: give --model")
    phases = run_phases(settings, how, add_gradient)
    kinds = dict.fromkeys(kind for phase in phases.values() for kind in phase.peak)
    rows = [("GB of each GPU", *phases)]
    for kind in kinds:
        rows.append((kind, *(gigabytes(phase.peak.get(kind, 0)) for phase in phases.values())))
    rows.append(("most at once", *(gigabytes(sum(p.peak.values())) for p in phases.values())))
    lines = [f"{row[0]:17}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, "", *costs(settings, how, phases)])


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 else "-"


def costs(settings: TrainSettings, how: DryRunSettings, phases: dict[str, Phase]) -> list[str]:
    """What a step computes, reads and receives, and how long that takes at the least."""
    config, p, g = load_config(settings.model), how.prompt_tokens, settings.group_size
    c = how.response_tokens or settings.max_new_tokens
    prompts = -(-settings.batch_size // how.processes)
    row = full_micro_batch(settings, how).row
    rows = prompts * (p + g * c) / row.tokens.numel()

    # Of q k^T and of its product with v: the pairs of tokens that see each other, of every layer.
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 4 * config.num_attention_heads * head * config.num_hidden_layers
    passes = bool(settings.beta) + 1 + settings.activation_checkpointing + 2.5
    attention = passes * pair * prompts * (p * p / 2 + g * (c * p + c * c / 2))
    update = phases["update"].flops * rows + attention

    weights = phases["sampling"].peak["gathered weights"]
    own = phases["sampling"].peak["keys and values"] / 2  # on average half as long as at the end
    steps = -(-prompts * g // max(settings.max_in_flight, g)) * c
    reading = 2 * weights / 2 * p * prompts + pair * prompts * p * p / 2
    read, received = steps * (weights + own), phases["update"].received * rows + weights
    return [
        f"a step of each GPU: {prompts} prompts of {p} tokens, {g} responses of {c} to each;",
        f"{prompts * (p + g * c):,} distinct tokens, in {rows:.1f} micro-batches",
        f"{'read prompts':17}{reading / 1e15:9.2f} PFLOP {reading / how.tflops / 1e12:9.1f} s",
        f"{'decode':17}{read / 1e12:9.2f} TB    {read / how.tbytes / 1e12:9.1f} s, {steps} steps",
        f"{'update':17}{update / 1e15:9.2f} PFLOP {update / how.tflops / 1e12:9.1f} s",
        f"{'receive':17}{received / 1e12:9.2f} TB    {received / how.network / 1e12:9.1f} s",
        f"at {how.tflops:g} TFLOP/s, {how.tbytes:g} TB/s of memory and {how.network:g} TB/s of "
        "network",
    ]
