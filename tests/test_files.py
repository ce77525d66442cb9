"""One run per folder: a lock that dies with its process."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.files import locked, refuse_foreign
from settings import UserError

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from engine.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_one_processs_until_that_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    process = hold(folder)
    try:
        for _ in range(2):
            message = f"{folder} is in use by process {process.pid} on .*another --output_dir"
            with pytest.raises(UserError, match=message), locked(folder):
                pass
    finally:
        process.kill()
        process.wait()
    assert list(folder.iterdir()) == [folder / ".lock"]  # what a killed process leaves
    with (
        locked(folder),
        pytest.raises(UserError, match=f"process {os.getpid()} on"),
        locked(folder),
    ):
        pass
    assert list(folder.iterdir()) == []


def test_the_lock_is_gone_after_an_error_and_a_new_folder_without_content(tmp_path):
    for folder, stays in ((tmp_path, True), (tmp_path / "new", False)):
        with pytest.raises(ZeroDivisionError), locked(folder):
            1 / 0  # noqa: B018
        assert folder.exists() == stays
        with locked(folder):
            (folder / "result").write_text("")
        assert list(folder.iterdir()) == [folder / "result"]
        (folder / "result").unlink()


def test_no_two_hold_it_however_they_come(tmp_path):
    """Also where one removes the file while another opens it."""
    inside, most, times = [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            try:
                with locked(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    times[0] += 1
                    inside[0] -= 1
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and times[0] >= 20  # of 800; how many, the machine's load decides


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "no locks here (Function not implemented)" in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "x")))
    with pytest.raises(OSError, match="x"), locked(tmp_path):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    refuse_foreign(tmp_path / "none", ["mark"])
    refuse_foreign(tmp_path, ["mark"])
    for name in (".lock", "out.log", "log.txt", "run.txt.7.tmp"):
        (tmp_path / name).write_text("")
    refuse_foreign(tmp_path, ["mark"])
    (tmp_path / "notes.txt").write_text("")
    message = rf"{tmp_path} holds something else \(notes.txt\): give another"
    with pytest.raises(UserError, match=message):
        refuse_foreign(tmp_path, ["mark"])
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        refuse_foreign(tmp_path / "notes.txt", ["mark"])
    (tmp_path / "mark").write_text("")
    refuse_foreign(tmp_path, ["mark", "other"])


def test_a_folder_that_cannot_be_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file"):
        pass
