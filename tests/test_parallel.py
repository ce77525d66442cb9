"""Many processes: work shared out by cost, failures that end all, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import parallel
from engine.parallel import Interrupted, StopSignal, balanced, together

ROOT = Path(__file__).parents[1]


@given(st.lists(st.integers(1, 1000)), st.integers(1, 8))
def test_shares_hold_everything_once_and_weigh_about_the_same(costs, parts):
    shares = balanced(costs, parts)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    totals = [sum(costs[i] for i in share) for share in shares]
    # Graham's bound for any greedy order; the last thing put on a share weighs at most the largest.
    assert max(totals) <= sum(costs) / parts + max(costs, default=0)
    assert len(costs) < parts or all(shares)


def test_shares_are_balanced_by_cost_and_not_by_count():
    assert balanced([9, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


def test_a_failure_is_everyones(process_group):
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        together(fail)
    assert together(lambda: 3) == 3


def torchrun(tmp_path: Path, body: str) -> tuple[subprocess.CompletedProcess, float]:
    """Run `body` in each of two processes, inside `processes()`; and how long that took."""
    (tmp_path / "job.py").write_text(
        "import time\n"
        "import torch.distributed as dist\n"
        "from engine.parallel import *\n"
        "with processes() as device:\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "job.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    return done, time.monotonic() - started


def test_where_one_process_fails_its_traceback_comes_first_and_none_hangs(tmp_path):
    done, seconds = torchrun(
        tmp_path,
        "if dist.get_rank() == 1:\n"
        "    raise ZeroDivisionError('the cause')\n"
        "all_gather('never answered')",
    )
    assert done.returncode != 0 and seconds < 60
    assert "ZeroDivisionError: the cause" in done.stderr
    first = done.stderr.split("Traceback (most recent call last)")[1]
    assert "ZeroDivisionError: the cause" in first and "never answered" not in first


def test_a_message_is_not_a_traceback(tmp_path):
    done, _ = torchrun(tmp_path, "raise SystemExit('--batch_size is wrong')")
    ours = done.stderr.partition("Traceback (most")[0]  # the rest is torchrun's own
    assert done.returncode != 0 and "--batch_size is wrong" in ours and "job.py" not in ours


def test_a_signal_ends_work_at_once_or_is_noted(process_group):
    with StopSignal() as stop, pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with StopSignal() as stop:
        stop.at_once = False
        assert stop.cut_short(lambda: 7) == 7
        stop.check()
        started = time.monotonic()
        assert stop.cut_short(lambda: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)]) is None
        assert time.monotonic() - started < 2
        with pytest.raises(Interrupted):
            stop.check()
        assert stop.number == signal.SIGTERM
        assert stop.cut_short(lambda: 7) is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_comes_while_a_process_waits_for_the_others_is_kept(
    process_group, monkeypatch
):
    """What all agreed on is from before it came; the next time all hear of it."""
    with StopSignal() as stop:
        stop.at_once = False

        def reduce(values, op):
            os.kill(os.getpid(), signal.SIGHUP)  # heard like SIGTERM
            return values

        with monkeypatch.context() as patch:
            patch.setattr(parallel, "all_reduce", reduce)
            stop.check()
        assert stop.number == signal.SIGHUP
        with pytest.raises(Interrupted):
            stop.check()
