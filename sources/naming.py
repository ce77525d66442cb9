"""Short names for folders of what is made from datasets and files: to read, and never another's."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from settings import SourceSettings

# The file that says most of what is in it comes first.
TELLING = ("candidates", "run", "table", "beir", "topics", "collection", "index", "qrels")


def key_of(facts: Any) -> str:
    """Six letters that other facts do not have."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:6]


def changed(given: SourceSettings) -> dict[str, Any]:
    """The flags that are given; a path the same for all its spellings."""
    default = asdict(SourceSettings())
    return {k: resolved(v) for k, v in asdict(given).items() if v != default[k]}


def resolved(value: Any) -> Any:
    path = Path(str(value))
    return str(path.resolve()) if path.exists() else value


def stem(names: Sequence[str], given: SourceSettings) -> str:
    """The datasets, or the name of the file that tells most."""
    files = [getattr(given, name) for name in TELLING if getattr(given, name)]
    return "-".join(names) or Path(files[0] if files else "files").name.partition(".")[0]


def folder_name(names: Sequence[str], given: SourceSettings) -> str:
    """The datasets alone, where nothing else is given; else with a key of all that is."""
    parts = [stem(names, given), *([key_of(changed(given))] if changed(given) else [])]
    return "-".join(parts)
