"""What direct SFT learns: windows, each with the response that is right.

The best order by the judgments, or the responses of a file.
"""

import sys
from typing import NamedTuple

import torch

from agent import Agent
from data import TrainingWindow, read_training_queries
from engine.chat import encode_response
from engine.model import end_tokens
from engine.parallel import say
from engine.sampler import Sample
from rollout import Rollout, drop_too_long, encode_prompt
from settings import SftSettings, UserError
from sources.text import field, json_records, qid_field
from tasks import Task, load_windows
from window import Prompt


class Lesson(NamedTuple):
    """A window and the response to be learned."""

    window: TrainingWindow
    response: str
    where: str  # it comes from, for messages


def best_response(task: Task, prompt: Prompt, window: TrainingWindow) -> str:
    """The best order by the judgments, of equal passages the one shown first; behind an empty
    reasoning where the prompt asks for one, since the judgments say nothing of reasons."""
    order = sorted(range(len(window.passages)), key=lambda i: -window.grades[i])
    answer = task.write(order)
    return f"<think>\n\n</think>\n\n<answer> {answer} </answer>" if prompt.reasoning else answer


def load_lessons(settings: SftSettings, task: Task, prompt: Prompt) -> list[Lesson]:
    if settings.responses:
        return given_lessons(settings, task, prompt)
    windows = load_windows(task, settings)
    return [Lesson(w, best_response(task, prompt, w), f"query {w.qid}") for w in windows]


def given_lessons(settings: SftSettings, task: Task, prompt: Prompt) -> list[Lesson]:
    """The windows and responses of --responses, whose passages are found among the candidates.
    Lines that are marked as malformed, cut off or too long are left out, and those whose response
    gives no answer to this task."""
    queries = {query.qid: query for query in read_training_queries(settings)[0]}
    lessons, left_out = [], 0
    for where, record in json_records(settings.responses):
        qid, response = qid_field(where, record, "qid"), field(where, record, "response", str)
        docids = field(where, record, "given", list)
        malformed = task.parse(response, len(docids), prompt.reasoning).malformed
        if malformed or any(record.get(mark) for mark in ("malformed", "cut_off", "too_long")):
            left_out += 1
            continue
        if qid not in queries:
            raise UserError(f"{where}: query {qid} is not among the training queries")
        query = queries[qid]
        passages = {passage.docid: passage for passage in query.passages}
        if unknown := [d for d in docids if not isinstance(d, str) or d not in passages]:
            raise UserError(f"{where}: query {qid} has no candidate {unknown[0]!r:.60}")
        if len(set(docids)) < len(docids):
            raise UserError(f"{where}: given holds a docid twice")
        shown = tuple(passages[docid] for docid in docids)
        lessons.append(Lesson(TrainingWindow(qid, query.query, shown, (), ()), response, where))
    if left_out:
        say(f"{left_out} responses are left out: malformed or cut off", file=sys.stderr)
    if not lessons:
        raise UserError(f"{settings.responses}: no response is left")
    return lessons


def encode_lessons(
    agent: Agent, lessons: list[Lesson], settings: SftSettings
) -> list[tuple[TrainingWindow, list[int]]]:
    """(window, its response's tokens) of the lessons whose prompts fit the model. UserError where
    a response is longer than --max_new_tokens, or holds its own end."""
    ends, encoded = end_tokens(agent.policy.lm, agent.tokenizer), []
    fit = {id(w) for w in drop_too_long(agent, [x.window for x in lessons], settings)[0]}
    for lesson in (lesson for lesson in lessons if id(lesson.window) in fit):
        try:
            tokens = encode_response(agent.tokenizer, lesson.response, ends)
        except UserError as error:
            raise UserError(f"{lesson.where}: {error}") from None
        if len(tokens) > settings.max_new_tokens:
            raise UserError(
                f"{lesson.where}: a response of {len(tokens)} tokens, more than --max_new_tokens "
                f"{settings.max_new_tokens}"
            )
        encoded.append((lesson.window, tokens))
    return encoded


def as_rollout(agent: Agent, place: int, window: TrainingWindow, tokens: list[int]) -> Rollout:
    """A given answer, as if it were the one that had been sampled."""
    sample, one = Sample(tokens, [0.0] * len(tokens), finished=True), torch.ones(1)
    return Rollout(place, window, encode_prompt(agent, window), [sample], [], one, advantages=one)
