"""Rerank a test collection and measure it.

    python evaluate.py dl19                                   # MS MARCO through pyserini
    python evaluate.py dl19 --model OUT --output_dir runs/mine
    python evaluate.py --candidates FILE --qrels FILE --reranker oracle
    torchrun --nproc_per_node=8 evaluate.py dl19              # each GPU reranks its share

Into --output_dir go the TREC run (run.txt), the figures (metrics.json), and every window's given
order, reasoning and answer (windows.jsonl); the number of processes changes none of them.

Until these are whole, each process adds every window to its windows.part*.jsonl as soon as it is
answered, and unfinished.json says what decides the answers. An evaluation that died goes on from
there when started again with the same command, on any number of processes. One that was finished
runs anew.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser

import data
import lora
from checkpoint import write_whole
from data import Candidates, Qrels
from memory import is_out_of_memory
from parallel import Interrupted, StopSignal, all_gather, balanced, processes
from rearank import AgentSettings, Answer, load_agent, rerank
from reward import ndcg_at_k
from settings import parse_settings, setting
from tasks import TASKS
from window import load_prompt, run_rankers

# name: (pyserini's BM25 index, topics, qrels)
DATASETS = {
    "dl19": ("msmarco-v1-passage", "dl19-passage", "dl19-passage"),
    "dl20": ("msmarco-v1-passage", "dl20", "dl20-passage"),
}
CUTOFFS = (1, 5, 10)
PARTS, UNFINISHED = "windows.part*.jsonl", "unfinished.json"
MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "chat_template*")

Known = dict[tuple[str, int], Answer]  # by qid and window


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
    output_dir: str = setting("", "where to write; default: runs/DATASET-MODEL")


def load_dataset(name: str | None, settings: EvaluateSettings) -> tuple[list[Candidates], Qrels]:
    """The candidates and the qrels: files where they are given, the rest by the dataset's name."""
    index, topics, qrels_name = DATASETS.get(name, (None, None, None))
    if name is None and not (settings.candidates and settings.qrels):
        raise ValueError("give a dataset's name, or both --candidates and --qrels")
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
    answered: list[tuple[tuple[int, int], list[int]]] = []
    windows = Counter()  # so far, of each query
    orders: dict[int, list[int]] = {}

    def submit(ticket: tuple[int, int], given: list[int]) -> None:
        qid, passages = candidates[ticket[0]].qid, candidates[ticket[0]].passages
        docids = [passages[i].docid for i in given]
        order = sorted(range(len(given)), key=lambda i: -qrels[qid].get(docids[i], 0))
        ranked = [docids[i] for i in order]
        on_answer(Answer(qid, windows[qid], docids, ranked, False, "", "", 0, False))
        windows[qid] += 1
        answered.append((ticket, order))

    ranker = TASKS[settings.task].ranker
    rankers = [ranker(len(query.passages), settings) for query in candidates]
    run_rankers(rankers, submit, lambda: [answered.pop()], orders.__setitem__)
    return [
        replace(query, passages=tuple(query.passages[i] for i in orders[index]))
        for index, query in enumerate(candidates)
    ]


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


# ------------------------------------------------------------------- what is on disk meanwhile


def deciding_facts(
    settings: EvaluateSettings, agent_settings: AgentSettings, candidates: list[Candidates], qrels
) -> dict:
    """All that decides the answers, as JSON has it; a local model by its files' sizes and times."""
    facts = {"reranker": settings.reranker, "top_k": settings.top_k, **asdict(agent_settings)}
    del facts["max_in_flight"]  # who ran out of memory may go on with less
    prompt = load_prompt(agent_settings.prompt or TASKS[agent_settings.task].prompt)
    model = agent_settings.model
    folders = [model, lora.base_of(model) or model] if Path(model).is_dir() else []
    files = {f for folder in folders for p in MODEL_FILES for f in Path(folder).glob(p)}
    return facts | {
        "prompt": asdict(prompt),
        "model files": {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)},
        "candidates": hashlib.sha256(repr(candidates).encode()).hexdigest(),
        "qrels": hashlib.sha256(repr(qrels).encode()).hexdigest(),
    }


def begin(output_dir: Path, facts: dict) -> Known:
    """Begin an evaluation, or go on with the unfinished one in output_dir: its answers.
    ValueError where that is another one."""
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = output_dir / UNFINISHED
    known = read_parts(output_dir) if unfinished.exists() else {}
    if known:
        begun = json.loads(unfinished.read_text(encoding="utf-8"))
        if different := sorted(k for k in facts.keys() | begun if facts.get(k) != begun.get(k)):
            raise ValueError(
                f"{output_dir} holds {len(known)} windows of an unfinished evaluation with another "
                f"{', '.join(different)}: give another --output_dir, or delete that one"
            )
        print(f"going on: {len(known)} windows are on disk")
    else:
        for part in output_dir.glob(PARTS):
            part.unlink()
        write_whole(unfinished, json.dumps(facts, indent=2))
    return known


def read_parts(output_dir: Path) -> Known:
    """The answered windows. A last line that was cut off is removed from its file; ValueError for
    any other that cannot be read."""
    known: Known = {}
    for part in sorted(output_dir.glob(PARTS)):
        *lines, torn = part.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                answer = Answer(**json.loads(line))
                if sorted(answer.ranked) != sorted(answer.given):
                    raise ValueError
                known[answer.qid, answer.window] = answer
            except (ValueError, TypeError):
                raise ValueError(f"{part}:{number}: damaged, no answered window can be read here; "
                                 "without the line it is asked for again") from None  # fmt: skip
        os.truncate(part, part.stat().st_size - len(torn))
    return known


# ----------------------------------------------------------------------------- the evaluation


def evaluate(
    candidates: list[Candidates],
    qrels: Qrels,
    rerank_all: Callable[[list[Candidates], Callable[[Answer], None], Known], list[Candidates]],
    output_dir: Path,
    known: Known | None = None,
) -> dict:
    """Rerank the candidates, write the three files, return the metrics; on all processes, which
    meet when each has reranked its share of the queries, not before.

    known: the answers of an evaluation that is gone on with; None: whatever is on disk is of
        another. The metrics count them, but their "seconds" are this call's alone.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    started, known = time.perf_counter(), known or {}
    costs = [sum(len(passage.text) for passage in query.passages) for query in candidates]
    mine = [candidates[i] for i in balanced(costs, world)[rank]]
    qids = {query.qid for query in mine}
    answers = {key: answer for key, answer in known.items() if key[0] in qids}
    output_dir.mkdir(parents=True, exist_ok=True)
    part = output_dir / PARTS.replace("*", str(rank))
    malformed = sum(answer.malformed for answer in answers.values())
    desc = "windows" if world == 1 else "process 0's windows"
    with (
        open(part, "a" if known else "w", encoding="utf-8") as log,
        tqdm(desc=desc, initial=len(answers), unit="w", ncols=80, disable=rank > 0) as bar,
    ):

        def on_answer(answer: Answer) -> None:
            nonlocal malformed
            answers[answer.qid, answer.window] = answer
            log.write(json_line(answer))
            log.flush()
            malformed += answer.malformed
            bar.set_postfix(malformed=malformed, refresh=False)
            bar.update()

        reranked = rerank_all(mine, on_answer, known)
    shares = all_gather((reranked, answers))
    by_qid = {query.qid: query for share, _ in shares for query in share}
    reranked = [by_qid[query.qid] for query in candidates]
    place = {query.qid: i for i, query in enumerate(candidates)}
    answers = [answer for _, share in shares for answer in share.values()]
    answers.sort(key=lambda answer: (place[answer.qid], answer.window))
    metrics = {
        "queries": len(qrels),
        "queries_without_candidates": len(qrels) - len(candidates),
        "before": ndcg_table(candidates, qrels),
        "after": ndcg_table(reranked, qrels),
        "windows": len(answers),
        "malformed": sum(answer.malformed for answer in answers),
        "cut_off": sum(answer.cut_off for answer in answers),
        "tokens": sum(answer.tokens for answer in answers),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if rank == 0:
        rankings = {query.qid: [p.docid for p in query.passages] for query in reranked}
        write_whole(output_dir / "windows.jsonl", "".join(map(json_line, answers)))
        data.write_run(rankings, output_dir / "run.txt", tag="rearank")
        write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        (output_dir / UNFINISHED).unlink(missing_ok=True)
        for part in output_dir.glob(PARTS):
            part.unlink()
    return metrics


def json_line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


def choose_reranker(name: str, qrels: Qrels, settings: AgentSettings, device) -> Callable:
    """What `evaluate` is to measure: (candidates, on_answer, known) -> reranked candidates."""
    if name == "none":
        return lambda candidates, *_: candidates
    if name == "oracle":
        return lambda candidates, report, _: oracle_rerank(candidates, qrels, settings, report)
    return partial(rerank, load_agent(settings, device))


def print_metrics(metrics: dict) -> None:
    print("            before    after")
    for name, before in metrics["before"].items():
        print(f"{name:8}  {before:8.4f} {metrics['after'][name]:8.4f}")
    print("{queries} queries, {windows} windows, {malformed} malformed, {cut_off} cut off, "
          "{tokens} tokens, {seconds} s".format(**metrics))  # fmt: skip


def all_or_none(work: Callable[[], Any]) -> Any:
    """Do `work` on this process; where it fails on any, all end, and process 0 says why."""
    result, failure = None, None
    try:
        result = work()
    except (ValueError, OSError, SystemExit) as error:
        failure = str(error)
    if failures := [failure for failure in all_gather(failure) if failure]:
        # torchrun lets those that end well do so, and itself ends as process 0 does.
        raise SystemExit(failures[0] if dist.get_rank() == 0 else 0)
    return result


def main() -> None:
    parser = HfArgumentParser(
        (EvaluateSettings, AgentSettings), allow_abbrev=False, description=__doc__.split("\n")[0]
    )
    parser.add_argument("dataset", nargs="?", choices=sorted(DATASETS), help="a dataset's name")
    settings, agent_settings, inputs = parse_settings(parser)
    model = Path(agent_settings.model).as_posix().strip("/").replace("/", "-")
    name = model if settings.reranker == "model" else settings.reranker
    dataset = inputs.dataset or Path(settings.candidates).stem
    output_dir = Path(settings.output_dir or f"runs/{dataset}-{name}")

    def prepare() -> tuple[list[Candidates], Qrels, Known]:
        candidates, qrels = load_dataset(inputs.dataset, settings)
        candidates = judged_queries(candidates, qrels, settings.top_k)
        facts = deciding_facts(settings, agent_settings, candidates, qrels)
        return candidates, qrels, begin(output_dir, facts)

    with processes() as device, StopSignal() as stop:
        try:
            box = [all_or_none(lambda: prepare() if dist.get_rank() == 0 else None)]
            dist.broadcast_object_list(box)
            candidates, qrels, known = box[0]
            rerank_all = all_or_none(
                lambda: choose_reranker(settings.reranker, qrels, agent_settings, device)
            )
            metrics = evaluate(candidates, qrels, rerank_all, output_dir, known)
        except (ValueError, OSError, Interrupted) as error:
            if not stop.number:  # a signal may come out of a library as an error of its own
                raise SystemExit(str(error)) from None
            stop.at_once = False  # torchrun repeats the signal
            if dist.get_rank() == 0 and (output_dir / UNFINISHED).exists():
                lines = sum(part.read_bytes().count(b"\n") for part in output_dir.glob(PARTS))
                print(f"interrupted: {lines} windows are kept in {output_dir}, and the same "
                      "command goes on from them", file=sys.stderr)  # fmt: skip
            raise SystemExit(128 + stop.number) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SystemExit(
                f"out of memory: a smaller --max_in_flight than {agent_settings.max_in_flight} "
                f"needs less, and goes on from the windows on disk\n{error}"
            ) from error
        if dist.get_rank() == 0:
            print_metrics(metrics)
            print(f"written to {output_dir}")


if __name__ == "__main__":
    main()
