"""Files that are whole or not there: one is replaced in one step, a log gains all lines or none.
And folders that one run at a time writes into.
"""

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from settings import UserError

LOCK = ".lock"


def write_whole(path: str | Path, text: str) -> None:
    """Write a UTF-8 file that is there whole or as it was before, never in part."""
    content = text.encode()
    # In the same directory, since os.replace is one step only within a file system.
    building = Path(f"{path}.{os.getpid()}.tmp")
    try:
        building.write_bytes(content)
        os.replace(building, path)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, why, str(path)) from None  # a full disk names none
    finally:
        building.unlink(missing_ok=True)


def append_lines(path: str | Path, records: list[dict]) -> None:
    """Add a JSON line for each record to a log: all or, where the disk is full, none."""
    with open(path, "a", encoding="utf-8") as file:
        size = file.tell()
        try:
            file.writelines(map(one_line, records))
            file.flush()
        except OSError:
            os.truncate(path, size)
            raise


def one_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def refuse_foreign(folder: str | Path, marks: Collection[str]) -> None:
    """UserError where `folder` holds something, and none of `marks`: the names of files by which
    a program knows a folder that it wrote itself. Hidden files may be there, logs, which a shell
    or a scheduler opens before the program begins, and what killed writers left (.tmp)."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder to write to: give another")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    allowed = (".log", ".out", ".err", ".tmp", "log.txt")
    names = [name for name in names if not name.startswith(".") and not name.endswith(allowed)]
    if names and not set(marks) & set(names):
        raise UserError(f"{folder} holds something else ({names[0]}): give another folder")


@contextmanager
def locked(folder: str | Path, joining: bool = False) -> Iterator[None]:
    """Inside, `folder` (made where it is missing) is this process's alone. UserError, naming the
    process that has it, where it is another's; a lock is gone as soon as its process is,
    and with it a new folder that nothing came into.

    joining: hold it with the process that has it, as one of the same run; then it is free when all
        of them are gone.
    """
    path = Path(folder) / LOCK
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_locked(path, joining) as file:
        if joining:
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                if is_new:
                    path.parent.rmdir()  # only where nothing came into it


def open_locked(path: Path, joining: bool):
    """The file, open and locked (flock): taken alone and then held so that others of the same run
    may hold it too, but none can take it."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH)[joining:]:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()  # who had it has just removed it: once more
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use by {holder}: wait until that ends, end it, or give "
                "another --output_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(
                f"{path.parent}: no locks here ({error.strerror}): see that only one run writes "
                "to it",
                file=sys.stderr,
            )
            return file


def read_json(path: str | Path, missing: dict | None = None) -> dict:
    """The object in a JSON file; `missing`, where that is given, if there is no file. UserError,
    naming the file, where it holds none."""
    if missing is not None and not Path(path).exists():
        return missing
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, no JSON: {error!s:.200}") from None
    if not isinstance(read, dict):
        raise UserError(f"{path}: damaged, expected a JSON object")
    return read


@contextmanager
def damage_named(*folders: Path) -> Iterator[None]:
    """Inside, what fails because files in the folders hold other things than were written there is
    UserError, which names them."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{', '.join(map(str, folders))}: a file is damaged ({what})") from error


def read_lines(path: str | Path) -> Iterator[dict]:
    """The JSON lines of a log, none where there is no log. A last line without its end, which
    may be under way, is left out; UserError for any other that is not an object."""
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: damaged, expected a JSON object")
            yield record
