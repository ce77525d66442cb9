"""What only a GPU runs, without one: the calls of its kernels, held against what the kernels are
documented to want, with a plain computation in their place."""

import pytest
import torch
from test_families import GROUPS, model
from test_packed import collect_all, naive_logprobs

from engine.packed import pack_row, response_logprobs
from engine.policy import Policy
from engine.sampler import Request, Sampler


def segments(q, k, cum_q, cum_k, max_q, max_k, seqused_k=None):
    """(queries, keys) of each sequence, as slices; and the kernels' demands."""
    assert cum_q.dtype == cum_k.dtype == torch.int32 and len(cum_q) == len(cum_k)
    assert q.dim() == k.dim() == 3 and q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k))
    assert cum_q[0] == cum_k[0] == 0 and cum_q[-1] == len(q) and cum_k[-1] == len(k)
    for i in range(len(cum_q) - 1):
        (a, b), (c, d) = cum_q[i : i + 2].tolist(), cum_k[i : i + 2].tolist()
        assert b - a <= max_q and d - c <= max_k
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32 and 0 < seqused_k[i] <= d - c
            d = c + int(seqused_k[i])
        yield slice(a, b), slice(c, d)


def scores(q, k, causal, scale, left, right) -> torch.Tensor:
    """[H, Q, K], -inf where hidden: the last query stands at the last key."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    at = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    right = 0 if causal else right
    hidden = torch.zeros_like(at, dtype=torch.bool)
    if right is not None:
        hidden |= at < -right
    if left is not None:
        hidden |= at > left
    return s.masked_fill(hidden, -torch.inf)


def forward(
    q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale,
    window_size_left=None, window_size_right=None, seqused_k=None,
):  # fmt: skip
    assert dropout == 0 and not debug
    o, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q))
    for own, seen in segments(q, k, cum_q, cum_k, max_q, max_k, seqused_k):
        s = scores(q[own], k[seen], causal, scale, window_size_left, window_size_right)
        values = v[seen].repeat_interleave(q.shape[1] // v.shape[1], 1).double()
        o[own] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values).to(q.dtype)
        lse[:, own] = s.logsumexp(-1).float()
    return o, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)


def backward(
    do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, *, scale,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert dropout == 0 and lse.shape == (q.shape[1], len(q)) and lse.is_contiguous()
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for own, seen in segments(q, k, cum_q, cum_k, max_q, max_k):
        s = scores(q[own], k[seen], causal, scale, window_size_left, window_size_right)
        p = (s - lse[:, own, None]).exp()
        keys, values = (x[seen].repeat_interleave(group, 1).double() for x in (k, v))
        down, out = do[own].double(), o[own].double()
        dp = torch.einsum("qhd,khd->hqk", down, values) - (down * out).sum(-1).T[..., None]
        ds = p * dp * scale
        dq[own] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
        for grad, part in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[own].double())),
            (dv, torch.einsum("hqk,qhd->khd", p, down)),
        ):
            grad[seen] = part.unflatten(1, (-1, group)).sum(2).to(q.dtype)
    return dq, dk, dv


@pytest.fixture
def gpu(monkeypatch):
    for module in ("attention", "cache"):
        monkeypatch.setattr(f"engine.{module}.on_gpu", lambda x: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


@pytest.mark.parametrize("name", ["qwen2", "mistral window", "gemma3_text", "qwen2 window"])
def test_the_gpus_update_is_exact(gpu, name):
    plain, ours = model(name), Policy(model(name))
    expected = naive_logprobs(plain, GROUPS, 0.8)
    got = ours(response_logprobs, pack_row(GROUPS), 0.8)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for logprobs in (expected, got):
        (logprobs * weights).sum().backward()
    for (parameter, p), o in zip(plain.named_parameters(), ours.lm.parameters(), strict=True):
        assert (o.grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, parameter


@pytest.mark.parametrize("name", ["qwen2", "mistral window", "gemma3_text"])
def test_the_gpus_sampling_is_exact(gpu, name):
    """Prompts of many lengths, groups of many sizes, responses that end at any time."""
    plain, ours = model(name), Policy(model(name))
    sampler = Sampler(ours, [3, 5, 7], 14, temperature=0, max_in_flight=6)
    prompts = [list(range(5, 5 + n)) for n in (20, 2, 9, 13, 1)]
    for i, prompt in enumerate(prompts):
        sampler.submit(Request(i, prompt, 1 + i % 3))
    done = collect_all(sampler)
    for i, prompt in enumerate(prompts):
        out = plain.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=14, do_sample=False, eos_token_id=[3, 5, 7], pad_token_id=0,
        )  # fmt: skip
        assert [s.tokens for s in done[i]] == [out[0, len(prompt) :].tolist()] * (1 + i % 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_own_shapes_and_types_fit(dtype):
    """On the meta device the real operators check what they are given and say what they return."""
    from engine.attention import Spans, flash, flash_backward

    q, k = (torch.empty(50, heads, 64, dtype=dtype, device="meta") for heads in (14, 2))
    spans, halves = Spans.of([20, 30], "meta"), Spans.of([10, 40], "meta")
    for queries, keys, causal, window in (
        (spans, spans, True, None), (halves, spans, False, None), (spans, spans, True, 8),
    ):  # fmt: skip
        how = (queries, keys, causal, 0.125, window)
        o, lse, state = flash(q, k, k, *how)
        assert o.shape == q.shape and o.dtype == dtype
        assert lse.shape == (14, 50) and lse.dtype == torch.float32
        grads = flash_backward(o, q, k, k, o, lse, state, *how)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
        assert all(g.dtype == dtype for g in grads)
