"""The ranking reader: what a reranker did to each query, window by window; or what two of them did.
An evaluation keeps its own, `report.html`, and beside it what it is made of: queries.jsonl."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.files import one_line, read_json, read_lines, write_whole
from engine.parallel import say
from pages.facts import flat
from pages.render import render
from reward import ndcg_at_k
from settings import UserError
from sources.formats import Candidates
from sources.trec import Qrels

TEXT, TEXTS = 400, 32_000_000  # characters kept of a passage; of all, so that fewer are of each
LARGEST = 12_000_000  # characters of passages and windows in a page


@dataclass(frozen=True)
class EvaluationFolder:
    """What an evaluation's folder tells, but for its windows (`read_windows`)."""

    name: str
    folder: Path
    metrics: dict
    queries: dict[str, dict]  # by qid, as queries.jsonl has them


# ------------------------------------------------------------------------------- what is kept


def query_records(
    candidates: list[Candidates], reranked: list[Candidates], qrels: Qrels
) -> Iterator[dict]:
    """Per query: {"qid", "query", "ndcg@10": [before, after], "relevant": how many were judged so,
    "passages": [{"docid", "grade" (None: not judged), "text"}] in the first stage's order,
    "final": docids}. Texts are cut to TEXT characters, to fewer where all together exceed TEXTS."""
    shown = sum(len(query.passages) for query in candidates)
    length = min(TEXT, TEXTS // max(shown, 1))
    for before, after in zip(candidates, reranked):
        grade_of = qrels.get(before.qid, {})
        ndcg = [
            ndcg_at_k([grade_of.get(p.docid, 0) for p in query.passages], 10, [*grade_of.values()])
            for query in (before, after)
        ]
        yield {
            "qid": before.qid,
            "query": before.query,
            "ndcg@10": [round(value, 6) for value in ndcg],
            "relevant": sum(grade > 0 for grade in grade_of.values()),
            "passages": [
                {
                    "docid": p.docid,
                    "grade": grade_of.get(p.docid),
                    "text": cut(" ".join(p.text.split()), length),
                }
                for p in before.passages
            ],
            "final": [p.docid for p in after.passages],
        }


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def keep_reader(
    output_dir: Path, candidates: list[Candidates], reranked: list[Candidates], qrels: Qrels
) -> None:
    """Write queries.jsonl and report.html into an evaluation's folder, which holds the rest. No
    error comes out of it: it is said, and the evaluation stays."""
    try:
        records = query_records(candidates, reranked, qrels)
        write_whole(output_dir / "queries.jsonl", "".join(map(one_line, records)))
        write_whole(output_dir / "report.html", reader_page([read_evaluation(output_dir)]))
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        say(f"{output_dir}/report.html is not written ({what})", file=sys.stderr)


# ---------------------------------------------------------------------------- what is read back


def read_evaluation(folder: Path) -> EvaluationFolder:
    """UserError where the folder holds no evaluation, or a damaged one."""
    if not (folder / "queries.jsonl").exists():
        raise UserError(f"{folder}: no evaluation to read (it has no queries.jsonl)")
    queries = {record["qid"]: record for record in read_lines(folder / "queries.jsonl")}
    metrics = read_json(folder / "metrics.json", missing={})
    *_, run, name = ("", *folder.resolve().parts)
    name = f"{run}/{name}" if name in ("before", "after") else name  # those of a training
    return EvaluationFolder(name, folder, metrics, queries)


def read_windows(evaluation: EvaluationFolder, qids: set[str]) -> dict[str, list[dict]]:
    """The windows of these queries, in order."""
    windows: dict[str, list[dict]] = {qid: [] for qid in qids}
    for record in read_lines(evaluation.folder / "windows.jsonl"):
        if record["qid"] in qids:
            windows[record["qid"]].append(record)
    return {qid: sorted(found, key=lambda one: one["window"]) for qid, found in windows.items()}


# ------------------------------------------------------------------------------------ the page


def compared(evaluations: list[EvaluationFolder]) -> list[tuple[str, list[float]]]:
    """(qid, the two nDCG@10 that are compared) of the queries that all evaluations have: before
    and after, the greatest loss first; of two evaluations after and after, the greatest difference
    first."""
    first, last = evaluations[0].queries, evaluations[-1].queries
    if len(evaluations) == 1:
        pairs = [(qid, record["ndcg@10"]) for qid, record in first.items()]
        return sorted(pairs, key=lambda pair: pair[1][1] - pair[1][0])
    pairs = [
        (qid, [first[qid]["ndcg@10"][1], last[qid]["ndcg@10"][1]]) for qid in first if qid in last
    ]
    if not pairs:
        raise UserError(f"{' and '.join(e.name for e in evaluations)} have no query in common")
    return sorted(pairs, key=lambda pair: -abs(pair[1][1] - pair[1][0]))


def with_details(evaluations: list[EvaluationFolder], order: list[str], largest: int) -> set[str]:
    """The queries whose passages and windows the page has room for, those in front first."""
    sizes = dict.fromkeys(order, 0)
    for evaluation in evaluations:
        for qid in order:
            sizes[qid] += sum(len(p["text"]) + 60 for p in evaluation.queries[qid]["passages"])
        for record in read_lines(evaluation.folder / "windows.jsonl"):
            if record["qid"] in sizes:
                sizes[record["qid"]] += len(record["response"]) + 8 * len(record["given"]) + 80
    chosen, room = set(), largest
    for qid in order:
        if sizes[qid] <= room:
            chosen.add(qid)
            room -= sizes[qid]
    return chosen


def query_details(records: list[dict], windows: list[list[dict]]) -> dict:
    """A query's passages once, and all else by their numbers: the two orders to compare, and each
    evaluation's windows."""
    docs = {p["docid"]: p for record in reversed(records) for p in record["passages"]}
    number = {docid: i for i, docid in enumerate(docs)}
    first = [p["docid"] for p in records[0]["passages"]]
    orders = [first, *(record["final"] for record in records)][-2:]
    return {
        "docs": list(docs.values()),
        "orders": [[number[docid] for docid in order] for order in orders],
        "windows": [
            [
                {
                    "given": [number[docid] for docid in one["given"]],
                    "ranked": [number[docid] for docid in one["ranked"]],
                    **{key: one[key] for key in ("malformed", "cut_off", "tokens", "response")},
                    "too_long": one.get("too_long", False),
                }
                for one in found
            ]
            for found in windows
        ],
    }


def reader_page(evaluations: list[EvaluationFolder], largest: int = LARGEST) -> str:
    """The page of one evaluation, or of two side by side."""
    pairs = compared(evaluations)
    chosen = with_details(evaluations, [qid for qid, _ in pairs], largest)
    windows = [read_windows(evaluation, chosen) for evaluation in evaluations]
    nothing = {"docs": [], "orders": [[], []], "windows": [[] for _ in evaluations]}
    queries = []
    for qid, ndcg in pairs:
        records = [evaluation.queries[qid] for evaluation in evaluations]
        about = {"qid": qid, "query": records[0]["query"], "ndcg": ndcg}
        about["relevant"] = records[0]["relevant"]
        details = query_details(records, [w[qid] for w in windows]) if qid in chosen else nothing
        queries.append(about | details)
    names = [evaluation.name for evaluation in evaluations]
    outcome = {"before", "after"}
    return render(
        "reader",
        {"names": names, "queries": queries},
        title=" against ".join(names),
        runs=evaluations,
        measures=list(evaluations[0].metrics.get("after", {})),
        facts=[
            dict(flat({k: v for k, v in evaluation.metrics.items() if k not in outcome}))
            for evaluation in evaluations
        ],
        left_out=len(pairs) - len(chosen),
    )
