"""Candidates and judgments as files, with a manifest that says what they are and where from."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from engine.files import locked, read_json, refuse_foreign, write_whole
from engine.provenance import hash_files, provenance
from settings import SourceSettings, UserError
from sources.formats import Candidates, candidates_lines, write_candidates
from sources.load import origin
from sources.registry import DATASETS
from sources.text import hash_lines
from sources.trec import Qrels, qrels_lines, write_qrels

CANDIDATES, QRELS, MANIFEST = "candidates.jsonl", "qrels.txt", "manifest.json"


def write_set(
    folder: Path,
    candidates: list[Candidates],
    qrels: Qrels,
    made_from: dict,
    more: Mapping = MappingProxyType({}),
) -> list[Path]:
    """Write candidates.jsonl, qrels.txt (where there are judgments) and manifest.json, which holds
    `more`, too; the paths. UserError where the folder holds something else, or a set that was made
    from something else."""
    hashes = {CANDIDATES: hash_lines(candidates_lines(candidates))}
    if qrels:
        hashes[QRELS] = hash_lines(qrels_lines(qrels))
    manifest = {
        "queries": len(candidates),
        "passages": sum(len(query.passages) for query in candidates),
        "judgments": sum(map(len, qrels.values())),
        "sha256": hashes,
        "made from": made_from,
        "made by": provenance(),
        **more,
    }
    refuse_foreign(folder, [MANIFEST])
    with locked(folder):
        if read_manifest(folder).get("made from", made_from) != made_from:
            raise UserError(f"--output_dir {folder} holds what was made from another source")
        # First, so that the folder is known as one of these when what follows is interrupted.
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        write_candidates(candidates, folder / CANDIDATES)
        if qrels:
            write_qrels(qrels, folder / QRELS)
    return [folder / name for name in (*hashes, MANIFEST)]


def is_whole(folder: Path) -> bool:
    """Whether all that the manifest tells of is there, and as it was written."""
    hashes = read_manifest(folder).get("sha256", {})
    return bool(hashes) and all(
        (folder / name).is_file() and hash_files([folder / name]) == digest
        for name, digest in hashes.items()
    )


def read_manifest(folder: Path) -> dict:
    """Nothing where there is none. UserError where it is damaged."""
    return read_json(folder / MANIFEST, missing={})


def sources_of(names: Iterable[str], given: SourceSettings) -> dict:
    """What a set is made from, for its manifest: datasets, flags, and each file with its hash."""
    flags = {name: value for name, value in asdict(given).items() if value}
    files = {name: origin(value) for name, value in flags.items() if isinstance(value, str)}
    return {"datasets": {name: asdict(DATASETS[name]) for name in names}, **flags, **files}
