"""Sample and score: what the policy answers to a training window, and what each answer is worth.

A rollout is one window's group of G responses with their rewards. Which process samples a window
makes no difference to what is sampled; each takes its share, and all get all rollouts.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from agent import Agent, encode_window
from data import TrainingWindow
from engine.chat import decode_response
from engine.model import NEED_LESS, check_length, end_tokens, room_for_prompt, some
from engine.parallel import StopSignal, all_gather, balanced, say, together
from engine.sampler import Request, Sample, Sampler
from reward import ndcg_at_k
from settings import RunSettings, TrainSettings, UserError
from tasks import Task
from window import Parsed, shown_text

LOGGED_STEPS, LOGGED_RESPONSES = 200, 4  # what is logged of a run, to read


@dataclass
class Rollout:
    """One window's group: what was sampled, and what it is worth."""

    place: int  # in the batch
    window: TrainingWindow
    prompt: list[int]
    samples: list[Sample]
    parsed: list[Parsed]
    rewards: Tensor  # [G]
    advantages: Tensor | None = None  # [G]; what GRPO makes of the rewards

    def tokens(self) -> int:
        """Distinct ones: what an update on this group costs."""
        return len(self.prompt) + sum(len(sample.tokens) for sample in self.samples)

    def finite(self) -> bool:
        """Whether all logits were that it was sampled from."""
        return all(sample.finite for sample in self.samples)


def sample_shared(
    agent: Agent,
    batch: Sequence[tuple[int, TrainingWindow]],
    seed: tuple[int, ...],
    settings: TrainSettings,
    stop: StopSignal,
) -> list[Rollout]:
    """`sample_and_score`, each process its share: about as many tokens to read and, as far as can
    be known before, to write. All rollouts, on every process; Interrupted on all after a signal."""
    to_write = settings.group_size * settings.max_new_tokens
    costs = [len(encode_prompt(agent, window)) + to_write for _, window in batch]
    share = [batch[i] for i in balanced(costs, dist.get_world_size())[dist.get_rank()]]
    mine = stop.cut_short(lambda: sample_and_score(agent, share, seed, settings))
    stop.check()
    return sorted((r for part in all_gather(mine) for r in part), key=lambda r: r.place)


def sample_and_score(
    agent: Agent,
    batch: Sequence[tuple[int, TrainingWindow]],
    seed: tuple[int, ...],
    settings: TrainSettings,
) -> list[Rollout]:
    """A group for each (place in the batch, window). What is sampled depends on the seed and the
    place, not on what else is sampled here."""
    policy, tokenizer = agent.policy, agent.tokenizer
    sampler = Sampler(
        policy,
        end_tokens(policy.lm, tokenizer),
        settings.max_new_tokens,
        settings.temperature,
        max_in_flight=settings.max_in_flight,
    )
    prompts = {}
    for place, window in batch:
        prompts[place] = encode_prompt(agent, window)
        check_length(policy.lm, len(prompts[place]), settings.max_new_tokens)
        sampler.submit(Request(place, prompts[place], settings.group_size, seed=(*seed, place)))
    sampled = {}
    while finished := sampler.collect():
        sampled.update(finished)

    rollouts = []
    for place, window in batch:
        n = len(window.passages)
        parsed = [
            agent.task.parse(decode_response(tokenizer, sample), n, agent.prompt.reasoning)
            for sample in sampled[place]
        ]
        rewards = torch.tensor(score(agent.task, parsed, window, settings))
        rollouts.append(Rollout(place, window, prompts[place], sampled[place], parsed, rewards))
    return rollouts


def encode_prompt(agent: Agent, window: TrainingWindow) -> list[int]:
    texts = [passage.text for passage in window.passages]
    return encode_window(agent.tokenizer, agent.prompt, window.query, texts)[0]


def score(
    task: Task, parsed: list[Parsed], window: TrainingWindow, settings: TrainSettings
) -> list[float]:
    """The rewards of one group."""
    reward = task.rewards[settings.reward or next(iter(task.rewards))]
    return [reward(p, window.grades, window.judged, settings.weights) for p in parsed]


def windows_at_once(settings: TrainSettings, prompt_tokens: int) -> int:
    """How many windows with a prompt each, as in an evaluation, may be under way where otherwise
    --max_in_flight responses are, of which a group shares its prompt: as many tokens."""
    shared = settings.max_new_tokens + prompt_tokens / settings.group_size
    return max(1, int(settings.max_in_flight * shared / (settings.max_new_tokens + prompt_tokens)))


def drop_too_long(
    agent: Agent, windows: list[TrainingWindow], settings: RunSettings
) -> tuple[list[TrainingWindow], int]:
    """(the windows that fit the model with their responses, the tokens of their longest prompt);
    says which queries' do not. All are measured, each process its share, so that none can end a
    run in the middle. UserError where one cannot be encoded, or none fits."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = tqdm(windows[rank::world], "measuring prompts", disable=rank > 0, delay=2, ncols=80)
    shares = all_gather(together(lambda: [prompt_length(agent, window) for window in share]))
    lengths = [shares[i % world][i // world] for i in range(len(windows))]
    room = room_for_prompt(agent.policy.lm, settings.max_new_tokens)
    fit = [(window, length) for window, length in zip(windows, lengths) if length <= room]
    if windows and not fit:
        raise UserError(
            f"no window is left: the shortest prompt has {min(lengths)} tokens, and the model room "
            f"for {room} beside a response of up to {settings.max_new_tokens}: {NEED_LESS}"
        )
    if left_out := {w.qid for w, length in zip(windows, lengths) if length > room}:
        say(
            f"{len(windows) - len(fit)} of {len(windows)} windows are left out: their prompts, of "
            f"up to {max(lengths)} tokens, are too long for a model that has room for {room} "
            f"beside a response (--max_new_tokens {settings.max_new_tokens}). They are of "
            f"{len(left_out)} queries: {some(left_out, 5)}",
            file=sys.stderr,
        )
    return [window for window, _ in fit], max((length for _, length in fit), default=1)


def prompt_length(agent: Agent, window: TrainingWindow) -> int:
    try:
        return len(encode_prompt(agent, window))
    except UserError as error:
        raise UserError(f"query {window.qid}: {error}") from None


# ----------------------------------------------------------------------------- what is logged of it


def rollout_figures(
    rollouts: list[Rollout], task: Task, settings: TrainSettings
) -> dict[str, float]:
    """Means over all responses, but for two: `tokens`, how many were sampled; and `entropy`, the
    mean of -log p over them all, in nats. They are drawn from p itself (at --temperature), so that
    it estimates the mean entropy of the distributions they were drawn from.

    r_rank is what the reward is with the weights 1, 0, 0 (setwise: the reward itself).
    """
    rank_only = replace(settings, weights=[1.0, 0.0, 0.0])
    r_ranks = [r for x in rollouts for r in score(task, x.parsed, x.window, rank_only)]
    rows = [
        {
            "reward": float(reward),
            "ndcg": ndcg_at_k([r.window.grades[i] for i in p.order], ideal=r.window.judged),
            "r_format1": p.tags,
            "r_format2": p.listed,
            "well_formed": p.tags and p.listed,
            "malformed": p.malformed,
            "length": len(s.tokens),
            "cut_off": not s.finished,
        }
        for r in rollouts
        for reward, p, s in zip(r.rewards, r.parsed, r.samples)
    ]
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    logprobs = [sum(sample.logprobs) for r in rollouts for sample in r.samples]
    tokens = sum(row["length"] for row in rows)
    return means | {
        "r_rank": fmean(r_ranks),
        "equal_groups": fmean(not r.advantages.any() for r in rollouts),
        "entropy": -sum(logprobs) / tokens,
        "tokens": tokens,
    }


def readable(
    agent: Agent, rollouts: list[Rollout], step: int, settings: TrainSettings
) -> list[dict]:
    """Groups to read in a log: those of the highest and the lowest mean reward, and the one whose
    rewards are most spread. What is logged of a run has a bound, however long it is: LOGGED_STEPS
    steps at most, of 3 groups with LOGGED_RESPONSES responses each."""
    if step % ceil(settings.steps / LOGGED_STEPS):
        return []
    chosen: dict[int, tuple[str, Rollout]] = {}
    for why, rollout in (
        ("best", max(rollouts, key=lambda r: r.rewards.mean())),
        ("worst", min(rollouts, key=lambda r: r.rewards.mean())),
        ("most spread", max(rollouts, key=lambda r: r.rewards.std(correction=0))),
    ):
        chosen.setdefault(rollout.place, (why, rollout))
    return [{"chosen": why} | readable_group(agent, rollout) for why, rollout in chosen.values()]


def readable_group(agent: Agent, rollout: Rollout) -> dict:
    """A window as the model was shown it, all rewards, and the first responses that earned some
    of them, from the best to the worst."""
    window = rollout.window
    rewards, advantages = (
        [round(x, 4) for x in values.tolist()] for values in (rollout.rewards, rollout.advantages)
    )
    earned = sorted(set(rewards), reverse=True)
    places = np.linspace(0, len(earned) - 1, min(LOGGED_RESPONSES, len(earned))).round()
    picked = [rewards.index(earned[int(place)]) for place in places]
    return {
        "qid": window.qid,
        "query": window.query,
        "passages": [
            {"docid": p.docid, "grade": grade, "text": shown_text(p.text, agent.prompt)}
            for p, grade in zip(window.passages, window.grades)
        ],
        "rewards": rewards,
        "responses": [
            {
                "reward": rewards[i],
                "advantage": advantages[i],
                "tokens": len(rollout.samples[i].tokens),
                "malformed": rollout.parsed[i].malformed,
                "cut_off": not rollout.samples[i].finished,
                "order": rollout.parsed[i].order,
                "response": decode_response(agent.tokenizer, rollout.samples[i]),
            }
            for i in picked
        ],
    }


def offending(agent: Agent, rollout: Rollout) -> dict:
    """The prompt and the responses of an update that was not finite, for a log."""
    responses = [decode_response(agent.tokenizer, sample) for sample in rollout.samples]
    prompt = agent.tokenizer.decode(rollout.prompt)
    return {"qid": rollout.window.qid, "prompt": prompt, "responses": responses}
