"""Pay for a prompt once in sampling: a prompt is read and kept once for all of its responses.

Responses to many prompts are under way at once. Each step adds a token to every one of them: its
attention over the prompt (whose keys and values all responses of a group share) and over its own
tokens are two parts, merged as in packed.py. Finished responses leave, waiting requests join.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from engine.cache import SharedCache
from engine.policy import Policy, logits_of


@dataclass(frozen=True)
class Request:
    """Ask for `samples` responses to one prompt."""

    ticket: Hashable  # comes back with the responses
    prompt: Sequence[int]
    samples: int = 1
    prefix: int = 0  # so many tokens at its front also begin other requests: read them once
    seed: tuple[int, ...] = ()  # the responses depend on this and the weights, not on the batch


@dataclass
class Sample:
    """One response: its tokens, and their log-probabilities under the sampling distribution
    (at temperature 0, which is greedy, under softmax(logits))."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False
    finished: bool = False  # done by an end-of-sequence token, not by the length limit
    finite: bool = True  # False: it ends where logits were not finite


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row of logits [R, V], by inverting the cumulative distribution at
    uniforms [R] in [0, 1): (tokens [R], logprobs [R]). Temperature 0 takes the likeliest."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        total = cumulative[:, -1:]
        # Rounding must not reach past the last token that has any probability.
        at = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, at, right=True)[:, 0]
        # Logits that are not finite point past the end; the caller sees it by the logprob.
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Sampler:
    """Samples responses to many requests at once: each prompt is read once, finished responses
    leave the batch, waiting requests join it.

    `submit` a request, `collect` those that are complete. The responses depend on the request's
    seed and the weights alone (to rounding), whatever else is in the batch.
    """

    def __init__(
        self,
        policy: Policy,
        eos: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,  # 0: greedy
        max_in_flight: int = 64,  # responses; more memory, and more work per pass
        on_token: Callable[[Hashable, Sample], None] | None = None,  # (ticket, what has grown)
    ):
        self.policy, self.eos, self.max_new_tokens = policy, set(eos), max_new_tokens
        self.temperature, self.max_in_flight, self.on_token = temperature, max_in_flight, on_token
        self.waiting: deque[Request] = deque()
        self.prefixes: OrderedDict[tuple[int, ...], DynamicCache] = OrderedDict()
        self.cache = SharedCache(max_new_tokens, policy.lm.device)
        self.rows: list[tuple[Hashable, Sample]] = []  # of the batch, in its order
        self.groups: dict[Hashable, list[Sample]] = {}  # under way, by ticket
        self.uniforms = self.last = None  # [R, max_new_tokens], [R]

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    @torch.no_grad()
    def collect(self) -> list[tuple[Hashable, list[Sample]]]:
        """Go on until at least one request is complete; (ticket, its samples) for each that is.
        Empty where nothing was submitted."""
        complete: list[tuple[Hashable, list[Sample]]] = []
        while not complete and (self.waiting or self.rows):
            while self.waiting and (not self.rows or self.fits(len(self.rows))):
                complete += self.policy(self.admit, self.waiting.popleft())
            if self.rows and not complete:
                complete += self.policy(self.step)
        return complete

    def fits(self, rows: int) -> bool:
        """Whether the next request may join so many responses."""
        return rows + self.waiting[0].samples <= self.max_in_flight

    def admit(self, policy: Policy, request: Request) -> list[tuple[Hashable, list[Sample]]]:
        """Read a prompt and draw the first token of each of its responses."""
        logits, read = self.read_prompt(request.prompt, request.prefix)
        uniforms = torch.tensor(
            np.stack(
                [
                    np.random.default_rng([*request.seed, i]).random(
                        self.max_new_tokens, np.float32
                    )
                    for i in range(request.samples)
                ]
            ),
            device=logits.device,
        )
        self.cache.add(read, len(request.prompt), request.samples)
        new = [(request.ticket, Sample()) for _ in range(request.samples)]
        self.groups[request.ticket] = [sample for _, sample in new]
        last = self.draw(logits.expand(request.samples, -1), uniforms[:, 0], new)
        self.rows += new
        self.uniforms = uniforms if self.last is None else torch.cat([self.uniforms, uniforms])
        self.last = last if self.last is None else torch.cat([self.last, last])
        return self.release()

    def step(self, policy: Policy) -> list[tuple[Hashable, list[Sample]]]:
        """One more token for every response under way."""
        positions, held = self.cache.begin_step()
        hidden = policy.lm.base_model(
            input_ids=self.last[:, None], position_ids=positions, use_cache=False, shared=self.cache
        ).last_hidden_state[:, 0]
        self.cache.own_len += 1
        at = (held + 1).clamp(max=self.max_new_tokens - 1)  # one that is done may linger
        uniforms = self.uniforms.gather(1, at[:, None])[:, 0]
        self.last = self.draw(logits_of(policy.lm, hidden), uniforms, self.rows)
        return self.release()

    def draw(self, logits: Tensor, uniforms: Tensor, rows: list) -> Tensor:
        tokens, logprobs = draw(logits, uniforms, self.temperature)
        for (ticket, sample), token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            if not sample.done:
                sample.tokens.append(token)
                sample.logprobs.append(logprob)
                sample.finite = isfinite(logprob)
                sample.finished = sample.finite and token in self.eos
                full = len(sample.tokens) == self.max_new_tokens
                sample.done = sample.finished or full or not sample.finite
                if self.on_token:
                    self.on_token(ticket, sample)
        return tokens

    def release(self) -> list[tuple[Hashable, list[Sample]]]:
        """The requests that are complete now. Responses that are done leave the batch where the
        next request can take their place, or where they are a quarter of it: leaving costs a copy
        of the others' keys and values."""
        live = [i for i, (_, sample) in enumerate(self.rows) if not sample.done]
        done = len(self.rows) - len(live)
        fits = self.waiting and self.fits(len(live)) and not self.fits(len(self.rows))
        if done and (fits or not live or done >= len(self.rows) / 4):
            self.rows = [self.rows[i] for i in live]
            self.uniforms, self.last = self.uniforms[live], self.last[live]
            self.cache.keep(live)
        complete = [t for t, samples in self.groups.items() if all(s.done for s in samples)]
        return [(ticket, self.groups.pop(ticket)) for ticket in complete]

    def read_prompt(self, prompt: Sequence[int], prefix: int) -> tuple[Tensor, DynamicCache]:
        """The logits [V] after a prompt, and its keys and values."""

        def read(tokens: Sequence[int], past: DynamicCache) -> Tensor:
            ids = torch.tensor([tokens], device=self.policy.lm.device)
            out = self.policy.lm(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            return out.logits

        with self.policy.plain() as lm:
            cache, prefix = DynamicCache(config=lm.config), min(prefix, len(prompt) - 1)
            if prefix:
                key = tuple(prompt[:prefix])
                if key not in self.prefixes:
                    read(key, cache)
                    self.prefixes[key] = cache
                    if len(self.prefixes) > 2 * self.max_in_flight:
                        self.prefixes.popitem(last=False)
                self.prefixes.move_to_end(key)
                cache = deepcopy(self.prefixes[key])
            return read(prompt[prefix:], cache)[0, -1], cache
