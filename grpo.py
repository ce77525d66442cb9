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
schedule. Prompts are paid for once (shared_prompt.py), weights are sharded by PyTorch's FSDP2.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerBase

import checkpoint
import data
import lora
import memory
import toy
from data import Instance
from parallel import (
    Interrupted,
    StopSignal,
    all_gather,
    all_reduce,
    balanced,
    compute_dtype,
    gathered,
    processes,
    scatter,
)
from rearank import (
    check_length,
    empty_lm,
    load_lm,
    prompt_attention,
)
from report import load_held_out, log_step, measure_held_out, step_metrics
from reward import WEIGHTS
from rollout import Actor, Rollout, encode_instance, sample_shared
from settings import parse_settings, setting
from shared_prompt import Group, Policy, Row, pack_row, response_logprobs
from tasks import TASKS
from window import Task, load_prompt


@dataclass
class Settings:
    """The defaults are REARANK's where the paper gives them."""

    preset: str = setting("", "toy: the offline world of toy.py", choices=["", "toy"])
    # what is trained, on what
    model: str = setting(
        "Qwen/Qwen2.5-7B-Instruct", "Hugging Face name or folder of a causal LM, or of an adapter"
    )
    task: str = setting("listwise", "what the model is asked for", choices=sorted(TASKS))
    prompt: str = setting("", "TOML file with every turn's text; default: the task's own")
    candidates: str = setting("", "training queries with their first-stage candidates")
    qrels: str = setting("", "their judgments, a TREC qrels file")
    triples: str = setting("", "instead of both: queries with positive and negative passages, "
                           "JSON lines as Tevatron publishes them")  # fmt: skip
    eval_candidates: str = setting("", "held-out candidates, reranked before and after training")
    eval_qrels: str = setting("", "the held-out judgments")
    output_dir: str = setting("", "default: runs/TASK-DATE-TIME")
    # the training windows
    size: int = setting(20, "passages per window")
    draws: int = setting(50, "windows drawn per query")
    min_ndcg: float = setting(0.1, "listwise: windows under this nDCG@10 are dropped")
    ndcg_filter: str = setting("initial", "which nDCG@10: of the order given, or the best "
                               "reachable; the paper says both", ["initial", "best"])  # fmt: skip
    # the reward
    reward: str = setting("", "listwise: relative, absolute or difference; setwise: exact or "
                          "graded; default: the first")  # fmt: skip
    weights: list[float] = setting(list(WEIGHTS), "listwise: of r_rank, r_format1 and r_format2")
    # sampling
    steps: int = setting(160, "rollout batches to train on")
    batch_size: int = setting(128, "prompts per step (B), over all processes")
    group_size: int = setting(32, "responses per prompt (G)")
    max_new_tokens: int = setting(2048, "length limit of a response, in tokens")
    temperature: float = setting(1.0, "of the sampling; log-probabilities are taken at it too")
    max_in_flight: int = setting(256, "responses sampled at once per process")
    resample: int = setting(0, "dynamic sampling: how often a group whose rewards are all equal "
                            "is sampled again, for another window")  # fmt: skip
    # the update
    updates_per_batch: int = setting(1, "optimizer steps per rollout batch, each on its share")
    learning_rate: float = setting(1e-6, "of AdamW, constant (not in the paper)")
    beta: float = setting(0.001, "weight of the KL to the reference; 0 keeps no reference (the "
                          "paper does not give its value)")  # fmt: skip
    lora_rank: int = setting(0, "train a LoRA adapter of this rank (Rank-R1: 16); 0: all weights")
    lora_alpha: int = setting(32, "the adapter is scaled by lora_alpha / lora_rank")
    clip: float = setting(0.2, "eps: how far the ratio may move before its gradient stops")
    average: str = setting("sequence", "mean over each response's tokens, then over responses; "
                           "or over all tokens alike", ["sequence", "token"])  # fmt: skip
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_tokens_per_micro_batch: int = setting(32768, "distinct tokens in memory at once per "
                                              "process; changes no result")  # fmt: skip
    activation_checkpointing: bool = setting(True, "recompute layers in backward: less memory")
    seed: int = setting(0, "of the windows drawn, their order, and the sampling")
    # what may go wrong
    checkpoint_every: int = setting(10, "steps between checkpoints; a run that died goes on from "
                                    "the last when started again with --output_dir")  # fmt: skip
    keep_checkpoints: int = setting(2, "how many checkpoints stay, the newest")
    max_skipped: int = setting(10, "updates whose loss or gradient was not finite, and which were "
                               "skipped, before training stops")  # fmt: skip


# They change no result, or only how far it goes; a run that goes on may have others.
FREE_TO_CHANGE = {
    "output_dir", "steps", "max_in_flight", "max_tokens_per_micro_batch",
    "activation_checkpointing", "checkpoint_every", "keep_checkpoints", "max_skipped",
}  # fmt: skip

# ---------------------------------------------------------------------------------- the algorithm


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


def average_tokens(x: Tensor, mask: Tensor, average: str, count: int | None = None) -> Tensor:
    """The mean of x [R, C] over the tokens in mask: of every sequence's own mean ("sequence"), or
    of all tokens alike ("token").

    count: divide by so many sequences or tokens instead of this tensor's own, so that the
    micro-batches of a batch add up to the mean over the whole of it.
    """
    if average == "sequence":
        return ((x * mask).sum(1) / mask.sum(1)).sum() / (count or len(x))
    if average == "token":
        return (x * mask).sum() / (count or mask.sum())
    raise ValueError(f"unknown average {average!r}: use sequence or token")


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || pi_ref) per token, estimated from one sample: r - log r - 1 with r = pi_ref / pi.
    Unbiased, and never negative (Schulman 2020, "Approximating KL divergence")."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    beta: float,
    average: str = "sequence",
    count: int | None = None,
) -> Tensor:
    """GRPO's loss, a scalar: minus the objective of the module's docstring.

    logprobs, old_logprobs, ref_logprobs: [R, C] log-probabilities of the sampled tokens under
        the policy (with gradient), the policy that sampled, and the reference (None: beta is 0).
    advantages: [R]; mask: [R, C], which tokens are there; average, count: see `average_tokens`.
    """
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(
        ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None]
    )
    if beta:
        gain = gain - beta * k3(logprobs, ref_logprobs)
    return -average_tokens(gain, mask, average, count)


# ---------------------------------------------------------------------------------------- sample


def sample_batch(
    actor: Actor,
    instances: list[Instance],
    step: int,
    settings: Settings,
    stop: StopSignal,
    device: torch.device,
) -> tuple[list[Rollout], int]:
    """A step's rollouts, the same on every process, and how many were thrown away.

    A group whose rewards are all equal teaches nothing; with --resample, another window drawn at
    random takes its place (dynamic sampling; DAPO, arXiv 2503.14476, section 3.2).
    """
    order = batch_at(step, settings.batch_size, len(instances), settings.seed)
    wanted = [(place, instances[i]) for place, i in enumerate(order)]
    rollouts, thrown_away = {}, 0
    for attempt in range(1 + settings.resample):
        seed = (settings.seed, step, attempt)
        fresh = sample_shared(actor, wanted, seed, settings, stop, device)
        for rollout in fresh:
            rollout.advantages = group_advantages(rollout.rewards, settings.group_size)
            rollouts[rollout.place] = rollout
        equal = [rollout.place for rollout in fresh if not rollout.advantages.any()]
        if not equal or attempt == settings.resample:
            break
        rng = np.random.default_rng(seed)
        wanted = [(place, instances[rng.integers(len(instances))]) for place in equal]
        thrown_away += len(equal)
    return [rollouts[place] for place in range(settings.batch_size)], thrown_away


# --------------------------------------------------------------------------------------- update


@dataclass
class MicroBatch:
    """Responses that go through the model together."""

    row: Row
    advantages: Tensor  # [R]
    rollouts: list[Rollout]  # whose responses they are
    weight: float = 1.0


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, device: torch.device
) -> list[MicroBatch]:
    """Packed rows of at most `max_tokens` tokens.

    A group goes into one row where it fits; a larger one is split, and its prompt paid for again.
    A row always takes one response, even one that alone is over the limit.
    """
    rows: list[list[tuple[Rollout, Group, list[float]]]] = []
    room = 0
    for rollout in rollouts:
        responses = [sample.tokens for sample in rollout.samples]
        whole = rollout.tokens()
        group = None
        for response, advantage in zip(responses, rollout.advantages.tolist()):
            first = group is None
            need = (whole if first and whole <= max_tokens else
                    len(response) + first * len(rollout.prompt))  # fmt: skip
            if not rows or need > room:
                rows.append([])
                room, group = max_tokens, None
            if group is None:
                group = (rollout, Group(rollout.prompt, []), [])
                rows[-1].append(group)
                room -= len(rollout.prompt)
            group[1].responses.append(response)
            group[2].append(advantage)
            room -= len(response)
    return [
        MicroBatch(
            pack_row([group for _, group, _ in row], device),
            torch.tensor([a for _, _, advantages in row for a in advantages], device=device),
            [rollout for rollout, _, _ in row],
        )
        for row in rows
    ]


def my_share(
    rollouts: Sequence[Rollout], max_tokens: int, device: torch.device
) -> list[MicroBatch]:
    """This process's part of an update: about as many tokens as every other's, and as many rows.

    Groups of equal rewards are left out: all their advantages are 0, so that they would only cost
    time (and add their KL, which the mean over the batch thus counts as 0).
    """
    useful = [rollout for rollout in rollouts if rollout.advantages.any()]
    shares = balanced([rollout.tokens() for rollout in useful], dist.get_world_size())
    rows = micro_batches([useful[i] for i in shares[dist.get_rank()]], max_tokens, device)
    # Each pass gathers weights from all processes, so all must make equally many: one that has
    # fewer rows repeats one, with no weight.
    missing = int(all_reduce([len(rows)], device, dist.ReduceOp.MAX)[0]) - len(rows)
    if missing:
        spare = (rows or micro_batches(useful[:1], max_tokens, device))[0]
        rows += [replace(spare, weight=0.0)] * missing
    return rows


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    settings: Settings,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], list[Rollout]]:
    """The optimizer steps on one rollout batch, which every process holds whole.

    Returns their mean loss, gradient norm, KL and share of clipped tokens, and the number of steps
    that were skipped because the loss or the gradient was not finite; and the rollouts of those.
    Raises Interrupted, the weights untouched, where `interrupted()` before the first step.
    """
    n = settings.updates_per_batch
    shares = [rollouts[i::n] for i in range(n)]
    batches = [my_share(share, settings.max_tokens_per_micro_batch, device) for share in shares]
    policy.train()
    t = settings.temperature
    with torch.no_grad():
        # Before the first step pi_old is pi itself; only later steps need it written down.
        olds = [
            [policy(response_logprobs, micro.row, t) for micro in batch]
            if n > 1 else [None] * len(batch)
            for batch in batches
        ]  # fmt: skip
    history, offenders, skipped = [], [], 0
    for share, batch, old_logprobs in zip(shares, batches, olds):
        if not batch:
            continue
        lengths = [len(sample.tokens) for rollout in share for sample in rollout.samples]
        count = len(lengths) if settings.average == "sequence" else sum(lengths)
        sums, suspects = np.zeros(4), []
        for micro, old in zip(batch, old_logprobs):
            if not history and interrupted():
                optimizer.zero_grad()
                policy.eval()
                raise Interrupted
            row = micro.row
            with torch.no_grad():
                ref = reference(response_logprobs, row, t) if reference else None
            new = policy(response_logprobs, row, t)
            old = new.detach() if old is None else old
            loss = micro.weight * policy_loss(
                new, old, ref, micro.advantages, row.mask, settings.clip, settings.beta,
                settings.average, count,
            )  # fmt: skip
            # FSDP averages gradients over the processes; the loss's mean is already over all.
            (loss * dist.get_world_size()).backward()
            with torch.no_grad():
                clipped = ((new - old).exp() - 1).abs() > settings.clip
                kl = k3(new, ref) if reference else torch.zeros_like(new)
                over_tokens = [(x * row.mask).sum().item() for x in (kl, clipped, row.mask)]
            sums += [loss.item(), *(micro.weight * x for x in over_tokens)]
            suspects += [] if loss.isfinite() else micro.rollouts
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        norm = float(norm.full_tensor())
        loss, kl, clipped, tokens = all_reduce(sums, device)
        if np.isfinite([loss, norm]).all():
            optimizer.step()
            history.append((loss, norm, kl / tokens, clipped / tokens))
        else:
            skipped += 1
            suspects = [rollout for part in all_gather(suspects) for rollout in part]
            offenders += suspects or share
        optimizer.zero_grad()
    policy.eval()
    names = ("loss", "grad_norm", "kl", "clip_fraction")
    means = np.mean(history, axis=0) if history else np.zeros(4)
    return dict(zip(names, means.tolist())) | {"skipped_updates": skipped}, offenders


# ----------------------------------------------------------------------------------------- train


def batch_at(step: int, size: int, n: int, seed: int) -> list[int]:
    """The indices of a step's batch: one random order of all n after the other, cut in pieces."""

    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(n)

    places = range(step * size, (step + 1) * size)
    orders = {place // n: order(place // n) for place in places}
    return [int(orders[place // n][place % n]) for place in places]


def load_instances(task: Task, settings: Settings) -> list[Instance]:
    """The training windows."""
    try:
        if settings.triples:
            source = data.read_triples(settings.triples)
        elif settings.candidates and settings.qrels:
            source = data.read_candidates(settings.candidates), data.read_qrels(settings.qrels)
        else:
            raise SystemExit("training needs --candidates and --qrels, or --triples (or try "
                             "--preset toy)")  # fmt: skip
        instances = task.training_set(*source, settings)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    if not instances:
        raise SystemExit(
            f"no training window left of {settings.triples or settings.candidates}: no query has a "
            "relevant candidate among others (and, listwise, nDCG@10 of at least --min_ndcg)"
        )
    return instances


def load_sharded(
    settings: Settings, dtype: torch.dtype, device: torch.device, trained: bool
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The model, split over all processes. Only the first one reads it, and each is sent its part,
    so that a machine need not hold it once per process."""
    attention = prompt_attention(device, compute_dtype(device))
    if dist.get_rank() == 0:
        lm, tokenizer = load_lm(settings.model, dtype, attention)
    else:
        lm, tokenizer = empty_lm(settings.model, dtype, attention)
    if trained and settings.activation_checkpointing:
        # Its name since transformers 5.23, and the name before.
        name = "activation_checkpointing_enable"
        enable = getattr(lm, name, None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if trained and settings.lora_rank:
        lora.add_adapter(lm, settings.lora_rank, settings.lora_alpha, settings.seed)
    if not trained:
        lm.requires_grad_(False)
    return scatter(Policy(lm.eval()), device), tokenizer


def check_longest(actor: Actor, instances: list[Instance], settings: Settings) -> int:
    """The tokens of the longest prompt, looked for among the windows of most characters.
    SystemExit where one cannot be encoded or does not fit: better now than in the middle."""

    def characters(instance: Instance) -> int:
        return sum(min(len(p.text), actor.prompt.max_chars) for p in instance.passages)

    try:
        longest = max(
            len(encode_instance(actor, i)) for i in sorted(instances, key=characters)[-8:]
        )
        check_length(actor.policy.lm, longest, settings.max_new_tokens)
        return longest
    except ValueError as error:
        raise SystemExit(str(error)) from None


def train(settings: Settings) -> Path:
    """The whole job, on this process or as one of many. Returns where the model was saved."""
    with processes() as device, StopSignal() as stop:
        try:
            return train_on(device, settings, stop)
        except Interrupted:
            if dist.get_rank() == 0:
                print(f"stopped by {signal.Signals(stop.number).name}", file=sys.stderr)
            raise SystemExit(128 + stop.number) from None


def complete(settings: Settings) -> Settings:
    """With what the preset prepares; SystemExit where settings do not go together."""
    world = dist.get_world_size()
    if settings.batch_size < world * settings.updates_per_batch:
        raise SystemExit(
            f"--batch_size {settings.batch_size} must be at least --updates_per_batch "
            f"{settings.updates_per_batch} times the number of processes, {world}"
        )
    rewards = TASKS[settings.task].rewards
    if settings.reward and settings.reward not in rewards:
        raise SystemExit(f"--reward {settings.reward}: {settings.task} has {', '.join(rewards)}")
    if settings.preset == "toy":
        torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
        if dist.get_rank() == 0:
            toy.prepare(settings.seed, settings.task)
        dist.barrier()
        # What the command line says of these stays.
        prepared, default = toy.prepare(settings.seed, settings.task), Settings()
        unset = {k: v for k, v in prepared.items() if getattr(settings, k) == getattr(default, k)}
        settings = replace(settings, **unset)
    return settings


def train_on(device: torch.device, settings: Settings, stop: StopSignal) -> Path:
    rank, world = dist.get_rank(), dist.get_world_size()
    settings = complete(settings)
    task = TASKS[settings.task]
    prompt_file = settings.prompt or task.prompt
    try:
        prompt = load_prompt(prompt_file)
    except (ValueError, OSError) as error:
        raise SystemExit(f"--prompt {error}") from None
    instances, held_out = load_instances(task, settings), load_held_out(settings)

    # The policy, its optimizer, and the reference it is held to (none where beta is 0).
    with memory.explained("loading", settings.model, settings, 0, device):
        policy, tokenizer = load_sharded(settings, torch.float32, device, trained=True)
        reference = None
        if settings.beta:
            # It never changes, so it is kept in the precision that it computes with.
            reference, _ = load_sharded(settings, compute_dtype(device), device, trained=False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0)
    actor = Actor(policy, tokenizer, prompt, task)
    longest = check_longest(actor, instances, settings)
    explained = partial(
        memory.explained, model=settings.model, settings=settings, prompt=longest, device=device
    )

    # Where the run writes, and how far it has come: a new one, or one that was interrupted.
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    output_dir = settings.output_dir or f"runs/{settings.preset or settings.task}-{stamp}"
    output_dir = Path(all_gather(output_dir)[0])  # their clocks may differ
    same = {k: v for k, v in asdict(settings).items() if k not in FREE_TO_CHANGE}
    try:
        checkpoint.claim(output_dir, asdict(settings), FREE_TO_CHANGE)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    checkpoints = output_dir / "checkpoints"
    facts = checkpoint.resume(checkpoints, policy, optimizer, same)
    first, skipped = (facts["step"], facts["skipped"]) if facts else (0, 0)
    saved = first
    if rank == 0:
        print(f"{len(instances)} training windows, {world} process(es), writing to {output_dir}")
        if first:
            print(f"going on from step {first}, checkpointed there")
        checkpoint.cut_logs(output_dir, first)
    if first and held_out:
        before = json.loads((output_dir / "before" / "held_out.json").read_text())
    else:
        before = measure_held_out(actor, held_out, settings, output_dir / "before", stop, device)

    def save_checkpoint(step: int) -> None:
        nonlocal saved
        checkpoint.save(
            checkpoints, policy, optimizer, {"step": step, "skipped": skipped, "settings": same},
            settings.keep_checkpoints,
        )  # fmt: skip
        saved = step

    # From here on the state is worth keeping: a signal ends a step only where all can save.
    stop.at_once = False
    bar = tqdm(range(first, settings.steps), desc="steps", disable=rank > 0, dynamic_ncols=True,
               initial=first, total=settings.steps)  # fmt: skip
    for step in bar:
        started = time.perf_counter()
        try:
            with explained("sampling"), gathered(policy):
                rollouts, thrown_away = sample_batch(actor, instances, step, settings, stop, device)
            sampled = time.perf_counter()
            with explained("update"):
                figures, offenders = update(
                    policy, reference, optimizer, rollouts, settings, device,
                    interrupted=lambda: stop.agreed(device),
                )  # fmt: skip
        except Interrupted:
            bar.close()
            try:
                if step > saved:
                    save_checkpoint(step)
            except OSError as error:
                raise SystemExit(str(error)) from None
            if rank == 0:
                print(f"the same command with --output_dir {output_dir} goes on at step {step}")
            raise
        metrics = {"step": step} | step_metrics(rollouts) | {"thrown_away": thrown_away} | figures
        metrics |= {
            "sample_seconds": round(sampled - started, 2),
            "update_seconds": round(time.perf_counter() - sampled, 2),
        }
        skipped += figures["skipped_updates"]
        if rank == 0:
            log_step(output_dir, metrics, rollouts[0], offenders, tokenizer)
            shown = {"reward": "reward", "ndcg": "ndcg", "len": "length", "kl": "kl",
                     "clip": "clip_fraction"}  # fmt: skip
            bar.set_postfix({k: f"{metrics[v]:.3g}" for k, v in shown.items()})
        if skipped > settings.max_skipped:
            raise SystemExit(
                f"{skipped} updates were not finite and skipped (--max_skipped "
                f"{settings.max_skipped}); their prompts are in {output_dir / 'skipped.jsonl'}"
            )
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            try:
                save_checkpoint(step + 1)
            except OSError as error:
                # The weights are only here now: better to train on, and save them later.
                if rank == 0:
                    print(f"\n{error}\ntraining goes on without", file=sys.stderr)
    stop.at_once = True

    card = partial(checkpoint.model_card, asdict(settings), len(instances))
    try:
        checkpoint.export(policy, tokenizer, prompt_file, output_dir, card())
    except OSError as error:
        raise SystemExit(
            f"the trained model could not be written: {error}\nonce it can be, the same command "
            f"with --output_dir {output_dir} goes on from the last checkpoint"
        ) from None
    after = measure_held_out(actor, held_out, settings, output_dir / "after", stop, device)
    if rank == 0:
        checkpoint.write_whole(output_dir / "README.md", card(before, after))
        if before and after:
            print(
                f"held-out nDCG@10: {before['ndcg@10']:.4f} before training, "
                f"{after['ndcg@10']:.4f} after (first stage {after['first_stage']:.4f})"
            )
            print(f"held-out windows, mean reward: {before['window_reward']:.4f} before training, "
                  f"{after['window_reward']:.4f} after")  # fmt: skip
        print(f"saved to {output_dir}")
    return output_dir


def main() -> None:
    parser = HfArgumentParser(Settings, allow_abbrev=False, description=__doc__.split("\n")[0])
    (settings,) = parse_settings(parser, {"toy": toy.PRESET})
    train(settings)


if __name__ == "__main__":
    main()
