"""Lines, JSON records, fields and ids: how every file of the sources is read, and its faults named.

Readers raise UserError with the place of the fault ("runs/x.txt:17: expected 6 columns ..."). All
files are UTF-8, and those whose name ends in .gz are unpacked as they are read.
"""

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.files import write_whole
from settings import UserError

LARGEST = 2**31  # of a grade or a rank, as for trec_eval
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, UTF-8 cannot
LINE_BREAKS = re.compile(r"[\t\n\r\v\f]")


# --- Lines ---------------------------------------------------------------------------------------


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """("path:number", line) of each line that is not blank, one at a time: a collection may be
    larger than the memory. UserError where there is none."""
    blank = True
    for number, line in enumerate(decoded(path), start=1):
        # Not splitlines(): it also splits at characters that texts contain, such as U+2028.
        if line.strip():
            blank = False
            yield f"{path}:{number}", line.rstrip("\r\n")
    if blank:
        raise UserError(f"{path}: the file is blank")


def decoded(path: str | Path) -> Iterator[str]:
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 0
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 at byte {error.start} of the line"
            ) from None
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: not a whole gzip file: {error}") from None


def read_columns(path: str | Path, columns: str) -> Iterator[tuple[str, list[str]]]:
    """("path:number", cells) of each line of `columns`, divided by tabs or spaces. The third is a
    docid, which may hold spaces itself: it is what the columns before and after leave."""
    n = len(columns.split())
    for where, line in read_lines(path):
        *before, rest = line.split(None, 2)
        cells = [*before, *rest.rsplit(None, n - 3)]
        if len(cells) != n:
            found = len(line.split())
            raise UserError(f"{where}: expected {n} columns '{columns}', found {found}")
        check_docid(where, "docid", cells[2])
        yield where, cells


# --- JSON ----------------------------------------------------------------------------------------


def json_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """("path:line", value) of each JSON line, or ("path: record i", value) of a JSON list."""
    lines = read_lines(path)
    where, line = next(lines)
    if not line.lstrip().startswith("["):
        yield where, parse_json(where, line)
        yield from ((where, parse_json(where, line)) for where, line in lines)
        return
    records = parse_json(path, "\n".join([line, *(line for _, line in lines)]))
    if not records:
        raise UserError(f"{path}: the list is empty")
    yield from numbered(path, records)


def numbered(path: str | Path, records: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{path}: record {i}", record) for i, record in enumerate(records, start=1)]


def parse_json(where: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter where it nests a thousand deep
        raise UserError(f"{where}: bad JSON: {error}") from None


def field(where: str, record: Any, name: str, *types: type) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with {name!r}, found {record!r:.60}")
    if name not in record:
        raise UserError(f"{where}: field {name!r} is missing")
    value = record[name]
    # JSON's true is an int to Python, and no field here is one.
    if not isinstance(value, types) or isinstance(value, bool):
        wanted = " or ".join(t.__name__ for t in types)
        raise UserError(f"{where}: field {name!r} should be {wanted}, found {value!r:.60}")
    if isinstance(value, str) and LONE_SURROGATE.search(value):
        raise UserError(f"{where}: field {name!r} holds a lone surrogate, which is no text")
    return value


# --- Cells and ids -------------------------------------------------------------------------------


def parse_number(where: str, column: str, cell: str, kind: type) -> Any:
    """An integer or a finite number; nothing else that Python reads as one (1_000, nan)."""
    try:
        value = kind(cell)
    except ValueError:
        value = math.nan
    limit = LARGEST if kind is int else math.inf
    if "_" in cell or not cell.isascii() or not -limit < value < limit:
        wanted = f"an integer below {LARGEST}" if kind is int else "a finite number"
        raise UserError(f"{where}: {column} should be {wanted}, found {cell!r:.60}")
    return value


def qid_field(where: str, record: Any, name: str) -> str:
    return check_qid(where, name, str(field(where, record, name, str, int)))


def docid_field(where: str, record: Any, name: str) -> str:
    return check_docid(where, name, str(field(where, record, name, str, int)))


def check_qid(where: str | Path, name: str, value: str) -> str:
    """`value`, if it survives a file of columns (where a BOM would vanish, too)."""
    if not (is_id(value) and value.split() == [value]):
        raise UserError(f"{where}: {name} should be text without whitespace, found {value!r:.60}")
    return value


def check_docid(where: str | Path, name: str, value: str) -> str:
    """As `check_qid`; but a docid may hold spaces (file names do, and they are BRIGHT's docids)."""
    if not is_id(value):
        raise UserError(
            f"{where}: {name} should be text in one line, without whitespace at its ends, found "
            f"{value!r:.60}"
        )
    return value


def is_id(value: Any) -> bool:
    if not isinstance(value, str) or not value or value != value.strip():
        return False
    return not ("\ufeff" in value or LINE_BREAKS.search(value) or LONE_SURROGATE.search(value))


# --- Writing -------------------------------------------------------------------------------------


def hash_lines(lines: list[str]) -> str:
    """The SHA-256 of the file that these lines make."""
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_lines(path: str | Path, lines: list[str]) -> None:
    if not lines:
        raise UserError(f"{path}: nothing to write")
    write_whole(path, "".join(lines))
