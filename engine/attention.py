"""Attention over stretches of keys that hands out its log-sum-exp, so that parts can be merged.

A part of the keys gives an output o and the log-sum-exp lse of its scores; with the weights
exp(lse_a) / (exp(lse_a) + exp(lse_b)) two parts add up to what one softmax over all keys gives.
The kernels are PyTorch's own flash attention, called below scaled_dot_product_attention because
only there they hand out lse; they accumulate scores in float32, whatever the type of q, k and v.
On CUDA one call serves all stretches; the CPU's kernel is called once for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Stretches of tokens, one behind the other: the i-th goes from starts[i] to starts[i + 1]."""

    starts: list[int]
    cumulative: Tensor  # the same, int32, on the device
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> "Spans":
        starts = [0, *accumulate(lengths)]
        return cls(starts, torch.tensor(starts, dtype=torch.int32, device=device), max(lengths))

    def slices(self) -> Iterator[slice]:
        return (slice(start, end) for start, end in pairwise(self.starts))


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over keys a and b together, from the attention over each.

    o: outputs [..., D]; lse: log-sum-exp of the scores [...], float32. Returns (o, lse).
    """
    return merge_outputs(o_a, lse_a, o_b, lse_b), torch.logaddexp(lse_a, lse_b)


def merge_outputs(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Tensor:
    weight = (lse_b - lse_a).sigmoid().unsqueeze(-1)
    return torch.lerp(o_a.float(), o_b.float(), weight).to(o_a.dtype)


def band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """What to add to scores [queries, keys], where the last query stands at the last key: 0 for the
    `window` keys up to and with a query's own, -inf for the others."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = distance - torch.arange(keys, device=device)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys, device=device).masked_fill_(hidden, -torch.inf)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Spans,
    keys: Spans,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attention of each stretch of queries to its stretch of keys: (o, lse, state for backward).

    q: [T_q, H, D]; k, v: [T_k, H_kv, D], H_kv divides H; o: [T_q, H, D]; lse: [H, T_q], float32.
    causal: a query sees the keys up to its own place, the last query standing at the last key;
        through a `window`, only so many of them.
    """
    if on_gpu(q):
        o, lse, *state, _ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, *gpu_spans(queries, keys), 0.0, causal, False),
            **gpu_options(scale, window),
        )
        return o, lse, state
    o, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for own, seen in zip(queries.slices(), keys.slices()):
        part = by_heads(q[own], k[seen], v[seen])
        how = cpu_options(part, causal, scale, window)
        part_o, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, **how)
        o[own], lse[:, own] = part_o[0].transpose(0, 1), part_lse[0]
    return o, lse, []


def flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    state: list[Tensor],
    queries: Spans,
    keys: Spans,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `flash`. Given the merged o and lse, exp(scores - lse) is each key's share of
    the whole attention, so the gradients of several parts simply add up."""
    if on_gpu(q):
        return torch.ops.aten._flash_attention_backward(
            *(do, q, k, v, o, lse.contiguous(), *gpu_spans(queries, keys), 0.0, causal, *state),
            **gpu_options(scale, window),
        )
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for own, seen in zip(queries.slices(), keys.slices()):
        part = by_heads(do[own], q[own], k[seen], v[seen], o[own])
        how = cpu_options(part[1:], causal, scale, window)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *part, lse[None, :, own].contiguous(), how.pop("dropout_p"), how.pop("is_causal"), **how
        )
        for whole, place, grad in zip((dq, dk, dv), (own, seen, seen), grads):
            whole[place] = grad[0].transpose(0, 1)
    return dq, dk, dv


def on_gpu(x: Tensor) -> bool:
    """Whether the GPU's kernels serve x. They do on the meta device, where shapes are checked."""
    return x.is_cuda or x.is_meta


def gpu_spans(queries: Spans, keys: Spans) -> tuple[Tensor, Tensor, int, int]:
    return queries.cumulative, keys.cumulative, queries.longest, keys.longest


def gpu_options(scale: float, window: int | None) -> dict:
    if window is None:
        return {"scale": scale}
    return {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}


def by_heads(*tensors: Tensor) -> list[Tensor]:
    """[T, H, D] -> [1, H, T, D], as the CPU's kernel wants them."""
    return [x.transpose(0, 1)[None] for x in tensors]


def cpu_options(part: Sequence[Tensor], causal: bool, scale: float, window: int | None) -> dict:
    q, k = part[:2]
    mask = None if window is None else band(q.shape[2], k.shape[2], window, q.device)[None, None]
    return {
        "dropout_p": 0.0,
        "is_causal": causal and window is None,
        "attn_mask": mask,
        "scale": scale,
    }
