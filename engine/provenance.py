"""What made a result: the code, the versions it ran on, and the exact files it read.

A file is known by the SHA-256 of all it holds, as `sha256sum` prints it: sizes and dates change
when nothing did, and stay when something did. A file is hashed at some 1.5 GB/s, and a model's
files at once, each on a core of its own: four files of a 7B model in seconds, less than it takes
to load them.
"""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from engine import lora

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "flash-attn", "pyserini", "ir-measures", "openai")
# What decides how a model answers; its folder may hold logs and more beside them.
MODEL_FILES = (
    "*.safetensors *.safetensors.index.json *config.json tokenizer* chat_template* vocab* "
    "merges.txt special_tokens_map.json added_tokens.json"
).split()


def provenance() -> dict:
    """{"git": the revision and whether the tree was clean, None without git, "source": the hash of
    this project's files, "versions": of Python and the packages that are installed}."""
    rooms = (".", "engine", "pages", "results", "sources")
    code = [file for room in rooms for file in (ROOT / room).glob("*.py")]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "git": git_state(),
        "source": hash_files(sorted([*code, *ROOT.glob("prompts/*.toml")])),
        "versions": versions,
    }


def git_state() -> dict | None:
    """{"revision", "clean"} of this project; None where it is no git checkout of its own."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return None  # a copy inside another project
        return {"revision": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.CalledProcessError):
        return None


def hash_files(paths: Iterable[str | Path]) -> str:
    """The SHA-256 of one file; of several, that of their hashes and names, in the order given."""
    paths = [Path(path) for path in paths]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_file, paths))
    if len(hashes) == 1:
        return hashes[0]
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(hashes, paths))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_model(name: str) -> dict[str, str]:
    """The SHA-256 of each file that decides how a model answers, by its name; an adapter's base as
    "base/NAME". `name` is a folder or was loaded from the hub before: else the result is empty."""
    files = {path.name: path for path in model_files(name)}
    if "adapter_config.json" in files:
        files |= {f"base/{path.name}": path for path in model_files(lora.base_of(name))}
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(hash_file, files.values())))


def model_files(name: str) -> list[Path]:
    """The files of MODEL_FILES, by name: in a folder, or in the cache of what the hub gave."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            known = [
                try_to_load_from_cache(name, f) for f in ("config.json", "adapter_config.json")
            ]
        except HFValidationError:  # a folder that is not there
            return []
        found = [Path(path) for path in known if isinstance(path, str)]
        if not found:
            return []
        folder = found[0].parent
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
