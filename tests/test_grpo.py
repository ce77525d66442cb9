"""GRPO: each formula against an independent float64 computation, the update, and whole runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_packed import naive_logprobs, tiny_lm
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

import batches
import grpo
import rollout
from batches import micro_batches
from data import batch_at
from engine import model
from engine.packed import Group
from engine.parallel import Interrupted, shard
from engine.policy import Policy
from engine.sampler import Sample
from grpo import group_advantages, k3, policy_loss
from rollout import Rollout
from settings import TrainSettings, UserError
from sources import formats, trec
from tasks import TASKS, load_windows
from window import load_prompt

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------- the formulas


def test_advantages_are_z_scores_within_groups():
    rewards = torch.tensor([1.0, 2, 4, 9, 0, 0, 1, 0])
    got = group_advantages(rewards, 4)
    for group, values in zip(rewards.view(2, 4).double().numpy(), got.view(2, 4)):
        expected = (group - group.mean()) / (group.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.2 + 0.1, -1e8])
def test_equal_rewards_give_exactly_zero(value):
    assert (group_advantages(torch.full((12,), value), 4) == 0).all()
    assert (group_advantages(torch.tensor([value, 3.0]), 1) == 0).all()


def expected_loss(new, old, ref, advantages, mask, clip, beta, average) -> float:
    """The same formula, token by token, in float64 and plain Python."""
    sequence_means, tokens = [], []
    for r in range(len(new)):
        gains = []
        for t in np.flatnonzero(mask[r]):
            ratio = np.exp(new[r, t] - old[r, t])
            gain = min(ratio * advantages[r], np.clip(ratio, 1 - clip, 1 + clip) * advantages[r])
            if beta:
                ref_ratio = np.exp(ref[r, t]) / np.exp(new[r, t])
                gain -= beta * (ref_ratio - np.log(ref_ratio) - 1)
            gains.append(gain)
        sequence_means.append(np.mean(gains))
        tokens += gains
    return -np.mean(sequence_means if average == "sequence" else tokens)


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("seed", range(5))
def test_loss_is_the_formula(average, beta, seed):
    rng = np.random.default_rng(seed)
    shape = (6, 9)
    new, old, ref = (-rng.exponential(1, shape) for _ in range(3))  # far apart: clipping is real
    advantages = rng.normal(size=6)
    mask = np.arange(9) < rng.integers(1, 10, (6, 1))
    t = [torch.tensor(x, dtype=torch.float32) for x in (new, old, ref, advantages)]
    got = policy_loss(*t, torch.tensor(mask), 0.2, beta, average).loss
    expected = expected_loss(new, old, ref, advantages, mask, 0.2, beta, average)
    assert float(got) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ratio = np.exp(new - old)[mask]
    assert ((ratio < 0.8) | (ratio > 1.2)).mean() > 0.3


def test_on_policy_gradient_is_the_policy_gradient():
    """With rho = pi / stop_gradient(pi), d loss / d log pi = -A / (|o| R)."""
    logprobs = torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    advantages = torch.tensor([1.0, -2.0, 0.5])
    policy_loss(logprobs, logprobs.detach(), None, advantages, mask, 0.2, 0.0).loss.backward()
    expected = -(advantages / mask.sum(1) / 3)[:, None] * mask
    torch.testing.assert_close(logprobs.grad, expected)


def test_clipping_stops_the_gradient_only_where_it_would_go_further():
    old = torch.zeros(4, 1)
    logprobs = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    mask = torch.ones(4, 1, dtype=torch.bool)
    policy_loss(logprobs, old, None, advantages, mask, 0.2, 0.0).loss.backward()
    assert (logprobs.grad[:, 0] != 0).tolist() == [False, True, True, False]


@given(st.lists(st.floats(-8, 0), min_size=2, max_size=8))
def test_k3_is_the_estimator_and_never_negative(values):
    new, ref = torch.tensor(values, dtype=torch.float64).split([1, len(values) - 1])
    got = k3(new, ref)
    assert (got >= -1e-12).all()
    ratio = np.exp(ref.numpy() - new.numpy())
    np.testing.assert_allclose(got, ratio - 1 - np.log(ratio), atol=1e-9)


def test_k3_estimates_the_kl_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), exact)


# ------------------------------------------------------------------------------- the update


def rollouts_of(groups: list[Group], seed: int = 0) -> list[Rollout]:
    rng = torch.Generator().manual_seed(seed)
    return [
        Rollout(
            place=place,
            window=None,
            prompt=group.prompt,
            samples=[Sample(list(r), [-1.0] * len(r)) for r in group.responses],
            parsed=[],
            rewards=None,
            advantages=torch.randn(len(group.responses), generator=rng),
        )
        for place, group in enumerate(groups)
    ]


GROUPS = [
    Group([1, 2, 3, 4], [[5, 6], [7], [8, 9, 10, 11]]),
    Group([9] * 11, [[5] * 12, [6, 7], [8, 8, 8]]),
    Group([4, 4], [[1, 2, 3], [3, 2, 1], [7, 7]]),
    Group([30, 31, 32], [[2], [3], [4]]),
]


def weights_after_one_step(rollouts, optimizer=torch.optim.SGD, lr=1e-3, **changes):
    policy = shard(Policy(tiny_lm()), torch.device("cpu"))
    reference = shard(Policy(tiny_lm(1).requires_grad_(False)), torch.device("cpu"))
    settings = TrainSettings(**({"beta": 0.1, "max_grad_norm": 1e9, "temperature": 0.8} | changes))
    step = optimizer(policy.parameters(), lr)
    reference = reference if settings.beta else None
    stats, _ = grpo.update(policy, reference, step, rollouts, settings)
    return [p.full_tensor().detach() for p in policy.parameters()], stats


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_the_step_is_the_gradient_of_the_whole_batch(process_group, average):
    """Against autograd through the plain model over one padded batch of everything."""
    rollouts = rollouts_of(GROUPS)
    lm, ref = tiny_lm(), tiny_lm(1)
    new = naive_logprobs(lm, GROUPS, 0.8)
    with torch.no_grad():
        ref = naive_logprobs(ref, GROUPS, 0.8)
    lengths = torch.tensor([len(r) for g in GROUPS for r in g.responses])
    mask = torch.arange(new.shape[1]) < lengths[:, None]
    advantages = torch.cat([r.advantages for r in rollouts])
    policy_loss(new, new.detach(), ref, advantages, mask, 0.2, 0.1, average).loss.backward()
    expected = [p.detach() - 1e-3 * p.grad for p in lm.parameters()]
    got, stats = weights_after_one_step(rollouts, average=average)
    for a, b in zip(expected, got):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    norm = torch.stack([p.grad.norm() for p in lm.parameters()]).norm()
    assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("max_tokens", [9, 10**6])
@pytest.mark.parametrize("n", [1, 2])
def test_the_mismatch_of_update_and_sampling_is_measured(process_group, n, max_tokens):
    rollouts = rollouts_of(GROUPS)
    exact = naive_logprobs(tiny_lm(), GROUPS, 0.8)
    responses = iter(exact)
    for group in rollouts:
        for i, sample in enumerate(group.samples):
            logprobs = next(responses)[: len(sample.tokens)].tolist()
            # Every second response was sampled from something else.
            sample.logprobs = [x - 0.5 * (i % 2) for x in logprobs]
    tokens = [len(s.tokens) for r in rollouts for s in r.samples]
    off = [len(s.tokens) for r in rollouts for s in r.samples[1::2]]
    _, stats = weights_after_one_step(
        rollouts, updates_per_batch=n, max_tokens_per_micro_batch=max_tokens
    )
    assert stats["mismatch_max"] == pytest.approx(0.5, abs=1e-4)
    if n == 1:
        assert stats["mismatch"] == pytest.approx(0.5 * sum(off) / sum(tokens), rel=1e-3)
    else:
        assert 0 < stats["mismatch"] < 0.5


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("max_tokens", [1, 9, 20])
def test_the_micro_batch_changes_nothing(process_group, average, max_tokens):
    rollouts = rollouts_of(GROUPS)
    whole, stats = weights_after_one_step(rollouts, average=average)
    cut, cut_stats = weights_after_one_step(
        rollouts, average=average, max_tokens_per_micro_batch=max_tokens
    )
    for a, b in zip(whole, cut):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert cut_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)


def test_the_second_update_is_off_policy_and_clipped(process_group):
    rollouts = rollouts_of(GROUPS)
    _, one = weights_after_one_step(rollouts, torch.optim.Adam, lr=0.05)
    assert one["clip_fraction"] == 0
    _, two = weights_after_one_step(rollouts, torch.optim.Adam, lr=0.05, updates_per_batch=2)
    assert two["clip_fraction"] > 0


def test_gradients_are_scaled_to_the_norm(process_group):
    rollouts = rollouts_of(GROUPS)
    before = [p.detach() for p in tiny_lm().parameters()]
    after, stats = weights_after_one_step(rollouts, max_grad_norm=0.01)
    moved = torch.stack([(a - b).norm() for a, b in zip(after, before)]).norm()
    assert stats["grad_norm"] > 0.02
    assert float(moved) == pytest.approx(1e-3 * 0.01, rel=1e-2)


def test_groups_of_equal_rewards_cost_nothing(process_group):
    """They are no part of any row, but of the mean: as if they were there, with no gradient."""
    rollouts = rollouts_of(GROUPS)
    rollouts[1].advantages = torch.zeros(3)
    rows = batches.my_share(Policy(tiny_lm()), rollouts, 10**6)
    assert [r.place for micro in rows for r in micro.rollouts] == [0, 2, 3]
    with_it, _ = weights_after_one_step(rollouts, beta=0.0)
    lm = tiny_lm()
    new = naive_logprobs(lm, GROUPS, 0.8)
    lengths = torch.tensor([len(r) for g in GROUPS for r in g.responses])
    mask = torch.arange(new.shape[1]) < lengths[:, None]
    advantages = torch.cat([r.advantages for r in rollouts])
    policy_loss(new, new.detach(), None, advantages, mask, 0.2, 0.0).loss.backward()
    for p, got in zip(lm.parameters(), with_it):
        torch.testing.assert_close(p.detach() - 1e-3 * p.grad, got, rtol=0, atol=1e-7)


def test_where_all_rewards_are_equal_nothing_moves(process_group):
    rollouts = rollouts_of(GROUPS)
    for r in rollouts:
        r.advantages = torch.zeros(3)
    weights, stats = weights_after_one_step(rollouts, torch.optim.AdamW)
    assert all(torch.equal(a, b) for a, b in zip(weights, tiny_lm().parameters()))
    assert set(stats.values()) == {0}


@pytest.mark.parametrize("n", [1, 2])
def test_an_update_that_is_not_finite_is_skipped_and_named(process_group, n):
    rollouts = rollouts_of(GROUPS)
    rollouts[2].advantages[1] = float("nan")
    policy = shard(Policy(tiny_lm()), torch.device("cpu"))
    step = torch.optim.AdamW(policy.parameters(), 0.1)
    settings = TrainSettings(beta=0.0, updates_per_batch=n, max_tokens_per_micro_batch=20)
    stats, offenders = grpo.update(policy, None, step, rollouts, settings)
    # Of two updates, the one without it is made.
    moved = any((a.full_tensor() != b).any() for a, b in
                zip(policy.parameters(), tiny_lm().parameters()))  # fmt: skip
    assert stats["skipped_updates"] == 1 and moved == (n == 2)
    assert all(p.full_tensor().isfinite().all() for p in policy.parameters())
    assert 2 in [r.place for r in offenders] and len(offenders) < len(rollouts)
    assert np.isfinite(list(stats.values())).all()


def test_a_gradient_that_overflows_is_skipped_too(process_group):
    rollouts = rollouts_of(GROUPS)
    rollouts[0].advantages *= 1e38  # the loss is still finite
    policy = shard(Policy(tiny_lm()), torch.device("cpu"))
    step = torch.optim.AdamW(policy.parameters(), 0.1)
    stats, offenders = grpo.update(policy, None, step, rollouts, TrainSettings(beta=0.0))
    assert stats["skipped_updates"] == 1 and len(offenders) == len(GROUPS)
    assert all(torch.equal(a.full_tensor(), b) for a, b in
               zip(policy.parameters(), tiny_lm().parameters()))  # fmt: skip


def test_a_signal_before_the_first_step_leaves_the_weights_alone(process_group):
    policy = shard(Policy(tiny_lm()), torch.device("cpu"))
    step = torch.optim.AdamW(policy.parameters(), 0.1)
    asked = iter([False, True])

    def check() -> None:
        if next(asked):
            raise Interrupted

    with pytest.raises(Interrupted):
        settings = TrainSettings(beta=0.0, max_tokens_per_micro_batch=9)
        grpo.update(policy, None, step, rollouts_of(GROUPS), settings, check)
    for got, before in zip(policy.parameters(), tiny_lm().parameters()):
        assert got.grad is None and torch.equal(got.full_tensor(), before)


sizes = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)))


@given(sizes.filter(bool), st.integers(1, 60))
@settings(deadline=None)
def test_micro_batches_hold_every_response_once_within_the_budget(shapes, max_tokens):
    groups = [Group([i] * p, [[i] * r for r in rs]) for i, (p, rs) in enumerate(shapes)]
    rollouts = rollouts_of(groups)
    rows = micro_batches(rollouts, max_tokens, torch.device("cpu"))
    advantages = torch.cat([micro.advantages for micro in rows])
    assert advantages.tolist() == [a for r in rollouts for a in r.advantages.tolist()]
    lengths = torch.cat([micro.row.mask.sum(1) for micro in rows]).tolist()
    assert lengths == [len(r) for g in groups for r in g.responses]
    for micro in rows:
        assert micro.row.tokens.numel() <= max_tokens or len(micro.row.mask) == 1
    whole = sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    if whole <= max_tokens:
        assert len(rows) == 1


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 10))
def test_every_epoch_holds_every_instance_once(n, size, steps):
    stream = [i for step in range(steps) for i in batch_at(step, size, n, seed=3)]
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


# ------------------------------------------------------------------------------- whole runs


def run_grpo(*flags, processes: int = 0) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launch if processes else []), "grpo.py", *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def flags(small, tiny):
    return [
        "--model", tiny, "--candidates", small[0], "--qrels", small[1], "--window_size", 4,
        "--draws", 4, "--steps", 3, "--batch_size", 4, "--group_size", 4, "--max_new_tokens", 50,
        "--learning_rate", 1e-3, "--eval_candidates", small[0], "--eval_qrels", small[1],
        "--allow_overlap", "true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    done = run_grpo(*flags, "--output_dir", out)
    assert done.returncode == 0, done.stderr
    return out, done


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_it_did(trained, tiny):
    out, done = trained
    steps = metrics(out)
    assert [m["step"] for m in steps] == [0, 1, 2]
    assert {"reward", "ndcg", "length", "kl", "clip_fraction", "loss", "grad_norm"} <= set(steps[0])
    assert steps[0]["kl"] == 0 < steps[2]["kl"] and steps[0]["grad_norm"] > 0
    groups = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert {group["step"] for group in groups} == {0, 1, 2}
    assert all(len(group["passages"]) == 4 == len(group["rewards"]) for group in groups)
    responses = [response for group in groups for response in group["responses"]]
    assert "<think>" in "".join(response["response"] for response in responses)
    assert len({response["reward"] for response in responses}) > 1
    assert "3 of 3" in (out / "report.html").read_text()
    assert "held-out nDCG@10" in done.stdout and "steps: 100%" in done.stderr
    before, after = (AutoModelForCausalLM.from_pretrained(d) for d in (tiny, out))
    assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters()))
    assert json.loads((out / "settings.json").read_text())["learning_rate"] == 1e-3


def test_the_trained_model_can_be_evaluated(trained, small, tmp_path):
    out, _ = trained
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--candidates", small[0], "--qrels", small[1], "--model",
         out, "--window_size", "4", "--step_size", "2", "--max_new_tokens", "50", "--output_dir",
         tmp_path], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_itself = json.loads((tmp_path / "metrics.json").read_text())
    while_training = json.loads((out / "after" / "metrics.json").read_text())
    assert by_itself["after"] == while_training["after"]


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_trains_alike(trained, flags, tmp_path, processes):
    out, _ = trained
    done = run_grpo(*flags, "--output_dir", tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    for name in ("responses.jsonl", "before/windows.jsonl", "after/windows.jsonl"):
        assert (tmp_path / name).read_text() == (out / name).read_text(), name
    for one, many in zip(metrics(out), metrics(tmp_path), strict=True):
        for name in one.keys() - {"sample_seconds", "update_seconds", "tokens_per_second"}:
            # The mismatch of sampling and update is rounding itself, other in each packed row.
            rounding = 1e-5 if name.startswith("mismatch") else 1e-6
            assert many[name] == pytest.approx(one[name], rel=1e-3, abs=rounding), name
    a, b = (AutoModelForCausalLM.from_pretrained(d) for d in (out, tmp_path))
    for x, y in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)  # of 3 Adam steps of 1e-3


def test_tied_embeddings_stay_one_tensor(small, tmp_path):
    """As in the smaller models of the Qwen2.5 family: the head is the input embeddings."""
    candidates = formats.read_candidates(small[0])
    save_tiny_model(candidates, tmp_path / "tied", 120, 4, tie_word_embeddings=True)
    trained = []
    for processes in (0, 2):
        out = tmp_path / f"out{processes}"
        done = run_grpo(
            "--model", tmp_path / "tied", "--candidates", small[0], "--qrels", small[1],
            "--window_size", 4, "--steps", 2, "--batch_size", 4, "--group_size", 4,
            "--max_new_tokens", 50, "--learning_rate", 1e-3, "--output_dir", out,
            processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        trained.append(load_file(out / "model.safetensors"))
        assert "lm_head.weight" not in trained[-1] and metrics(out)[1]["kl"] > 0
    for name, one in trained[0].items():
        torch.testing.assert_close(one, trained[1][name], rtol=0, atol=2e-5)


def test_without_beta_no_reference_is_loaded(monkeypatch, flags, tmp_path):
    loaded = []
    load_lm = model.load_lm
    monkeypatch.setattr(
        model, "load_lm", lambda *args, **how: loaded.append(args) or load_lm(*args, **how)
    )
    tiny, candidates, qrels = (str(flags[i]) for i in (1, 3, 5))
    config = TrainSettings(
        model=tiny, candidates=candidates, qrels=qrels, window_size=4, draws=2, steps=1,
        batch_size=2, group_size=2, max_new_tokens=20, beta=0.0, output_dir=str(tmp_path / "a"),
    )  # fmt: skip
    grpo.train(config)
    assert len(loaded) == 1
    grpo.train(replace(config, beta=0.1, output_dir=str(tmp_path / "b")))
    assert len(loaded) == 3


def quick(small, tiny, out, **changes) -> TrainSettings:
    defaults = {
        "window_size": 4, "draws": 2, "steps": 2, "batch_size": 3, "group_size": 3,
        "max_new_tokens": 20, "beta": 0.0, "checkpoint_every": 1,
    }  # fmt: skip
    files = {"model": str(tiny), "candidates": str(small[0]), "qrels": str(small[1])}
    return TrainSettings(**files | defaults | changes, output_dir=str(out))


def test_training_stops_where_too_many_updates_are_not_finite(monkeypatch, small, tiny, tmp_path):
    monkeypatch.setattr(rollout, "score", lambda task, parsed, *_: [1.0, 2.0, float("nan")])
    with pytest.raises(UserError, match=r"3 updates .*skipped\.jsonl"):
        grpo.train(quick(small, tiny, tmp_path, steps=9, max_skipped=2))
    assert [m["skipped_updates"] for m in metrics(tmp_path)] == [1, 1, 1]
    offenders = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {line["step"] for line in offenders} == {0, 1, 2}
    assert all("<|im_start|>" in line["prompt"] and line["responses"] for line in offenders)
    # It is counted over the whole run, whatever went between.
    with pytest.raises(UserError, match="4 updates"):
        grpo.train(quick(small, tiny, tmp_path, steps=9, max_skipped=3))


@pytest.mark.parametrize("resample", [0, 2])
def test_equal_groups_are_sampled_again(monkeypatch, small, tiny, tmp_path, resample):
    asked = []

    def score(task, parsed, window, settings):
        if settings.weights != [1.0, 0.0, 0.0]:  # so r_rank is asked for, once more and for the log
            asked.append(window.qid)
        return [1.0] * 3 if window.qid < "q4" else [0.0, 1.0, 2.0]

    monkeypatch.setattr(rollout, "score", score)
    grpo.train(quick(small, tiny, tmp_path, steps=3, resample=resample))
    steps = metrics(tmp_path)
    assert len(asked) == 3 * 3 + sum(m["thrown_away"] for m in steps)
    assert (sum(m["thrown_away"] for m in steps) > 0) == (resample > 0)
    again = list(asked)
    asked.clear()
    grpo.train(quick(small, tiny, tmp_path / "again", steps=3, resample=resample))
    assert asked == again


def test_another_runs_folder_is_not_used(trained, flags):
    out, _ = trained
    done = run_grpo(*flags, "--output_dir", out, "--learning_rate", "2e-3")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{out} holds another run, with learning_rate 0.001 instead of 0.002" in done.stderr


def test_the_export_says_how_it_was_trained(trained):
    out, _ = trained
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "chat_template.jinja", "README.md", "prompt.toml"} <= files  # fmt: skip
    assert not [name for name in files if name.endswith((".bin", ".pt", ".tmp"))]
    card = (out / "README.md").read_text()
    assert "| learning_rate | 0.001 |" in card and "before training" in card
    assert load_prompt(out / "prompt.toml") == load_prompt(TASKS["listwise"].prompt)


def test_setwise_trains_on_triples(small, tiny, tmp_path):
    candidates, qrels = formats.read_candidates(small[0]), trec.read_qrels(small[1])
    with open(tmp_path / "triples.jsonl", "w") as file:
        for query in candidates:
            split = {True: [], False: []}
            for p in query.passages:
                relevant = qrels[query.qid][p.docid] > 0
                split[relevant].append({"docid": p.docid, "title": "", "text": p.text})
            record = {
                "query_id": query.qid,
                "query": query.query,
                "positive_passages": split[True],
                "negative_passages": split[False],
            }
            file.write(json.dumps(record) + "\n")
    settings = TrainSettings(
        task="setwise", model=str(tiny), triples=str(tmp_path / "triples.jsonl"), window_size=4,
        draws=2, steps=2, batch_size=2, group_size=3, max_new_tokens=30, reward="graded",
        eval_candidates=str(small[0]), eval_qrels=str(small[1]), output_dir=str(tmp_path / "out"),
        allow_overlap=True,
    )  # fmt: skip
    grpo.train(settings)
    assert [m["step"] for m in metrics(tmp_path / "out")] == [0, 1]
    held_out = json.loads((tmp_path / "out" / "after" / "held_out.json").read_text())
    assert 0 <= held_out["window_reward"] <= 1 and 0 < held_out["ndcg@10"] <= 1


def test_what_would_fail_in_the_middle_of_a_run_fails_before_it(small, tiny, tmp_path):
    with pytest.raises(UserError, match=r"no window is left: .* room for 0 beside a response"):
        grpo.train(quick(small, tiny, tmp_path, max_new_tokens=8192))
    with pytest.raises(UserError, match=r"--prompt .*nowhere\.toml"):
        grpo.train(quick(small, tiny, tmp_path, prompt=str(tmp_path / "nowhere.toml")))
    trec.write_qrels({"q99": {"d": 1}}, tmp_path / "others.txt")
    held_out = {"eval_candidates": str(small[0]), "eval_qrels": str(tmp_path / "others.txt")}
    with pytest.raises(UserError, match="no query in common"):
        grpo.train(quick(small, tiny, tmp_path, **held_out))
    assert not (tmp_path / "settings.json").exists()


def test_a_run_can_be_made_longer(small, tiny, tmp_path):
    held_out = {"eval_candidates": str(small[0]), "eval_qrels": str(small[1])}
    with pytest.raises(UserError, match=r"6 training queries are those of the evaluation"):
        grpo.train(quick(small, tiny, tmp_path, **held_out))
    held_out["allow_overlap"] = True
    for steps in (1, 2):
        grpo.train(quick(small, tiny, tmp_path, steps=steps, learning_rate=1e-2, **held_out))
    assert [m["step"] for m in metrics(tmp_path)] == [0, 1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_reward_of_another_task_is_an_error(small, tiny, tmp_path):
    settings = TrainSettings(
        task="setwise", model=str(tiny), candidates=str(small[0]), qrels=str(small[1]),
        reward="relative", output_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(UserError, match="--reward relative: setwise has exact, graded"):
        grpo.train(settings)


def test_a_training_set_of_the_real_data(dl19):
    candidates, qrels = map(str, dl19)
    instances = load_windows(TASKS["listwise"], TrainSettings(candidates=candidates, qrels=qrels))
    assert 1000 < len(instances) < 43 * 50
    assert all(len(i.passages) == 20 and max(i.grades) > 0 for i in instances)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([], "training needs --candidates and --qrels"),
        (["--stepz", "3"], "unknown flag --stepz"),
        (["--preset", "tiny"], "--preset tiny: expected one of toy, rearank, rank-r1"),
        (["--average", "median"], "--average median: expected one of sequence, token"),
        (["--weights", "0", "0", "0"], "--weights 0 0 0: every response would earn the same"),
        (["--batch_size", "1", "--updates_per_batch", "2"], "--batch_size 1 must be at least"),
    ],
)
def test_wrong_flags_are_named(monkeypatch, capsys, wrong, message):
    monkeypatch.setattr(sys, "argv", ["grpo.py", *wrong])
    with pytest.raises(SystemExit) as stop:
        grpo.main()
    assert message in str(stop.value) + capsys.readouterr().err
    assert not torch.distributed.is_initialized()


def test_no_window_left_is_an_error(small, tmp_path):
    trec.write_qrels({"q0": {"nothing": 1}}, tmp_path / "qrels.txt")
    settings = TrainSettings(candidates=str(small[0]), qrels=str(tmp_path / "qrels.txt"))
    for task in TASKS.values():
        with pytest.raises(UserError, match="no training window left"):
            load_windows(task, settings)
