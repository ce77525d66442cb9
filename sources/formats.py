"""Queries with their first-stage passages: what they are here, and the files they are read from.

- Candidates, in RankGPT's and in RankLLM's JSON.
- Triples: training queries with positive and negative passages, as Tevatron publishes them.

Writers check everything before they touch the disk and replace the file in one step, so that a
run that dies halfway never leaves half a file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import UserError
from sources.text import (
    docid_field,
    field,
    json_records,
    numbered,
    parse_number,
    qid_field,
    write_lines,
)
from sources.trec import Qrels

# Where RankLLM, pyserini's own collections, BEIR and MS MARCO v2 each keep a document's text.
TEXT_FIELDS = ("contents", "content", "text", "passage", "segment", "body")


@dataclass(frozen=True)
class Passage:
    """One text of the collection, as a first stage or a reranker returned it."""

    docid: str
    text: str
    score: float  # of who ranked it last; ties are common, so rank order is what counts


@dataclass(frozen=True)
class Candidates:
    """A query and what the first stage found for it, best first."""

    qid: str
    query: str
    passages: tuple[Passage, ...]


def read_candidates(path: str | Path) -> list[Candidates]:
    """Queries with their first-stage passages, in either form that rerankers exchange.

    RankGPT: {"query", "hits": [{"content", "docid", "qid", "rank", "score"}]}
    RankLLM: {"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {...}}]}

    The form is told by the fields, and a JSON list from JSON lines by the first character.
    The order in the file is the rank order. ids may be numbers, texts may be empty.
    """
    return parse_candidates(json_records(path))


def write_candidates(candidates: list[Candidates], path: str | Path) -> None:
    """Write RankLLM's form to a ".jsonl" path, RankGPT's to a ".json" path.

    UserError for another ending, and for whatever `read_candidates` would refuse: so a query
    without hits fits only RankLLM's form, since RankGPT's keeps the qid in the hits.
    """
    suffix = Path(path).suffix
    if suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: candidates go to .jsonl (RankLLM) or .json (RankGPT)")
    to_record = rankgpt_record if suffix == ".json" else rankllm_record
    records = [to_record(query) for query in candidates]
    parse_candidates(numbered(path, records))
    if suffix == ".json":
        write_lines(path, [json.dumps(records, indent=2)] if records else [])
    else:
        write_lines(path, candidates_lines(candidates))


def candidates_lines(candidates: list[Candidates]) -> list[str]:
    """As RankLLM's JSON lines."""
    return [json.dumps(rankllm_record(query)) + "\n" for query in candidates]


def rankgpt_record(query: Candidates) -> dict[str, Any]:
    hits = [
        {"content": p.text, "qid": query.qid, "docid": p.docid, "rank": rank, "score": p.score}
        for rank, p in enumerate(query.passages, start=1)
    ]
    return {"query": query.query, "hits": hits}


def rankllm_record(query: Candidates) -> dict[str, Any]:
    candidates = [
        {"docid": p.docid, "score": p.score, "doc": {"contents": p.text}} for p in query.passages
    ]
    return {"query": {"text": query.query, "qid": query.qid}, "candidates": candidates}


def parse_candidates(records: list[tuple[str, Any]]) -> list[Candidates]:
    parsed: dict[str, Candidates] = {}
    for where, record in records:
        is_rankllm = isinstance(record, dict) and "candidates" in record
        query = (from_rankllm if is_rankllm else from_rankgpt)(where, record)
        if query.qid in parsed:
            raise UserError(f"{where}: second record of qid {query.qid}")
        if len({p.docid for p in query.passages}) != len(query.passages):
            raise UserError(f"{where}: qid {query.qid} has a docid twice")
        parsed[query.qid] = query
    return list(parsed.values())


def from_rankgpt(where: str, record: Any) -> Candidates:
    query = field(where, record, "query", str)
    hits = field(where, record, "hits", list)
    passages, qids = [], set()
    for i, hit in enumerate(hits, start=1):
        at = f"{where}, hit {i}"
        passages.append(parse_passage(at, hit, field(at, hit, "content", str)))
        qids.add(qid_field(at, hit, "qid"))
    if len(qids) != 1:
        raise UserError(f"{where}: the hits should name one qid, found {sorted(qids)}")
    return Candidates(qids.pop(), query, tuple(passages))


def from_rankllm(where: str, record: Any) -> Candidates:
    query = field(where, record, "query", dict)
    passages = []
    for i, candidate in enumerate(field(where, record, "candidates", list), start=1):
        at = f"{where}, candidate {i}"
        text = document_text(at, field(at, candidate, "doc", dict))
        passages.append(parse_passage(at, candidate, text))
    text = field(where, query, "text", str)
    return Candidates(qid_field(where, query, "qid"), text, tuple(passages))


def parse_passage(where: str, hit: Any, text: str) -> Passage:
    score = str(field(where, hit, "score", int, float))
    return Passage(
        docid_field(where, hit, "docid"), text, parse_number(where, "score", score, float)
    )


def document_text(where: str, doc: dict[str, Any]) -> str:
    """The passage as the reranker reads it; a title is prefixed in RankGPT's and RankLLM's way."""
    name = next((name for name in TEXT_FIELDS if name in doc), None)
    if name is None:
        raise UserError(f"{where}: none of the text fields {', '.join(TEXT_FIELDS)}")
    text = field(where, doc, name, str)
    title = field(where, doc, "title", str).strip() if doc.get("title") else ""
    # pyserini's "contents" is often title and text in one already, and "" starts every text.
    return text if text.startswith(title) else f"Title: {title} Content: {text}"


def read_triples(path: str | Path) -> tuple[list[Candidates], Qrels]:
    """MS MARCO-style training queries as Tevatron publishes them, JSON lines of

        {"query_id", "query", "positive_passages": [...], "negative_passages": [...]}

    with passages {"docid", "title", "text"}; as candidates (score 0: no first stage ranked them)
    and judgments, grade 1 for the positives and 0 for the negatives.
    """
    candidates, qrels = {}, {}
    for where, record in json_records(path):
        qid = qid_field(where, record, "query_id")
        if qid in candidates:
            raise UserError(f"{where}: second record of query_id {qid}")
        passages, grades = [], {}
        for name, grade in (("positive_passages", 1), ("negative_passages", 0)):
            for i, doc in enumerate(field(where, record, name, list), start=1):
                at = f"{where}, {name} {i}"
                docid = docid_field(at, doc, "docid")
                if docid in grades:
                    raise UserError(f"{at}: docid {docid} is there twice")
                passages.append(Passage(docid, document_text(at, doc), 0.0))
                grades[docid] = grade
        query = field(where, record, "query", str)
        candidates[qid], qrels[qid] = Candidates(qid, query, tuple(passages)), grades
    return list(candidates.values()), qrels
