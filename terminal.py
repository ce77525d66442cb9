"""What `python rearank.py` shows: the responses as they are written, then what moved where. Plain
text, on a terminal as in a file: nothing in it is a control code, whatever a passage holds."""

import re
import shutil
from collections.abc import Iterator

from agent import Answer, Shown
from sources.formats import Candidates, Passage
from window import TAGS

TAG = re.compile("|".join(TAGS))


def width() -> int:
    """Of the terminal; 80 where there is none."""
    return shutil.get_terminal_size().columns


class Paper:
    """Text that is written piece by piece: its words are wrapped, its tags left out."""

    def __init__(self):
        self.rest, self.column, self.width = "", 0, width()

    def write(self, text: str) -> None:
        # Words and the white space between them; the last word may still grow.
        *whole, self.rest = re.split(r"(\s+)", self.rest + text)
        for piece in whole:
            if not piece.isspace():
                self.write_word(piece)
            elif "\n" in piece:
                self.end_line(blank=piece.count("\n") > 1)
        print(end="", flush=True)

    def write_word(self, word: str) -> None:
        if "<answer>" in word:
            self.end_line()
            self.write_word("Answer:")
        word = "".join(filter(str.isprintable, TAG.sub("", word)))
        if self.column + len(word) >= self.width:
            self.end_line()
        if word:
            print(" " * bool(self.column) + word, end="")
            self.column += bool(self.column) + len(word)

    def end_line(self, blank: bool = False) -> None:
        if self.column:
            print()
            self.column = 0
        if blank:
            print()


class Transcript:
    """Responses one after the other: the first as it is written, those that are written beside it
    when it is done."""

    def __init__(self):
        self.paper = Paper()
        self.to_show: dict[tuple[str, int], str] = {}  # by query and window, in their order
        self.done: set[tuple[str, int]] = set()

    def on_text(self, text: str, shown: Shown) -> None:
        self.add((shown.query.qid, shown.window), shown.docids(), text)

    def on_answer(self, answer: Answer) -> None:
        window = answer.qid, answer.window
        self.done.add(window)
        end = "\n"
        if answer.cut_off:
            end += f"(cut off after {answer.tokens} tokens)\n"
        if answer.malformed:
            end += "(no answer could be read: these passages keep their order)\n"
        self.add(window, answer.given, end)

    def add(self, window: tuple[str, int], docids: list[str], text: str) -> None:
        qid, number = window
        of = f" of query {qid}" if qid else ""
        labels = " ".join(f"[{label}]={docid}" for label, docid in enumerate(docids, start=1))
        head = f"Window {number + 1}{of}: {labels}\n"
        self.to_show[window] = self.to_show.get(window, head) + text
        for first in list(self.to_show):
            self.paper.write(self.to_show[first])
            self.to_show[first] = ""
            if first not in self.done:
                break
            del self.to_show[first]
            self.paper.end_line(blank=True)


def places(before: Candidates, after: Candidates) -> Iterator[tuple[int, int, Passage]]:
    """(rank, rank before, passage), best first."""
    was = {passage.docid: rank for rank, passage in enumerate(before.passages, start=1)}
    for rank, passage in enumerate(after.passages, start=1):
        yield rank, was[passage.docid], passage


def print_ranking(before: Candidates, after: Candidates) -> None:
    """A line for each passage: its rank, its name, how many places it moved up (+) or down (-)."""
    if after.qid:
        print(f"Query {after.qid}: {plain(after.query)}")
    names = max([len(plain(passage.docid)) for passage in after.passages] + [len("passage")])
    print(f"rank  {'passage':>{names}}  moved")
    for rank, was, passage in places(before, after):
        moved = f"{was - rank:+}" if was != rank else ""
        line = f"{rank:4}  {plain(passage.docid):>{names}} {moved:>6}  {plain(passage.text)}"
        print(line if len(line) < width() else line[: width() - 4] + "...")
    print()


def plain(text: str) -> str:
    return "".join(filter(str.isprintable, " ".join(text.split())))
