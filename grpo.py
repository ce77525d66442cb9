"""Train a reasoning reranker with GRPO, on one process or many.

    python grpo.py --preset toy                                       # offline, on a CPU
    torchrun --nproc_per_node=8 grpo.py --candidates FILE --qrels FILE

Every step:
    sample     G responses o_1..o_G to each of B prompts (windows of passages), from the policy pi
    score      r_i, the reward of the ranking that o_i answers (reward.py)
    advantage  A_i = (r_i - mean(r)) / std(r), over the G responses to the same prompt
    update     one step up the gradient of the mean over all responses of

                   1/|o_i| * sum_t [ min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i) - beta KL_t ]

               rho_t = pi(o_t) / pi_old(o_t)                    pi_old: the policy that sampled
               KL_t  = pi_ref(o_t) / pi(o_t) - log(pi_ref(o_t) / pi(o_t)) - 1        (k3, >= 0)

What is left out on purpose: a value model, a replay buffer, a reward model, a learning rate
schedule. Prompts are paid for once (engine/packed.py), weights are sharded by PyTorch's FSDP2.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import dry_run
import presets
from agent import Agent
from batches import MicroBatch, batches_of_updates, make_optimizer, take_step, training
from data import TrainingWindow, batch_at
from engine.files import read_lines
from engine.flags import parse_settings, program
from engine.model import choose_dtype, load_policy, load_reference
from engine.packed import response_logprobs
from engine.parallel import (
    StopSignal,
    all_reduce,
    explained,
    gathered,
    processes,
    say,
    together,
)
from engine.policy import Policy
from engine.run import Run, in_folder, model_card
from engine.streams import make_unbreakable
from engine.watch import say_what_taught, watcher
from held_out import (
    load_held_out,
    measure_held_out,
    measure_if_due,
    refuse_held_out,
    say_what_was_gained,
)
from pages.run import keeper
from rollout import Rollout, drop_too_long, offending, readable, rollout_figures, sample_shared
from settings import DryRunSettings, TrainSettings, UserError
from sources.formats import Candidates
from sources.trec import Qrels
from tasks import TASKS, Task, load_task, load_windows
from window import Prompt

# ---------------------------------------------------------------------------------- the formulas


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-4) within each group: rewards [N], groups adjacent -> [N].

    std is the sample's (n - 1). The 1e-4 keeps differences that are mere rounding from being
    blown up to full size; a group of equal rewards gives exactly 0.
    """
    groups = rewards.view(-1, group_size)
    if group_size == 1:
        return torch.zeros_like(rewards)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).view(-1)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || pi_ref) per token, estimated from one sample: r - log r - 1 with r = pi_ref / pi.
    Unbiased, and never negative (Schulman 2020, "Approximating KL divergence")."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def average_tokens(
    x: Tensor, mask: Tensor, average: str, lengths: Sequence[int] | None = None
) -> Tensor:
    """The mean of x [R, C] over the tokens in mask: of every response's own mean ("sequence"), or
    of all tokens alike ("token").

    lengths: of all the responses that the mean is over, where x holds only some of them. So the
        micro-batches of a batch add up to the mean over the whole of it.
    """
    lengths = mask.sum(1) if lengths is None else lengths
    if average == "sequence":
        return ((x * mask).sum(1) / mask.sum(1)).sum() / len(lengths)
    if average == "token":
        return (x * mask).sum() / sum(lengths)
    raise ValueError(f"unknown average {average!r}: use sequence or token")


class Loss(NamedTuple):
    """What `policy_loss` computed: the loss, and sums over its tokens to look at."""

    loss: Tensor  # scalar, with gradient
    kl: Tensor  # sum of KL_t
    clipped: Tensor  # how many tokens' ratios are outside 1 +- eps
    tokens: Tensor  # how many there are


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    beta: float,
    average: str = "sequence",
    lengths: Sequence[int] | None = None,
) -> Loss:
    """GRPO's loss: minus the objective of the module's docstring.

    logprobs, old_logprobs, ref_logprobs: [R, C] log-probabilities of the sampled tokens under
        the policy (with gradient), the policy that sampled, and the reference (None: beta is 0).
    advantages: [R]; mask: [R, C], which tokens are there; average, lengths: see `average_tokens`.
    """
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(
        ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None]
    )
    kl = k3(logprobs, ref_logprobs) if beta else torch.zeros_like(logprobs)
    loss = -average_tokens(gain - beta * kl if beta else gain, mask, average, lengths)
    clipped = (ratio.detach() - 1).abs() > clip
    return Loss(loss, (kl.detach() * mask).sum(), (clipped * mask).sum(), mask.sum())


# ----------------------------------------------------------------------------------- the sampling


def sample_batch(
    agent: Agent,
    windows: list[TrainingWindow],
    step: int,
    settings: TrainSettings,
    stop: StopSignal,
) -> tuple[list[Rollout], int]:
    """A step's rollouts, the same on every process, and how many were thrown away.

    A group whose rewards are all equal teaches nothing; with --resample, another window drawn at
    random takes its place (dynamic sampling; DAPO, arXiv 2503.14476, section 3.2).
    """
    order = batch_at(step, settings.batch_size, len(windows), settings.seed)
    wanted = [(place, windows[i]) for place, i in enumerate(order)]
    rollouts, thrown_away = {}, 0
    for attempt in range(1 + settings.resample):
        seed = (settings.seed, step, attempt)
        fresh = sample_shared(agent, wanted, seed, settings, stop)
        for rollout in fresh:
            rollout.advantages = group_advantages(rollout.rewards, settings.group_size)
            rollouts[rollout.place] = rollout
        equal = [rollout.place for rollout in fresh if not rollout.advantages.any()]
        if not equal or attempt == settings.resample:
            break
        rng = np.random.default_rng(seed)
        wanted = [(place, windows[rng.integers(len(windows))]) for place in equal]
        thrown_away += len(equal)
    return [rollouts[place] for place in range(settings.batch_size)], thrown_away


# --------------------------------------------------------------------------- the update, the loop


def add_gradient(
    policy: Policy, reference: Policy | None, micro: MicroBatch, settings: TrainSettings
) -> tuple[Loss, Tensor]:
    """Add the gradient of a micro-batch's part of the loss to those that are there. Returns what it
    came to, and [R, C] by how much update and sampling differ: |log pi_old - log pi_sampled|."""
    temperature = settings.temperature
    with torch.no_grad():
        ref = reference(response_logprobs, micro.row, temperature) if reference else None
    new = policy(response_logprobs, micro.row, temperature)
    old = new.detach() if micro.old_logprobs is None else micro.old_logprobs
    loss = policy_loss(
        *(new, old, ref, micro.advantages, micro.row.mask),
        *(settings.clip, settings.beta, settings.average, micro.lengths),
    )
    # FSDP averages gradients over the processes; the loss's mean is already over all.
    (micro.weight * loss.loss * dist.get_world_size()).backward()
    apart = (old - micro.sampled).abs() * micro.row.mask
    return Loss(*(micro.weight * x.detach() for x in loss)), micro.weight * apart


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    settings: TrainSettings,
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[Rollout]]:
    """The optimizer steps on one rollout batch, which every process holds whole.

    Returns their mean loss, gradient norm, KL, share of clipped tokens, and mean difference between
    update and sampling, with the largest; and how many steps were skipped because logits, loss or
    gradient were not finite, with the rollouts of those. `check` may raise before the first step;
    the weights are then untouched.
    """
    figures, largest = [], 0.0
    # Where the policy could not sample, its loss would not be finite either.
    offenders = [rollout for rollout in rollouts if not rollout.finite()]
    skipped, usable = len(offenders[:1]), [] if offenders else rollouts

    def add(micro: MicroBatch) -> list[float]:
        nonlocal largest
        if not figures:
            check()
        loss, apart = add_gradient(policy, reference, micro, settings)
        largest = max(largest, apart.max().item())
        return [*(x.item() for x in loss), apart.sum().item()]

    with training(policy, optimizer):
        for part, micros in batches_of_updates(policy, usable, settings):
            sums, norm, whose = take_step(policy, optimizer, micros, add, settings.max_grad_norm)
            loss, *totals, tokens, apart = sums
            if whose is None:
                figures.append((loss, norm, *(total / tokens for total in (*totals, apart))))
            else:
                skipped += 1
                offenders += whose or part
    means = np.mean(figures, axis=0) if figures else np.zeros(5)
    names = ("loss", "grad_norm", "kl", "clip_fraction", "mismatch")
    largest = all_reduce([largest], dist.ReduceOp.MAX)[0]
    counts = {"mismatch_max": largest, "skipped_updates": skipped}
    return dict(zip(names, means.tolist())) | counts, offenders


def train(settings: TrainSettings) -> Path:
    """The whole job, on this process or as one of many. Returns where the model was saved."""
    with processes() as device, StopSignal() as stop:
        settings = fill_in(settings)
        data = together(lambda: load_data(settings))
        work = partial(train_in, data, settings, device, stop)
        return in_folder(settings, data.prompt_file, work)


class Data(NamedTuple):
    """What a run trains on, and the held-out queries that it is measured on before and after."""

    task: Task
    prompt_file: str | Path
    prompt: Prompt
    windows: list[TrainingWindow]
    held_out: tuple[list[Candidates], Qrels] | None


def train_in(
    data: Data,
    settings: TrainSettings,
    device: torch.device,
    stop: StopSignal,
    folder: Path,
    inputs: dict,
) -> None:
    """Train from these inputs in a folder that is claimed, from the first step that is not done."""
    # Who edits the prompt while the model trains must not change what it is exported with.
    prompt = Path(data.prompt_file).read_bytes().decode()
    # The policy, its optimizer, and the reference it is held to (none where beta is 0).
    dtype = choose_dtype(settings.dtype, device)
    with explained("loading"):
        policy, tokenizer = load_policy(settings, dtype, device)
        reference = load_reference(settings, dtype, device)
    optimizer = make_optimizer(policy, settings.learning_rate)
    agent = Agent(policy, tokenizer, data.prompt, data.task)
    windows, _ = drop_too_long(agent, data.windows, settings)

    # How far the run has come: not at all, or it was interrupted.
    say(f"{len(windows)} training windows")
    run = Run(settings, folder, inputs, policy, optimizer, stop)
    measured = partial(measure_held_out, agent, data.held_out, settings, stop=stop)
    before = measured(folder / "before", again=not run.first)
    keep_page, watch = keeper(folder), watcher(settings)
    with run:
        for step in run.steps():
            measure_if_due(measured, folder, step, settings.eval_every)
            # Sample G responses to each of B prompts, score them, and compare each group's.
            with explained("sampling"), run.timed("sample_seconds"), gathered(policy):
                rollouts, thrown_away = sample_batch(agent, windows, step, settings, stop)
            # One step up the gradient, or --updates_per_batch.
            with explained("update"), run.timed("update_seconds"):
                figures, offenders = update(
                    policy, reference, optimizer, rollouts, settings, check=stop.check
                )
            sampled = rollout_figures(rollouts, data.task, settings) | {"thrown_away": thrown_away}
            figures = sampled | figures
            run.log(
                figures,
                shown="reward ndcg length kl clip_fraction",
                responses=readable(agent, rollouts, step, settings),
                skipped=[offending(agent, rollout) for rollout in offenders],
            )
            watch(figures)
            keep_page()

    # The trained model, and what it gained.
    does = f"reasons about them, and {data.task.does}"
    answers = f"{settings.group_size} sampled responses"
    card = partial(model_card, settings, "GRPO", does, answers, len(windows))
    run.export(tokenizer, prompt, card())
    after = measured(folder / "after")
    if before and after:
        run.write_card(card(before, after))
        say_what_was_gained(before, after)
    say_what_taught(read_lines(folder / "metrics.jsonl"))
    keep_page(now=True)
    run.finish()


def fill_in(settings: TrainSettings) -> TrainSettings:
    """With what the preset prepares; UserError where settings do not go together."""
    rewards = TASKS[settings.task].rewards
    if settings.reward and settings.reward not in rewards:
        raise UserError(f"--reward {settings.reward}: {settings.task} has {', '.join(rewards)}")
    if settings.task == "listwise" and not any(settings.weights):
        raise UserError("--weights 0 0 0: every response would earn the same, which is nothing")
    return presets.fill_in(settings, settings.updates_per_batch)


def load_data(settings: TrainSettings) -> Data:
    """UserError where there is nothing to train on, or it is what is measured on."""
    task, prompt_file, prompt = load_task(settings)
    windows, held_out = load_windows(task, settings), load_held_out(settings)
    refuse_held_out(windows, held_out, settings)
    return Data(task, prompt_file, prompt, windows, held_out)


@program
def main() -> None:
    make_unbreakable()
    settings, how = parse_settings(__doc__, TrainSettings, DryRunSettings, presets=presets.PRESETS)
    if how.dry_run:
        print(dry_run.table(settings, how, add_gradient))
    else:
        train(settings)


if __name__ == "__main__":
    main()
