"""Held-out figures while a training goes: measured, drawn, and there once however often it dies."""

import json
import os
import signal
from itertools import count
from pathlib import Path

import pytest
from test_grpo import metrics, quick

import grpo
import held_out
from engine.files import read_lines
from pages.run import read_run
from settings import TrainSettings, UserError


@pytest.fixture(scope="module")
def settings(small, tiny):
    """Of a run of 4 steps into a folder, measured before each but the first."""

    def make(folder: Path, **changes) -> TrainSettings:
        measured = {"eval_candidates": str(small[0]), "eval_qrels": str(small[1]), "eval_every": 1}
        how = {"allow_overlap": True, "steps": 4, "checkpoint_every": 3, "learning_rate": 1e-3}
        return quick(small, tiny, folder, **measured | how | changes)

    return make


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    return grpo.train(settings(tmp_path_factory.mktemp("whole") / "run"))


def lines(folder: Path) -> list[dict]:
    return list(read_lines(folder / "held_out.jsonl"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_measuring_changes_nothing_and_is_drawn(settings, whole, tmp_path):
    seldom = grpo.train(settings(tmp_path, eval_every=2))
    assert weights(seldom) == weights(whole)
    assert [line["step"] for line in lines(whole)] == [1, 2, 3]
    assert lines(seldom) == lines(whole)[1:2]
    drawn = read_run(whole).held_out
    assert [figures["step"] for figures in drawn] == [0, 1, 2, 3, 4]
    assert len({figures["ndcg@10"] for figures in drawn}) > 1  # it learns
    assert len({figures["first_stage"] for figures in drawn}) == 1
    last = json.loads((whole / "during" / "metrics.json").read_text())
    assert last["after"]["ndcg@10"] == lines(whole)[-1]["ndcg@10"]


def at_call(number: int, work, do):
    """`work`, before whose call of this number `do` is called."""
    calls = count(1)
    return lambda *args, **how: (next(calls) == number and do(), work(*args, **how))[1]


def test_no_line_is_lost_or_there_twice(settings, whole, tmp_path, monkeypatch):
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def die() -> None:
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:  # while it measures before step 2
        patch.setattr(held_out, "rank_batch", at_call(3, held_out.rank_batch, stop))
        with pytest.raises(SystemExit) as ended:
            grpo.train(settings(tmp_path))
    assert ended.value.code == 128 + signal.SIGTERM
    assert [line["step"] for line in lines(tmp_path)] == [1]
    with monkeypatch.context() as patch:  # behind the measurement before step 3
        patch.setattr(grpo, "sample_batch", at_call(2, grpo.sample_batch, die))
        with pytest.raises(RuntimeError, match="no more"):
            grpo.train(settings(tmp_path))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    grpo.train(settings(tmp_path))
    assert lines(tmp_path) == lines(whole) and weights(tmp_path) == weights(whole)
    assert [m["step"] for m in metrics(tmp_path)] == [0, 1, 2, 3]


def test_there_must_be_something_to_measure(settings, tmp_path):
    with pytest.raises(UserError, match="--eval_every needs held-out queries"):
        grpo.train(settings(tmp_path, eval_candidates="", eval_qrels=""))
