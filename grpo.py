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
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerBase

import data
import evaluate
import lora
import toy
from data import Instance
from parallel import all_reduce, compute_dtype, gathered, processes, save, shard
from rearank import (
    Agent,
    AgentSettings,
    check_length,
    decode_response,
    encode_window,
    end_tokens,
    load_lm,
    prompt_attention,
    rerank,
)
from reward import WEIGHTS, ndcg_at_k
from settings import parse_settings, setting
from shared_prompt import Group, Policy, Request, Row, Sample, Sampler, pack_row, response_logprobs
from tasks import TASKS
from window import Parsed, Prompt, Task, load_prompt


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


# ------------------------------------------------------------------------------ sample and score


@dataclass
class Rollout:
    """One prompt's group: what was sampled, and what it is worth."""

    instance: Instance
    prompt: list[int]
    samples: list[Sample]
    parsed: list[Parsed]
    rewards: Tensor  # [G]
    advantages: Tensor  # [G]


def sample_and_score(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    task: Task,
    batch: Sequence[tuple[int, Instance]],
    step: int,
    settings: Settings,
) -> list[Rollout]:
    """A group for each (place in the batch, instance). What is sampled depends on the seed, the
    step and the place, not on which process samples it."""
    sampler = Sampler(
        policy, end_tokens(policy.lm, tokenizer), settings.max_new_tokens, settings.temperature,
        max_in_flight=settings.max_in_flight,
    )  # fmt: skip
    prompts = {}
    for place, instance in batch:
        texts = [passage.text for passage in instance.passages]
        prompts[place], _ = encode_window(tokenizer, prompt, instance.query, texts)
        check_length(policy.lm, len(prompts[place]), settings.max_new_tokens)
        seed = (settings.seed, step, place)
        sampler.submit(Request(place, prompts[place], settings.group_size, seed=seed))
    sampled = {}
    while complete := sampler.collect():
        sampled.update(complete)

    rollouts = []
    for place, instance in batch:
        parsed = [
            task.parse(decode_response(tokenizer, s), len(instance.passages), prompt.reasoning)
            for s in sampled[place]
        ]
        rewards = torch.tensor(score(task, parsed, instance, settings))
        advantages = group_advantages(rewards, settings.group_size)
        rollouts.append(
            Rollout(instance, prompts[place], sampled[place], parsed, rewards, advantages)
        )
    return rollouts


def score(task: Task, parsed: list[Parsed], instance: Instance, settings: Settings) -> list[float]:
    """The rewards of one group."""
    reward = task.rewards[settings.reward or next(iter(task.rewards))]
    return [reward(p, instance.grades, instance.judged, settings.weights) for p in parsed]


# --------------------------------------------------------------------------------------- update


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, device: torch.device
) -> list[tuple[Row, Tensor]]:
    """Packed rows of at most `max_tokens` tokens, each with its responses' advantages [R].

    A group goes into one row where it fits; a larger one is split, and its prompt paid for again.
    A row always takes one response, even one that alone is over the limit.
    """
    rows: list[list[tuple[Group, list[float]]]] = []
    room = 0
    for rollout in rollouts:
        responses = [sample.tokens for sample in rollout.samples]
        whole = len(rollout.prompt) + sum(map(len, responses))
        group = None
        for response, advantage in zip(responses, rollout.advantages.tolist()):
            first = group is None
            need = (whole if first and whole <= max_tokens else
                    len(response) + first * len(rollout.prompt))  # fmt: skip
            if not rows or need > room:
                rows.append([])
                room, group = max_tokens, None
            if group is None:
                group = (Group(rollout.prompt, []), [])
                rows[-1].append(group)
                room -= len(rollout.prompt)
            group[0].responses.append(response)
            group[1].append(advantage)
            room -= len(response)
    return [
        (pack_row([group for group, _ in row], device),
         torch.tensor([a for _, advantages in row for a in advantages], device=device))
        for row in rows
    ]  # fmt: skip


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    settings: Settings,
    device: torch.device,
) -> dict[str, float]:
    """The optimizer steps on one rollout batch; their mean loss, gradient norm, KL and share of
    clipped tokens, over all processes."""
    shares = [rollouts[i :: settings.updates_per_batch] for i in range(settings.updates_per_batch)]
    batches = [micro_batches(s, settings.max_tokens_per_micro_batch, device) for s in shares]
    for batch in batches:
        # Each pass gathers weights from all processes, so all must make equally many: one that
        # has fewer rows repeats its first, with no weight.
        missing = int(all_reduce([len(batch)], device, dist.ReduceOp.MAX)[0]) - len(batch)
        batch += [(batch[0][0], None)] * missing

    policy.train()
    t = settings.temperature
    with torch.no_grad():
        # Before the first step pi_old is pi itself; only later steps need it written down.
        olds = [
            [policy(response_logprobs, row, t) for row, _ in batch]
            if settings.updates_per_batch > 1 else [None] * len(batch)
            for batch in batches
        ]  # fmt: skip
    history = []
    for batch, old_logprobs in zip(batches, olds):
        real = [row for row, advantages in batch if advantages is not None]
        sequences, tokens = all_reduce(
            [sum(len(row.mask) for row in real), sum(int(row.mask.sum()) for row in real)], device
        )
        count = sequences if settings.average == "sequence" else tokens
        sums = np.zeros(3)
        for (row, advantages), old in zip(batch, old_logprobs):
            with torch.no_grad():
                ref = reference(response_logprobs, row, t) if reference else None
            new = policy(response_logprobs, row, t)
            old = new.detach() if old is None else old
            weight = 0.0 if advantages is None else 1.0
            if advantages is None:
                advantages = torch.zeros(len(row.mask), device=device)
            loss = weight * policy_loss(
                new, old, ref, advantages, row.mask, settings.clip, settings.beta,
                settings.average, count,
            )  # fmt: skip
            # FSDP averages gradients over the processes; the loss's mean is already over all.
            (loss * dist.get_world_size()).backward()
            with torch.no_grad():
                clipped = ((new - old).exp() - 1).abs() > settings.clip
                kl = k3(new, ref) if reference else torch.zeros_like(new)
                over_tokens = [weight * (x * row.mask).sum().item() for x in (kl, clipped)]
                sums += [loss.item(), *over_tokens]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss, kl, clipped = all_reduce(sums, device)
        history.append((loss, float(norm.full_tensor()), kl / tokens, clipped / tokens))
    policy.eval()
    names = ("loss", "grad_norm", "kl", "clip_fraction")
    return {name: fmean(values) for name, values in zip(names, zip(*history))}


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


def held_out(
    policy: Policy, tokenizer, prompt: Prompt, task: Task, settings: Settings, output_dir: Path
) -> dict[str, float] | None:
    """Greedy figures on the held-out queries: nDCG@10 of their candidates, reranked as
    evaluate.py does it, and the mean reward of windows drawn like those of training."""
    if not settings.eval_candidates:
        return None
    figures = None
    with gathered(policy):
        if dist.get_rank() == 0:
            candidates = data.read_candidates(settings.eval_candidates)
            qrels = data.read_qrels(settings.eval_qrels)
            agent_settings = AgentSettings(
                model=settings.model, task=settings.task, window_size=settings.size,
                step_size=max(1, settings.size // 2), max_new_tokens=settings.max_new_tokens,
                max_in_flight=settings.max_in_flight,
            )  # fmt: skip
            agent = Agent(policy, tokenizer, prompt, task, agent_settings)
            metrics = evaluate.evaluate(candidates, qrels, partial(rerank, agent), output_dir)
            greedy = replace(settings, temperature=0.0, group_size=1, draws=3)
            windows = list(enumerate(task.training_set(candidates, qrels, greedy)))
            rollouts = sample_and_score(policy, tokenizer, prompt, task, windows, 0, greedy)
            figures = {
                "first_stage": metrics["before"]["ndcg@10"],
                "ndcg@10": metrics["after"]["ndcg@10"],
                "window_reward": fmean(float(r.rewards[0]) for r in rollouts),
            }
            (output_dir / "held_out.json").write_text(json.dumps(figures) + "\n")
        dist.barrier()
    return figures


def step_metrics(rollouts: list[Rollout], device: torch.device) -> dict[str, float]:
    """Means over all responses of all processes."""
    rows = [
        (
            float(reward),
            ndcg_at_k([r.instance.grades[i] for i in p.order], ideal=r.instance.judged),
            p.tags and p.listed,
            p.malformed,
            len(s.tokens),
            not s.finished,
        )
        for r in rollouts
        for reward, p, s in zip(r.rewards, r.parsed, r.samples)
    ]
    equal = sum(bool((r.advantages == 0).all()) for r in rollouts)
    *sums, n, equal, groups = all_reduce(
        [*np.sum(rows, axis=0), len(rows), equal, len(rollouts)], device
    )
    names = ("reward", "ndcg", "well_formed", "malformed", "length", "cut_off")
    return {name: total / n for name, total in zip(names, sums)} | {"equal_groups": equal / groups}


def train(settings: Settings) -> Path:
    """The whole job, on this process or as one of many. Returns where the model was saved."""
    with processes() as device:
        return train_on(device, settings)


def train_on(device: torch.device, settings: Settings) -> Path:
    rank, world = dist.get_rank(), dist.get_world_size()
    if settings.batch_size % (world * settings.updates_per_batch):
        raise SystemExit(
            f"--batch_size {settings.batch_size} must be divisible by the {world} processes times "
            f"--updates_per_batch {settings.updates_per_batch}"
        )
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    output_dir = Path(settings.output_dir or f"runs/{settings.preset or settings.task}-{stamp}")
    if settings.preset == "toy":
        torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
        if rank == 0:
            toy.prepare(settings.seed, settings.task)
        dist.barrier()
        # What the command line says of these stays.
        prepared, default = toy.prepare(settings.seed, settings.task), Settings()
        unset = {k: v for k, v in prepared.items() if getattr(settings, k) == getattr(default, k)}
        settings = replace(settings, **unset)

    # The policy, its optimizer, and the reference it is held to (none where beta is 0).
    task = TASKS[settings.task]
    prompt = load_prompt(settings.prompt or task.prompt)
    if settings.reward and settings.reward not in task.rewards:
        raise SystemExit(
            f"--reward {settings.reward}: {settings.task} has {', '.join(task.rewards)}"
        )
    if bool(settings.eval_candidates) != bool(settings.eval_qrels):
        raise SystemExit("held-out figures need both --eval_candidates and --eval_qrels")
    instances = load_instances(task, settings)
    attention = prompt_attention(device, compute_dtype(device))
    lm, tokenizer = load_lm(settings.model, torch.float32, attention)
    if settings.activation_checkpointing:
        # Its name since transformers 5.23, and the name before.
        name = "activation_checkpointing_enable"
        enable = getattr(lm, name, None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if settings.lora_rank:
        lora.add_adapter(lm, settings.lora_rank, settings.lora_alpha, settings.seed)
    policy = shard(Policy(lm).eval(), device)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0)
    reference = None
    if settings.beta:
        frozen, _ = load_lm(settings.model, torch.float32, attention)
        reference = shard(Policy(frozen.requires_grad_(False).eval()), device)

    if rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
        print(f"{len(instances)} training windows, {world} process(es), writing to {output_dir}")
    before = held_out(policy, tokenizer, prompt, task, settings, output_dir / "before")

    bar = tqdm(range(settings.steps), desc="steps", disable=rank > 0, dynamic_ncols=True)
    for step in bar:
        started = time.perf_counter()
        places = batch_at(step, settings.batch_size, len(instances), settings.seed)
        mine = [(place, instances[i]) for place, i in enumerate(places)][rank::world]
        with gathered(policy):
            rollouts = sample_and_score(policy, tokenizer, prompt, task, mine, step, settings)
        sampled = time.perf_counter()
        metrics = {"step": step} | step_metrics(rollouts, device)
        metrics |= update(policy, reference, optimizer, rollouts, settings, device)
        metrics |= {
            "sample_seconds": round(sampled - started, 2),
            "update_seconds": round(time.perf_counter() - sampled, 2),
        }
        if rank == 0:
            log_step(output_dir, metrics, rollouts[0], tokenizer)
            shown = {"reward": "reward", "ndcg": "ndcg", "len": "length", "kl": "kl",
                     "clip": "clip_fraction"}  # fmt: skip
            bar.set_postfix({k: f"{metrics[v]:.3g}" for k, v in shown.items()})

    save(policy, tokenizer, output_dir)
    after = held_out(policy, tokenizer, prompt, task, settings, output_dir / "after")
    if rank == 0:
        if before and after:
            print(
                f"held-out nDCG@10: {before['ndcg@10']:.4f} before training, "
                f"{after['ndcg@10']:.4f} after (first stage {after['first_stage']:.4f})"
            )
            print(f"held-out windows, mean reward: {before['window_reward']:.4f} before training, "
                  f"{after['window_reward']:.4f} after")  # fmt: skip
        print(f"saved to {output_dir}")
    return output_dir


def log_step(output_dir: Path, metrics: dict, rollout: Rollout, tokenizer) -> None:
    """A line of figures, and one group of responses to read."""
    with open(output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    with open(output_dir / "responses.jsonl", "a", encoding="utf-8") as file:
        for reward, sample in zip(rollout.rewards.tolist(), rollout.samples):
            record = {
                "step": metrics["step"], "qid": rollout.instance.qid,
                "query": rollout.instance.query, "grades": rollout.instance.grades,
                "reward": reward, "response": decode_response(tokenizer, sample),
            }  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = HfArgumentParser(Settings, allow_abbrev=False, description=__doc__.split("\n")[0])
    (settings,) = parse_settings(parser, {"toy": toy.PRESET})
    train(settings)


if __name__ == "__main__":
    main()
