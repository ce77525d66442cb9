"""Pay for a prompt once: exact attention, log-probabilities and sampling for groups of responses.

GRPO asks one prompt of P tokens for G responses of up to C tokens each. Laid out as G padded
sequences, every phase works on G * (P + C) tokens; the distinct ones are only P + G * C. Here a
group is one packed row, and so are several groups one after the other:

    tokens     | prompt a          | a1    | a2  | a3      | prompt b       | b1  | b2    |
    positions  | 0 1 2 ...     P-1 | P ... | P ..| P ...   | 0 1 ...     Q-1 | Q ..| Q ... |

    a2 attends to prompt a and to itself, never to a1 or a3; b attends to nothing of a.

Attention over [prompt; own tokens] is computed in two parts, each an ordinary flash attention
without a mask, and merged exactly: each part returns its output o and the log-sum-exp lse of its
scores, and with the weights exp(l_part) / (exp(l_prompt) + exp(lse_own)) the sum of both is what
one softmax over all keys would give. While sampling, a prompt's keys and values likewise exist
once per group, and only what each response adds is stored per response.

The model is any Hugging Face decoder whose attention goes through transformers'
AttentionInterface; its code stays as it is. In reading order: the merge, the packed row, its
attention, log-probabilities, and sampling.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over keys a and b together, from the attention over each.

    o: outputs [..., D]; lse: log-sum-exp of the scores [...], float32. Returns (o, lse).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    o = o_a * (lse_a - lse).exp().unsqueeze(-1) + o_b * (lse_b - lse).exp().unsqueeze(-1)
    return o.to(o_a.dtype), lse


# --------------------------------------------------------------------------------- the packed row


@dataclass(frozen=True)
class Group:
    """One prompt with the responses sampled from it, as token ids."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Row:
    """Several groups packed into one row of T tokens, holding R responses of at most C tokens."""

    tokens: Tensor  # [1, T] int64
    positions: Tensor  # [1, T] int64
    prompts: list[slice]  # of each group, in the row
    responses: list[slice]  # of each group: all its responses, which directly follow its prompt
    own: Tensor  # [R, C] int64: where in the row each response's tokens stand, its last repeated
    before: Tensor  # [R, C] int64: where the token before each of those stands
    mask: Tensor  # [R, C] bool: False where `own` only repeats


def pack_row(groups: Sequence[Group], device: torch.device | str = "cpu") -> Row:
    """Lay out groups as drawn above. Every prompt and response must hold at least one token."""
    tokens, positions, prompts, responses, own, before = [], [], [], [], [], []
    for group in groups:
        if not group.prompt or not all(group.responses):
            raise ValueError("a prompt and its responses must each hold at least one token")
        start, size = len(tokens), len(group.prompt)
        tokens += group.prompt
        positions += range(size)
        prompts.append(slice(start, start + size))
        for response in group.responses:
            at = len(tokens)
            own.append(torch.arange(at, at + len(response)))
            before.append(torch.tensor([start + size - 1, *range(at, at + len(response) - 1)]))
            tokens += response
            positions += range(size, size + len(response))
        responses.append(slice(start + size, len(tokens)))
    lengths = torch.tensor([len(places) for places in own])
    width = int(lengths.max())
    return Row(
        tokens=torch.tensor([tokens], device=device),
        positions=torch.tensor([positions], device=device),
        prompts=prompts,
        responses=responses,
        own=torch.stack([F.pad(p, (0, width - len(p)), value=int(p[-1])) for p in own]).to(device),
        before=torch.stack([F.pad(p, (0, width - len(p))) for p in before]).to(device),
        mask=(torch.arange(width) < lengths[:, None]).to(device),
    )


# -------------------------------------------------------------------------- its attention (update)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple:
    """PyTorch's flash kernel of this device: (o [B, H, S, D], lse [B, H, S], state for backward).

    The kernel is called below scaled_dot_product_attention, because only here it hands out lse.
    """
    if q.is_cuda:
        o, lse, *state, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return o, lse, state
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )
    return o, lse, []


def flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    state: list,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one part. Given the merged o and lse, exp(scores - lse) is each key's share
    of the whole attention, so the parts' gradients simply add up."""
    if q.is_cuda:
        cum_q, cum_k, max_q, max_k, seed, offset = state
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, scale=scale
    )


class SharedPromptAttention(torch.autograd.Function):
    """Attention of a packed row: q [1, H, T, D]; k, v [1, H_kv, T, D]; H_kv divides H.

    Three kinds of parts: each prompt to itself, all responses of a group to its prompt (one
    rectangle), and each response to itself (a batch of R, padded to C).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
        o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        own_o, own_lse, own_state = flash(*(take(x, row.own) for x in (q, k, v)), True, scale)
        put(o, row, own_o)
        put(lse, row, own_lse)
        states = []
        for p, r in zip(row.prompts, row.responses):
            kp, vp = k[:, :, p], v[:, :, p]
            o[:, :, p], lse[:, :, p], prompt_state = flash(q[:, :, p], kp, vp, True, scale)
            o_p, lse_p, response_state = flash(q[:, :, r], kp, vp, False, scale)
            o[:, :, r], lse[:, :, r] = merge(o[:, :, r], lse[:, :, r], o_p, lse_p)
            states.append((prompt_state, response_state))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.row, ctx.scale, ctx.own_state, ctx.states = row, scale, own_state, states
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple:
        q, k, v, o, lse = ctx.saved_tensors
        row, scale = ctx.row, ctx.scale
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # A repeated token of the padding repeats finite scores too; its zero gradient ends there.
        own_do = take(do, row.own).masked_fill(~row.mask[:, None, :, None], 0)
        own = (take(x, row.own) for x in (q, k, v, o, lse))
        own_grads = flash_backward(own_do, *own, ctx.own_state, True, scale)
        for whole, part in zip((dq, dk, dv), own_grads):
            put(whole, row, part)
        for p, r, states in zip(row.prompts, row.responses, ctx.states):
            for s, state, causal in ((p, states[0], True), (r, states[1], False)):
                part_q, part_k, part_v = flash_backward(
                    do[:, :, s], q[:, :, s], k[:, :, p], v[:, :, p], o[:, :, s],
                    lse[:, :, s].contiguous(), state, causal, scale,
                )  # fmt: skip
                dq[:, :, s] += part_q
                dk[:, :, p] += part_k
                dv[:, :, p] += part_v
        return dq, dk, dv, None, None


def take(x: Tensor, places: Tensor) -> Tensor:
    """[1, H, T, ...] -> [R, H, C, ...]: the tokens of each response, from the packed row."""
    return x[0][:, places].transpose(0, 1).contiguous()


def put(x: Tensor, row: Row, part: Tensor) -> None:
    """Write [R, H, C, ...] back into [1, H, T, ...], without the padding."""
    x[0].transpose(0, 1)[row.own[row.mask]] = part.transpose(1, 2)[row.mask].to(x.dtype)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    shared: "Row | Batch",
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `shared` comes through the model's own forward."""
    for feature in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise NotImplementedError(f"{module.config.model_type}: attention with {feature}")
    if dropout:
        raise NotImplementedError("attention dropout: set attention_dropout to 0 in the config")
    if isinstance(shared, Row):
        out = SharedPromptAttention.apply(query, key, value, shared, scaling)
    else:
        out = shared.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


class Policy(nn.Module):
    """A causal language model with one door: `policy(compute, ...)` runs `compute(policy, ...)`.

    FSDP gathers sharded weights when a module's forward is entered, so whatever we do with the
    weights, sampling or scoring, enters here.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.prefill_attention = lm.config._attn_implementation  # reads prompts when sampling
        lm.config._attn_implementation = "shared_prompt"

    def forward(self, compute, *args, **kwargs):
        return compute(self, *args, **kwargs)


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
    head = policy.lm.get_output_embeddings()

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    states, targets = hidden[row.before[row.mask]], row.tokens[0, row.own[row.mask]]
    logprobs = torch.cat(
        [
            checkpoint(chunk_logprobs, h, t, use_reentrant=False)
            for h, t in zip(states.split(chunk), targets.split(chunk))
        ]
    )
    return torch.zeros(row.mask.shape, device=logprobs.device).masked_scatter(row.mask, logprobs)


# --------------------------------------------------------------------------------------- sampling


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


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """One token per row of logits [R, V], by inverting the cumulative distribution at
    uniforms [R] in [0, 1): (tokens [R], logprobs [R]). Temperature 0 takes the likeliest."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        if top_p < 1:
            p, order = logprobs.exp().sort(-1, descending=True)
            outside = torch.zeros_like(p, dtype=torch.bool).scatter(
                -1, order, p.cumsum(-1) - p >= top_p
            )
            logprobs = logprobs.masked_fill(outside, -torch.inf).log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        total = cumulative[:, -1:]
        # Rounding must not reach past the last token that has any probability.
        at = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, at, right=True)[:, 0]
        # Logits that are not finite point past the end; the update will see and skip them.
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Batch:
    """The keys and values of S prompts (once each) and of the R responses under way to them."""

    def __init__(self):
        self.prompt_kv: list[tuple[Tensor, Tensor]] = []  # per layer, each [S, H_kv, P, D]
        self.own_kv: list[tuple[Tensor, Tensor]] = []  # per layer, each [R, H_kv, T, D]
        self.prompt_len = self.own_len = self.slot = None  # [S], [R], [R]: each response's prompt

    def add(self, kv: list[tuple[Tensor, Tensor]], samples: int) -> None:
        """Take in one prompt, whose keys and values are [1, H_kv, P, D] per layer."""
        device, (_, heads, size, dim) = kv[0][0].device, kv[0][0].shape
        own = [[x.new_zeros(samples, heads, 0, dim) for x in layer] for layer in kv]
        new_len, new_own = (torch.tensor(x, device=device) for x in ([size], [0] * samples))
        if self.slot is None:
            self.prompt_kv, self.own_kv = kv, own
            self.prompt_len, self.own_len, self.slot = new_len, new_own, new_own.clone()
        else:
            self.slot = torch.cat([self.slot, new_own + len(self.prompt_len)])
            self.prompt_len = torch.cat([self.prompt_len, new_len])
            self.own_len = torch.cat([self.own_len, new_own])
            # One layer at a time, here and below, so that never more than one is there twice.
            for layer in range(len(kv)):
                self.prompt_kv[layer] = stack(self.prompt_kv[layer], kv[layer])
                self.own_kv[layer] = stack(self.own_kv[layer], own[layer])
        self.place_rows()

    def keep(self, rows: list[int]) -> None:
        """Drop all other responses, and the prompts that no response is left of."""
        rows = torch.tensor(rows, dtype=torch.long, device=self.slot.device)
        slots, self.slot = self.slot[rows].unique(return_inverse=True)
        self.own_len, self.prompt_len = self.own_len[rows], self.prompt_len[slots]
        p, t = (int(x.max()) if len(x) else 0 for x in (self.prompt_len, self.own_len))
        for layer in range(len(self.own_kv)):
            self.prompt_kv[layer] = [x[slots, :, :p] for x in self.prompt_kv[layer]]
            self.own_kv[layer] = [x[rows, :, :t] for x in self.own_kv[layer]]
        self.place_rows()

    def place_rows(self) -> None:
        """Number each prompt's responses, so that their queries form one matrix per prompt."""
        counts = self.slot.bincount(minlength=len(self.prompt_len))
        first = counts.cumsum(0) - counts  # responses stand in the order of their prompts
        self.place = torch.arange(len(self.slot), device=self.slot.device) - first[self.slot]
        width = torch.arange(int(counts.max()) if len(counts) else 0, device=self.slot.device)
        self.rows = (first[:, None] + width).clamp(max=max(len(self.slot) - 1, 0))  # [S, G]

    def begin_step(self) -> Tensor:
        """Make room for one more token per response; the positions [R, 1] they stand at."""
        self.width = int(self.own_len.max()) + 1
        if self.width > self.own_kv[0][0].shape[2]:
            more = max(64, self.width // 2)
            for layer in range(len(self.own_kv)):
                self.own_kv[layer] = [F.pad(x, (0, 0, 0, more)) for x in self.own_kv[layer]]
        arange = torch.arange(max(self.width, int(self.prompt_len.max())), device=self.slot.device)
        self.own_hidden = (arange[: self.width] > self.own_len[:, None])[:, None, None]
        prompt_width = self.prompt_kv[0][0].shape[2]
        self.prompt_hidden = (arange[:prompt_width] >= self.prompt_len[:, None])[:, None, None]
        return (self.prompt_len[self.slot] + self.own_len)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One new token per response: q [R, H, 1, D], k and v [R, H_kv, 1, D] -> [R, H, 1, D]."""
        own_k, own_v = self.own_kv[layer]
        every = torch.arange(len(q), device=q.device)
        own_k[every, :, self.own_len], own_v[every, :, self.own_len] = k[:, :, 0], v[:, :, 0]
        own_k, own_v = own_k[:, :, : self.width], own_v[:, :, : self.width]
        prompt_k, prompt_v = self.prompt_kv[layer]

        # The H / H_kv query heads of one key head, and a prompt's responses, are rows of a matrix.
        heads, dim = own_k.shape[1], own_k.shape[3]
        q_own = q.reshape(len(q), heads, -1, dim)
        q_prompt = q_own[self.rows].transpose(1, 2)  # [S, H_kv, G, H / H_kv, D]
        o_own, lse_own = part(q_own, own_k, own_v, self.own_hidden, scale)
        o, lse = part(q_prompt.flatten(2, 3), prompt_k, prompt_v, self.prompt_hidden, scale)
        o = o.view(q_prompt.shape)[self.slot, :, self.place]
        lse = lse.view(q_prompt.shape[:-1])[self.slot, :, self.place]
        return merge(o, lse, o_own, lse_own)[0].view(q.shape)


def part(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, written out: (o, lse) as `merge` wants them."""
    scores = (q @ k.transpose(-1, -2)).float().mul_(scale).masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse.unsqueeze(-1)).exp_().to(v.dtype) @ v, lse


def stack(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """Concatenate two [N, H, length, D] pairs of keys and values, padded to the longer."""
    longest = max(old[0].shape[2], new[0].shape[2])
    return [
        torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in pair])
        for pair in zip(old, new)
    ]


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
        top_p: float = 1.0,
        max_in_flight: int = 64,  # responses; more memory, and more work per pass
    ):
        self.policy, self.eos, self.max_new_tokens = policy, set(eos), max_new_tokens
        self.temperature, self.top_p, self.max_in_flight = temperature, top_p, max_in_flight
        self.waiting: deque[Request] = deque()
        self.prefixes: OrderedDict[tuple[int, ...], DynamicCache] = OrderedDict()
        self.batch = Batch()
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
            while self.waiting and (
                not self.rows or len(self.rows) + self.waiting[0].samples <= self.max_in_flight
            ):
                complete += self.policy(self.admit, self.waiting.popleft())
            if self.rows and not complete:
                complete += self.policy(self.step)
        return complete

    def admit(self, policy: Policy, request: Request) -> list[tuple[Hashable, list[Sample]]]:
        """Read a prompt and draw the first token of each of its responses."""
        logits, kv = self.read_prompt(request.prompt, request.prefix)
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
        self.batch.add(kv, request.samples)
        new = [(request.ticket, Sample()) for _ in range(request.samples)]
        self.groups[request.ticket] = [sample for _, sample in new]
        last = self.draw(logits.expand(request.samples, -1), uniforms[:, 0], new)
        self.rows += new
        self.uniforms = uniforms if self.last is None else torch.cat([self.uniforms, uniforms])
        self.last = last if self.last is None else torch.cat([self.last, last])
        return self.release()

    def step(self, policy: Policy) -> list[tuple[Hashable, list[Sample]]]:
        """One more token for every response under way."""
        positions = self.batch.begin_step()
        hidden = policy.lm.base_model(
            input_ids=self.last[:, None],
            position_ids=positions,
            use_cache=False,
            shared=self.batch,
        ).last_hidden_state[:, 0]
        self.batch.own_len += 1
        at = self.batch.own_len.clamp(max=self.max_new_tokens - 1)  # one that is done may linger
        uniforms = self.uniforms.gather(1, at[:, None])[:, 0]
        self.last = self.draw(policy.lm.get_output_embeddings()(hidden), uniforms, self.rows)
        return self.release()

    def draw(self, logits: Tensor, uniforms: Tensor, rows: list) -> Tensor:
        tokens, logprobs = draw(logits, uniforms, self.temperature, self.top_p)
        for (_, sample), token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            if not sample.done:
                sample.tokens.append(token)
                sample.logprobs.append(logprob)
                sample.finished = token in self.eos
                sample.done = sample.finished or len(sample.tokens) == self.max_new_tokens
        return tokens

    def release(self) -> list[tuple[Hashable, list[Sample]]]:
        """The requests that are complete now. Responses that are done leave the batch where
        others wait for their place, or where they are a quarter of it (leaving costs a copy)."""
        live = [i for i, (_, sample) in enumerate(self.rows) if not sample.done]
        done = len(self.rows) - len(live)
        if done and (self.waiting or not live or done >= len(self.rows) / 4):
            self.rows = [self.rows[i] for i in live]
            self.uniforms, self.last = self.uniforms[live], self.last[live]
            self.batch.keep(live)
        complete = [t for t, samples in self.groups.items() if all(s.done for s in samples)]
        return [(ticket, self.groups.pop(ticket)) for ticket in complete]

    def read_prompt(
        self, prompt: Sequence[int], prefix: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The logits [V] after a prompt, and each layer's keys and values [1, H_kv, P, D]."""

        def read(tokens: Sequence[int], past: DynamicCache) -> Tensor:
            ids = torch.tensor([tokens], device=self.policy.lm.device)
            out = self.policy.lm(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            return out.logits

        config = self.policy.lm.config
        config._attn_implementation = self.policy.prefill_attention
        try:
            cache, prefix = DynamicCache(config=config), min(prefix, len(prompt) - 1)
            if prefix:
                key = tuple(prompt[:prefix])
                if key not in self.prefixes:
                    read(key, cache)
                    self.prefixes[key] = cache
                    if len(self.prefixes) > 2 * self.max_in_flight:
                        self.prefixes.popitem(last=False)
                self.prefixes.move_to_end(key)
                cache = deepcopy(self.prefixes[key])
            logits = read(prompt[prefix:], cache)[0, -1]
        finally:
            config._attn_implementation = "shared_prompt"
        return logits, [(layer.keys, layer.values) for layer in cache.layers]
