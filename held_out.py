"""What a training is worth on queries it does not see: measured before, after, and as it goes."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from agent import Agent, rank_batch
from data import TrainingWindow, refuse_overlap
from engine.files import append_lines, read_json, write_whole
from engine.parallel import StopSignal, explained, gathered, if_first, say, together
from measure import Evaluation, measurable, measure_all
from rollout import drop_too_long, sample_shared, windows_at_once
from settings import AgentSettings, RunSettings, TrainSettings, UserError
from sources.formats import Candidates, read_candidates
from sources.trec import Qrels, read_qrels

Measured = Callable[[Path], dict[str, float] | None]  # measures, writes to the folder


def load_held_out(settings: RunSettings) -> tuple[list[Candidates], Qrels] | None:
    """The held-out queries of a training, None where it has none."""
    if bool(settings.eval_candidates) != bool(settings.eval_qrels):
        raise UserError("held-out figures need both --eval_candidates and --eval_qrels")
    if not settings.eval_candidates:
        if settings.eval_every:
            raise UserError("--eval_every needs held-out queries: give --eval_candidates")
        return None
    candidates, qrels = read_candidates(settings.eval_candidates), read_qrels(settings.eval_qrels)
    return measurable(candidates, qrels, top_k=100), qrels


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
        ask = partial(rank_batch, agent, agent_settings, keep_too_long=True)

        def rerank(*asked) -> list[Candidates]:
            reranked = together(lambda: stop.cut_short(lambda: ask(*asked)))
            stop.check()
            return reranked

        ranker = partial(agent.task.ranker, settings=agent_settings)
        (metrics,) = measure_all([Evaluation(candidates, qrels, output_dir)], rerank, ranker)
        rollouts = sample_shared(agent, list(enumerate(windows)), (0,), greedy, stop)
    figures = {
        "first_stage": metrics["before"]["ndcg@10"],
        "ndcg@10": metrics["after"]["ndcg@10"],
        "window_reward": fmean(float(r.rewards[0]) for r in rollouts),
    }
    if_first(lambda: write_whole(output_dir / "held_out.json", json.dumps(figures) + "\n"))
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


def measure_if_due(measured: Measured, folder: Path, step: int, every: int) -> None:
    """Every so many steps (0: never), measure before a step what has been learned so far: a line
    of held_out.jsonl. Of the files of these evaluations, in during/, the newest stay. Where they
    cannot be written, that is said, and training goes on."""
    if every and step and step % every == 0:
        try:
            line = {"step": step, **measured(folder / "during")}
            if_first(lambda: append_lines(folder / "held_out.jsonl", [line]))
        except OSError as error:
            say(f"\nnot measured at step {step}: {error}", file=sys.stderr)


def say_what_was_gained(before: dict[str, float], after: dict[str, float]) -> None:
    say(
        f"held-out nDCG@10: {before['ndcg@10']:.4f} before training, {after['ndcg@10']:.4f} after "
        f"(first stage {after['first_stage']:.4f})"
    )
    say(
        f"held-out windows, mean reward: {before['window_reward']:.4f} before training, "
        f"{after['window_reward']:.4f} after"
    )
