"""Rerank a test collection and measure it.

    python evaluate.py dl19                                   # MS MARCO through pyserini
    python evaluate.py dl19 --model OUT --output_dir runs/mine
    python evaluate.py --candidates FILE --qrels FILE --reranker oracle

Into --output_dir go the TREC run (run.txt), the figures (metrics.json), and every window's given
order, reasoning and answer (windows.jsonl).
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from tqdm import tqdm
from transformers import HfArgumentParser

import data
from data import Candidates, Qrels
from rearank import AgentSettings, Answer, load_agent, rerank
from reward import ndcg_at_k
from settings import parse_settings, setting
from tasks import TASKS
from window import Parsed, run_rankers

# name: (pyserini's BM25 index, topics, qrels)
DATASETS = {
    "dl19": ("msmarco-v1-passage", "dl19-passage", "dl19-passage"),
    "dl20": ("msmarco-v1-passage", "dl20", "dl20-passage"),
}
CUTOFFS = (1, 5, 10)


@dataclass
class EvaluateSettings:
    candidates: str = setting("", "first-stage candidates (RankGPT's JSON or RankLLM's JSONL)")
    qrels: str = setting("", "TREC qrels file")
    reranker: str = setting(
        "model",
        "model; none: the first stage as it is; oracle: orders each window by the judgments",
        choices=["none", "oracle", "model"],
    )
    top_k: int = setting(100, "candidates per query that are reranked and written")
    output_dir: str = setting("", "where to write; default: runs/DATASET-RERANKER")


def load_dataset(name: str | None, settings: EvaluateSettings) -> tuple[list[Candidates], Qrels]:
    """The candidates and the qrels: files where they are given, the rest by the dataset's name."""
    index, topics, qrels_name = DATASETS.get(name, (None, None, None))
    if name is None and not (settings.candidates and settings.qrels):
        raise SystemExit("give a dataset's name, or both --candidates and --qrels")
    qrels = data.read_qrels(settings.qrels) if settings.qrels else data.pyserini_qrels(qrels_name)
    if settings.candidates:
        return data.read_candidates(settings.candidates), qrels
    judged = {q: text for q, text in data.pyserini_topics(topics).items() if q in qrels}
    return data.search_bm25(index, judged, k=settings.top_k), qrels


def ndcg_table(ranked: list[Candidates], qrels: Qrels) -> dict[str, float]:
    """Mean nDCG at each cutoff over all queries of the qrels; one without a ranking counts 0."""
    docids = {query.qid: [p.docid for p in query.passages] for query in ranked}
    return {
        f"ndcg@{k}": fmean(
            ndcg_at_k([grades.get(d, 0) for d in docids.get(qid, [])], k, list(grades.values()))
            for qid, grades in qrels.items()
        )
        for k in CUTOFFS
    }


def oracle_rerank(
    candidates: list[Candidates],
    qrels: Qrels,
    settings: AgentSettings,
    on_answer: Callable[[Answer], None],
) -> list[Candidates]:
    """The task's own ranker with every window answered by the judgments: the most that its
    windows can reach, and a test of the sliding itself."""
    pending: list[tuple[tuple[int, int], list[int]]] = []
    reranked: dict[int, Candidates] = {}

    def collect():
        ticket, given = pending.pop()
        query = candidates[ticket[0]]
        docids = [query.passages[i].docid for i in given]
        grades = [qrels[query.qid].get(docid, 0) for docid in docids]
        order = sorted(range(len(given)), key=lambda i: -grades[i])
        on_answer(Answer(query.qid, docids, Parsed(order, True, True, False, ""), "", 0, False))
        return [(ticket, order)]

    def done(index: int, order: list[int]) -> None:
        query = candidates[index]
        reranked[index] = replace(query, passages=tuple(query.passages[i] for i in order))

    ranker = TASKS[settings.task].ranker
    run_rankers(
        [ranker(len(query.passages), settings) for query in candidates],
        lambda ticket, given: pending.append((ticket, given)), collect, done,
    )  # fmt: skip
    return [reranked[index] for index in range(len(candidates))]


def judged_queries(candidates: list[Candidates], qrels: Qrels, top_k: int) -> list[Candidates]:
    """The queries that can be measured, each with its best `top_k` candidates; says what it
    leaves out and what will count as 0."""
    judged = [
        replace(query, passages=query.passages[:top_k])
        for query in candidates
        if query.qid in qrels
    ]
    if not judged:
        raise ValueError("the candidates and the qrels have no query in common")
    if missing := len(qrels) - len(judged):
        print(f"{missing} judged queries have no candidates and count as 0")
    if unjudged := len(candidates) - len(judged):
        print(f"{unjudged} queries have no judgments and are left out")
    return judged


def evaluate(
    candidates: list[Candidates],
    qrels: Qrels,
    rerank_all: Callable[[list[Candidates], Callable[[Answer], None]], list[Candidates]],
    output_dir: Path,
) -> dict:
    """Rerank the candidates, write the three files, return the metrics."""
    output_dir.mkdir(parents=True, exist_ok=True)
    totals = {"windows": 0, "malformed": 0, "cut_off": 0, "tokens": 0}
    started = time.perf_counter()
    with (
        open(output_dir / "windows.jsonl", "w", encoding="utf-8") as log,
        tqdm(desc="windows", unit="w", ncols=80) as bar,
    ):

        def on_answer(answer: Answer) -> None:
            totals["windows"] += 1
            totals["malformed"] += answer.parsed.malformed
            totals["cut_off"] += answer.cut_off
            totals["tokens"] += answer.tokens
            log.write(json.dumps(window_record(answer), ensure_ascii=False) + "\n")
            bar.set_postfix(malformed=totals["malformed"], refresh=False)
            bar.update()

        reranked = rerank_all(candidates, on_answer)
    metrics = {
        "queries": len(qrels),
        "queries_without_candidates": len(qrels) - len(candidates),
        "before": ndcg_table(candidates, qrels),
        "after": ndcg_table(reranked, qrels),
        **totals,
        "seconds": round(time.perf_counter() - started, 1),
    }
    rankings = {query.qid: [p.docid for p in query.passages] for query in reranked}
    data.write_run(rankings, output_dir / "run.txt", tag="rearank")
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def window_record(answer: Answer) -> dict:
    record = asdict(answer)
    parsed = record.pop("parsed")
    ranked = [answer.given[i] for i in answer.parsed.order]
    return record | {"ranked": ranked, "malformed": parsed["malformed"],
                     "reasoning": parsed["reasoning"]}  # fmt: skip


def choose_reranker(name: str, qrels: Qrels, settings: AgentSettings) -> Callable:
    """What `evaluate` is to measure: (candidates, on_answer) -> reranked candidates."""
    if name == "none":
        return lambda candidates, on_answer: candidates
    if name == "oracle":
        return lambda candidates, on_answer: oracle_rerank(candidates, qrels, settings, on_answer)
    agent = load_agent(settings)
    return lambda candidates, on_answer: rerank(agent, candidates, on_answer)


def print_metrics(metrics: dict) -> None:
    print("            before    after")
    for name, before in metrics["before"].items():
        print(f"{name:8}  {before:8.4f} {metrics['after'][name]:8.4f}")
    print("{queries} queries, {windows} windows, {malformed} malformed, {cut_off} cut off, "
          "{tokens} tokens, {seconds} s".format(**metrics))  # fmt: skip


def main() -> None:
    parser = HfArgumentParser(
        (EvaluateSettings, AgentSettings), allow_abbrev=False, description=__doc__.split("\n")[0]
    )
    parser.add_argument("dataset", nargs="?", choices=sorted(DATASETS), help="a dataset's name")
    settings, agent_settings, inputs = parse_settings(parser)
    name = f"{inputs.dataset or Path(settings.candidates).stem}-{settings.reranker}"
    output_dir = Path(settings.output_dir or f"runs/{name}")
    try:
        candidates, qrels = load_dataset(inputs.dataset, settings)
        candidates = judged_queries(candidates, qrels, settings.top_k)
        rerank_all = choose_reranker(settings.reranker, qrels, agent_settings)
        metrics = evaluate(candidates, qrels, rerank_all, output_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print_metrics(metrics)
    print(f"written to {output_dir}")


if __name__ == "__main__":
    main()
