"""The answered windows of an evaluation that is under way, on disk: so that one that died goes on.

OUTPUT_DIR/
    unfinished.json          what decides the answers, while there are more to come
    windows.part*.jsonl      each process adds every window as soon as it is answered
    metrics.json             at the end; the two above are then gone
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from agent import Answer
from engine.files import locked, one_line, read_json, refuse_foreign, write_whole
from settings import UserError

PARTS, UNFINISHED, METRICS = "windows.part*.jsonl", "unfinished.json", "metrics.json"
WRITTEN = (METRICS, UNFINISHED, "run.txt", "windows.jsonl", "per_query.jsonl")


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Inside, the folder is this evaluation's alone, and what killed ones left half written is
    gone. UserError where it holds something else, or another process writes to it."""
    refuse_foreign(output_dir, [METRICS, UNFINISHED])
    with locked(output_dir):
        for name in WRITTEN:
            for left_over in output_dir.glob(f"{name}.*.tmp"):
                left_over.unlink()
        yield


def finished(output_dir: Path, facts: dict) -> dict | None:
    """The metrics of the evaluation that output_dir holds, None where it holds none that is
    finished. UserError where that is another one; facts: as for `begin`."""
    path = output_dir / METRICS
    if not path.exists() or (output_dir / UNFINISHED).exists():
        return None
    refuse_different(facts, path, "a finished evaluation")
    return read_json(path)


def begin(output_dir: Path, facts: dict) -> dict[tuple[str, int], Answer]:
    """Begin an evaluation, or go on with the unfinished one in output_dir: its answers.
    UserError where that is another one.

    facts: what decides the answers, as JSON has it.
    """
    unfinished = output_dir / UNFINISHED
    known = read_parts(output_dir) if unfinished.exists() else {}
    if known:
        refuse_different(facts, unfinished, f"{len(known)} windows of an unfinished evaluation")
        print(f"going on: {len(known)} windows are on disk")
        return known
    for part in output_dir.glob(PARTS):
        part.unlink()
    write_whole(unfinished, json.dumps(facts, indent=2) + "\n")
    return known


def refuse_different(facts: dict, path: Path, what: str) -> None:
    """UserError where the file tells of an evaluation that other facts decided."""
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = {
            name
            for part, here in facts.items()
            for name, value in here.items()
            if begun.get(part, {}).get(name) != value
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it to begin anew") from None
    if different:
        raise UserError(
            f"{path.parent} holds {what} with another {', '.join(sorted(different))}: give another "
            "--output_dir, or delete that one"
        )


def json_line(answer: Answer) -> str:
    return one_line(asdict(answer))


def kept_windows(output_dir: Path) -> int:
    """How many windows of an unfinished evaluation are on disk."""
    return sum(part.read_bytes().count(b"\n") for part in output_dir.glob(PARTS))


def read_parts(output_dir: Path) -> dict[tuple[str, int], Answer]:
    """The answered windows. A last line that was cut off is removed from its file; UserError for
    any other that cannot be read."""
    known = {}
    for part in sorted(output_dir.glob(PARTS)):
        *lines, torn = part.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                answer = Answer(**json.loads(line))
                if sorted(answer.ranked) != sorted(answer.given):
                    raise ValueError
                known[answer.qid, answer.window] = answer
            except (ValueError, TypeError):
                raise UserError(
                    f"{part}:{number}: damaged, no answered window can be read here; without the "
                    "line it is asked for again"
                ) from None
        os.truncate(part, part.stat().st_size - len(torn))
    return known
