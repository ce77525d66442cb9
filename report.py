"""What a training run measures and writes down: held-out figures, and a line of figures a step."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist

import checkpoint
import data
import evaluate
from data import Candidates, Qrels
from parallel import StopSignal, gathered
from rearank import Agent, AgentSettings, decode_response, rerank
from reward import ndcg_at_k
from rollout import Actor, Rollout, sample_shared


def load_held_out(settings) -> tuple[list[Candidates], Qrels] | None:
    if bool(settings.eval_candidates) != bool(settings.eval_qrels):
        raise SystemExit("held-out figures need both --eval_candidates and --eval_qrels")
    if not settings.eval_candidates:
        return None
    try:
        candidates = data.read_candidates(settings.eval_candidates)
        qrels = data.read_qrels(settings.eval_qrels)
        return evaluate.judged_queries(candidates, qrels, top_k=100), qrels
    except (ValueError, OSError) as error:
        raise SystemExit(f"held out: {error}") from None


def measure_held_out(
    actor: Actor,
    queries: tuple[list[Candidates], Qrels] | None,
    settings,
    output_dir: Path,
    stop: StopSignal,
    device: torch.device,
) -> dict[str, float] | None:
    """Greedy figures on the held-out queries: nDCG@10 of their candidates, reranked as
    evaluate.py does it, and the mean reward of windows drawn like those of training."""
    if not queries:
        return None
    candidates, qrels = queries
    agent_settings = AgentSettings(
        model=settings.model, task=settings.task, window_size=settings.size,
        step_size=max(1, settings.size // 2), max_new_tokens=settings.max_new_tokens,
        max_in_flight=settings.max_in_flight,
    )  # fmt: skip
    agent = Agent(actor.policy, actor.tokenizer, actor.prompt, actor.task, agent_settings)
    greedy = replace(settings, temperature=0.0, group_size=1, draws=3)
    windows = list(enumerate(actor.task.training_set(candidates, qrels, greedy)))
    with gathered(actor.policy):
        metrics = evaluate.evaluate(candidates, qrels, partial(rerank, agent), output_dir)
        rollouts = sample_shared(actor, windows, (0,), greedy, stop, device)
    figures = {
        "first_stage": metrics["before"]["ndcg@10"],
        "ndcg@10": metrics["after"]["ndcg@10"],
        "window_reward": fmean(float(r.rewards[0]) for r in rollouts),
    }
    if dist.get_rank() == 0:
        checkpoint.write_whole(output_dir / "held_out.json", json.dumps(figures) + "\n")
    return figures


def step_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Means over all responses."""
    rows = [
        {
            "reward": float(reward),
            "ndcg": ndcg_at_k([r.instance.grades[i] for i in p.order], ideal=r.instance.judged),
            "well_formed": p.tags and p.listed,
            "malformed": p.malformed,
            "length": len(s.tokens),
            "cut_off": not s.finished,
        }
        for r in rollouts
        for reward, p, s in zip(r.rewards, r.parsed, r.samples)
    ]
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    return means | {"equal_groups": fmean(not r.advantages.any() for r in rollouts)}


def log_step(
    output_dir: Path, metrics: dict, rollout: Rollout, offenders: list[Rollout], tokenizer
) -> None:
    """A line of figures, one group of responses to read, and the prompts of skipped updates."""
    step = metrics["step"]
    responses = [
        {
            "step": step, "qid": rollout.instance.qid, "query": rollout.instance.query,
            "grades": rollout.instance.grades, "reward": reward,
            "response": decode_response(tokenizer, sample),
        }
        for reward, sample in zip(rollout.rewards.tolist(), rollout.samples)
    ]  # fmt: skip
    skipped = [
        {"step": step, "qid": r.instance.qid, "prompt": tokenizer.decode(r.prompt),
         "responses": [decode_response(tokenizer, sample) for sample in r.samples]}
        for r in offenders
    ]  # fmt: skip
    for name, lines in zip(checkpoint.LOGS, ([metrics], responses, skipped)):
        try:
            if lines:
                checkpoint.append(output_dir / name, lines)
        except OSError as error:
            # Neither the training nor these lines shall be lost to a full disk.
            print(f"\n{error}\n{json.dumps(lines)}", file=sys.stderr)
