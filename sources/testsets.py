"""Topics, judgments and excluded docids of the test sets that pyserini knows; downloaded on first
use, by it, into its own cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import UserError
from sources.lucene import NotDownloaded, first_line, load_lucene
from sources.registry import Dataset
from sources.trec import Qrels, read_excluded, read_qrels

# Where Anserini, inside pyserini, downloads these files from.
SERVER = "https://raw.githubusercontent.com/castorini/anserini-tools/master/topics-and-qrels"


def pyserini_topics(name: str) -> dict[str, str]:
    """qid -> query of a test set pyserini knows, such as dl19-passage; downloaded on first use.

    UserError for a name it does not know, NotDownloaded where that fails.
    """
    load_lucene()
    from pyserini.search import _base

    # pyserini's own get_topics() makes qids integers, and so loses leading zeros.
    read = _base.JTopicReader.getTopicsWithStringIds
    topics = fetch("topics", name, _base.topics_mapping, lambda: read(_base.topics_mapping[name]))
    return {qid: topics.get(qid).get("title") for qid in topics.keySet().toArray()}


def pyserini_qrels(name: str) -> Qrels:
    """Judgments of a test set pyserini knows; names, download and errors as `pyserini_topics`."""
    load_lucene()
    from pyserini.search import _base

    get_path = _base.get_qrels_file
    return read_qrels(fetch("qrels", name, _base.qrels_mapping, lambda: get_path(name)))


def pyserini_excluded(name: str) -> dict[str, set[str]]:
    """qid -> docids that are no candidates of it, of a BRIGHT split that has such; download and
    errors as `pyserini_topics`."""
    load_lucene()
    from jnius import autoclass

    exclude_docs = autoclass("io.anserini.eval.ExcludeDocs")
    known = {name: True} if exclude_docs.isExcludable(name) else {}
    fetch("excluded docids", name, known, lambda: exclude_docs(name))
    return read_excluded(cached_file(f"exclude.{name}.txt"))


def fetch(what: str, name: str, known: dict[str, Any], get: Callable[[], Any]) -> Any:
    from jnius import JavaException

    if known.get(name) is None:
        raise UserError(f"pyserini knows no {what} {name!r}")
    try:
        return get()
    except JavaException as error:
        reason = first_line(error).rpartition("Exception: ")[2]  # after Java's names of it
        raise NotDownloaded(f"no {what} {name}: {reason}") from None


# ------------------------------------------------------------------------ where there is no network


@dataclass(frozen=True)
class Part:
    """Something that a dataset needs: the flag that takes one's own, where it is downloaded from,
    and where pyserini looks for it."""

    flag: str
    url: str
    path: Path


def cached_file(name: str) -> Path:
    from jnius import autoclass

    home = autoclass("java.lang.System").getProperty("user.home")
    return Path(home) / ".cache" / "pyserini" / "topics-and-qrels" / name


def parts(dataset: Dataset) -> list[Part]:
    """All that pyserini downloads for a dataset."""
    load_lucene()
    from pyserini.prebuilt_index_info import TF_INDEX_INFO
    from pyserini.search import _base
    from pyserini.util import get_cache_home

    info = TF_INDEX_INFO[dataset.index]
    url = info["urls"][0]
    folder = f"{url.rpartition('/')[2].removesuffix('.tar.gz')}.{info['md5']}"
    index = Part("--index", url, Path(get_cache_home()) / "indexes" / folder)
    files = [
        ("--topics", _base.topics_mapping[dataset.topics].path),
        ("--qrels", _base.qrels_mapping[dataset.qrels].path),
    ]
    if dataset.excluded:
        files.append(("--exclude", f"exclude.{dataset.excluded}.txt"))
    return [index, *(Part(flag, f"{SERVER}/{name}", cached_file(name)) for flag, name in files)]


def what_is_missing(name: str, dataset: Dataset, given: set[str], error: Exception) -> UserError:
    """What to do where a dataset cannot be downloaded. given: the flags that take its place."""
    home = str(Path.home())
    lines = []
    for part in parts(dataset):
        if part.flag not in given and not part.path.exists():
            unpacked = " (the unpacked folder)" if part.flag == "--index" else ""
            path = str(part.path).replace(home, "~", 1)
            lines.append(f"  {part.flag:9} {part.url}\n{' ':12}{path}{unpacked}")
    return UserError(
        f"{name} is not on this machine, and cannot be downloaded: {error}.\n"
        "Fetch these where there is a network, and put each at the path under it, or give its own\n"
        "path with the flag:\n" + "\n".join(lines) + "\n"
        "Or give a first stage of your own: --candidates FILE --qrels FILE (see docs/data.md)."
    )
