"""Direct SFT, GRPO, and one after the other; and GRPO by reward: in the offline world, by seed.

    python benchmarks/sft_and_rewards.py 91 92 93 94 95             # what is not measured yet
    python benchmarks/sft_and_rewards.py 91 --only before sft       # some of it
    python benchmarks/sft_and_rewards.py                            # the table

Each run starts from the world's warm-started model, which reasons, and is measured greedily on
the held-out queries, in the conversation it was trained with:

    before                           the warm-started model
    relative, difference, absolute   after GRPO, by the reward's r_rank (reward.py)
    sft                              after direct SFT on the best orders, without reasoning
    sft+relative                     the same, and then GRPO
    reasoned                         after SFT on right notes, and then the best order
    reasoned+relative                the same, and then GRPO

Figures: nDCG@10 of the reranked candidates, the share of well-formed responses, and their mean
length in tokens. GRPO has GRPO_STEPS steps of BATCH windows with GROUP responses each, at the
preset's rate. SFT has SFT_STEPS of as many windows, which takes about as long, and the better of
two rates on seed 0 (3e-4 gave 0.655 there, 1e-3 0.757).
Written to benchmarks/sft_and_rewards.jsonl, one line a run. The table has means over the seeds with
95% confidence intervals (Student's t), and those of the differences within a seed.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpo
import sft
import toy
from agent import Agent, rank_batch
from engine.model import load_lm
from engine.policy import Policy
from measure import mean, per_query
from settings import AgentSettings, SftSettings, TrainSettings
from sources import formats, trec
from tasks import TASKS
from window import load_prompt

OUT = Path(__file__).parents[1] / "runs" / "sft_and_rewards"
LINES = Path(__file__).with_suffix(".jsonl")
REWARDS = ["relative", "difference", "absolute"]
VARIANTS = ["before", *REWARDS, "sft", "sft+relative", "reasoned", "reasoned+relative"]
BATCH, GROUP, GRPO_STEPS, SFT_STEPS, SFT_RATE = 8, 16, 50, 300, 1e-3
TRAINING = {
    "window_size": toy.SIZE,
    "draws": toy.PRESET["draws"],
    "batch_size": BATCH,
    "max_new_tokens": toy.PRESET["max_new_tokens"],
    "max_in_flight": toy.PRESET["max_in_flight"],
    "activation_checkpointing": False,
}


def train(variant: str, seed: int, files: dict[str, str]) -> Path:
    """The folder of the model."""
    if variant == "before":
        return Path(files["model"])
    first, _, then = variant.rpartition("+")
    model = str(train(first or "before", seed, files))
    out = OUT / f"{seed}-{variant}"
    given = {name: files[name] for name in ("prompt", "candidates", "qrels")}
    common = TRAINING | given | {"model": model, "seed": seed, "output_dir": str(out)}
    if then in REWARDS:
        same = {name: toy.PRESET[name] for name in ("learning_rate", "beta")}
        how = {"reward": then, "group_size": GROUP, "steps": GRPO_STEPS, "checkpoint_every": 25}
        return grpo.train(TrainSettings(**common, **same, **how))
    responses = write_reasoned(files, seed) if variant == "reasoned" else ""
    how = {"steps": SFT_STEPS, "learning_rate": SFT_RATE, "checkpoint_every": 100}
    return sft.train(SftSettings(**common, **how, responses=responses))


def write_reasoned(files: dict[str, str], seed: int) -> str:
    """A file of responses to the training windows: the demonstrator's notes, which are right, and
    then the best order."""
    drawn = TrainSettings(window_size=toy.SIZE, draws=toy.PRESET["draws"], seed=seed)
    windows = TASKS["listwise"].training_set(
        formats.read_candidates(files["candidates"]), trec.read_qrels(files["qrels"]), drawn
    )
    lines = []
    for window in windows:
        texts = [passage.text for passage in window.passages]
        notes = (f"[{i}] {toy.note(window.query, text)}" for i, text in enumerate(texts, start=1))
        order = sorted(range(len(texts)), key=lambda i: -window.grades[i])
        answer = " > ".join(f"[{i + 1}]" for i in order)
        response = f"<think> {' '.join(notes)} </think> <answer> {answer} </answer>"
        given = [passage.docid for passage in window.passages]
        lines.append(json.dumps({"qid": window.qid, "given": given, "response": response}) + "\n")
    path = OUT / f"{seed}-responses.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return str(path)


def measure(model: Path, files: dict[str, str]) -> dict[str, float]:
    """Greedy, on the held-out queries."""
    lm, tokenizer = load_lm(str(model), torch.float32)
    task = TASKS["listwise"]
    agent = Agent(Policy(lm.eval()), tokenizer, load_prompt(files["prompt"]), task)
    settings = AgentSettings(
        window_size=toy.SIZE, step_size=toy.SIZE // 2, max_new_tokens=toy.PRESET["max_new_tokens"]
    )
    answers = []
    candidates = formats.read_candidates(files["eval_candidates"])
    ranked = rank_batch(agent, settings, candidates, on_answer=answers.append)
    parsed = [task.parse(a.response, len(a.given)) for a in answers]
    return {
        "ndcg@10": mean(per_query(ranked, trec.read_qrels(files["eval_qrels"])))["ndcg@10"],
        "well_formed": fmean(p.tags and p.listed for p in parsed),
        "tokens": fmean(a.tokens for a in answers),
    }


# -------------------------------------------------------------------------------------- the table


def read_lines() -> list[dict]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def interval(values: list[float]) -> str:
    """The mean with its 95% confidence interval, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.3f} \N{PLUS-MINUS SIGN} {half:.3f}"


def print_table(lines: list[dict]) -> None:
    by_variant: dict[str, dict[int, dict]] = {}
    for line in lines:
        by_variant.setdefault(line["variant"], {})[line["seed"]] = line
    print("| | seeds | nDCG@10 | less before | less relative | well-formed | tokens |")
    print("|---|---|---|---|---|---|---|")
    for variant in (v for v in VARIANTS if v in by_variant):
        rows = by_variant[variant]

        def less(other: str, rows=rows) -> str:
            others = by_variant.get(other, {})
            both = [rows[s]["ndcg@10"] - others[s]["ndcg@10"] for s in rows if s in others]
            return interval(both) if both and others is not rows else ""

        figures = [
            *(interval([r["ndcg@10"] for r in rows.values()]), less("before"), less("relative")),
            f"{fmean(r['well_formed'] for r in rows.values()):.3f}",
            f"{fmean(r['tokens'] for r in rows.values()):.1f}",
        ]
        print(f"| {variant} | {len(rows)} | {' | '.join(figures)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for variant in args.only:
            if any((r["seed"], r["variant"]) == (seed, variant) for r in read_lines()):
                continue
            files = toy.prepare(seed)
            figures = measure(train(variant, seed, files), files)
            with open(LINES, "a") as file:
                file.write(json.dumps({"seed": seed, "variant": variant} | figures) + "\n")
    print_table(read_lines())


if __name__ == "__main__":
    main()
