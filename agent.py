"""The reranking agent: a language model that reads a window of passages, reasons, and ranks it.

    settings = AgentSettings(model="Qwen/Qwen2.5-7B-Instruct")
    reranked = rank_batch(load_agent(settings), settings, candidates)

One query or thousands: all their windows share one batch. rearank.py is what users call.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from engine.chat import decode_response, encode_chat, text_stream
from engine.model import TooLong, check_length, choose_dtype, end_tokens, load_whole
from engine.policy import Policy
from engine.sampler import Request, Sample, Sampler
from settings import AgentSettings, UserError
from sources.formats import Candidates, Passage
from tasks import TASKS, Task, own_task, say_another_task, settle
from window import (
    OPENING_TURNS,
    Parsed,
    Prompt,
    Ranker,
    Response,
    conversation,
    load_prompt,
    run_rankers,
)

if TYPE_CHECKING:
    from endpoint import Endpoint


@dataclass(frozen=True)
class Agent:
    """A model, how it is talked to, and what it is asked for."""

    policy: Policy | None  # None: a server has it
    tokenizer: PreTrainedTokenizerBase | None
    prompt: Prompt
    task: Task
    endpoint: "Endpoint | None" = None


@dataclass(frozen=True, eq=False)
class Shown:
    """One window, as the model is asked about it."""

    ticket: tuple[int, int]  # for `run_rankers`
    query: Candidates
    window: int  # its number within the query, from 0
    passages: list[Passage]

    def docids(self) -> list[str]:
        return [passage.docid for passage in self.passages]

    def name(self) -> str:
        """Of its query, for a message; one from the command line has no qid."""
        return f"query {self.query.qid}" if self.query.qid else "the query"


@dataclass(frozen=True)
class Answer:
    """One answered window, as it is reported and written down."""

    qid: str
    window: int  # its number within the query, from 0
    given: list[str]  # the docids in the order the model saw them
    ranked: list[str]  # the docids, best first
    malformed: bool  # no answer could be read, so the order is the given one
    reasoning: str
    response: str
    tokens: int
    cut_off: bool  # by max_new_tokens
    too_long: bool = False  # for the model, so it was not asked
    prompt_tokens: int = 0


Known = Mapping[tuple[str, int], Answer]  # by qid and window
OnText = Callable[[str, Shown], None]  # (a piece of a response, its window)


def load_agent(settings: AgentSettings, device: torch.device | None = None) -> Agent:
    """The agent on `device`, by default the GPU where there is one. Its task and its prompt are
    the settings', else the model's own (see `settle`). With --endpoint nothing is loaded."""
    if settings.prompt:
        load_prompt(settings.prompt)  # before the weights: it may be misspelt
    if settings.task or Path(settings.model).is_dir():  # and windows may not slide so
        task = settings.task or own_task(settings) or next(iter(TASKS))
        next(TASKS[task].ranker(2, settings), None)
    policy = tokenizer = endpoint = None
    if settings.endpoint:
        from endpoint import Endpoint  # takes a second, for a package that few need

        endpoint = Endpoint(settings)
    else:
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = choose_dtype(settings.dtype, device)
        policy, tokenizer = load_whole(settings.model, dtype, device)
    settings = settle(settings)
    say_another_task(settings)
    return Agent(policy, tokenizer, load_prompt(settings.prompt), TASKS[settings.task], endpoint)


def encode_window(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, query: str, passages: Sequence[str]
) -> tuple[list[int], int]:
    """A window's conversation as token ids, and how many of them (the turns before the first
    passage) every other window of the query begins with too."""
    messages = conversation(query, passages, prompt)
    trusted = [m["content"] for m in conversation("", [""] * len(passages), prompt)]
    ids = encode_chat(tokenizer, messages, trusted=trusted)
    opening = encode_chat(
        tokenizer, messages[:OPENING_TURNS], generate=False, trusted=trusted[:OPENING_TURNS]
    )
    # Where a template ends a last turn in its own way, the tokens part a little earlier.
    same = next((i for i, (a, b) in enumerate(zip(ids, opening)) if a != b), len(opening))
    return ids, same


class LocalModel:
    """Windows that are answered by a model on this machine: `submit` one, `collect` the responses
    that are whole."""

    def __init__(self, agent: Agent, settings: AgentSettings, on_text: OnText | None = None):
        self.agent, self.settings, self.on_text = agent, settings, on_text
        # By ticket: a policy that is split over processes hands back a copy of what was submitted.
        self.streams: dict[tuple[int, int], Callable[[int], str]] = {}
        self.prompt_tokens: dict[tuple[int, int], int] = {}
        self.sampler = Sampler(
            agent.policy,
            end_tokens(agent.policy.lm, agent.tokenizer),
            settings.max_new_tokens,
            settings.temperature,
            max_in_flight=settings.max_in_flight,
            on_token=self.stream if on_text else None,
        )

    def submit(self, shown: Shown) -> None:
        """TooLong where the window does not fit."""
        agent, settings = self.agent, self.settings
        texts = [passage.text for passage in shown.passages]
        ids, prefix = encode_window(agent.tokenizer, agent.prompt, shown.query.query, texts)
        check_length(agent.policy.lm, len(ids), settings.max_new_tokens)
        # No two windows draw the same numbers, and each the same whichever others are asked.
        seed = (settings.seed, zlib.crc32(shown.query.qid.encode()), shown.window)
        self.prompt_tokens[shown.ticket] = len(ids)
        self.sampler.submit(Request(shown, ids, prefix=prefix, seed=seed))

    def collect(self) -> Iterable[tuple[Shown, Response]]:
        for shown, (sample,) in self.sampler.collect():
            if not sample.finite:
                raise UserError(
                    f"{shown.name()}: the model's logits are not finite in "
                    f"{self.settings.dtype}: try --dtype bfloat16 or float32"
                )
            text = decode_response(self.agent.tokenizer, sample)
            read = self.prompt_tokens.pop(shown.ticket)
            yield shown, Response(text, read, len(sample.tokens), cut_off=not sample.finished)

    def stream(self, shown: Shown, sample: Sample) -> None:
        ticket = shown.ticket
        if ticket not in self.streams:
            self.streams[ticket] = text_stream(self.agent.tokenizer)
        text_of = self.streams.pop(ticket) if sample.done else self.streams[ticket]
        if not sample.finished and (text := text_of(sample.tokens[-1])):
            self.on_text(text, shown)


class ServerModel:
    """The same for a model that a server has; its texts are streamed as wholes."""

    def __init__(self, agent: Agent, settings: AgentSettings, on_text: OnText | None = None):
        from endpoint import Conversations

        self.prompt, self.seed, self.on_text = agent.prompt, settings.seed, on_text
        self.conversations = Conversations(agent.endpoint)

    def submit(self, shown: Shown) -> None:
        query, texts = shown.query, [passage.text for passage in shown.passages]
        seed = zlib.crc32(f"{self.seed} {shown.window} {query.qid}".encode()) >> 1  # 31 bits
        self.conversations.submit(shown, conversation(query.query, texts, self.prompt), seed)

    def collect(self) -> Iterable[tuple[Shown, Response | TooLong]]:
        for shown, response in self.conversations.collect():
            if self.on_text and isinstance(response, Response):
                self.on_text(response.text, shown)
            yield shown, response


def rank_batch(
    agent: Agent,
    settings: AgentSettings,
    candidates: Sequence[Candidates],
    on_answer: Callable[[Answer], None] = lambda answer: None,
    known: Known = MappingProxyType({}),
    keep_too_long: bool = False,
    on_text: OnText | None = None,
) -> list[Candidates]:
    """Each query's passages in the agent's order. All queries are under way at once, and each
    goes on to its next window as soon as its last is answered.

    known: answers from before, which are not asked for again nor reported; UserError where one is
        for other passages than its window shows now.
    keep_too_long: a window too long for the model keeps its order, and is reported so, where else
        it raises TooLong.
    on_text: is called with the responses as they are written, piece by piece.
    """
    model = (ServerModel if agent.endpoint else LocalModel)(agent, settings, on_text)
    ready: list[tuple[Shown, Answer]] = []  # what the model is not asked for

    def submit(shown: Shown) -> None:
        if answer := known.get((shown.query.qid, shown.window)):
            if answer.given != shown.docids():
                window = f"window {shown.window} of {shown.name()}"
                raise UserError(f"the known answer to {window} is for other passages")
            ready.append((shown, answer))
            return
        try:
            model.submit(shown)
        except TooLong as error:
            keep_order(shown, error)

    def keep_order(shown: Shown, error: TooLong) -> None:
        if not keep_too_long:
            raise TooLong(f"{shown.name()}: {error}") from None
        on_answer(answer := not_asked(shown))
        ready.append((shown, answer))

    def collect() -> Iterable[tuple[Shown, list[int]]]:
        while ready:
            shown, answer = ready.pop()
            yield shown, [answer.given.index(docid) for docid in answer.ranked]
        for shown, response in model.collect():
            if isinstance(response, TooLong):
                keep_order(shown, response)
                continue
            parsed = agent.task.parse(response.text, len(shown.passages), agent.prompt.reasoning)
            on_answer(answer_of(shown, response, parsed))
            yield shown, parsed.order

    return rank_windows(candidates, lambda n: agent.task.ranker(n, settings), submit, collect)


def answer_of(shown: Shown, response: Response, parsed: Parsed) -> Answer:
    return Answer(
        qid=shown.query.qid,
        window=shown.window,
        given=shown.docids(),
        ranked=[shown.passages[i].docid for i in parsed.order],
        malformed=parsed.malformed,
        reasoning=parsed.reasoning,
        response=response.text,
        tokens=response.tokens,
        cut_off=response.cut_off,
        prompt_tokens=response.prompt_tokens,
    )


def not_asked(shown: Shown) -> Answer:
    """Of a window that is too long for the model: its order stays."""
    given = shown.docids()
    return Answer(
        shown.query.qid, shown.window, given, given, True, "", "", 0, False, too_long=True
    )


def rank_windows(
    candidates: Sequence[Candidates],
    ranker: Callable[[int], Ranker],
    submit: Callable[[Shown], None],
    collect: Callable[[], Iterable[tuple[Shown, list[int]]]],
) -> list[Candidates]:
    """`run_rankers` over queries: each one's passages in the order of a ranker, whose windows are
    submitted and come back, each with its answer: positions in it, best first."""

    def ask(ticket: tuple[int, int], given: list[int]) -> None:
        query = candidates[ticket[0]]
        submit(Shown(ticket, query, ticket[1], [query.passages[i] for i in given]))

    def answers() -> Iterable[tuple[tuple[int, int], list[int]]]:
        return ((shown.ticket, order) for shown, order in collect())

    orders = run_rankers([ranker(len(query.passages)) for query in candidates], ask, answers)
    return [in_order(query, order) for query, order in zip(candidates, orders)]


def in_order(query: Candidates, order: Sequence[int]) -> Candidates:
    """The query with its passages in this order, and scores n..1 in place of the first stage's."""
    ranked = zip(range(len(order), 0, -1), order)
    passages = (replace(query.passages[i], score=float(score)) for score, i in ranked)
    return replace(query, passages=tuple(passages))
