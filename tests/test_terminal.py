"""`python rearank.py`: what it reads, what it shows while the model writes, how it ends."""

import io
import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import collection

import rearank
from agent import Answer, Shown
from sources.formats import Candidates, Passage, read_candidates
from terminal import Transcript, print_ranking

ROOT = Path(__file__).parents[1]
FLAGS = "--window_size 4 --step_size 2 --max_new_tokens 60".split()


@pytest.fixture
def command(tiny, monkeypatch, capsys):
    """The program on these arguments, in this process: (what it printed, what it complained)."""

    def run(*args: object, stdin: bytes = b"") -> tuple[str, str]:
        argv = ["rearank.py", *map(str, args), "--model", str(tiny), *FLAGS]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        rearank.main()
        return capsys.readouterr()

    return run


@pytest.fixture
def passages(tmp_path) -> Path:
    path = tmp_path / "passages.txt"
    lines = [passage.text for passage in collection()[0][0].passages]
    lines[3] += " \x1b[31mred " + "tide " * 40
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_windows_then_what_moved(command, passages):
    out, complaints = command("why tides", passages)
    assert "reads prompts with PyTorch SDPA" in complaints
    assert "\x1b" not in out and max(map(len, out.split("\n"))) <= 80
    *windows, ranking = out.split("\n\n")[:-1]
    assert [window.split(":")[0] for window in windows] == [f"Window {i}" for i in (1, 2, 3, 4)]
    assert windows[0].startswith("Window 1: [1]=6 [2]=7 [3]=8 [4]=9\nEach was read.\nAnswer: [")
    assert "<" not in out
    head, *lines = ranking.split("\n")
    assert head.split() == ["rank", "passage", "moved"] and len(lines) == 9
    texts = [line for line in passages.read_text().split("\n") if line]
    for rank, line in enumerate(lines, start=1):
        place, passage, *rest = line.split()
        moved = int(passage) - rank
        assert int(place) == rank and (rest[0] == f"{moved:+}") == bool(moved)
        assert rest[bool(moved)] == texts[int(passage) - 1].split()[0]
    assert {line.split()[1] for line in lines} == set("123456789")


def test_json_holds_the_ranking_and_the_windows(command, passages):
    plain, _ = command("why tides", passages)
    record = json.loads(command("why tides", passages, "--json")[0])
    assert record["query"] == "why tides"
    shown = [line.split()[1] for line in plain.split("moved\n")[1].split("\n") if line]
    assert [found["docid"] for found in record["ranking"]] == shown
    assert [found["rank"] for found in record["ranking"]] == list(range(1, 10))
    assert all(int(f["docid"]) == f["rank"] + f["moved"] for f in record["ranking"])
    assert "\x1b[31m" in {f["docid"]: f["text"] for f in record["ranking"]}["4"]
    assert [window["window"] for window in record["windows"]] == [0, 1, 2, 3]
    assert record["windows"][-1]["ranked"] == shown[:4]


def test_passages_from_a_pipe(command, passages):
    from_file, _ = command("why tides", passages)
    assert command("why tides", "-", stdin=passages.read_bytes())[0] == from_file


def test_a_passage_is_named_by_its_line(command, tmp_path):
    """In a file as Windows writes it, with lines left empty."""
    (tmp_path / "file.txt").write_bytes(b"\xef\xbb\xbfthe tide\r\n\r\n \r\nthe moon\r\n")
    (window,) = json.loads(command("why", tmp_path / "file.txt", "--json")[0])["windows"]
    assert window["given"] == ["1", "4"]
    (record,) = command("why", "-", "--json", stdin=b"\xef\xbb\xbfthe tide\n")[0].splitlines()
    assert json.loads(record)["ranking"][0]["text"] == "the tide"


def test_candidates_of_one_query_or_of_all(command, small):
    out, _ = command("--candidates", small[0], "--json")
    candidates = read_candidates(small[0])
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["qid"] for record in records] == [query.qid for query in candidates]
    for record, query in zip(records, candidates):
        docids = {passage.docid for passage in query.passages}
        assert {found["docid"] for found in record["ranking"]} == docids
    out, _ = command("--candidates", small[0], "--qid", "q2", "--json")
    assert json.loads(out) == records[2]
    out, _ = command("--candidates", small[0], "--qid", "q2")
    assert f"\nQuery q2: {candidates[2].query}\nrank  passage  moved\n" in out
    assert "Window 1 of query q2: [1]=d2-5 [2]=d2-6 [3]=d2-7 [4]=d2-8\n" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["why"], "give a query and a file of passages"),
        (["why", "no/such/file"], "no/such/file: cannot read passages"),
        (["why", "-"], "-: no passage in it"),
        (["", "-"], "give a query and a file of passages"),
        (["why", "-", "--qid", "3"], "--qid chooses among --candidates"),
        (["--candidates", "CANDIDATES", "--qid", "q9"], "--qid q9: not among 6 queries"),
        (["why", "--candidates", "CANDIDATES"], "not both"),
    ],
)
def test_what_is_missing_is_said(command, small, args, message):
    args = [str(small[0]) if arg == "CANDIDATES" else arg for arg in args]
    with pytest.raises(SystemExit, match=message):
        command(*args)


def test_ctrl_c_ends_it_in_the_middle_without_a_traceback(tiny, tmp_path):
    passages = tmp_path / "passages.txt"
    passages.write_text("the tide follows the moon\n" * 400)
    args = ["why", str(passages), "--model", str(tiny), *FLAGS]
    program = subprocess.Popen(
        [sys.executable, "rearank.py", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline().startswith("Window 1: [1]=397")  # before the others are asked
    program.send_signal(signal.SIGINT)
    out, complaints = program.communicate(timeout=60)
    assert program.returncode == 130 and complaints.endswith("\ninterrupted\n")
    assert "Traceback" not in complaints and "rank  passage" not in out


# ------------------------------------------------------------------------------- what is shown

RESPONSE = """<think>
The first \x1b[2J passage [1] speaks of tides, the second one says not a word about them, at all.

- [2] is salt</think>
<answer> [1] > [2] </answer>"""
SHOWN = """Window 1: [1]=a [2]=b
The first [2J passage [1] speaks of tides, the second one says not a word about
them, at all.

- [2] is salt
Answer: [1] > [2]

"""


def windows_of_two_queries() -> list[tuple[Shown, Answer]]:
    passages = (Passage("a", "x", 2.0), Passage("b", "y", 1.0))
    query = Candidates("", "q", passages)
    return [
        (
            Shown((0, number), query, number, list(passages)),
            Answer("", number, ["a", "b"], ["a", "b"], number > 0, "", RESPONSE, 9, number > 0),
        )
        for number in (0, 1)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_windows_under_way_together_are_shown_one_after_the_other(capsys, seed):
    rng, transcript = random.Random(seed), Transcript()
    left = {shown: (answer, RESPONSE) for shown, answer in windows_of_two_queries()}
    transcript.on_text("", next(iter(left)))  # it is the first, however little there is of it
    while left:
        shown = rng.choice(list(left))
        answer, text = left[shown]
        cut = rng.randint(1, 9)
        transcript.on_text(text[:cut], shown)
        left[shown] = answer, text[cut:]
        if not text[cut:]:
            transcript.on_answer(answer)
            del left[shown]
    ending = """(cut off after 9 tokens)
(no answer could be read: these passages keep their order)

"""
    assert capsys.readouterr().out == SHOWN + SHOWN.replace("Window 1", "Window 2")[:-1] + ending


def test_a_word_wider_than_the_terminal_and_an_empty_response(capsys):
    (shown, answer), _ = windows_of_two_queries()
    transcript = Transcript()
    transcript.on_text("x" * 200 + " y", shown)
    transcript.on_answer(answer)
    transcript.on_answer(replace(answer, window=1, malformed=True))
    lines = capsys.readouterr().out.split("\n")
    assert lines[1:3] == ["x" * 200, "y"] and lines[4] == "Window 2: [1]=a [2]=b"
    assert lines[6] == "(no answer could be read: these passages keep their order)"


def test_a_ranking_without_passages(capsys):
    print_ranking(Candidates("7", "q", ()), Candidates("7", "q", ()))
    assert capsys.readouterr().out == "Query 7: q\nrank  passage  moved\n\n"
