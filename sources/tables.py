"""Queries, passages and labels in a table of one's own, CSV or TSV.

    query,passage,label
    how do tides work,The moon pulls at the sea.,2
    how do tides work,Salt is mined in the hills.,0

A first row of names may give the columns another order; without one they stand as above. Columns
of more names (qid, docid) give ids of one's own, which else are made: q1, q2, ... and d1, d2, ... .
An empty label is a passage without a judgment. The passages of a query are candidates in the order
of their rows.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from settings import UserError
from sources.formats import Candidates, Passage
from sources.text import check_docid, check_qid, decoded, parse_number
from sources.trec import Qrels

COLUMNS = ("query", "passage", "label")
IDS = ("qid", "docid")


def read_table(path: str | Path) -> tuple[list[Candidates], Qrels]:
    """(candidates, judgments). UserError, naming the line, for what is no such table."""
    queries: dict[str, str] = {}  # qid -> query
    passages: dict[str, list[Passage]] = {}  # by qid
    texts: dict[str, str] = {}  # docid -> passage
    qrels: Qrels = {}
    made: dict[str, dict[str, str]] = {"q": {}, "d": {}}  # the ids that are made, by text
    for where, row in read_rows(path):
        qid = check_qid(where, "qid", row.get("qid") or make_id("q", made["q"], row["query"]))
        docid = check_docid(
            where, "docid", row.get("docid") or make_id("d", made["d"], row["passage"])
        )
        if queries.setdefault(qid, row["query"]) != row["query"]:
            raise UserError(f"{where}: qid {qid} had another query before")
        if texts.setdefault(docid, row["passage"]) != row["passage"]:
            raise UserError(f"{where}: docid {docid} had another passage before")
        found = passages.setdefault(qid, [])
        if docid in qrels.setdefault(qid, {}) or any(p.docid == docid for p in found):
            raise UserError(f"{where}: the query had this passage before")
        found.append(Passage(docid, row["passage"], 0.0))
        if row["label"]:
            qrels[qid][docid] = parse_number(where, "label", row["label"], int)
    if not queries:
        raise UserError(f"{path}: no row under the names")
    candidates = [Candidates(q, query, tuple(passages[q])) for q, query in queries.items()]
    return candidates, {qid: judged for qid, judged in qrels.items() if judged}


def make_id(letter: str, made: dict[str, str], text: str) -> str:
    return made.setdefault(text, f"{letter}{len(made) + 1}")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("path:line", the row by its columns' names) of each row that is not empty."""
    name = str(path).removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        raise UserError(f"{path}: a table ends in .csv or .tsv")
    csv.field_size_limit(2**31 - 1)
    # A TSV is taken as it stands: tabs and line ends divide it, and quotes are text.
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
    reader = csv.reader(decoded(path), strict=True, **how)
    names = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            where = f"{path}:{reader.line_num}"
            if names is None:
                names = column_names(where, cells)
                if names == cells:
                    continue
            if len(cells) != len(names):
                raise UserError(f"{where}: {len(cells)} columns, expected {', '.join(names)}")
            row = dict(zip(names, cells))
            if not (row["query"] and row["passage"]):
                raise UserError(f"{where}: the query or the passage is empty")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    if names is None:
        raise UserError(f"{path}: the file is blank")


def column_names(where: str, cells: list[str]) -> list[str]:
    """The names in a first row; where it has none, the columns' own."""
    if not set(cells) >= set(COLUMNS):
        if len(cells) != len(COLUMNS):
            raise UserError(
                f"{where}: expected {', '.join(COLUMNS)}, or a row of names with these among them"
            )
        return list(COLUMNS)
    if unknown := [name for name in cells if name not in COLUMNS + IDS]:
        raise UserError(f"{where}: unknown column {unknown[0]!r:.60}")
    return cells
