"""What was made once and is kept: BM25's candidates, indexes. $REARANK_CACHE, by default .cache
beside the project's files; each in a folder of its own, whole or not there."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.files import write_whole
from engine.provenance import provenance

DEFAULT = Path(__file__).parents[1] / ".cache"
MANIFEST = "manifest.json"  # what a folder's content was made from, and by


@contextmanager
def cached(name: str, facts: dict[str, Any], build: Callable[[Path], None]) -> Iterator[Path]:
    """The folder that `build` fills, filled once for all that `facts` (as JSON) say decides its
    content. Where none can be kept, a folder that is gone after."""
    cache = Path(os.environ.get("REARANK_CACHE") or DEFAULT)
    text = json.dumps(facts, sort_keys=True)
    folder = cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if folder.exists():
        yield folder
        return
    building = make_folder(folder)
    try:
        build(building)
        manifest = {"made from": facts, "made by": provenance()}
        write_whole(building / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        yield keep(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def make_folder(folder: Path) -> Path:
    """A new folder beside `folder`, so that it can be renamed to it; elsewhere, saying so, where
    that cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        print(f"nothing is kept for the next time: {error}", file=sys.stderr)
        return Path(tempfile.mkdtemp())


def keep(building: Path, folder: Path) -> Path:
    """Give what was built its name; where another process was first, its is as good."""
    if building.parent != folder.parent:
        return building
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    return folder
