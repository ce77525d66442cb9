"""Training in bfloat16, on a CPU: the update, many processes, going on, and the exported model.

What holds in float32 alone is not asked for here: the same responses at any number of processes.
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_families import biased
from test_grpo import GROUPS, ROOT, metrics, quick, rollouts_of, run_grpo
from test_packed import naive_logprobs, tiny_lm

import grpo
from agent import load_agent, rank_batch
from engine.parallel import shard
from engine.policy import Policy
from grpo import policy_loss
from settings import AgentSettings, TrainSettings, UserError
from sources.formats import read_candidates

HOW = {"beta": 0.1, "max_grad_norm": 1e9, "temperature": 0.8}


def plain_gradient(lm, reference, dtype: torch.dtype) -> torch.Tensor:
    """Of the loss of GROUPS by the unmodified models; their weights have been rounded before."""

    def logprobs(lm):
        lm = lm.to(dtype)
        wide = lambda *a, **k: SimpleNamespace(logits=lm(*a, **k).logits.float())  # noqa: E731
        return naive_logprobs(wide, GROUPS, HOW["temperature"])

    new = logprobs(lm)
    with torch.no_grad():
        ref = logprobs(reference)
    lengths = torch.tensor([len(r) for g in GROUPS for r in g.responses])
    mask = torch.arange(new.shape[1]) < lengths[:, None]
    advantages = torch.cat([r.advantages for r in rollouts_of(GROUPS)])
    policy_loss(new, new.detach(), ref, advantages, mask, 0.2, HOW["beta"]).loss.backward()
    return torch.cat([p.grad.float().flatten() for p in lm.parameters()])


@pytest.mark.parametrize("make", [tiny_lm, lambda seed: biased(torch.float32, seed)])
def test_the_gradient_is_as_exact_as_the_plain_models(process_group, make):
    """Its rounding is measured against float32; key biases as large as Qwen2.5's included."""
    lm, reference = (make(seed).bfloat16().float() for seed in (0, 1))
    lms = [copy.deepcopy((lm, reference)) for _ in range(2)]
    exact, plain = (plain_gradient(*x, t) for x, t in zip(lms, (torch.float32, torch.bfloat16)))
    policy, ref = (shard(Policy(x), torch.device("cpu"), torch.bfloat16) for x in (lm, reference))
    before = [p.full_tensor().clone() for p in policy.parameters()]
    step = torch.optim.SGD(policy.parameters(), 1.0)
    grpo.update(policy, ref.requires_grad_(False), step, rollouts_of(GROUPS), TrainSettings(**HOW))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    moved = zip(before, policy.parameters())
    ours = torch.cat([(old - new.full_tensor()).detach().flatten() for old, new in moved])
    assert (plain - exact).norm() > 0 and (ours - exact).norm() <= 1.2 * (plain - exact).norm()


def one_update(device) -> tuple[list[torch.Tensor], dict]:
    policy, ref = (shard(Policy(tiny_lm(seed)), device, torch.bfloat16) for seed in (0, 1))
    step = torch.optim.SGD(policy.parameters(), 1.0)
    ref.requires_grad_(False)
    stats, _ = grpo.update(policy, ref, step, rollouts_of(GROUPS), TrainSettings(**HOW))
    return [p.full_tensor().detach() for p in policy.parameters()], stats


def test_two_processes_make_the_update_of_one(process_group, tmp_path):
    """To the rounding of a gradient that is summed in another order."""
    (tmp_path / "job.py").write_text(
        "import sys, torch\n"
        "from engine.parallel import processes\n"
        "from test_bf16 import one_update\n"
        "with processes() as device:\n"
        "    torch.save(one_update(device), sys.argv[1])\n"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "job.py",
         tmp_path / "two.pt"], check=True, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    one, stats = one_update(torch.device("cpu"))
    two, others = torch.load(tmp_path / "two.pt")
    for a, b, old in zip(one, two, tiny_lm().parameters()):
        assert (a - b).norm() <= 0.02 * (a - old).norm() + 1e-6
    assert others["grad_norm"] == pytest.approx(stats["grad_norm"], rel=0.01)


def test_logits_that_are_not_finite_skip_the_update(process_group):
    rollouts = rollouts_of(GROUPS)
    rollouts[1].samples[0].finite = False
    policy = shard(Policy(tiny_lm()), torch.device("cpu"))
    step = torch.optim.AdamW(policy.parameters(), 0.1)
    stats, offenders = grpo.update(policy, None, step, rollouts, TrainSettings(beta=0.0))
    assert stats["skipped_updates"] == 1 and offenders == [rollouts[1]]
    assert all(torch.equal(a.full_tensor(), b) for a, b in
               zip(policy.parameters(), tiny_lm().parameters()))  # fmt: skip


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_that_was_cut_goes_on_bit_for_bit(small, tiny, tmp_path, processes):
    """With sharding, float32 weights, a reference, held-out figures and the export."""
    settings = {
        "model": tiny, "candidates": small[0], "qrels": small[1], "window_size": 4, "draws": 4,
        "steps": 3, "batch_size": 4, "group_size": 4, "max_new_tokens": 50, "learning_rate": 1e-3,
        "beta": 0.1, "checkpoint_every": 1, "dtype": "bfloat16", "eval_candidates": small[0],
        "eval_qrels": small[1], "allow_overlap": True,
    }  # fmt: skip
    settings = {name: str(x) if isinstance(x, Path) else x for name, x in settings.items()}
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def train(out: Path) -> None:
        if not processes:
            grpo.train(TrainSettings(**settings, output_dir=str(out)))
            return
        flags = [x for name, value in settings.items() for x in (f"--{name}", value)]
        done = run_grpo(*flags, "--output_dir", out, processes=processes)
        assert done.returncode == 0, done.stderr

    train(whole)
    shutil.copytree(whole, cut)
    for path in (cut / "checkpoints" / "step-000003", cut / "model.safetensors"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(cut)
    assert (whole / "responses.jsonl").read_text() == (cut / "responses.jsonl").read_text()
    one, other = (load_file(out / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert {x.dtype for x in one.values()} == {torch.bfloat16}
    kept = [load_file(shard) for shard in whole.glob("checkpoints/step-000003/*.safetensors")]
    assert {x.dtype for tensors in kept for x in tensors.values()} == {torch.float32}
    steps = metrics(whole)
    assert steps[0]["kl"] == 0 < steps[2]["kl"] and steps[2]["grad_norm"] > 0
    # Two roundings of the same weights; 0 would say that nothing was measured.
    assert all(0 < step["mismatch"] < 0.05 and step["skipped_updates"] == 0 for step in steps)


def test_an_evaluation_ends_where_logits_are_not_finite(small, tiny):
    how = AgentSettings(model=str(tiny), window_size=4, step_size=2, max_new_tokens=9)
    agent = load_agent(how)
    agent.policy.lm.model.norm.weight.data *= 1e38  # finite weights whose logits overflow
    with pytest.raises(UserError, match=r"query .* logits are not finite in auto: try --dtype"):
        rank_batch(agent, how, read_candidates(small[0]))


def test_the_exported_model_is_the_one_that_was_measured(small, tiny, tmp_path):
    config = quick(
        small, tiny, tmp_path, learning_rate=1e-3, dtype="bfloat16", eval_candidates=str(small[0]),
        eval_qrels=str(small[1]), allow_overlap=True, window_size=4, max_new_tokens=50,
    )  # fmt: skip
    grpo.train(config)
    how = AgentSettings(
        model=str(tmp_path), dtype="bfloat16", window_size=4, step_size=2, max_new_tokens=50
    )
    queries = read_candidates(small[0])
    ranked = rank_batch(load_agent(how), how, queries)
    after = (tmp_path / "after" / "run.txt").read_text().split("\n")
    assert [p.docid for q in ranked for p in q.passages] == [x.split()[2] for x in after if x]
