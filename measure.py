"""What a reranker is worth on judged queries: the measures before and after, query by query.

    OUTPUT_DIR/
        run.txt            the TREC run
        metrics.json       the figures, and all that they were made from
        per_query.jsonl    each query's figures, before and after
        windows.jsonl      every window's given order, reasoning and answer
        queries.jsonl      the queries, their passages and judgments
        report.html        all of it, to read (pages/reader.py)

Several datasets are measured together: their windows share one batch, and each gets its own files.
Training measures its held-out queries the same way (held_out.py).
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch.distributed as dist
from ir_measures import AP, RR, R, iter_calc, nDCG
from tqdm import tqdm

from agent import Answer, Known
from engine.files import one_line, write_whole
from engine.parallel import all_gather, balanced, if_first, together
from pages.reader import keep_reader
from results.answers import METRICS, PARTS, UNFINISHED, json_line
from settings import UserError
from sources.formats import Candidates
from sources.trec import Qrels, write_run
from window import Ranker, expected_windows

# (candidates, on_answer, known) -> the candidates, reranked
Reranker = Callable[[list[Candidates], Callable[[Answer], None], Known], list[Candidates]]


@dataclass(frozen=True)
class Evaluation:
    """One dataset to be measured, and where it is written."""

    candidates: list[Candidates]
    qrels: Qrels
    output_dir: Path
    known: Known = field(default_factory=dict)  # the answers of an evaluation that is gone on with
    name: str = ""  # of the dataset
    relevant: int = 1  # the least grade that is relevant, for the measures that know yes and no
    about: Mapping = field(default_factory=dict)  # what the figures are made from, for metrics.json

    def key(self, qid: str) -> str:
        """A qid that no other dataset has."""
        return f"{self.name}/{qid}" if self.name else qid


# ------------------------------------------------------------------------------------ the figures


def per_query(
    ranked: list[Candidates], qrels: Qrels, relevant: int = 1
) -> dict[str, dict[str, float]]:
    """qid -> the measures by name, for every query of the qrels; one without a ranking has 0. As
    trec_eval computes them, for the order that the passages are in: what ties is not reordered.

    relevant: the least grade that is relevant for map, mrr and recall; nDCG takes all.
    """
    measures = {
        nDCG @ 1: "ndcg@1",
        nDCG @ 5: "ndcg@5",
        nDCG @ 10: "ndcg@10",
        AP(rel=relevant): "map",
        RR(rel=relevant): "mrr",
        R(rel=relevant) @ 100: "recall@100",
    }
    run = {q.qid: {p.docid: -float(i) for i, p in enumerate(q.passages)} for q in ranked}
    # To trec_eval grades below 0 are not relevant either; a query that has only grades below -1
    # would end it, and this process, in a segmentation fault.
    qrels = {qid: {d: max(grade, 0) for d, grade in of.items()} for qid, of in qrels.items()}
    values: dict[str, dict[str, float]] = {
        qid: dict.fromkeys(measures.values(), 0.0) for qid in qrels
    }
    for value in iter_calc(list(measures), qrels, run):
        values[value.query_id][measures[value.measure]] = value.value
    return values


def mean(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over all queries."""
    names = next(iter(values.values()))
    return {name: fmean(query[name] for query in values.values()) for name in names}


def measurable(
    candidates: list[Candidates], qrels: Qrels, top_k: int, name: str = ""
) -> list[Candidates]:
    """The queries that can be measured, each with its best `top_k` candidates; says what it
    leaves out and what will count as 0."""
    of = f"{name}: " if name else ""
    judged = [
        replace(query, passages=query.passages[:top_k])
        for query in candidates
        if query.qid in qrels
    ]
    if not judged:
        raise UserError(f"{of}the candidates and the qrels have no query in common")
    if missing := len(qrels) - len(judged):
        print(f"{of}{missing} judged queries have no candidates and count as 0")
    if unjudged := len(candidates) - len(judged):
        print(f"{of}{unjudged} queries have no judgments and are left out")
    return judged


# ---------------------------------------------------------------------------------- the measuring


def measure_all(
    evaluations: list[Evaluation],
    rerank: Reranker,
    ranker: Callable[[int], Ranker] | None = None,
) -> list[dict]:
    """Rerank all candidates in one go, write each dataset's files, return its metrics; on all
    processes, which meet when each has reranked its share of the queries, not before.

    The metrics count the known answers, but their "seconds" are this call's alone, and of all
    datasets together.

    ranker: what `rerank` asks windows by, for the bar; None: it asks none, and there is no bar.
    """
    started = time.perf_counter()
    shares = rerank_share(evaluations, rerank, ranker)
    seconds = round(time.perf_counter() - started, 1)
    return [measure(e, *share, seconds) for e, share in zip(evaluations, shares)]


def measure(
    evaluation: Evaluation, reranked: list[Candidates], answers: list[Answer], seconds: float
) -> dict:
    """The metrics of one dataset, which process 0 writes with the other files."""
    candidates, qrels = evaluation.candidates, evaluation.qrels
    before, after = (
        per_query(ranked, qrels, evaluation.relevant) for ranked in (candidates, reranked)
    )
    metrics = {
        "dataset": evaluation.name,
        "queries": len(qrels),
        "queries_without_candidates": len(qrels) - len(candidates),
        "before": mean(before),
        "after": mean(after),
        "relevant_from_grade": evaluation.relevant,
        "windows": len(answers),
        "malformed": sum(answer.malformed for answer in answers),
        "cut_off": sum(answer.cut_off for answer in answers),
        "too_long": sum(answer.too_long for answer in answers),
        "too_long_queries": sorted({answer.qid for answer in answers if answer.too_long}),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
        "seconds": seconds,
        **evaluation.about,
    }
    per_qid = [{"qid": qid, "before": before[qid], "after": after[qid]} for qid in qrels]
    if_first(lambda: write_results(evaluation, reranked, answers, per_qid, metrics))
    return metrics


def write_results(
    evaluation: Evaluation,
    reranked: list[Candidates],
    answers: list[Answer],
    per_qid: list[dict],
    metrics: dict,
) -> None:
    """The files of one dataset; those that an evaluation goes on from are then gone."""
    output_dir = evaluation.output_dir
    rankings = {query.qid: [p.docid for p in query.passages] for query in reranked}
    write_whole(output_dir / "windows.jsonl", "".join(map(json_line, answers)))
    write_run(rankings, output_dir / "run.txt", tag="rearank")
    write_whole(output_dir / "per_query.jsonl", "".join(map(one_line, per_qid)))
    write_whole(output_dir / METRICS, json.dumps(metrics, indent=2) + "\n")
    keep_reader(output_dir, evaluation.candidates, reranked, evaluation.qrels)
    (output_dir / UNFINISHED).unlink(missing_ok=True)
    for part in output_dir.glob(PARTS):
        part.unlink()


def rerank_share(
    evaluations: list[Evaluation],
    rerank: Reranker,
    ranker: Callable[[int], Ranker] | None,
) -> list[tuple[list[Candidates], list[Answer]]]:
    """Rerank this process's share of the queries, each answer written down as it comes; then, of
    each dataset, all queries reranked and all answers, in order, from all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    all_of_them = [(e, query) for e in evaluations for query in e.candidates]
    costs = [sum(len(passage.text) for passage in query.passages) for _, query in all_of_them]
    mine = [all_of_them[i] for i in balanced(costs, world)[rank]]
    # By a qid of its own: the folder of its dataset, and the qid there.
    owner = {e.key(query.qid): (str(e.output_dir), query.qid) for e, query in mine}
    answers = {
        (e.key(qid), window): answer
        for e in evaluations
        for (qid, window), answer in e.known.items()
        if e.key(qid) in owner
    }
    malformed = sum(answer.malformed for answer in answers.values())
    tokens = 0  # that this start takes
    with ExitStack() as files, window_bar([query for _, query in mine], ranker) as bar:
        bar.update(len(answers))
        parts = together(lambda: [files.enter_context(open_part(e, rank)) for e in evaluations])
        logs = {str(e.output_dir): part for e, part in zip(evaluations, parts)}

        def on_answer(answer: Answer) -> None:
            nonlocal malformed, tokens
            folder, qid = owner[answer.qid]
            answers[answer.qid, answer.window] = replace(answer, qid=qid)
            logs[folder].write(json_line(answers[answer.qid, answer.window]))
            logs[folder].flush()
            malformed += answer.malformed
            tokens += answer.prompt_tokens + answer.tokens
            bar.set_postfix(malformed=malformed, tokens=f"{tokens:,}", refresh=False)
            bar.update()

        queries = [replace(query, qid=e.key(query.qid)) for e, query in mine]
        reranked = rerank(queries, on_answer, dict(answers))
        bar.total = bar.n  # it may have been an estimate
    shares = all_gather((reranked, answers))
    by_key = {query.qid: query for share, _ in shares for query in share}
    by_window = {key: answer for _, share in shares for key, answer in share.items()}
    return [of_dataset(e, by_key, by_window) for e in evaluations]


def window_bar(queries: list[Candidates], ranker: Callable[[int], Ranker] | None) -> tqdm:
    """A bar of the windows that these queries take; without a ranker they take none, and it is not
    shown."""
    world, total, certain = dist.get_world_size(), 0, True
    if ranker:
        total, certain = expected_windows(ranker, [len(query.passages) for query in queries])
    return tqdm(
        desc=("windows" if world == 1 else "process 0's windows") + ("" if certain else ", about"),
        total=total,
        unit="w",
        ncols=80,
        leave=None,  # not under the bar of a training
        disable=dist.get_rank() > 0 or not ranker,
    )


def open_part(evaluation: Evaluation, rank: int):
    evaluation.output_dir.mkdir(parents=True, exist_ok=True)
    path = evaluation.output_dir / PARTS.replace("*", str(rank))
    return open(path, "a" if evaluation.known else "w", encoding="utf-8")


def of_dataset(
    evaluation: Evaluation,
    by_key: dict[str, Candidates],
    by_window: dict[tuple[str, int], Answer],
) -> tuple[list[Candidates], list[Answer]]:
    """A dataset's queries and answers out of those of all, in its own order."""
    qids = [query.qid for query in evaluation.candidates]
    place = {evaluation.key(qid): i for i, qid in enumerate(qids)}
    windows = sorted((place[key], window, key) for key, window in by_window if key in place)
    reranked = [replace(by_key[evaluation.key(qid)], qid=qid) for qid in qids]
    return reranked, [by_window[key, window] for _, window, key in windows]
