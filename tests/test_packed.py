"""The shared-prompt engine against the plain model: padded batches, and `model.generate`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine.packed import Group, pack_row, response_logprobs
from engine.policy import Policy
from engine.sampler import Request, Sampler, draw

VOCAB = 50


def tiny_lm(seed: int = 0, heads: int = 4, kv_heads: int = 2) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
        attn_implementation="sdpa",
    )  # fmt: skip
    lm = Qwen2ForCausalLM(config).eval()
    for parameter in lm.parameters():  # large enough that no gradient drowns in rounding
        torch.nn.init.normal_(parameter, std=0.3)
    return lm


def naive_logprobs(lm, groups: list[Group], temperature: float) -> torch.Tensor:
    """[R, C] from the unmodified model over a right-padded batch of whole sequences."""
    sequences = [(g.prompt, r) for g in groups for r in g.responses]
    width = max(len(p) + len(r) for p, r in sequences)
    longest = max(len(r) for _, r in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attend = torch.zeros_like(ids)
    for row, (p, r) in enumerate(sequences):
        ids[row, : len(p) + len(r)] = torch.tensor([*p, *r])
        attend[row, : len(p) + len(r)] = 1
    logits = lm(ids, attention_mask=attend).logits / temperature
    out = torch.zeros(len(sequences), longest)
    for row, (p, r) in enumerate(sequences):
        steps = logits[row, len(p) - 1 : len(p) + len(r) - 1].log_softmax(-1)
        out[row, : len(r)] = steps[torch.arange(len(r)), torch.tensor(r)]
    return out


tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)
group = st.builds(Group, tokens, st.lists(tokens, min_size=1, max_size=5))


@given(
    groups=st.lists(group, min_size=1, max_size=3),
    temperature=st.sampled_from([1.0, 0.7]),
    heads=st.sampled_from([(4, 2), (4, 1), (2, 2)]),
    chunk=st.sampled_from([3, 1024]),
)
@settings(max_examples=40, deadline=None)
def test_logprobs_and_every_gradient_equal_the_plain_model(groups, temperature, heads, chunk):
    plain, ours = tiny_lm(0, *heads), Policy(tiny_lm(0, *heads))
    expected = naive_logprobs(plain, groups, temperature)
    row = pack_row(groups)
    got = ours(response_logprobs, row, temperature, chunk)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    exact = tiny_lm(0, *heads).double()
    for logprobs in (expected, got, naive_logprobs(exact, groups, temperature)):
        (logprobs * weights).sum().backward()
    total = torch.stack([p.grad.norm() for p in exact.parameters()]).norm()
    names = dict(plain.named_parameters())
    for name, p, o, e in zip(names, names.values(), ours.lm.parameters(), exact.parameters()):
        # To 1e-5; or, where terms cancel so that float32 cannot say it that well (one token
        # over and over, or one key, whose query does not matter), as well as the plain model.
        rounding = (p.grad - e.grad).norm()
        error = (o.grad - e.grad).norm()
        assert error <= max(1e-5 * e.grad.norm(), 3 * rounding, 1e-6 * total), (name, error)


def test_the_last_mlp_leaves_out_what_nobody_reads():
    policy = Policy(tiny_lm())
    seen = {}
    for i, layer in enumerate(policy.lm.model.layers):
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, args, out, i=i: seen.update({i: args[0].shape[:2].numel()})
        )
    row = pack_row([Group([1] * 9, [[2, 3], [4]]), Group([5] * 7, [[6, 7, 8]])])
    policy(response_logprobs, row)
    # Of a prompt its last token is read, of a response all but its last.
    assert seen == {0: 9 + 3 + 7 + 3, 1: 1 + 1 + 1 + 2}
    with policy.plain() as lm:
        lm(torch.tensor([[1] * 9]))
    assert seen == {0: 9, 1: 9}
    sampler = Sampler(policy, [], 3)
    sampler.submit(Request(0, [1] * 9, 4))
    collect_all(sampler)
    assert seen == {0: 4, 1: 4}


def test_empty_prompt_or_response_is_an_error():
    for empty in (Group([], [[1]]), Group([1], [[1], []])):
        with pytest.raises(ValueError, match="at least one token"):
            pack_row([empty])


def test_activation_checkpointing_changes_nothing():
    groups = [Group([1, 2, 3], [[4, 5], [6]]), Group([7], [[8, 9, 10]])]
    grads = []
    for checkpointing in (False, True):
        policy = Policy(tiny_lm()).train()
        if checkpointing:
            policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy(response_logprobs, pack_row(groups)).sum().backward()
        grads.append([p.grad.clone() for p in policy.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def collect_all(sampler: Sampler) -> dict:
    done = {}
    while complete := sampler.collect():
        done.update(complete)
    return done


@given(
    prompts=st.lists(st.tuples(tokens, st.integers(1, 4)), min_size=1, max_size=6),
    max_in_flight=st.sampled_from([1, 3, 64]),
    prefix=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_greedy_sampling_equals_generate_token_for_token(prompts, max_in_flight, prefix):
    eos, limit = [3, 4, 5], 12
    plain = tiny_lm()
    sampler = Sampler(Policy(tiny_lm()), eos, limit, temperature=0, max_in_flight=max_in_flight)
    for i, (prompt, samples) in enumerate(prompts):
        sampler.submit(Request(i, prompt, samples, prefix))
    done = collect_all(sampler)
    assert sorted(done) == list(range(len(prompts)))
    for i, (prompt, samples) in enumerate(prompts):
        out = plain.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=limit, do_sample=False, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
        expected = out[0, len(prompt) :].tolist()
        assert [sample.tokens for sample in done[i]] == [expected] * samples
        assert all(sample.finished == (expected[-1] in eos) for sample in done[i])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_equal_the_updates(temperature):
    policy = Policy(tiny_lm())
    sampler = Sampler(policy, [3], 30, temperature, max_in_flight=7)
    prompts = [list(range(i, i + 3 + i)) for i in range(6)]
    for i, prompt in enumerate(prompts):
        sampler.submit(Request(i, prompt, samples=4, seed=(i,)))
    done = collect_all(sampler)
    groups = [Group(p, [s.tokens for s in done[i]]) for i, p in enumerate(prompts)]
    row = pack_row(groups)
    sampled = torch.cat([torch.tensor(s.logprobs) for i in range(6) for s in done[i]])
    with torch.no_grad():
        scored = policy(response_logprobs, row, temperature)[row.mask]
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-4)
    assert len({len(s.tokens) for samples in done.values() for s in samples}) > 3


def test_samples_depend_on_their_seed_and_not_on_the_batch():
    def sample(seeds, max_in_flight):
        sampler = Sampler(Policy(tiny_lm()), [3], 20, max_in_flight=max_in_flight)
        for seed in seeds:
            sampler.submit(Request(seed, [1, 2, seed], samples=3, seed=(0, seed)))
        return {t: [s.tokens for s in samples] for t, samples in collect_all(sampler).items()}

    together, alone = sample(range(8), 64), {}
    for seed in reversed(range(8)):
        alone |= sample([seed], 1)
    assert together == alone
    assert len({str(samples) for samples in together.values()}) == 8


def test_draw_follows_the_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -torch.inf])
    uniforms = (torch.arange(100_000) + 0.5) / 100_000
    for temperature in (1.0, 0.5):
        p = (logits / temperature).softmax(-1)
        drawn, logprobs = draw(logits.expand(len(uniforms), -1), uniforms, temperature)
        share = drawn.bincount(minlength=4) / len(drawn)
        torch.testing.assert_close(share, p, atol=2e-5, rtol=0)
        torch.testing.assert_close(logprobs.exp(), p[drawn])


def test_draw_never_takes_an_impossible_token():
    logits = torch.full((2, 8), -torch.inf)
    logits[:, 3] = 0.0
    drawn, _ = draw(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert drawn.tolist() == [3, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_still_draw_a_token(temperature):
    logits = torch.zeros(2, 10)
    logits[0] = float("nan")
    tokens, logprobs = draw(logits, torch.tensor([0.5, 0.5]), temperature)
    assert ((tokens >= 0) & (tokens < 10)).all()
    assert logprobs[0].isnan() and logprobs[1].isfinite()
