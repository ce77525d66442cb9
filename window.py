"""One window of passages: how it is shown to the model, how the response is read, how it slides.

A listwise ranker sees few passages at once (20), and a query has many (100). So the window moves
from the last candidates to the first, overlapping, and carries the best ones along:

    candidates   0 ........ 10 ........ 20   ...   70 ........ 80 ........ 90 ....... 99
    1st window                                                 [----------------------]
    2nd window                                     [----------------------]
      ...
    9th window   [----------------------]

Nothing here knows a model. A ranker is a generator: it yields the windows it wants answered and
is sent the answers; `run_rankers` keeps the rankers of many queries going at once.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from settings import UserError

PROMPTS = Path(__file__).parent / "prompts"
LISTWISE_PROMPT = PROMPTS / "listwise.toml"

# ---------------------------------------------------------------------------- the conversation

OPENING_TURNS = 3


@dataclass(frozen=True)
class Prompt:
    """The text of every turn, with {query}, {n}, {i} and {text} to be filled in."""

    reasoning: bool  # whether the response reasons in <think> and answers in <answer>
    max_chars: int  # characters of each passage that are shown
    system: str
    opening: str  # user: what is coming, the query, the form of the answer
    ready: str  # assistant: asks for the passages
    passage: str  # user, one turn a passage
    received: str  # assistant, after each passage
    request: str  # user: the query again, and what to do now


# What is filled into some turns, beside {query} and {n}.
FILLED = {"passage": {"i", "text"}, "received": {"i"}}


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt from a TOML file that sets every field of `Prompt` and no other key.

    Raises UserError, naming the file and the key, where one is missing, unknown or of another
    type, or where the passages' text, their labels or the query would never be shown.
    """
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--prompt {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    for field in fields(Prompt):
        if type(settings.get(field.name)) is not field.type:
            raise UserError(f"{path}: expected {field.name} = a {field.type.__name__}")
    if unknown := settings.keys() - {field.name for field in fields(Prompt)}:
        raise UserError(f"{path}: unknown key {sorted(unknown)[0]!r:.60}")
    prompt = Prompt(**settings)
    if prompt.max_chars < 1:
        raise UserError(f"{path}: max_chars must be at least 1")
    for turn in (field.name for field in fields(Prompt) if field.type is str):
        known = {"query", "n"} | FILLED.get(turn, set())
        if unknown := set(re.findall(r"\{(\w+)\}", getattr(prompt, turn))) - known:
            raise UserError(
                f"{path}: {turn} holds {{{min(unknown):.60}}}, which is never filled in"
            )
    for needed, why in (("{text}", "no passage would be shown"), ("{i}", "none could be named")):
        if needed not in prompt.passage:
            raise UserError(f"{path}: passage lacks {needed}, so {why}")
    if "{query}" not in prompt.opening + prompt.request:
        raise UserError(f"{path}: neither opening nor request holds {{query}}")
    return prompt


def shown_text(passage: str, prompt: Prompt) -> str:
    """What is shown of a passage: its white space folded, its end cut off."""
    return " ".join(passage.split())[: prompt.max_chars]


def conversation(query: str, passages: Sequence[str], prompt: Prompt) -> list[dict[str, str]]:
    """The chat messages ({"role", "content"}) that ask for a ranking of `passages`.

    The turns before the first passage (`OPENING_TURNS` of them) are the same for every window
    of this size over a query, so a model need read them only once.
    """

    def fill(template: str, **values) -> str:
        # One pass, so that a query or passage which itself holds "{n}" stays as it is.
        values |= {"query": query, "n": len(passages)}
        return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), template)

    messages = [
        {"role": "system", "content": fill(prompt.system)},
        {"role": "user", "content": fill(prompt.opening)},
        {"role": "assistant", "content": fill(prompt.ready)},
    ]
    for i, passage in enumerate(passages, start=1):
        text = fill(prompt.passage, i=i, text=shown_text(passage, prompt))
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": fill(prompt.received, i=i)})
    messages.append({"role": "user", "content": fill(prompt.request)})
    return messages


# -------------------------------------------------------------------------------- the response


@dataclass(frozen=True)
class Response:
    """What a model wrote of one window."""

    text: str
    prompt_tokens: int
    tokens: int
    cut_off: bool  # by max_new_tokens


class NoAnswer(UserError):
    """A model that others run answers no more; what it has answered may be kept."""


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LABEL = re.compile(r"\[\s*([0-9]{1,9})\s*\]")
RANKING = re.compile(r"\s*\[[0-9]+\](?:\s*>\s*\[[0-9]+\])*\s*")


@dataclass(frozen=True)
class Parsed:
    """A response, read."""

    order: list[int]  # 0-based positions in the window, best first; each exactly once
    tags: bool  # think and answer tags are there, each once, in order (r_format1)
    listed: bool  # the answer is nothing but [i] > [j] > ... (r_format2)
    malformed: bool  # no answer could be read, so the order is the given one
    reasoning: str


def split_response(response: str) -> tuple[str, str | None]:
    """What stands before and after the last </think>: the reasoning, and the reply.

    The reply is None where the reasoning never ends: a label in there is a thought, no answer.
    """
    reasoning, closed, reply = response.rpartition("</think>")
    if closed:
        return reasoning.replace("<think>", "", 1).strip(), reply
    reply, opened, reasoning = response.partition("<think>")
    return reasoning.strip(), None if opened else reply


def read_answer(reply: str | None, reasoning: bool) -> tuple[str, bool]:
    """(the answer in a reply, whether it is whole): what its tags hold, cut off or not; without
    `reasoning` the tags may be left out."""
    reply = reply or ""
    _, opened, answer = reply.partition("<answer>")
    if not opened and not reasoning:
        return reply, True
    answer, closed, _ = answer.partition("</answer>")
    return answer, bool(closed)


def well_tagged(response: str) -> bool:
    """Whether think and answer tags are all there, each once, in order."""
    places = [response.find(tag) for tag in TAGS]
    return places == sorted(places) and all(response.count(tag) == 1 for tag in TAGS)


def parse_ranking(response: str, n: int, reasoning: bool = True) -> Parsed:
    """Read the ranking of n passages out of a response. Never raises; linear in its length.

    A label is a number in square brackets. Inside the answer, labels outside 1..n and repeated
    ones are dropped, and the passages left out follow in given order; an answer without a label
    in range is malformed, and keeps the given order. With `reasoning` the answer stands in its
    tags (one that the length limit cut off counts as far as it goes); without, as a zero-shot
    prompt asks, the tags may be left out. Reasoning never ranks.

    For n = 3, with reasoning:
        <think>..</think> <answer>[3] > [1]</answer>     -> 3 1 2
        <think>..</think> <answer>[2] [2] [9] > [1]      -> 2 1 3, neither tags nor listed
        <think>..</think> <answer> [0] [999] 3 </answer> -> 1 2 3, malformed: no label in range
        <think> I prefer [3] to [1]                      -> 1 2 3, malformed: cut off
        [3] > [2] > [1]                                  -> 1 2 3, malformed: no tags
    """
    thought, reply = split_response(response)
    answer, closed = read_answer(reply, reasoning)
    labels = (int(label) - 1 for label in LABEL.findall(answer))
    ranked = list(dict.fromkeys(i for i in labels if 0 <= i < n))
    return Parsed(
        order=ranked + sorted(set(range(n)) - set(ranked)),
        tags=well_tagged(response),
        listed=closed and bool(RANKING.fullmatch(answer)),
        malformed=not ranked,
        reasoning=thought,
    )


def write_ranking(order: Sequence[int]) -> str:
    """The answer that ranks 0-based positions in this order."""
    return " > ".join(f"[{position + 1}]" for position in order)


# --------------------------------------------------------------------------------- the sliding

# A ranker of n candidates. It yields batches of windows, each a list of 0-based candidates in the
# order to show them; is sent one answer per window, each a list of positions in that window, best
# first; and returns all n candidates, best first.
Ranker = Generator[list[list[int]], list[list[int]], list[int]]


def windows(n: int, window_size: int = 20, step_size: int = 10) -> list[tuple[int, int]]:
    """The (start, end) of each window over n candidates, in the order they are ranked.

    From the bottom to the top; every candidate is covered, and the last window always starts at
    0, with more overlap where the step does not divide. n <= window_size is one window, n = 0 none.
    """
    if window_size < 2:
        raise UserError(f"a window of {window_size} cannot rank: window_size must be at least 2")
    if not 1 <= step_size <= window_size:
        raise UserError(
            f"step_size must be 1 to window_size ({window_size}), not {step_size}: a larger one "
            "would skip candidates"
        )
    starts = [*range(n - window_size, 0, -step_size), 0]
    return [(start, min(start + window_size, n)) for start in starts] if n else []


def slide(n: int, window_size: int = 20, step_size: int = 10) -> Ranker:
    """The listwise ranker: one window at a time, from the bottom to the top."""
    order = list(range(n))
    for start, end in windows(n, window_size, step_size):
        given = order[start:end]
        (answer,) = yield [given]
        order[start:end] = [given[position] for position in answer]
    return order


def count_windows(ranker: Ranker, reverse: bool) -> int:
    """How many windows a ranker asks for where every answer keeps, or reverses, the given order."""
    count, answers = 0, None
    try:
        while True:
            batch = ranker.send(answers)
            count += len(batch)
            answers = [list(range(len(given)))[:: -1 if reverse else 1] for given in batch]
    except StopIteration:
        return count


def expected_windows(ranker: Callable[[int], Ranker], sizes: Sequence[int]) -> tuple[int, bool]:
    """How many windows queries of so many candidates take together, and whether that is certain.
    Where it depends on the answers, the mean of what two extremes take."""
    kept, reversed_ = (
        sum(times * count_windows(ranker(n), reverse) for n, times in Counter(sizes).items())
        for reverse in (False, True)
    )
    return round((kept + reversed_) / 2), kept == reversed_


def run_rankers(
    rankers: Iterable[Ranker],
    submit: Callable[[tuple[int, int], list[int]], None],
    collect: Callable[[], Iterable[tuple[tuple[int, int], list[int]]]],
) -> list[list[int]]:
    """Each ranker's final order. Many are driven at once, and each goes on as soon as its own
    windows are answered.

    submit(ticket, given): queue one window; ticket = (index of the ranker, number of the window).
    collect(): wait for at least one queued window; the (ticket, answer) of those now finished.
    """
    rankers = list(rankers)
    orders: dict[int, list[int]] = {}
    asked = [0] * len(rankers)  # windows so far, of each ranker
    waiting: dict[int, dict[int, list[int] | None]] = {}  # by ranker and window; None: no answer

    def advance(index: int, answers: list[list[int]] | None) -> None:
        try:
            batch = rankers[index].send(answers)
        except StopIteration as finished:
            orders[index] = finished.value
            return
        numbers = range(asked[index], asked[index] + len(batch))
        asked[index] = numbers.stop
        waiting[index] = dict.fromkeys(numbers)
        for number, given in zip(numbers, batch):
            submit((index, number), given)

    for index in range(len(rankers)):
        advance(index, None)
    while waiting:
        for (index, number), answer in collect():
            waiting[index][number] = answer
            if None not in waiting[index].values():
                advance(index, list(waiting.pop(index).values()))
    return [orders[index] for index in range(len(rankers))]
