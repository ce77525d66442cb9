"""How a batch goes through the model: in packed rows, shared out over the processes; and the
optimizer's step on it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.packed import Group, Row, pack_row, response_logprobs
from engine.parallel import all_gather, all_reduce, balanced
from engine.policy import Policy
from rollout import Rollout
from settings import TrainSettings


@dataclass
class MicroBatch:
    """Responses that go through the model together."""

    row: Row
    advantages: Tensor  # [R]
    sampled: Tensor  # [R, C]: the log-probabilities that sampling gave the tokens
    rollouts: list[Rollout]  # whose responses they are
    lengths: Sequence[int] = ()  # of all the update's responses, on every process
    weight: float = 1.0
    old_logprobs: Tensor | None = None  # [R, C] under pi_old; None: pi is still pi_old


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, device: torch.device
) -> list[MicroBatch]:
    """Packed rows of at most `max_tokens` tokens.

    A group goes into one row where it fits; a larger one is split, and its prompt paid for again.
    A row always takes one response, even one that alone is over the limit.
    """
    rows: list[list[tuple[Rollout, list[int]]]] = []  # groups, each with those of its responses
    room = 0
    for rollout in rollouts:
        part = None
        for i, sample in enumerate(rollout.samples):
            need = len(sample.tokens)
            if part is None:
                whole = rollout.tokens()
                need = whole if whole <= max_tokens else need + len(rollout.prompt)
            if not rows or need > room:
                rows.append([])
                room, part = max_tokens, None
            if part is None:
                part = []
                rows[-1].append((rollout, part))
                room -= len(rollout.prompt)
            part.append(i)
            room -= len(sample.tokens)
    return [micro_batch(row, device) for row in rows]


def micro_batch(groups: list[tuple[Rollout, list[int]]], device: torch.device) -> MicroBatch:
    samples = [[rollout.samples[i] for i in part] for rollout, part in groups]
    prompts = [rollout.prompt for rollout, _ in groups]
    row = pack_row([Group(p, [s.tokens for s in ss]) for p, ss in zip(prompts, samples)], device)
    sampled = torch.tensor([x for ss in samples for s in ss for x in s.logprobs], device=device)
    return MicroBatch(
        row=row,
        advantages=torch.cat([r.advantages[part] for r, part in groups]).to(device),
        sampled=torch.zeros(row.mask.shape, device=device).index_put(row.cells, sampled),
        rollouts=[rollout for rollout, _ in groups],
    )


def my_share(policy: Policy, rollouts: Sequence[Rollout], max_tokens: int) -> list[MicroBatch]:
    """This process's part of an update: about as many tokens as every other's, and as many rows.

    Groups of equal rewards are left out: all their advantages are 0, so that they would only cost
    time (and add their KL, which the mean over the batch thus counts as 0).
    """
    device = policy.lm.device
    useful = [rollout for rollout in rollouts if rollout.advantages.any()]
    shares = balanced([rollout.tokens() for rollout in useful], dist.get_world_size())
    rows = micro_batches([useful[i] for i in shares[dist.get_rank()]], max_tokens, device)
    # Each pass gathers weights from all processes, so all must make equally many: one that has
    # fewer rows repeats one, with no weight.
    missing = int(all_reduce([len(rows)], dist.ReduceOp.MAX)[0]) - len(rows)
    if missing:
        spare = (rows or micro_batches(useful[:1], max_tokens, device))[0]
        rows += [replace(spare, weight=0.0)] * missing
    lengths = [len(sample.tokens) for rollout in rollouts for sample in rollout.samples]
    return [replace(micro, lengths=lengths) for micro in rows]


def batches_of_updates(
    policy: Policy, rollouts: Sequence[Rollout], settings: TrainSettings
) -> Iterator[tuple[Sequence[Rollout], list[MicroBatch]]]:
    """The rollouts of each update of a batch, with this process's part of them. An update whose
    groups all have equal rewards is left out."""
    n = settings.updates_per_batch
    parts = [rollouts[i::n] for i in range(n)]
    shares = [my_share(policy, part, settings.max_tokens_per_micro_batch) for part in parts]
    if n > 1:
        # Before the first step pi_old is pi itself; only later steps need it written down.
        with torch.no_grad():
            for micro in (micro for share in shares for micro in share):
                micro.old_logprobs = policy(response_logprobs, micro.row, settings.temperature)
    return ((part, share) for part, share in zip(parts, shares) if share)


def make_optimizer(policy: Policy, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW of what is trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, learning_rate, weight_decay=0.0, fused=True)


def take_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    micros: Sequence[MicroBatch],
    add_gradient: Callable[[MicroBatch], Sequence[float]],
    max_grad_norm: float,
) -> tuple[np.ndarray, float, list[Rollout] | None]:
    """One step of the optimizer on an update's micro-batches, by all processes together.

    add_gradient: adds a micro-batch's gradient to those that are there; what is to be summed of
        it, first the loss.
    Returns these sums over all micro-batches of all processes and the gradient's norm; and None or,
    where the loss or the gradient is not finite so that no step is made, whose losses were not.
    """
    sums, suspects = np.zeros(1), []
    for micro in micros:
        added = np.array(add_gradient(micro))
        sums = sums + added
        suspects += [] if np.isfinite(added[0]) else micro.rollouts
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    norm = float(norm.full_tensor())
    sums = np.array(all_reduce(sums))
    offenders = None
    if np.isfinite([sums[0], norm]).all():
        optimizer.step()
    else:
        offenders = [rollout for found in all_gather(suspects) for rollout in found]
    optimizer.zero_grad()
    return sums, norm, offenders


@contextmanager
def training(policy: Policy, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the policy is in training mode. However it is left, no gradient stays behind."""
    policy.train()
    try:
        yield
    finally:
        policy.eval()
        optimizer.zero_grad()
