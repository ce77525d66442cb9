"""Printing never ends a training: a closed pipe, a full disk."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.streams import Unbreakable

ROOT = Path(__file__).parents[1]
PRINT = """
import sys
from tqdm import tqdm
from engine.streams import make_unbreakable
make_unbreakable()
make_unbreakable()
for i in tqdm(range(3), mininterval=0):
    for stream in (sys.stdout, sys.stderr):
        print("words " * 5000, file=stream, flush=True)
open(sys.argv[1], "w").close()
sys.exit("a last word")
"""


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("broken", [full_disk, closed_pipe])
def test_a_program_goes_on_where_nothing_can_be_printed(tmp_path, broken):
    for script, comes_to_its_end in (
        (PRINT, True),
        (PRINT.replace("make_unbreakable()", ""), False),
    ):
        stream, mark = broken(), tmp_path / "mark"
        done = subprocess.run(
            [sys.executable, "-c", script, mark], cwd=ROOT, stdout=stream, stderr=stream
        )
        os.close(stream)
        assert mark.exists() == comes_to_its_end
        assert (done.returncode == 1) or not comes_to_its_end  # that of the last word
        mark.unlink(missing_ok=True)


def test_a_program_goes_on_where_its_streams_are_closed(tmp_path):
    command = [sys.executable, "-c", PRINT, str(tmp_path / "mark")]
    subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=ROOT)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("broken", [full_disk, closed_pipe])
def test_an_evaluation_is_written_where_nothing_can_be_printed(tmp_path, small, broken):
    stream = broken()
    flags = ["--candidates", small[0], "--qrels", small[1], "--output_dir", tmp_path / "out"]
    command = [sys.executable, "-u", "evaluate.py", "--reranker", "oracle", *flags]
    done = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream)
    os.close(stream)
    assert done.returncode == 0 and (tmp_path / "out" / "metrics.json").exists()


def test_what_can_be_printed_is(tmp_path):
    path = tmp_path / "text"
    with open(path, "w", encoding="ascii") as file:
        stream = Unbreakable(file)
        print("one", file=stream, flush=True)
        print("é", file=stream)
        print("two", file=stream)
        assert not stream.isatty() and stream.encoding == "ascii"
    assert path.read_text().split() == ["one", "two"]
    print("three", file=stream)  # it is closed now
    closed = io.StringIO()
    closed.close()
    Unbreakable(closed).flush()


def test_a_character_that_the_terminal_lacks_is_escaped():
    script = "from engine.flags import program; program(lambda: print('caf\\u00e9, 1.5'))()"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout == b"caf\\xe9, 1.5\n", done.stderr


def test_an_output_that_becomes_a_pipe_ends_nothing(tmp_path):
    script = (
        "import os; from engine.flags import program; _, pipe = os.pipe(); os.dup2(pipe, 1); "
        f"program(lambda: open({str(tmp_path / 'ran')!r}, 'w'))()"
    )
    with open(tmp_path / "out", "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=out, stderr=subprocess.PIPE
        )
    assert done.returncode == 0 and (tmp_path / "ran").exists(), done.stderr
