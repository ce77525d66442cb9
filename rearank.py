"""Rerank documents of your own, from Python or from the command line (docs/library.md).

    from rearank import Rearank
    Rearank("Qwen/Qwen2.5-7B-Instruct").rank("how do tides work", documents)

    python rearank.py "how do tides work" passages.txt      # one passage a line; - is stdin
    python rearank.py --candidates FILE --qid 23            # a first stage's; without --qid all

The command shows the responses as they are written, then the ranking; --json prints JSON.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import asdict, fields, replace
from numbers import Integral
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from agent import Answer, Shown, load_agent, rank_batch
from engine.flags import parse_settings, program, read_setting
from settings import MODEL, AgentSettings, SourceSettings, UserError
from sources.formats import Candidates, Passage
from sources.load import load
from terminal import Transcript, places, print_ranking

OnToken = Callable[[str, int, int], None]  # (text, number of the query, number of its window)


class Ranking(list):
    """One query's documents, best first, each a dict: "corpus_id" (its number among those given),
    "score", "rank" (from 1), and "text" where that was asked for.

    The score is ordinal: n for the best of n documents, 1 for the last. It tells the order, and
    nothing about how much better one is, nor about other queries.

    windows: what the model was asked and how it answered, in order: dicts with the corpus_ids
        "given" and "ranked", the "reasoning", the whole "response", its "tokens", and whether it
        was "malformed" (no answer could be read, so the given order stays) or "cut_off"; all
        keys stand in docs/library.md.
    """

    def __init__(self, documents: list[dict[str, Any]], windows: list[dict[str, Any]]):
        super().__init__(documents)
        self.windows = windows


class Rearank:
    """A reranker: a language model that reads documents in windows, reasons, and ranks them.

    model: a Hugging Face name or a folder, as for --model; device: "cuda" where there is one, else
        "cpu"; settings: those of settings.AgentSettings, by name (window_size=10, ...).

    What goes wrong is a ValueError or an OSError with a message of its own. Threads may share a
    reranker: they take turns.
    """

    def __init__(self, model: str | Path = MODEL, device: str | None = None, **settings: Any):
        self.settings = checked(AgentSettings(model=str(model), **settings))
        self.agent = load_agent(self.settings, usable(device) if device else None)
        self.turn = RLock()  # which a callback may take again

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        on_token: OnToken | None = None,
        on_window: Callable[[dict[str, Any]], None] | None = None,
    ) -> Ranking:
        """Rank the documents of one query, as `rank_batch` does."""
        how = top_k, return_documents, on_token, on_window
        return self.rank_batch([query], [documents], *how)[0]

    def rank_batch(
        self,
        queries: Iterable[str],
        documents: Iterable[Iterable[str]],
        top_k: int | None = None,
        return_documents: bool = False,
        on_token: OnToken | None = None,
        on_window: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[Ranking]:
        """Rank each query's own documents, which stand in the order that a first stage gave them.
        All queries are under way at once, which is much faster than one after the other.

        top_k: how many of the best are returned; all are ranked.
        return_documents: whether each dict has its document, "text".
        on_token: called with each piece of text as it is written, the number of its query and the
            number of its window: lambda text, *_: print(text, end="", flush=True).
        on_window: called with each window (as in Ranking.windows) as soon as it is answered.
        """
        if top_k is not None and not (isinstance(top_k, Integral) and top_k >= 0):
            raise UserError(f"top_k {top_k!r}: expected a whole number from 0, or None for all")
        candidates = as_candidates(queries, documents)
        windows: list[list[dict[str, Any]]] = [[] for _ in candidates]

        def on_answer(answer: Answer) -> None:
            window = as_window(answer)
            windows[window["query"]].append(window)
            if on_window:
                on_window(window)

        def on_text(text: str, shown: Shown) -> None:
            on_token(text, int(shown.query.qid), shown.window)

        how = {"on_text": on_text if on_token else None}
        with self.turn:
            ranked = rank_batch(self.agent, self.settings, candidates, on_answer, **how)
        return [
            Ranking(
                as_results(query, return_documents)[:top_k],
                sorted(asked, key=lambda window: window["window"]),
            )
            for query, asked in zip(ranked, windows)
        ]

    def transform(self, results):
        """PyTerrier's: a frame of qid, query, docno and text (and more) with its rows reranked
        within each query, and a new score and rank (from 0). In a pipeline:

            bm25 >> pt.apply.generic(Rearank("runs/mine").transform)

        The rows' order is the first stage's; where there is a rank, it is the order.
        """
        if missing := {"qid", "query", "docno", "text"} - set(results.columns):
            raise UserError(f"the frame has no column {', '.join(sorted(missing))}")
        if "rank" in results:
            results = results.sort_values("rank", kind="stable")
        groups = list(results.groupby("qid", sort=False, dropna=False).indices.values())
        rows = [results.iloc[group] for group in groups]
        rankings = self.rank_batch(
            [group["query"].iloc[0] for group in rows], [group["text"].tolist() for group in rows]
        )
        best_first = [g[d["corpus_id"]] for g, ranking in zip(groups, rankings) for d in ranking]
        new = [document for ranking in rankings for document in ranking]
        return results.iloc[best_first].assign(
            score=[document["score"] for document in new],
            rank=[document["rank"] - 1 for document in new],
        )


def checked(settings: AgentSettings) -> AgentSettings:
    """The settings, read as the flags are. UserError where one is out of its range."""
    given = {field: str(getattr(settings, field.name)) for field in fields(settings)}
    return replace(settings, **{f.name: read_setting(f, "", text) for f, text in given.items()})


def usable(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
        raise UserError(f"device {device}: {error}") from None


def as_list(things: Any, what: str) -> list:
    if isinstance(things, str | bytes | Mapping | Set) or not isinstance(things, Iterable):
        raise UserError(f"expected a list of {what}, not {type(things).__name__}")
    return list(things)


def as_candidates(queries: Iterable[str], documents: Iterable[Iterable[str]]) -> list[Candidates]:
    """Queries and documents named by their numbers. UserError where they are no texts."""
    queries = as_list(queries, "queries")
    documents = [as_list(own, "documents") for own in as_list(documents, "lists of documents")]
    if len(queries) != len(documents):
        raise UserError(f"expected a list of documents for each of {len(queries)} queries")
    for query, own in zip(queries, documents):
        texts = {"the query": query} | {f"document {i}": text for i, text in enumerate(own)}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise UserError(f"{name} is no text but {type(text).__name__}")
    return [
        Candidates(str(i), query, tuple(Passage(str(d), text, 0.0) for d, text in enumerate(own)))
        for i, (query, own) in enumerate(zip(queries, documents))
    ]


def as_results(query: Candidates, return_documents: bool) -> list[dict[str, Any]]:
    return [
        {"corpus_id": int(passage.docid), "score": passage.score, "rank": rank}
        | ({"text": passage.text} if return_documents else {})
        for rank, passage in enumerate(query.passages, start=1)
    ]


def as_window(answer: Answer) -> dict[str, Any]:
    """An answered window with numbers for names."""
    window = asdict(answer)
    del window["too_long"]  # which is an error here
    numbers = {name: [int(docid) for docid in window[name]] for name in ("given", "ranked")}
    return {"query": int(window.pop("qid"))} | window | numbers


# ----------------------------------------------------------------------------------- the command


def read_queries(inputs: Namespace, sources: SourceSettings) -> list[Candidates]:
    """What to rank: the command line's query with passages from a file, or a first stage's."""
    if sources != SourceSettings():
        if inputs.query:
            raise UserError("give a query and its passages, or files of candidates, not both")
        candidates = load("", sources).candidates
        found = [query for query in candidates if inputs.qid in ("", query.qid)]
        if not found:
            raise UserError(f"--qid {inputs.qid}: not among {len(candidates)} queries")
        return found
    if not inputs.query.strip() or not inputs.passages:
        raise UserError("give a query and a file of passages (- is stdin), or --candidates FILE")
    if inputs.qid:
        raise UserError("--qid chooses among --candidates: passages from a file have one query")
    lines = enumerate(read_text(inputs.passages).split("\n"), start=1)
    passages = tuple(Passage(str(i), line, 0.0) for i, line in lines if line.strip())
    if not passages:
        raise UserError(f"{inputs.passages}: no passage in it (expected one a line)")
    return [Candidates("", inputs.query, passages)]


def read_text(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read passages: {error}") from None


def json_record(given: Candidates, ranked: Candidates, answers: list[Answer]) -> dict[str, Any]:
    """What --json prints of a query."""
    ranking = [
        {"rank": rank, "docid": p.docid, "score": p.score, "moved": before - rank, "text": p.text}
        for rank, before, p in places(given, ranked)
    ]
    windows = sorted((asdict(a) for a in answers if a.qid == given.qid), key=lambda a: a["window"])
    return {"qid": given.qid, "query": given.query, "ranking": ranking, "windows": windows}


def rerank(inputs: Namespace, sources: SourceSettings, settings: AgentSettings) -> None:
    queries, answers, transcript = read_queries(inputs, sources), [], Transcript()
    on_answer, on_text = transcript.on_answer, transcript.on_text
    if inputs.json:
        on_answer, on_text = answers.append, None
    ranked = rank_batch(load_agent(settings), settings, queries, on_answer, on_text=on_text)
    for before, after in zip(queries, ranked):
        if inputs.json:
            print(json.dumps(json_record(before, after, answers), ensure_ascii=False))
        else:
            print_ranking(before, after)


@program
def main() -> None:
    others = {
        "query": {"nargs": "?", "default": "", "help": "one text, in quotes"},
        "passages": {"nargs": "?", "default": "", "help": "a file, one a line; - is stdin"},
        "--qid": {"default": "", "help": "of the candidates: the one query to rank"},
        "--json": {"action": "store_true", "help": "print JSON, a line for each query"},
    }
    settings, sources, inputs = parse_settings(
        __doc__, AgentSettings, SourceSettings, others=others
    )
    try:
        rerank(inputs, sources, settings)
    except BrokenPipeError:  # who read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
