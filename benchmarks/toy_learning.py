"""What GRPO learns in the offline world, by seed, beside its controls.

    python benchmarks/toy_learning.py listwise 11 12 13        # 6 minutes a seed on one core
    python benchmarks/toy_learning.py setwise 11 12 13
    python benchmarks/toy_learning.py listwise 91 92 93 --dtype bfloat16

For each seed (of the world, the warm start and the training alike), greedy and held out, nDCG@10
of the reranked candidates (listwise) or the share of windows whose best passage is named (setwise):

    before    the warm-started model
    after     the trained one
    demo      the demonstrator that the warm start imitated, its noise taken out
    swapped   the trained model, every window shown with another query
    shuffled  the model trained alike, but with the rewards shuffled within each group
    form      the share of well-formed responses, after; and after training on shuffled rewards

Written to benchmarks/toy_learning.jsonl as well, one line a seed.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpo
import rollout
import toy
from agent import Agent, rank_batch, rank_windows
from data import TrainingWindow
from engine.model import load_lm
from engine.policy import Policy
from measure import mean, per_query
from rollout import sample_and_score
from settings import AgentSettings, TrainSettings
from sources import formats, trec
from sources.formats import Candidates
from tasks import TASKS
from window import load_prompt

OUT = Path(__file__).parents[1] / "runs" / "toy_learning"
FIGURE = {"listwise": "ndcg@10", "setwise": "window_reward"}


def train(task: str, seed: int, name: str, dtype: str = "float32") -> Path:
    settings = TrainSettings(
        preset="toy", task=task, seed=seed, dtype=dtype,
        output_dir=str(OUT / f"{task}-{seed}-{name}-{dtype}"), **toy.PRESET,
    )  # fmt: skip
    return grpo.train(settings)


def shuffled(score, seed: int):
    """`rollout.score` with each group's rewards dealt out again at random."""
    rng = random.Random(seed)

    def deal(*args):
        rewards = score(*args)
        return rng.sample(rewards, len(rewards))

    return deal


def other_queries(queries: Sequence[Candidates | TrainingWindow]) -> list:
    """Each with a query that shares no topic with its own."""

    def topics(query):
        return set(query.query.split()) & set(toy.TOPICS)

    swapped = []
    for i, query in enumerate(queries):
        rest = [*queries[i + 1 :], *queries[:i]]
        other = next(other for other in rest if not topics(other) & topics(query))
        swapped.append(replace(query, query=other.query))
    return swapped


def swapped_figure(
    task: str, run: Path, files: dict, windows: list[TrainingWindow], dtype: str
) -> float:
    """The trained model's figure where every query is another's."""
    lm, tokenizer = load_lm(str(run), getattr(torch, dtype))
    agent = Agent(Policy(lm.eval()), tokenizer, load_prompt(files["prompt"]), TASKS[task])
    if task == "setwise":
        greedy = TrainSettings(**toy.PRESET | {"temperature": 0.0, "group_size": 1})
        asked = list(enumerate(other_queries(windows)))
        rollouts = sample_and_score(agent, asked, (0,), greedy)
        return fmean(float(r.rewards[0]) for r in rollouts)
    settings = AgentSettings(
        window_size=toy.SIZE, step_size=toy.SIZE // 2, max_new_tokens=toy.PRESET["max_new_tokens"]
    )
    asked = other_queries(formats.read_candidates(files["eval_candidates"]))
    ranked = rank_batch(agent, settings, asked)
    return mean(per_query(ranked, trec.read_qrels(files["eval_qrels"])))["ndcg@10"]


def demonstrator_figure(task: str, files: dict, windows: list[TrainingWindow]) -> float:
    """The noise-free demonstrator's, by the same windows and the same sliding."""
    if task == "setwise":
        firsts = [
            w.grades[toy.demonstrator_order(w.query, [p.text for p in w.passages])[0]]
            for w in windows
        ]
        return fmean(first == max(w.grades) for first, w in zip(firsts, windows))
    candidates = formats.read_candidates(files["eval_candidates"])
    settings = AgentSettings(window_size=toy.SIZE, step_size=toy.SIZE // 2)
    pending = []

    def collect():
        shown = pending.pop()
        texts = [passage.text for passage in shown.passages]
        return [(shown, toy.demonstrator_order(shown.query.query, texts))]

    ranked = rank_windows(
        candidates, lambda n: TASKS[task].ranker(n, settings), pending.append, collect
    )
    return mean(per_query(ranked, trec.read_qrels(files["eval_qrels"])))["ndcg@10"]


def well_formed(task: str, run: Path) -> float:
    """The share of well-formed responses in the held-out evaluation after a run."""
    records = map(json.loads, (run / "after" / "windows.jsonl").read_text().splitlines())
    parsed = [TASKS[task].parse(r["response"], len(r["given"])) for r in records]
    return fmean(p.tags and p.listed for p in parsed)


def held_out(task: str, run: Path, when: str) -> float:
    return json.loads((run / when / "held_out.json").read_text())[FIGURE[task]]


def measure(task: str, seed: int, dtype: str = "float32") -> dict:
    run = train(task, seed, "reward", dtype)
    files = toy.prepare(seed, task)
    sampling = TrainSettings(seed=seed, **toy.PRESET | {"draws": 3})
    windows = TASKS[task].training_set(
        formats.read_candidates(files["eval_candidates"]), trec.read_qrels(files["eval_qrels"]),
        sampling,
    )  # fmt: skip
    return {
        "task": task,
        "seed": seed,
        "dtype": dtype,
        "before": held_out(task, run, "before"),
        "after": held_out(task, run, "after"),
        "demo": demonstrator_figure(task, files, windows),
        "swapped": swapped_figure(task, run, files, windows, dtype),
        "form": well_formed(task, run),
    } | measure_control(task, seed, dtype)


def measure_control(task: str, seed: int, dtype: str) -> dict:
    score = rollout.score
    rollout.score = shuffled(score, seed)
    try:
        run = train(task, seed, "shuffled", dtype)
    finally:
        rollout.score = score
    return {"shuffled": held_out(task, run, "after"), "shuffled_form": well_formed(task, run)}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=FIGURE)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        rows.append(measure(args.task, seed, args.dtype))
        with open(Path(__file__).with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
