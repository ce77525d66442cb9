"""Sample and score: what the policy answers to a prompt, and what each answer is worth.

A rollout is one prompt's group of G responses with their rewards. Which process samples a prompt
makes no difference to what is sampled; each takes its share, and all get all rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data import Instance
from parallel import Interrupted, StopSignal, all_gather, balanced
from rearank import check_length, decode_response, encode_window, end_tokens
from shared_prompt import Policy, Request, Sample, Sampler
from window import Parsed, Prompt, Task


@dataclass
class Rollout:
    """One prompt's group: what was sampled, and what it is worth."""

    place: int  # in the batch
    instance: Instance
    prompt: list[int]
    samples: list[Sample]
    parsed: list[Parsed]
    rewards: Tensor  # [G]
    advantages: Tensor | None = None  # [G]; what GRPO makes of the rewards

    def tokens(self) -> int:
        """Distinct ones: what an update on this group costs."""
        return len(self.prompt) + sum(len(sample.tokens) for sample in self.samples)


@dataclass
class Actor:
    """What samples, and how its replies are read."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    task: Task


def sample_and_score(
    actor: Actor, batch: Sequence[tuple[int, Instance]], seed: tuple[int, ...], settings
) -> list[Rollout]:
    """A group for each (place in the batch, instance); settings: grpo.Settings. What is sampled
    depends on the seed and the place, not on what else is sampled here."""
    policy, tokenizer = actor.policy, actor.tokenizer
    sampler = Sampler(
        policy, end_tokens(policy.lm, tokenizer), settings.max_new_tokens, settings.temperature,
        max_in_flight=settings.max_in_flight,
    )  # fmt: skip
    prompts = {}
    for place, instance in batch:
        prompts[place] = encode_instance(actor, instance)
        check_length(policy.lm, len(prompts[place]), settings.max_new_tokens)
        sampler.submit(Request(place, prompts[place], settings.group_size, seed=(*seed, place)))
    sampled = {}
    while complete := sampler.collect():
        sampled.update(complete)

    rollouts = []
    for place, instance in batch:
        n = len(instance.passages)
        parsed = [
            actor.task.parse(decode_response(tokenizer, sample), n, actor.prompt.reasoning)
            for sample in sampled[place]
        ]
        rewards = torch.tensor(score(actor.task, parsed, instance, settings))
        rollouts.append(Rollout(place, instance, prompts[place], sampled[place], parsed, rewards))
    return rollouts


def encode_instance(actor: Actor, instance: Instance) -> list[int]:
    texts = [passage.text for passage in instance.passages]
    return encode_window(actor.tokenizer, actor.prompt, instance.query, texts)[0]


def sample_shared(
    actor: Actor,
    batch: Sequence[tuple[int, Instance]],
    seed: tuple[int, ...],
    settings,
    stop: StopSignal,
    device: torch.device,
) -> list[Rollout]:
    """`sample_and_score`, each process its share: about as many tokens to read and, as far as can
    be known before, to write. All rollouts, on every process; Interrupted on all after a signal."""
    to_write = settings.group_size * settings.max_new_tokens
    costs = [len(encode_instance(actor, instance)) + to_write for _, instance in batch]
    share = [batch[i] for i in balanced(costs, dist.get_world_size())[dist.get_rank()]]
    mine = stop.cut_short(lambda: sample_and_score(actor, share, seed, settings))
    if stop.agreed(device):
        raise Interrupted
    return sorted((r for part in all_gather(mine) for r in part), key=lambda r: r.place)


def score(task: Task, parsed: list[Parsed], instance: Instance, settings) -> list[float]:
    """The rewards of one group."""
    reward = task.rewards[settings.reward or next(iter(task.rewards))]
    return [reward(p, instance.grades, instance.judged, settings.weights) for p in parsed]
