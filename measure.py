"""What a reranker is worth on judged queries: the measures before and after, query by query.

    OUTPUT_DIR/
        run.txt            the TREC run
        metrics.json       the figures, and all that they were made from
        per_query.jsonl    each query's figures, before and after
        windows.jsonl      every window's given order, reasoning and answer
        queries.jsonl      the queries, their passages and judgments
        report.html        all of it, to read (pages/reader.py)

Several datasets are measured together: their windows share one batch, and each gets its own files.
Training measures its held-out queries the same way.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch.distributed as dist
from ir_measures import AP, RR, R, iter_calc, nDCG
from tqdm import tqdm

from agent import Agent, Answer, Known, rank_batch
from answers import METRICS, PARTS, UNFINISHED, json_line
from data import TrainingWindow, refuse_overlap
from engine.files import read_json, write_whole
from engine.parallel import StopSignal, all_gather, balanced, explained, gathered, say, together
from pages.reader import keep_reader
from rollout import drop_too_long, sample_shared, windows_at_once
from settings import AgentSettings, RunSettings, TrainSettings, UserError
from sources.formats import Candidates, read_candidates
from sources.trec import Qrels, read_qrels, write_run

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


def judged_queries(
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


def measure_all(evaluations: list[Evaluation], rerank: Reranker) -> list[dict]:
    """Rerank all candidates in one go, write each dataset's files, return its metrics; on all
    processes, which meet when each has reranked its share of the queries, not before.

    The metrics count the known answers, but their "seconds" are this call's alone, and of all
    datasets together.
    """
    started = time.perf_counter()
    shares = rerank_share(evaluations, rerank)
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
    if dist.get_rank() == 0:
        output_dir = evaluation.output_dir
        rankings = {query.qid: [p.docid for p in query.passages] for query in reranked}
        both = ({"qid": q, "before": before[q], "after": after[q]} for q in qrels)
        write_whole(output_dir / "windows.jsonl", "".join(map(json_line, answers)))
        write_run(rankings, output_dir / "run.txt", tag="rearank")
        write_whole(
            output_dir / "per_query.jsonl", "".join(json.dumps(query) + "\n" for query in both)
        )
        write_whole(output_dir / METRICS, json.dumps(metrics, indent=2) + "\n")
        keep_reader(output_dir, candidates, reranked, qrels)
        (output_dir / UNFINISHED).unlink(missing_ok=True)
        for part in output_dir.glob(PARTS):
            part.unlink()
    return metrics


def rerank_share(
    evaluations: list[Evaluation], rerank: Reranker
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
    desc = "windows" if world == 1 else "process 0's windows"
    with (
        ExitStack() as files,
        tqdm(desc=desc, initial=len(answers), unit="w", ncols=80, disable=rank > 0) as bar,
    ):
        logs = {str(e.output_dir): files.enter_context(open_part(e, rank)) for e in evaluations}

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
    shares = all_gather((reranked, answers))
    by_key = {query.qid: query for share, _ in shares for query in share}
    by_window = {key: answer for _, share in shares for key, answer in share.items()}
    return [in_order(e, by_key, by_window) for e in evaluations]


def open_part(evaluation: Evaluation, rank: int):
    evaluation.output_dir.mkdir(parents=True, exist_ok=True)
    path = evaluation.output_dir / PARTS.replace("*", str(rank))
    return open(path, "a" if evaluation.known else "w", encoding="utf-8")


def in_order(
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


# ----------------------------------------------------------------------------- held-out queries


def load_held_out(settings: RunSettings) -> tuple[list[Candidates], Qrels] | None:
    """The held-out queries of a training, None where it has none."""
    if bool(settings.eval_candidates) != bool(settings.eval_qrels):
        raise UserError("held-out figures need both --eval_candidates and --eval_qrels")
    if not settings.eval_candidates:
        return None
    candidates, qrels = read_candidates(settings.eval_candidates), read_qrels(settings.eval_qrels)
    return judged_queries(candidates, qrels, top_k=100), qrels


def refuse_held_out(
    windows: list[TrainingWindow],
    held_out: tuple[list[Candidates], Qrels] | None,
    settings: RunSettings,
) -> None:
    """UserError where what is measured is trained on, unless --allow_overlap."""
    queries = [query.query for query in held_out[0]] if held_out else []
    trained_on = (window.query for window in windows)
    refuse_overlap(trained_on, {settings.eval_candidates: queries}, settings.allow_overlap)


def measure_held_out(
    agent: Agent,
    queries: tuple[list[Candidates], Qrels] | None,
    settings: TrainSettings,
    output_dir: Path,
    stop: StopSignal,
    again: bool = True,
) -> dict[str, float] | None:
    """Greedy figures on the held-out queries: nDCG@10 of their candidates, reranked as
    evaluate.py does it, and the mean reward of windows drawn like those of training. Not `again`:
    those that were written before."""
    if not queries:
        return None
    if not again:
        return together(lambda: read_held_out(output_dir))
    candidates, qrels = queries
    greedy = replace(settings, temperature=0.0, group_size=1, draws=3)
    windows = agent.task.training_set(candidates, qrels, greedy)
    windows, longest = drop_too_long(agent, windows, settings)
    # Here each window has a prompt of its own, in training a group shares one.
    at_once = windows_at_once(settings, longest)
    greedy = replace(greedy, max_in_flight=at_once)
    agent_settings = AgentSettings(
        window_size=settings.window_size,
        step_size=max(1, settings.window_size // 2),
        max_new_tokens=settings.max_new_tokens,
        max_in_flight=at_once,
    )
    with explained("sampling"), gathered(agent.policy):
        rerank = partial(rank_batch, agent, agent_settings, keep_too_long=True)
        (metrics,) = measure_all([Evaluation(candidates, qrels, output_dir)], rerank)
        rollouts = sample_shared(agent, list(enumerate(windows)), (0,), greedy, stop)
    figures = {
        "first_stage": metrics["before"]["ndcg@10"],
        "ndcg@10": metrics["after"]["ndcg@10"],
        "window_reward": fmean(float(r.rewards[0]) for r in rollouts),
    }
    if dist.get_rank() == 0:
        write_whole(output_dir / "held_out.json", json.dumps(figures) + "\n")
    return figures


def read_held_out(output_dir: Path) -> dict[str, float] | None:
    """The figures that `measure_held_out` wrote; None where the file is gone, which is said."""
    path = output_dir / "held_out.json"
    if not path.exists():
        say(f"{path} is gone: the model before training is not measured again", file=sys.stderr)
        return None
    figures = read_json(path)
    for name in ("first_stage", "ndcg@10", "window_reward"):
        if not isinstance(figures.get(name), float | int):
            raise UserError(f"{path}: damaged, it has no {name}; without the file the run goes on")
    return figures


def say_what_was_gained(before: dict[str, float], after: dict[str, float]) -> None:
    say(
        f"held-out nDCG@10: {before['ndcg@10']:.4f} before training, {after['ndcg@10']:.4f} after "
        f"(first stage {after['first_stage']:.4f})"
    )
    say(
        f"held-out windows, mean reward: {before['window_reward']:.4f} before training, "
        f"{after['window_reward']:.4f} after"
    )
