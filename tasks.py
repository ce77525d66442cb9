"""What a reranker can be trained for: what a task is, and the two there are. A new one is a file of
functions like setwise.py, an entry here, and its name among the choices in settings.py."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data import TrainingWindow, choice_training_set, read_training_queries, training_set
from engine.hub import file_beside
from reward import listwise_reward
from settings import AgentSettings, RunSettings, UserError
from setwise import SORTS, exact_reward, graded_reward, parse_choice, write_choice
from sources.formats import Candidates
from sources.trec import Qrels
from window import (
    PROMPTS,
    Parsed,
    Prompt,
    Ranker,
    load_prompt,
    parse_ranking,
    slide,
    write_ranking,
)


@dataclass(frozen=True)
class Task:
    """What the programs ask of a task: how to converse, to read a response, to reward it, to rank
    many candidates with a model that sees few; and which windows to train on."""

    does: str  # what its model does with the passages of a window, for the model card
    prompt: Path  # the conversation, as a TOML file
    parse: Callable[..., Parsed]  # (response, n, reasoning) -> Parsed
    write: Callable[[Sequence[int]], str]  # the answer that gives an order, without its tags
    rewards: dict[str, Callable[..., float]]  # by name: (parsed, grades, judged, weights) -> reward
    ranker: Callable[[int, AgentSettings], Ranker]  # of so many candidates
    training_set: Callable[[list[Candidates], Qrels, RunSettings], list[TrainingWindow]]


LISTWISE = Task(
    does="ranks them",
    prompt=PROMPTS / "listwise.toml",
    parse=parse_ranking,
    write=write_ranking,
    rewards={
        variant: partial(listwise_reward, variant=variant)
        for variant in ("relative", "absolute", "difference")
    },
    ranker=lambda n, settings: slide(n, settings.window_size, settings.step_size),
    training_set=lambda candidates, qrels, s: training_set(
        candidates, qrels, s.window_size, s.draws, s.min_ndcg, s.ndcg_filter, s.seed
    ),
)

SETWISE = Task(
    does="names the best",
    prompt=PROMPTS / "setwise.toml",
    parse=parse_choice,
    write=write_choice,
    rewards={"exact": exact_reward, "graded": graded_reward},
    ranker=lambda n, settings: SORTS[settings.sort](n, settings.sort_top, settings.window_size - 1),
    training_set=lambda candidates, qrels, s: choice_training_set(
        candidates, qrels, s.window_size, s.draws, s.seed
    ),
)

TASKS = {"listwise": LISTWISE, "setwise": SETWISE}


def load_task(settings: RunSettings) -> tuple[Task, str | Path, Prompt]:
    """(the task, its prompt's file, the prompt) of a training."""
    task = TASKS[settings.task]
    prompt_file = settings.prompt or task.prompt
    return task, prompt_file, load_prompt(prompt_file)


def load_windows(task: Task, settings: RunSettings) -> list[TrainingWindow]:
    """The windows to train on. UserError where there are none."""
    windows = task.training_set(*read_training_queries(settings), settings)
    if not windows:
        raise UserError(
            f"no training window left of {settings.triples or settings.candidates}: no query has a "
            "relevant candidate among others (and, listwise, nDCG@10 of at least --min_ndcg)"
        )
    return windows


def settle(settings: AgentSettings) -> AgentSettings:
    """With task and prompt decided: the flag's, else the model's own, else listwise and the task's.
    For another task than it was trained for, the prompt is not the model's own."""
    trained_for = own_task(settings)
    task = settings.task or trained_for or next(iter(TASKS))
    own = beside_model(settings, "prompt.toml") if task == (trained_for or task) else None
    return replace(settings, task=task, prompt=settings.prompt or str(own or TASKS[task].prompt))


def say_another_task(settings: AgentSettings) -> None:
    """Say where the model was trained for another task than it is asked for."""
    trained_for = own_task(settings)
    if trained_for not in (None, settings.task) and os.environ.get("RANK", "0") == "0":
        words = f"{settings.model} was trained for {trained_for}, not for {settings.task}"
        print(words, file=sys.stderr)


def beside_model(settings: AgentSettings, file: str) -> Path | None:
    """`file_beside` the model; a server's has files where its name is a folder's here, as when the
    server runs an export."""
    foreign = settings.endpoint and not Path(settings.model).is_dir()
    return None if foreign else file_beside(settings.model, file)


def own_task(settings: AgentSettings) -> str | None:
    """The task that a model was trained for, where the settings of its training lie beside it."""
    path = beside_model(settings, "settings.json")
    try:
        trained = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; without it the model can") from None
    task = trained.get("task") if isinstance(trained, dict) else None
    return task if task in TASKS else None
