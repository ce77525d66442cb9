"""A training's folder: one run at a time writes there, and it goes on from what it was begun with.

OUTPUT_DIR/
    .lock              while any process of the run lives (engine/files.py)
    settings.json      every setting
    provenance.json    "inputs": the SHA-256 of each file that is trained on or measured with
                       "starts": each one's first step, time, processes, code and versions
                       "finished": the steps, once the trained model is there and measured
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.checkpoint import first_difference
from engine.files import locked, one_line, read_json, read_lines, refuse_foreign, write_whole
from engine.parallel import all_gather, if_first, together
from engine.provenance import hash_files, hash_model, provenance
from settings import FREE_TO_CHANGE, RunSettings, UserError

SETTINGS, PROVENANCE = "settings.json", "provenance.json"
LOGS = ("metrics.jsonl", "responses.jsonl", "skipped.jsonl", "held_out.jsonl")  # lines of steps
FILES = ("candidates", "qrels", "triples", "responses", "eval_candidates", "eval_qrels")
# Of killed writers: a file that was to be replaced, an export, a checkpoint.
LEFT_OVER = ("*.[0-9]*.tmp", "*/*.[0-9]*.tmp", "export.tmp", "checkpoints/*.tmp")


# -------------------------------------------------------------------------------- whose it is


@contextmanager
def claimed(settings: RunSettings) -> Iterator[Path]:
    """Inside, the folder is this run's alone, held by all of its processes, and what killed ones
    left half written is gone. UserError where another process writes to it, or where it holds
    something else, or a run with other settings than are free to change."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    chosen = settings.output_dir or f"runs/{settings.preset or settings.task}-{stamp}"
    folder = Path(all_gather(chosen)[0])  # their clocks may differ

    def claim() -> None:
        refuse_foreign(folder, [SETTINGS])
        held.enter_context(locked(folder))
        refuse_another_run(folder, settings)
        for left_over in (path for pattern in LEFT_OVER for path in folder.glob(pattern)):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()

    with ExitStack() as held:
        if_first(claim)
        # Where the launcher and some processes are killed, the others still hold it.
        joining = dist.get_rank() > 0
        together(lambda: held.enter_context(locked(folder, joining=True)) if joining else None)
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise
            raise UserError(
                f"{folder} cannot be written: {error}; once it can be, the same command goes on"
            ) from None


def refuse_another_run(folder: Path, settings: RunSettings) -> None:
    file, bound = folder / SETTINGS, bound_settings(settings)
    if file.exists():
        others = read_json(file)
        if name := first_difference(bound, others):
            raise UserError(
                f"{folder} holds another run, with {name} {others.get(name)!r} instead of "
                f"{bound[name]!r}: give another --output_dir"
            )


def bound_settings(settings: RunSettings) -> dict[str, Any]:
    """Those that a run which goes on must have again."""
    return {k: v for k, v in asdict(settings).items() if k not in FREE_TO_CHANGE}


# -------------------------------------------------------------------------- what it was made from


def hash_inputs(settings: RunSettings, prompt: str | Path) -> dict[str, Any]:
    """The SHA-256 of every file that a run reads, by the setting that names it; the model's each
    by its name ({} for one that is not downloaded yet)."""
    files = {"prompt": prompt} | named_files(settings)
    hashes = {name: hash_files([path]) for name, path in files.items() if path}
    return {"model": hash_model(settings.model)} | hashes


def named_files(settings: RunSettings) -> dict[str, str]:
    return {name: getattr(settings, name) for name in FILES if hasattr(settings, name)}


def read_record(folder: Path) -> dict[str, Any]:
    """What provenance.json says; of a new run, nothing."""
    file = folder / PROVENANCE
    if not file.exists():
        return {"inputs": {}, "starts": []}
    record = read_json(file)
    inputs = record.get("inputs")
    whole = isinstance(inputs, dict) and isinstance(inputs.get("model", {}), dict)
    if not (whole and isinstance(record.get("starts"), list)):
        raise UserError(f"{file}: damaged, expected inputs and starts")
    if not isinstance(record.get("finished", 0), int):
        raise UserError(f"{file}: damaged, what is finished is no number of steps")
    return record


def changed_inputs(folder: Path, inputs: dict[str, Any], settings: RunSettings) -> list[str]:
    """The files that are not what the run was begun with, by name. UserError where there are any,
    unless --allow_changed."""
    begun = read_record(folder)["inputs"]
    if not begun:
        return []
    known, now = (flat(hashes, bool(inputs["model"])) for hashes in (begun, inputs))
    changed = sorted(k for k in known.keys() | now.keys() if known.get(k) != now.get(k))
    if changed and not settings.allow_changed:
        named = {"model": settings.model} | named_files(settings)
        whose = [f"{k} ({where})" if (where := named.get(k.split("/")[0])) else k for k in changed]
        raise UserError(
            f"{folder} was begun with other contents of {', '.join(whose)}: put them back, give "
            "another --output_dir, or go on with what is there now: --allow_changed True"
        )
    return changed


def flat(hashes: dict[str, Any], with_model: bool) -> dict[str, str]:
    """By "candidates", "model/config.json"; those of a model that is not here yet are left out."""
    model = hashes.get("model", {}) if with_model else {}
    others = {name: value for name, value in hashes.items() if name != "model"}
    return others | {f"model/{name}": value for name, value in model.items()}


# ------------------------------------------------------------------------------ how far it came


def begin(folder: Path, settings: RunSettings, inputs: dict[str, Any], step: int) -> None:
    """Write down that the run starts at `step`, from these inputs; the logs end there. UserError
    where it has come further than --steps, or its inputs have changed."""
    record = read_record(folder)
    done = max(step, record.get("finished", 0))
    if done > settings.steps:
        raise UserError(
            f"{folder} has done {done} steps, more than --steps {settings.steps}: give "
            "as many or more, or another --output_dir"
        )
    if done and not step:
        raise UserError(
            f"{folder} has done {done} steps, and no checkpoint to go on from is left: train its "
            f"model further with --model {folder} and another --output_dir"
        )
    if not inputs["model"]:  # it has been downloaded now
        inputs = inputs | {"model": hash_model(settings.model)}
    start = {"step": step, "time": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"}
    start |= {"processes": dist.get_world_size(), **provenance()}
    if changed := changed_inputs(folder, inputs, settings):
        start["changed"] = changed
    write_json(folder / SETTINGS, asdict(settings))
    write_json(folder / PROVENANCE, {"inputs": inputs, "starts": [*record["starts"], start]})
    cut_logs(folder, step)


def finish(folder: Path, steps: int) -> None:
    """Write down that nothing of so many steps is left to do."""
    write_json(folder / PROVENANCE, read_record(folder) | {"finished": steps})


def is_finished(folder: Path, steps: int) -> bool:
    return read_record(folder).get("finished") == steps and any(folder.glob("*.safetensors"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def cut_logs(folder: Path, first: int) -> None:
    """Drop what the logs say of steps from `first` on, which will be done again, and a last line
    that was never finished. UserError for a line without its step."""
    for path in (folder / name for name in LOGS):
        records = list(read_lines(path))
        for number, record in enumerate(records, start=1):
            if not isinstance(record.get("step"), int):
                raise UserError(f"{path}:{number}: damaged, it has no step")
        kept = (record for record in records if record["step"] < first)
        if path.exists():
            write_whole(path, "".join(one_line(record) for record in kept))
