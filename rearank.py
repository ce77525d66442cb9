"""The reranking agent: a language model that reads a window of passages, reasons, and ranks it.

    python rearank.py "how do tides work" passages.txt          # one passage a line
    python rearank.py "how do tides work" passages.txt --model OUT --prompt my_prompt.toml

From Python, for one query or thousands (all their windows share one batch):

    settings = AgentSettings(model="Qwen/Qwen2.5-7B-Instruct")
    reranked = rank_batch(load_agent(settings), settings, candidates)
"""

import textwrap
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from engine.chat import decode_response, encode_chat
from engine.model import TooLong, check_length, choose_dtype, end_tokens, load_whole
from engine.packed import Policy
from engine.sampler import Request, Sampler
from settings import AgentSettings, UserError, parse_settings, program
from sources.formats import Candidates, Passage
from tasks import TASKS, Task, say_another_task, settle
from window import OPENING_TURNS, Prompt, Ranker, conversation, load_prompt, run_rankers


@dataclass(frozen=True)
class Agent:
    """A model, how it is talked to, and what it is asked for."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    task: Task


@dataclass(frozen=True, eq=False)
class Shown:
    """One window, as the model is asked about it."""

    ticket: tuple[int, int]  # for `run_rankers`
    query: Candidates
    window: int  # its number within the query, from 0
    passages: list[Passage]

    def docids(self) -> list[str]:
        return [passage.docid for passage in self.passages]


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


Known = Mapping[tuple[str, int], Answer]  # by qid and window


def load_agent(settings: AgentSettings, device: torch.device | None = None) -> Agent:
    """The agent on `device`, by default the GPU where there is one. Its task and its prompt are
    the settings', else the model's own (see `settle`)."""
    if settings.prompt:
        load_prompt(settings.prompt)  # before the weights: it may be misspelt
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(settings.dtype, device)
    policy, tokenizer = load_whole(settings.model, dtype, device)
    settings = settle(settings)
    say_another_task(settings)
    return Agent(policy, tokenizer, load_prompt(settings.prompt), TASKS[settings.task])


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


def rank_batch(
    agent: Agent,
    settings: AgentSettings,
    candidates: Sequence[Candidates],
    on_answer: Callable[[Answer], None] = lambda answer: None,
    known: Known = MappingProxyType({}),
    keep_too_long: bool = False,
) -> list[Candidates]:
    """Each query's passages in the agent's order. All queries are under way at once, and each
    goes on to its next window as soon as its last is answered.

    known: answers from before, which are not asked for again nor reported; UserError where one is
        for other passages than its window shows now.
    keep_too_long: a window too long for the model keeps its order, and is reported so, where else
        it raises TooLong.
    """
    policy, tokenizer = agent.policy, agent.tokenizer
    sampler = Sampler(
        policy,
        end_tokens(policy.lm, tokenizer),
        settings.max_new_tokens,
        settings.temperature,
        max_in_flight=settings.max_in_flight,
    )
    ready: list[tuple[Shown, list[int]]] = []  # what is answered by `known`

    def submit(shown: Shown) -> None:
        qid, docids = shown.query.qid, shown.docids()
        if answer := known.get((qid, shown.window)):
            if answer.given != docids:
                window = f"window {shown.window} of query {qid}"
                raise UserError(f"the known answer to {window} is for other passages")
            ready.append((shown, [docids.index(docid) for docid in answer.ranked]))
            return
        texts = [passage.text for passage in shown.passages]
        ids, prefix = encode_window(tokenizer, agent.prompt, shown.query.query, texts)
        try:
            check_length(policy.lm, len(ids), settings.max_new_tokens)
        except TooLong as error:
            if not keep_too_long:
                raise TooLong(f"query {qid}: {error}") from None
            kept = Answer(qid, shown.window, docids, docids, True, "", "", 0, False, too_long=True)
            on_answer(kept)
            ready.append((shown, list(range(len(docids)))))
            return
        # No two windows draw the same numbers, and each the same whichever others are asked.
        seed = (settings.seed, zlib.crc32(qid.encode()), shown.window)
        sampler.submit(Request(shown, ids, prefix=prefix, seed=seed))

    def collect() -> Iterable[tuple[Shown, list[int]]]:
        while ready:
            yield ready.pop()
        for shown, (sample,) in sampler.collect():
            response = decode_response(tokenizer, sample)
            parsed = agent.task.parse(response, len(shown.passages), agent.prompt.reasoning)
            on_answer(
                Answer(
                    qid=shown.query.qid,
                    window=shown.window,
                    given=shown.docids(),
                    ranked=[shown.passages[i].docid for i in parsed.order],
                    malformed=parsed.malformed,
                    reasoning=parsed.reasoning,
                    response=response,
                    tokens=len(sample.tokens),
                    cut_off=not sample.finished,
                )
            )
            yield shown, parsed.order

    return rank_windows(candidates, lambda n: agent.task.ranker(n, settings), submit, collect)


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
    return [
        replace(query, passages=tuple(query.passages[i] for i in order))
        for query, order in zip(candidates, orders)
    ]


# ----------------------------------------------------------------------------------- the command


@program
def main() -> None:
    parser = HfArgumentParser(AgentSettings, allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("query")
    parser.add_argument("passages", type=Path, help="a text file, one passage a line")
    settings, inputs = parse_settings(parser)
    try:
        lines = [line for line in inputs.passages.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{inputs.passages}: cannot read passages: {error}")
    if not lines:
        parser.error(f"{inputs.passages}: no passage in it (expected one a line)")

    def show(answer: Answer) -> None:
        print(f"\nWindow of passages {', '.join(answer.given)}:", end="")
        print(" NO ANSWER COULD BE READ, its order is kept" if answer.malformed else "")
        print(textwrap.fill(answer.reasoning or "(no reasoning)", 80))

    passages = tuple(Passage(str(i), line, 0.0) for i, line in enumerate(lines, start=1))
    query = Candidates("1", inputs.query, passages)
    (ranked,) = rank_batch(load_agent(settings), settings, [query], show)
    print("\nRanking:")
    for rank, passage in enumerate(ranked.passages, start=1):
        print(f"{rank:4}. [{passage.docid}] " + textwrap.shorten(passage.text, 70))


if __name__ == "__main__":
    main()
