"""Pay for a prompt once in an update: exact attention and log-probabilities of a packed row.

GRPO asks one prompt of P tokens for G responses of up to C tokens each. Laid out as G padded
sequences, every phase works on G * (P + C) tokens; the distinct ones are only P + G * C. Here
groups are packed into one row, their prompts first:

    tokens     | prompt a       | prompt b     | a1    | a2  | a3      | b1  | b2    |
    positions  | 0 1 2 ...  P-1 | 0 1 ...  Q-1 | P ... | P ..| P ...   | Q ..| Q ... |

    a2 attends to prompt a and to itself, never to a1 or a3; b attends to nothing of a.

Attention over [prompt; own tokens] is computed in two parts (attention.py): every prompt and every
response attends to itself, then a group's responses attend to their prompt, in one rectangle. Both
are ordinary flash attention, and merging them is exact. Layers with a sliding window see little
of the prompt, so there each response attends to a copy of its prompt's end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.attention import Spans, flash, flash_backward, merge
from engine.policy import Policy, logits_of

# --------------------------------------------------------------------------------- the packed row


@dataclass(frozen=True)
class Group:
    """One prompt with the responses sampled from it, as token ids."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Row:
    """Groups packed into one row of T tokens, of which the last N are R responses of at most C.

    All indexes are made here, once, from lengths that the host knows: no layer waits for a device.
    """

    tokens: Tensor  # [1, T] int64
    positions: Tensor  # [1, T] int64
    everything: Spans  # each prompt, then each response
    prompts: Spans  # each prompt
    groups: Spans  # all responses of a prompt; counted, like the next, from the first response
    responses: Spans  # each response
    before: Tensor  # [N] int64: where in the row the token before each response token stands
    read: Tensor  # [M] int64: the same places, each once: where last hidden states are read
    cells: tuple[Tensor, Tensor]  # each [N] int64: the place of each response token in [R, C]
    mask: Tensor  # [R, C] bool: which of [R, C] are tokens
    tails: dict[int, tuple[Tensor, Spans]] = field(default_factory=dict)  # see `tail`

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """q [1, H, T, D]; k, v [1, H_kv, T, D] -> [1, T, H, D]. `window`: how many tokens the
        layer's attention reaches back, itself included; None: to the first."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        if window is None:
            return SharedPromptAttention.apply(q, k, v, self, scale)[None]
        return windowed_attention(q, k, v, self, scale, window)[None]

    def tail(self, window: int) -> tuple[Tensor, Spans]:
        """Where in the row the keys stand that each response can see through a window: the end of
        its prompt, then itself; and how those of one response lie behind those of the other."""
        if window not in self.tails:
            places, lengths, n = [], [], self.prompts.starts[-1]
            responses = self.responses.slices()
            for prompt, group in zip(self.prompts.slices(), self.groups.slices()):
                seen = range(max(prompt.start, prompt.stop - window + 1), prompt.stop)
                end = group.start
                while end < group.stop:
                    own = next(responses)
                    end = own.stop
                    places += [*seen, *range(n + own.start, n + own.stop)]
                    lengths.append(len(seen) + own.stop - own.start)
            device = self.tokens.device
            self.tails[window] = torch.tensor(places, device=device), Spans.of(lengths, device)
        return self.tails[window]


def pack_row(groups: Sequence[Group], device: torch.device | str = "cpu") -> Row:
    """Lay out groups as drawn above. Every prompt and response must hold at least one token."""
    if not all(group.prompt and all(group.responses) for group in groups):
        raise ValueError("a prompt and its responses must each hold at least one token")
    prompts = [len(group.prompt) for group in groups]
    responses = [response for group in groups for response in group.responses]
    lengths = [len(response) for response in responses]
    tokens = [token for part in (*(g.prompt for g in groups), *responses) for token in part]
    positions = [i for size in prompts for i in range(size)]
    before, end = [], 0
    for group in groups:
        end += len(group.prompt)
        for response in group.responses:
            positions += range(len(group.prompt), len(group.prompt) + len(response))
            first = len(positions) - len(response)
            before += [end - 1, *range(first, len(positions) - 1)]
    cells = zip(*((r, c) for r, length in enumerate(lengths) for c in range(length)))
    return Row(
        tokens=torch.tensor([tokens], device=device),
        positions=torch.tensor([positions], device=device),
        everything=Spans.of(prompts + lengths, device),
        prompts=Spans.of(prompts, device),
        groups=Spans.of([sum(map(len, group.responses)) for group in groups], device),
        responses=Spans.of(lengths, device),
        before=torch.tensor(before, device=device),
        read=torch.tensor(sorted(set(before)), device=device),
        cells=tuple(torch.tensor(places, device=device) for places in cells),
        mask=(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device),
    )


# -------------------------------------------------------------------------------- its attention


class SharedPromptAttention(torch.autograd.Function):
    """Every prompt and response to itself, and merged with it a group's responses to their prompt.

    q: [T, H, D]; k, v: [T, H_kv, D].
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
        n = row.prompts.starts[-1]
        o, lse, own_state = flash(q, k, v, row.everything, row.everything, True, scale)
        o_p, lse_p, state = flash(q[n:], k[:n], v[:n], row.groups, row.prompts, False, scale)
        o[n:], lse.T[n:] = merge(o[n:], lse.T[n:], o_p, lse_p.T)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.row, ctx.scale, ctx.own_state, ctx.state = row, scale, own_state, state
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple:
        q, k, v, o, lse = ctx.saved_tensors
        row, scale, n = ctx.row, ctx.scale, ctx.row.prompts.starts[-1]
        dq, dk, dv = flash_backward(
            do, q, k, v, o, lse, ctx.own_state, row.everything, row.everything, True, scale
        )
        queries, keys = (x[n:] for x in (do, q)), (x[:n] for x in (k, v))
        part_q, part_k, part_v = flash_backward(
            *(*queries, *keys, o[n:], lse[:, n:], ctx.state),
            *(row.groups, row.prompts, False, scale),
        )
        dq[n:] += part_q
        dk[:n] += part_k
        dv[:n] += part_v
        return dq, dk, dv, None, None


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float, window: int
) -> Tensor:
    """As SharedPromptAttention, where each token sees only `window` tokens back, itself included:
    every prompt to itself, and every response to itself behind a copy of its prompt's end."""
    n = row.prompts.starts[-1]
    seen, spans = row.tail(window)
    of_prompts = SpanAttention.apply(q[:n], k[:n], v[:n], row.prompts, row.prompts, scale, window)
    of_responses = SpanAttention.apply(q[n:], k[seen], v[seen], row.responses, spans, scale, window)
    return torch.cat([of_prompts, of_responses])


class SpanAttention(torch.autograd.Function):
    """`flash` through a window, with its gradient."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float, window: int
    ) -> Tensor:
        ctx.how = queries, keys, True, scale, window
        o, lse, ctx.state = flash(q, k, v, *ctx.how)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple:
        return *flash_backward(do, *ctx.saved_tensors, ctx.state, *ctx.how), None, None, None, None


# ------------------------------------------------------------------------------ log-probabilities


def response_logprobs(
    policy: Policy, row: Row, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """log pi(token | prompt, tokens before) of every response token: [R, C] float32, 0 where
    `row.mask` is False.

    pi is the distribution that was sampled from: softmax(logits / temperature). The logits, a
    vocabulary wide, exist for `chunk` tokens at a time, in backward too (computed once more).
    """
    hidden = policy.lm.base_model(
        input_ids=row.tokens, position_ids=row.positions, use_cache=False, shared=row
    ).last_hidden_state[0]

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(policy.lm, hidden).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    states, targets = hidden[row.before], row.tokens[0, row.prompts.starts[-1] :]
    logprobs = torch.cat(
        [
            checkpoint(chunk_logprobs, h, t, use_reentrant=False)
            for h, t in zip(states.split(chunk), targets.split(chunk))
        ]
    )
    return torch.zeros(row.mask.shape, device=logprobs.device).index_put(row.cells, logprobs)
