"""Made-up runs and evaluations of any size, as grpo.py and evaluate.py leave them in their folders,
to look at their pages; and texts that want to be more than text."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

from pages.reader import query_records
from settings import TrainSettings
from sources.formats import Candidates, Passage
from window import slide

WORDS = "tide moon sea salt wind rain cloud sun storm wave sand rock fish boat net reef".split()
HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    '" onmouseover="window.pwned = 3" x="',
    "javascript:window.pwned=4",
    "<img src=x onerror=window.pwned=5>",
    "<!--<script>",
    "half a pair \ud83d, a line\u2028and a paragraph\u2029",
    "{{ 7 * 7 }} ${7 * 7} &lt;b&gt; \\u003c",
]
FIGURES = (
    "reward r_rank ndcg entropy kl clip_fraction grad_norm length loss equal_groups malformed "
    "cut_off sample_seconds update_seconds tokens_per_second r_format1 r_format2"
).split()


def prose(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def reasoning(rng: random.Random, passages: int, tokens: int) -> str:
    """About so many tokens that speak of each passage, without the answer."""
    each = max(1, tokens // passages - 3)
    return " ".join(f"[{i}] {prose(rng, each)}." for i in range(1, passages + 1))


def answered(rng: random.Random, n: int, tokens: int) -> tuple[str, list[int]]:
    order = rng.sample(range(n), n)
    ranking = " > ".join(f"[{i + 1}]" for i in order)
    return f"<think> {reasoning(rng, n, tokens)} </think> <answer> {ranking} </answer>", order


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def fake_run(
    folder: Path,
    steps: int = 12,
    passages: int = 5,
    tokens: int = 30,
    hostile: bool = False,
    logged_every: int = 1,
    **settings,
) -> Path:
    """A training run's folder, of rising rewards."""
    rng = random.Random(str(settings))
    folder.mkdir(parents=True, exist_ok=True)
    whole = asdict(replace(TrainSettings(), steps=steps, **settings))
    (folder / "settings.json").write_text(json.dumps(whole))
    figures, groups = [], []
    for step in range(steps):
        row = {name: (i + 1) * (step + rng.random()) / steps for i, name in enumerate(FIGURES)}
        figures.append({"step": step, **row, "skipped_updates": 0, "tokens": 400})
        if step % logged_every == 0:
            groups += [
                fake_group(rng, step, why, passages, tokens, hostile) for why in ("best", "worst")
            ]
    write_lines(folder / "metrics.jsonl", figures)
    write_lines(folder / "responses.jsonl", groups)
    for name, ndcg in (("before", 0.5), ("after", 0.625)):
        (folder / name).mkdir(exist_ok=True)
        held_out = {"first_stage": 0.4, "ndcg@10": ndcg, "window_reward": ndcg / 2}
        (folder / name / "held_out.json").write_text(json.dumps(held_out))
    return folder


def fake_group(rng, step: int, why: str, passages: int, tokens: int, hostile: bool) -> dict:
    def text(words: int) -> str:
        return f"{rng.choice(HOSTILE)} {prose(rng, words)}" if hostile else prose(rng, words)

    rewards = sorted((round(rng.uniform(-0.5, 1), 4) for _ in range(8)), reverse=True)
    responses = []
    for i in (0, 3, 7):
        response, order = answered(rng, passages, tokens)
        responses.append(
            {
                "reward": rewards[i],
                "advantage": 1.5 - i / 3,
                "tokens": tokens,
                "malformed": i == 7,
                "cut_off": False,
                "order": order,
                "response": text(1) + response,
            }
        )
    return {
        "step": step,
        "chosen": why,
        "qid": f"q{rng.randrange(50)}",
        "query": text(3),
        "passages": [
            {"docid": f"d{i} {text(0)}", "grade": i % 4, "text": text(60)} for i in range(passages)
        ],
        "rewards": rewards,
        "responses": responses,
    }


def fake_evaluation(
    folder: Path,
    queries: int = 6,
    depth: int = 30,
    tokens: int = 60,
    seed: int = 0,
    hostile: bool = False,
) -> Path:
    """An evaluation's folder: random answers to windows of 20. The first window of the first query
    is malformed, that of the second cut off, that of the third too long for the model."""
    rng, world = random.Random(seed), random.Random(1)  # the world is the same whatever the seed

    def text(words: int) -> str:
        return f"{world.choice(HOSTILE)} {prose(world, words)}" if hostile else prose(world, words)

    candidates, qrels, reranked, windows = [], {}, [], []
    for q in range(queries):
        passages = tuple(Passage(f"d{q}-{i}", text(60), 1.0) for i in range(depth))
        candidates.append(Candidates(f"q{q}", text(5), passages))
        qrels[f"q{q}"] = {p.docid: world.choice([0, 0, 1, 2, 3]) for p in passages[::2]}
        ranker, answer, number = slide(depth), None, 0
        try:
            while True:
                (given,) = ranker.send(answer)
                response, order = answered(rng, len(given), tokens)
                bad, too_long = number == 0 and q < 3, number == 0 and q == 2
                order = sorted(order) if bad else order
                docids = [passages[i].docid for i in given]
                windows.append(
                    {
                        "qid": f"q{q}",
                        "window": number,
                        "given": docids,
                        "ranked": [docids[i] for i in order],
                        "malformed": bad,
                        "cut_off": bad and q == 1,
                        "too_long": too_long,
                        "tokens": 0 if too_long else tokens,
                        "reasoning": "",
                        "response": "" if too_long else hostile * rng.choice(HOSTILE) + response,
                    }
                )
                answer, number = [order], number + 1
        except StopIteration as finished:
            final = tuple(passages[i] for i in finished.value)
            reranked.append(replace(candidates[-1], passages=final))
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "windows.jsonl", windows)
    write_lines(folder / "queries.jsonl", list(query_records(candidates, reranked, qrels)))
    metrics = {
        "queries": queries,
        "before": {"ndcg@1": 0.3, "ndcg@10": 0.5},
        "after": {"ndcg@1": 0.4, "ndcg@10": 0.625},
        "windows": len(windows),
        "malformed": 3,
        "cut_off": 1,
        "tokens": tokens * len(windows),
        "settings": {"model": HOSTILE[1] if hostile else "tiny"},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder
