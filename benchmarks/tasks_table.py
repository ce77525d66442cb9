"""Listwise against setwise: nDCG@10, model calls, passages shown, tokens generated.

    python benchmarks/tasks_table.py [CANDIDATES QRELS]

On the offline world with the two trained models of seed 81 (trained first, some 5 minutes each,
where benchmarks/toy_learning.py has not left them); and, where a collection is given, on it with
every window answered by the judgments, which generates no tokens.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from toy_learning import train

import toy
from agent import load_agent, rank_batch
from engine.parallel import processes
from evaluate import oracle_rerank
from measure import Evaluation, measurable, measure_all
from settings import AgentSettings
from sources import formats, trec

SEED = 81
WAYS = {  # what is asked for, and how many are asked it
    "listwise": {"task": "listwise"},
    "setwise, heapsort": {"task": "setwise", "sort": "heapsort"},
    "setwise, bubblesort": {"task": "setwise", "sort": "bubblesort"},
}


def count(candidates, qrels, rerank) -> dict:
    with tempfile.TemporaryDirectory() as out:
        with processes():
            (metrics,) = measure_all([Evaluation(candidates, qrels, Path(out))], rerank)
        windows = (Path(out) / "windows.jsonl").read_text().splitlines()
    shown = sum(len(json.loads(line)["given"]) for line in windows)
    return {"ndcg": metrics["after"]["ndcg@10"], "calls": metrics["windows"], "shown": shown,
            "tokens": metrics["tokens"]}  # fmt: skip


def print_table(name: str, rows: dict[str, dict]) -> None:
    print(f"\n{name}\n\n| | nDCG@10 | model calls | passages shown | tokens generated |")
    print("|---|---|---|---|---|")
    for way, row in rows.items():
        print(f"| {way} | {row['ndcg']:.4f} | {row['calls']} | {row['shown']} | {row['tokens']} |")


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    for way, settings in WAYS.items():
        files = toy.prepare(SEED, settings["task"])
        agent_settings = AgentSettings(
            model=str(train(settings["task"], SEED, "reward")),
            prompt=files["prompt"],
            window_size=toy.SIZE,
            step_size=toy.SIZE // 2,
            max_new_tokens=toy.PRESET["max_new_tokens"],
            **settings,
        )
        rerank = partial(rank_batch, load_agent(agent_settings), agent_settings)
        candidates = formats.read_candidates(files["eval_candidates"])
        qrels = trec.read_qrels(files["eval_qrels"])
        rows[way] = count(candidates, qrels, rerank)
    print_table("The offline world, trained models, windows of 6", rows)
    if len(sys.argv) == 3:
        qrels = trec.read_qrels(sys.argv[2])
        candidates = measurable(formats.read_candidates(sys.argv[1]), qrels, 100)
        rows = {}
        for way, settings in WAYS.items():
            judge = partial(oracle_rerank, qrels, AgentSettings(**settings))
            rows[way] = count(candidates, qrels, judge)
        print_table("Judgments answer, windows of 20", rows)


if __name__ == "__main__":
    main()
