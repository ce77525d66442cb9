"""Candidates and judgments from whatever is there: a dataset's name, files, an index, a table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.provenance import hash_files
from settings import SourceSettings, UserError
from sources.bm25 import K1, B, search_bm25
from sources.cache import cached
from sources.collection import collection_files, collection_texts
from sources.formats import Candidates, Passage, read_candidates, write_candidates
from sources.lucene import NotDownloaded, build_index, index_texts
from sources.registry import DATASETS, Dataset
from sources.tables import read_table
from sources.testsets import (
    pyserini_excluded,
    pyserini_qrels,
    pyserini_topics,
    what_is_missing,
)
from sources.trec import Qrels, read_excluded, read_qrels, read_run, read_topics, write_qrels

DEPTH = 100  # of the first stage that is kept, however few of it are asked for


@dataclass(frozen=True)
class JudgedSet:
    """Queries with their first-stage candidates, and their judgments."""

    name: str  # of the dataset; "" where only files were given
    candidates: list[Candidates]
    qrels: Qrels  # empty where there are none
    relevant: int = 1  # the least grade that is relevant, for the measures that know yes and no


def load(name: str, given: SourceSettings, texts: bool = True) -> JudgedSet:
    """The dataset of that name, or what the flags give alone ("").

    given: the flags, which come before what pyserini has.
    texts: without, the queries and passages of a run may stay empty; only a model reads them.
    UserError where something is missing, and says which flag gives it.
    """
    dataset = DATASETS[name] if name else None
    given = unfold_beir(given)
    refuse_both(given)
    try:
        candidates, qrels = load_both(name, dataset, given, texts)
    except NotDownloaded as error:
        if dataset:
            raise what_is_missing(name, dataset, given_flags(given), error) from None
        raise UserError(f"{error}: give --index a folder, or --collection FILE") from None
    candidates = [replace(q, passages=q.passages[: given.top_k]) for q in candidates]
    return JudgedSet(name, candidates, qrels, dataset.relevant if dataset else 1)


def load_each(names: Sequence[str], given: SourceSettings, texts: bool = True) -> list[JudgedSet]:
    """The datasets, or what the flags give alone. UserError that says of each what is missing."""
    sets, problems = [], []
    for name in names or [""]:
        try:
            sets.append(load(name, given, texts))
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n\n".join(problems))
    return sets


def load_both(
    name: str, dataset: Dataset | None, given: SourceSettings, texts: bool
) -> tuple[list[Candidates], Qrels]:
    if given.table:
        candidates, qrels = read_table(given.table)
        return candidates, read_qrels(given.qrels) if given.qrels else qrels
    if given.candidates:
        return read_candidates(given.candidates), load_qrels(dataset, given)
    if given.run:
        qrels = load_qrels(dataset, given)
        return read_first_stage(dataset, given, qrels, texts), qrels
    return retrieve(name, dataset, given)


def unfold_beir(given: SourceSettings) -> SourceSettings:
    """With the three files of a BEIR folder, where they are not given one by one."""
    if not given.beir:
        return given
    folder = Path(given.beir)
    if not (folder / "corpus.jsonl").exists():
        raise UserError(f"--beir {folder}: no corpus.jsonl in it")
    files = {"topics": "queries.jsonl", "qrels": "qrels/test.tsv"}
    files |= {} if given.index else {"collection": "corpus.jsonl"}
    unset = {flag: file for flag, file in files.items() if not getattr(given, flag)}
    for flag, file in unset.items():
        if not (folder / file).exists():
            raise UserError(f"--beir {folder}: no {file} in it: give it by --{flag} FILE")
    return replace(given, **{flag: str(folder / file) for flag, file in unset.items()})


def refuse_both(given: SourceSettings) -> None:
    """UserError where one flag would silently take another's place."""
    for one, others in (
        ("table", ("candidates", "run", "topics", "index", "collection", "beir", "exclude")),
        ("candidates", ("run", "topics", "index", "collection", "beir", "exclude")),
        ("index", ("collection",)),
    ):
        for other in others:
            if getattr(given, one) and getattr(given, other):
                raise UserError(f"give --{one} or --{other}, not both")


def refuse_files_of_many(names: list[str], given: SourceSettings) -> None:
    """UserError where several datasets are named and files given that can be of one only."""
    flags = [f"--{name}" for name, value in asdict(given).items() if value and name != "top_k"]
    if len(names) > 1 and flags:
        raise UserError(f"{flags[0]} is of one dataset, and {len(names)} are named")


def given_flags(given: SourceSettings) -> set[str]:
    named = {f"--{name}" for name in ("topics", "qrels", "exclude") if getattr(given, name)}
    return named | ({"--index"} if given.index or given.collection else set())


# ---------------------------------------------------------------------------------------- the parts


def load_qrels(dataset: Dataset | None, given: SourceSettings) -> Qrels:
    if given.qrels:
        return read_qrels(given.qrels)
    return pyserini_qrels(dataset.qrels) if dataset else {}


def load_topics(dataset: Dataset | None, given: SourceSettings) -> dict[str, str]:
    if given.topics:
        return read_topics(given.topics)
    if not dataset:
        raise UserError("the queries are missing: give --topics FILE, or a dataset's name")
    return pyserini_topics(dataset.topics)


def load_left_out(
    dataset: Dataset | None, given: SourceSettings, qids: list[str]
) -> dict[str, set[str]]:
    """By qid, the docids that are no candidates of it."""
    left_out: dict[str, set[str]] = {}
    if given.exclude:
        left_out = read_excluded(given.exclude)
    elif dataset and dataset.excluded:
        left_out = pyserini_excluded(dataset.excluded)
    if dataset and dataset.drop_query:
        left_out = {qid: left_out.get(qid, set()) | {qid} for qid in qids}
    return left_out


def read_first_stage(
    dataset: Dataset | None, given: SourceSettings, qrels: Qrels, texts: bool
) -> list[Candidates]:
    """A run as candidates: of the judged queries, or of all where there are no judgments."""
    run = {q: ranked for q, ranked in read_run(given.run).items() if not qrels or q in qrels}
    if not run:
        raise UserError(f"{given.run} and the qrels have no query in common")
    left_out = load_left_out(dataset, given, list(run))
    ranked = {
        qid: [(d, score) for d, score in hits if d not in left_out.get(qid, ())][: given.top_k]
        for qid, hits in run.items()
    }
    topics = load_topics(dataset, given) if texts else dict.fromkeys(ranked, "")
    if missing := [qid for qid in ranked if qid not in topics]:
        raise UserError(
            f"{len(missing)} queries of {given.run} are not among the topics (the first: qid "
            f"{missing[0]})"
        )
    docids = list(dict.fromkeys(docid for hits in ranked.values() for docid, _ in hits))
    text = texts_by_docid(dataset, given, docids) if texts else dict.fromkeys(docids, "")
    return [
        Candidates(qid, topics[qid], tuple(Passage(d, text[d], score) for d, score in hits))
        for qid, hits in ranked.items()
    ]


def texts_by_docid(
    dataset: Dataset | None, given: SourceSettings, docids: list[str]
) -> dict[str, str]:
    if given.collection:
        return collection_texts(given.collection, docids)
    if not (given.index or dataset):
        raise UserError("the texts are missing: give --index or --collection, or a dataset's name")
    return index_texts(index_of(dataset, given), docids)


def index_of(dataset: Dataset | None, given: SourceSettings) -> str | Path:
    """The index of the flag, a folder before a name; else the dataset's, which is a name."""
    if given.index:
        return Path(given.index) if Path(given.index).is_dir() else given.index
    return dataset.index


# ------------------------------------------------------------------------------------------- BM25


def retrieve(
    name: str, dataset: Dataset | None, given: SourceSettings
) -> tuple[list[Candidates], Qrels]:
    """BM25's candidates, searched for once and then kept; and the judgments, kept beside them."""
    if not (dataset or given.topics) or not (dataset or given.index or given.collection):
        raise UserError(
            "give a dataset's name; or a first stage: --candidates, --run, --table, --beir, or "
            "--topics with --index or --collection"
        )
    depth = max(DEPTH, given.top_k)

    def build(folder: Path) -> None:
        topics, qrels = load_topics(dataset, given), load_qrels(dataset, given)
        judged = {qid: query for qid, query in topics.items() if not qrels or qid in qrels}
        if not judged:
            raise UserError("the topics and the qrels have no query in common")
        left_out = load_left_out(dataset, given, list(judged))
        with_index(
            dataset,
            given,
            lambda index: write_candidates(
                search_bm25(index, judged, depth, left_out=left_out), folder / "candidates.jsonl"
            ),
        )
        if qrels:
            write_qrels(qrels, folder / "qrels.txt")

    facts = {
        "dataset": name,
        "files": {k: origin(getattr(given, k)) for k in ("topics", "qrels", "exclude")},
        "index": origin(given.index or given.collection) or dataset.index,
        "BM25": {"k1": K1, "b": B, "depth": depth},
        "pyserini": version("pyserini"),
    }
    stem = name or Path(given.topics).name.partition(".")[0]
    with cached(f"bm25-{stem}", facts, build) as folder:
        qrels = folder / "qrels.txt"
        return read_candidates(folder / "candidates.jsonl"), (
            read_qrels(qrels) if qrels.exists() else {}
        )


def with_index(
    dataset: Dataset | None, given: SourceSettings, use: Callable[[str | Path], None]
) -> None:
    """use(the index): the one that is given, one made from the collection, or the dataset's."""
    if not given.collection:
        return use(index_of(dataset, given))
    facts = {"collection": origin(given.collection), "pyserini": version("pyserini")}
    stem = Path(given.collection).name.partition(".")[0]
    build = partial(build_index, given.collection)
    with cached(f"index-{stem}", facts, build) as folder:
        use(folder / "index")


def origin(source: str) -> dict[str, Any] | str:
    """What tells a file, a collection or an index from others: its hash, or pyserini's name."""
    path = Path(source)
    if not source or not path.exists():
        return source
    # Lucene gives each state of an index an id of its own, and this small file holds it.
    files = sorted(path.glob("segments_*")) or collection_files(path)
    return {"path": str(path.resolve()), "sha256": hash_files(files)}
