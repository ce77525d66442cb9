"""A few of the faults that tests/faults.py injects, each with all of its checks."""

import subprocess
import sys
from pathlib import Path

from faults import FAULTS


def test_real_runs_survive_a_few_of_each_fault():
    # In a process of its own, since it forks, which one with pytest's threads must not.
    script = Path(__file__).with_name("faults.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    struck = [name for name, _, few, _ in FAULTS if few]
    rows = done.stdout.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in struck]
