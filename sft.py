"""Train a reranker on given answers (direct SFT), on one process or many.

    python sft.py --preset toy                                        # offline, on a CPU
    torchrun --nproc_per_node=8 sft.py --candidates FILE --qrels FILE
    python sft.py --candidates FILE --qrels FILE --responses FILE     # not the best orders

Every step lowers, on a batch of windows, the mean over all tokens of their answers of

    - log pi(token | prompt, tokens before)                 the negative log-likelihood

An answer is the best order of a window, by the judgments, in the form that its prompt asks for
(lessons.py); or with --responses, what a file gives for a window. Rows, shards, checkpoints
and the run's folder are those of grpo.py, which can go on from what is trained here.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import presets
from agent import Agent
from batches import MicroBatch, make_optimizer, my_share, take_step, training
from data import batch_at
from engine.flags import parse_settings, program
from engine.model import choose_dtype, load_policy
from engine.packed import response_logprobs
from engine.parallel import StopSignal, explained, processes, say, together
from engine.policy import Policy
from engine.run import Run, in_folder, model_card
from engine.streams import make_unbreakable
from held_out import (
    load_held_out,
    measure_held_out,
    measure_if_due,
    refuse_held_out,
    say_what_was_gained,
)
from lessons import Lesson, as_rollout, encode_lessons, load_lessons
from pages.run import keeper
from rollout import Rollout, offending
from settings import RunSettings, SftSettings, TrainSettings
from sources.formats import Candidates
from sources.trec import Qrels
from tasks import Task, load_task
from window import Prompt

# ------------------------------------------------------------------------------------- the update


def add_gradient(policy: Policy, micro: MicroBatch) -> float:
    """Add the gradient of a micro-batch's part of the mean negative log-likelihood over all tokens
    of the batch to those that are there; this part."""
    nll = -micro.weight * policy(response_logprobs, micro.row).sum() / sum(micro.lengths)
    (nll * dist.get_world_size()).backward()  # FSDP averages gradients over the processes
    return nll.item()


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: list[Rollout],
    settings: SftSettings,
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[Rollout]]:
    """One step of the optimizer on a batch, which every process holds whole: its figures, and the
    rollouts of a step that was skipped because loss or gradient were not finite. `check` may raise
    before the step; the weights are then untouched."""

    def add(micro: MicroBatch) -> list[float]:
        check()
        return [add_gradient(policy, micro)]

    with training(policy, optimizer):
        micros = my_share(policy, batch, settings.max_tokens_per_micro_batch)
        sums, norm, whose = take_step(policy, optimizer, micros, add, settings.max_grad_norm)
    skipped = whose is not None
    tokens = sum(len(sample.tokens) for rollout in batch for sample in rollout.samples)
    figures = {
        "nll": 0.0 if skipped else sums[0],
        "grad_norm": 0.0 if skipped else norm,
        "length": tokens / len(batch),
        "skipped_updates": int(skipped),
    }
    return figures, (whose or batch) if skipped else []


# -------------------------------------------------------------------------------------- the whole


class Data(NamedTuple):
    """What a run learns, and the held-out queries that it is measured on before and after."""

    task: Task
    prompt_file: str | Path
    prompt: Prompt
    lessons: list[Lesson]
    held_out: tuple[list[Candidates], Qrels] | None


def load_data(settings: SftSettings) -> Data:
    """UserError where there is nothing to learn, or it is what is measured on."""
    task, prompt_file, prompt = load_task(settings)
    lessons, held_out = load_lessons(settings, task, prompt), load_held_out(settings)
    refuse_held_out([lesson.window for lesson in lessons], held_out, settings)
    return Data(task, prompt_file, prompt, lessons, held_out)


def train(settings: SftSettings) -> Path:
    """The whole job, on this process or as one of many. Returns where the model was saved."""
    with processes() as device, StopSignal() as stop:
        settings = presets.fill_in(settings)
        data = together(lambda: load_data(settings))
        work = partial(train_in, data, settings, device, stop)
        return in_folder(settings, data.prompt_file, work)


def train_in(
    data: Data,
    settings: SftSettings,
    device: torch.device,
    stop: StopSignal,
    folder: Path,
    inputs: dict,
) -> None:
    """Train from these inputs in a folder that is claimed, from the first step that is not done."""
    # Who edits the prompt while the model trains must not change what it is exported with.
    prompt = Path(data.prompt_file).read_bytes().decode()
    with explained("loading"):
        policy, tokenizer = load_policy(settings, choose_dtype(settings.dtype, device), device)
    optimizer = make_optimizer(policy, settings.learning_rate)
    agent = Agent(policy, tokenizer, data.prompt, data.task)
    lessons = encode_lessons(agent, data.lessons, settings)

    say(f"{len(lessons)} training windows")
    run = Run(settings, folder, inputs, policy, optimizer, stop)
    sampling = TrainSettings(**{f.name: getattr(settings, f.name) for f in fields(RunSettings)})
    measured = partial(measure_held_out, agent, data.held_out, sampling, stop=stop)
    before = measured(folder / "before", again=not run.first)
    keep_page = keeper(folder)
    with run:
        for step in run.steps():
            measure_if_due(measured, folder, step, settings.eval_every)
            chosen = batch_at(step, settings.batch_size, len(lessons), settings.seed)
            batch = [as_rollout(agent, place, *lessons[i]) for place, i in enumerate(chosen)]
            with explained("update"), run.timed("update_seconds"):
                figures, offenders = update(policy, optimizer, batch, settings, stop.check)
            skipped = [offending(agent, rollout) for rollout in offenders]
            run.log(figures, shown="nll grad_norm", responses=[], skipped=skipped)
            keep_page()

    card = partial(model_card, settings, "SFT", data.task.does, "a given answer", len(lessons))
    run.export(tokenizer, prompt, card())
    after = measured(folder / "after")
    if before and after:
        run.write_card(card(before, after))
        say_what_was_gained(before, after)
    keep_page(now=True)
    run.finish()


@program
def main() -> None:
    make_unbreakable()
    known = {f.name for f in fields(SftSettings)}
    of_ours = {
        name: {key: value for key, value in preset.items() if key in known}
        for name, preset in presets.PRESETS.items()
    }
    (settings,) = parse_settings(__doc__, SftSettings, presets=of_ours)
    train(settings)


if __name__ == "__main__":
    main()
