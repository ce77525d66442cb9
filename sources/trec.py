"""Topics, judgments and runs: TREC's files, and BEIR's for the first two.

    topics   qid<TAB>query                            or {"_id": "7", "text": "how do tides work"}
    qrels    qid iteration docid grade                or query-id<TAB>corpus-id<TAB>score, a header
    run      qid Q0 docid rank score tag

Columns are divided by tabs or spaces. A docid may hold spaces: real ones do, and where one does,
what is written has tabs between its columns. Such a file is for this project and for who splits
at tabs; trec_eval reads no docid with a space, whatever divides the columns.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from settings import UserError
from sources.text import (
    LARGEST,
    check_docid,
    check_qid,
    field,
    parse_json,
    parse_number,
    qid_field,
    read_columns,
    read_lines,
    write_lines,
)

Qrels = dict[str, dict[str, int]]  # qid -> docid -> grade
Run = dict[str, list[tuple[str, float]]]  # qid -> (docid, score), best first

BEIR_HEADER = "query-id"  # how BEIR's qrels begin


def read_topics(path: str | Path) -> dict[str, str]:
    """qid -> query."""
    topics: dict[str, str] = {}
    for where, line in read_lines(path):
        if line.startswith("{"):
            record = parse_json(where, line)
            qid, query = qid_field(where, record, "_id"), field(where, record, "text", str)
        else:
            qid, tab, query = line.partition("\t")
            if not (tab and query.strip()):
                raise UserError(f"{where}: expected 'qid<TAB>query', found {line!r:.60}")
            qid = check_qid(where, "qid", qid.strip())
        if qid in topics:
            raise UserError(f"{where}: second query for qid {qid}")
        topics[qid] = query.strip()
    return topics


def read_qrels(path: str | Path) -> Qrels:
    """Judgments in either form; grades are integers."""
    _, first = next(read_lines(path))
    rows = read_beir_rows(path) if first.startswith(BEIR_HEADER) else read_trec_rows(path)
    qrels: Qrels = {}
    for where, qid, docid, grade in rows:
        judgments = qrels.setdefault(qid, {})
        if docid in judgments:
            raise UserError(f"{where}: second judgment of docid {docid} for qid {qid}")
        judgments[docid] = parse_number(where, "grade", grade, int)
    if not qrels:
        raise UserError(f"{path}: no judgment under the header")
    return qrels


def read_trec_rows(path: str | Path) -> Iterator[tuple[str, str, str, str]]:
    for where, (qid, _, docid, grade) in read_columns(path, "qid iteration docid grade"):
        yield where, qid, docid, grade


def read_beir_rows(path: str | Path) -> Iterator[tuple[str, str, str, str]]:
    lines = read_lines(path)
    next(lines)
    for where, line in lines:
        cells = line.split("\t")
        if len(cells) != 3:
            raise UserError(f"{where}: expected query-id<TAB>corpus-id<TAB>score: {line!r:.60}")
        qid, docid, grade = (cell.strip() for cell in cells)
        yield where, check_qid(where, "qid", qid), check_docid(where, "docid", docid), grade


def write_qrels(qrels: Qrels, path: str | Path) -> None:
    """Write judgments as 'qid 0 docid grade'. UserError for an id that would not read back."""
    for qid, judgments in qrels.items():
        check_qid(path, "qid", qid)
        for docid, grade in judgments.items():
            check_docid(path, "docid", docid)
            if type(grade) is not int or abs(grade) >= LARGEST:
                where = f"{path}: grade of {docid} for qid {qid}"
                raise UserError(f"{where} should be an integer below {LARGEST}, not {grade!r:.60}")
    write_lines(path, qrels_lines(qrels))


def qrels_lines(qrels: Qrels) -> list[str]:
    space = column_space(docid for judgments in qrels.values() for docid in judgments)
    return [
        space.join((qid, "0", docid, str(grade))) + "\n"
        for qid, judgments in qrels.items()
        for docid, grade in judgments.items()
    ]


def column_space(docids: Iterable[str]) -> str:
    """What divides the columns of a file with these docids."""
    return "\t" if any(len(str(docid).split()) > 1 for docid in docids) else " "


def read_run(path: str | Path) -> Run:
    """Each query's ranking.

    The score decides, as in trec_eval; the rank column settles ties, which trec_eval would
    settle by docid.
    """
    ranked: dict[str, dict[str, tuple[float, int]]] = {}
    columns = "qid Q0 docid rank score tag"
    for where, (qid, _, docid, rank, score, _) in read_columns(path, columns):
        docs = ranked.setdefault(qid, {})
        if docid in docs:
            raise UserError(f"{where}: docid {docid} is ranked twice for qid {qid}")
        place = parse_number(where, "rank", rank, int)
        docs[docid] = (-parse_number(where, "score", score, float), place)
    return {
        qid: [(docid, -docs[docid][0]) for docid in sorted(docs, key=docs.__getitem__)]
        for qid, docs in ranked.items()
    }


def write_run(rankings: dict[str, list[str]], path: str | Path, tag: str) -> None:
    """Write each query's docids, best first, as a TREC run.

    The scores are n..1 and mean nothing: trec_eval sorts by score and breaks ties by docid, so
    only strictly falling scores keep this order. UserError for a docid listed twice or an id
    that would not read back.
    """
    check_qid(path, "tag", tag)
    lines = []
    space = column_space(docid for docids in rankings.values() for docid in docids)
    for qid, docids in rankings.items():
        check_qid(path, "qid", qid)
        if len(set(docids)) != len(docids):
            raise UserError(f"{path}: qid {qid} ranks a docid twice")
        for rank, docid in enumerate(docids, start=1):
            check_docid(path, "docid", docid)
            score = str(len(docids) - rank + 1)
            lines.append(space.join((qid, "Q0", docid, str(rank), score, tag)) + "\n")
    write_lines(path, lines)


def read_excluded(path: str | Path) -> dict[str, set[str]]:
    """qid -> docids that are no candidates of it, from lines of 'qid docid'."""
    excluded: dict[str, set[str]] = {}
    for where, line in read_lines(path):
        qid, *rest = line.strip().split(None, 1)
        if not rest:
            raise UserError(f"{where}: expected 'qid docid', found {line!r:.60}")
        excluded.setdefault(qid, set()).add(check_docid(where, "docid", rest[0]))
    return excluded
