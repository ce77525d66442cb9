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
from toy_learning import OUT, train

import data
import toy
from evaluate import evaluate, judged_queries, oracle_rerank
from parallel import processes
from rearank import AgentSettings, load_agent, rerank

SEED = 81
WAYS = {  # what is asked for, and how many are asked it
    "listwise": {"task": "listwise"},
    "setwise, heapsort": {"task": "setwise", "sort": "heapsort"},
    "setwise, bubblesort": {"task": "setwise", "sort": "bubblesort"},
}


def measure(candidates, qrels, rerank_all) -> dict:
    with tempfile.TemporaryDirectory() as out:
        with processes():
            metrics = evaluate(candidates, qrels, rerank_all, Path(out))
        windows = (Path(out) / "windows.jsonl").read_text().splitlines()
    shown = sum(len(json.loads(line)["given"]) for line in windows)
    return {"ndcg": metrics["after"]["ndcg@10"], "calls": metrics["windows"], "shown": shown,
            "tokens": metrics["tokens"]}  # fmt: skip


def trained_model(task: str) -> Path:
    run = OUT / f"{task}-{SEED}-reward"
    return run if (run / "after").exists() else train(task, SEED, "reward")


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
        agent = load_agent(
            AgentSettings(
                model=str(trained_model(settings["task"])),
                prompt=files["prompt"],
                window_size=toy.SIZE,
                step_size=toy.SIZE // 2,
                max_new_tokens=toy.PRESET["max_new_tokens"],
                **settings,
            )
        )
        candidates = data.read_candidates(files["eval_candidates"])
        qrels = data.read_qrels(files["eval_qrels"])
        rows[way] = measure(candidates, qrels, partial(rerank, agent))
    print_table("The offline world, trained models, windows of 6", rows)
    if len(sys.argv) == 3:
        qrels = data.read_qrels(sys.argv[2])
        candidates = judged_queries(data.read_candidates(sys.argv[1]), qrels, 100)
        rows = {}
        for way, settings in WAYS.items():

            def judge(candidates, report, known, settings=settings):
                return oracle_rerank(candidates, qrels, AgentSettings(**settings), report)

            rows[way] = measure(candidates, qrels, judge)
        print_table("Judgments answer, windows of 20", rows)


if __name__ == "__main__":
    main()
