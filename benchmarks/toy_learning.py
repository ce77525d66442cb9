"""What GRPO learns in the offline world, by seed, beside its controls.

    python benchmarks/toy_learning.py 11 12 13          # about 5 minutes a seed on one core

For each seed (of the world, the warm start and the training alike), held-out greedy nDCG@10 of

    first     the first stage
    before    the warm-started model
    after     the trained one
    demo      the demonstrator that the warm start imitated, its noise taken out
    swapped   the trained model, every window shown with another query
    shuffled  the model trained alike, but with the rewards shuffled within each group;
              form is the share of its held-out responses that are well formed

Written to benchmarks/toy_learning.jsonl as well, one line a seed.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import grpo
import toy
from evaluate import ndcg_table
from rearank import Agent, AgentSettings, load_lm, rerank
from shared_prompt import Policy
from tasks import TASKS
from window import load_prompt, windows

OUT = Path(__file__).parents[1] / "runs" / "toy_learning"


def train(seed: int, name: str) -> Path:
    settings = grpo.Settings(
        preset="toy", seed=seed, output_dir=str(OUT / f"{seed}-{name}"), **toy.PRESET
    )
    return grpo.train(settings)


def shuffled(score, seed: int):
    """`grpo.score` with each group's rewards dealt out again at random."""
    rng = random.Random(seed)

    def deal(*args):
        rewards = score(*args)
        return rng.sample(rewards, len(rewards))

    return deal


def reranked_with_other_queries(model: Path, candidates, prompt) -> list[data.Candidates]:
    """Each query's candidates, ranked for a query that shares no topic with it."""
    lm, tokenizer = load_lm(str(model), torch.float32, torch.device("cpu"))
    settings = AgentSettings(window_size=toy.SIZE, step_size=toy.SIZE // 2, max_new_tokens=40)
    agent = Agent(Policy(lm.eval()), tokenizer, prompt, TASKS["listwise"], settings)
    others = [
        next(
            other.query
            for other in candidates[i + 1 :] + candidates
            if not set(other.query.split()) & set(query.query.split()) & set(toy.TOPICS)
        )
        for i, query in enumerate(candidates)
    ]
    asked = [replace(query, query=other) for query, other in zip(candidates, others)]
    return rerank(agent, asked)


def demonstrator_reranked(candidates) -> list[data.Candidates]:
    """The noise-free demonstrator, slid over the candidates as the model is."""
    ranked = []
    for query in candidates:
        passages = list(query.passages)
        for start, end in windows(len(passages), toy.SIZE, toy.SIZE // 2):
            given = passages[start:end]
            order = toy.demonstrator_order(query.query, [p.text for p in given])
            passages[start:end] = [given[i] for i in order]
        ranked.append(replace(query, passages=tuple(passages)))
    return ranked


def well_formed(run: Path) -> float:
    records = map(json.loads, (run / "after" / "windows.jsonl").read_text().splitlines())
    parsed = [TASKS["listwise"].parse(r["response"], len(r["given"]), True) for r in records]
    return sum(p.tags and p.listed for p in parsed) / len(parsed)


def measure(seed: int) -> dict:
    files = toy.prepare(seed)
    candidates, qrels = (
        data.read_candidates(files["eval_candidates"]),
        data.read_qrels(files["eval_qrels"]),
    )
    run = train(seed, "reward")
    score = grpo.score
    grpo.score = shuffled(score, seed)
    try:
        control = train(seed, "shuffled")
    finally:
        grpo.score = score

    def ndcg(run: Path, when: str, what: str = "after") -> float:
        return json.loads((run / when / "metrics.json").read_text())[what]["ndcg@10"]

    swapped = reranked_with_other_queries(run, candidates, load_prompt(files["prompt"]))
    return {
        "seed": seed,
        "first": ndcg(run, "before", "before"),
        "before": ndcg(run, "before"),
        "after": ndcg(run, "after"),
        "demo": ndcg_table(demonstrator_reranked(candidates), qrels)["ndcg@10"],
        "swapped": ndcg_table(swapped, qrels)["ndcg@10"],
        "shuffled": ndcg(control, "after"),
        "form": well_formed(run),
        "shuffled_form": well_formed(control),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for seed in map(int, sys.argv[1:]):
        rows.append(measure(seed))
        with open(Path(__file__).with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
