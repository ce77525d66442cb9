"""The conversation, the parser, and the sliding window."""

import random
import time
from contextlib import suppress
from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setwise import bubblesort, heapsort
from window import (
    LISTWISE_PROMPT,
    OPENING_TURNS,
    PROMPTS,
    Prompt,
    conversation,
    expected_windows,
    load_prompt,
    parse_ranking,
    run_rankers,
    slide,
    windows,
)

# ------------------------------------------------------------------------------ the conversation


def test_conversation_has_the_shape_of_the_paper():
    query = "why is the sky blue"
    messages = conversation(query, ["a  b\n c", "d"], load_prompt(LISTWISE_PROMPT))
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert query in messages[1]["content"] and "2 passages" in messages[1]["content"]
    assert messages[3]["content"] == "[1] a b c" and messages[5]["content"] == "[2] d"
    assert "[2]" in messages[6]["content"]
    assert query in messages[-1]["content"]
    assert "<think>" in messages[-1]["content"] and "<answer>" in messages[-1]["content"]


def test_opening_turns_do_not_depend_on_the_passages():
    prompt = load_prompt(LISTWISE_PROMPT)
    a, b = (conversation("q", texts, prompt) for texts in (["x", "y"], ["z", "w"]))
    assert a[:OPENING_TURNS] == b[:OPENING_TURNS] and a[OPENING_TURNS] != b[OPENING_TURNS]


def test_passages_are_folded_and_cut():
    prompt = load_prompt(LISTWISE_PROMPT)
    text = conversation("q", ["ab \t\n" * 400], prompt)[OPENING_TURNS]["content"]
    assert text == "[1] " + ("ab " * 400)[: prompt.max_chars]


def test_braces_in_query_and_passages_stay():
    messages = conversation("{n} {query} {i}", ["{text} {x}", "}{"], load_prompt(LISTWISE_PROMPT))
    assert "{n} {query} {i}" in messages[1]["content"]
    assert messages[3]["content"] == "[1] {text} {x}"


@pytest.mark.parametrize("path", sorted(PROMPTS.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_prompts_load(path):
    load_prompt(path)


def toml(**changes) -> str:
    values = {
        "reasoning": "true", "max_chars": "9", "system": '"s"', "opening": '"{query} {n}"',
        "ready": '"r"', "passage": '"<{i}> {text}"', "received": '"ok"', "request": '"go {query}"',
    } | changes  # fmt: skip
    return "\n".join(f"{k} = {v}" for k, v in values.items() if v is not None)


def test_a_prompt_file_replaces_every_turn(tmp_path):
    (tmp_path / "p.toml").write_text(toml())
    messages = conversation("Q", ["abcdefghijkl"], load_prompt(tmp_path / "p.toml"))
    assert [m["content"] for m in messages] == ["s", "Q 1", "r", "<1> abcdefghi", "ok", "go Q"]
    assert set(toml().split()) >= {field.name for field in fields(Prompt)}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"ready": None}, "expected ready = a str"),
        ({"max_chars": '"9"'}, "expected max_chars = a int"),
        ({"max_chars": "0"}, "max_chars must be at least 1"),
        ({"reasoning": "1"}, "expected reasoning = a bool"),
        ({"extra": "1"}, "unknown key 'extra'"),
        ({"passage": '"[{i}]"'}, "no passage would be shown"),
        ({"passage": '"{text}"'}, "passage lacks {i}, so none could be named"),
        ({"passage": '"[{i}] {text} {title}"'}, "passage holds {title}, which is never filled in"),
        ({"received": '"{text}"'}, "received holds {text}, which is never filled in"),
        ({"request": '"{query} {i}"'}, "request holds {i}, which is never filled in"),
        ({"opening": '""', "request": '""'}, "neither opening nor request"),
        ({"system": '"'}, "not a TOML file"),
    ],
)
def test_a_bad_prompt_file_says_what_is_wrong(tmp_path, changes, expected):
    path = tmp_path / "p.toml"
    path.write_text(toml(**changes))
    with pytest.raises(ValueError, match=expected) as error:
        load_prompt(path)
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------------ the parser

T = "<think> [2] is nice </think>"


@pytest.mark.parametrize(
    "response, order, tags, listed, malformed",
    [
        (f"{T} <answer>[3] > [1] > [2]</answer>", [3, 1, 2], True, True, False),
        (f"{T}<answer>\n[3]>[1]\n</answer>", [3, 1, 2], True, True, False),  # 2 follows
        (f"{T} <answer>[3] > [3] > [9] > [2]</answer>", [3, 2, 1], True, True, False),
        (f"{T} <answer>I say [3] > [1]</answer>", [3, 1, 2], True, False, False),
        (f"{T} <answer>[3], [1]</answer>", [3, 1, 2], True, False, False),
        (f"{T} <answer> [0] [999] 3 </answer>", [1, 2, 3], True, False, True),
        (f"{T} <answer>3 > 2 > 1</answer>", [1, 2, 3], True, False, True),  # no labels
        (f"{T} <answer></answer>", [1, 2, 3], True, False, True),
        (f"{T} <answer>[3] > [2", [3, 1, 2], False, False, False),  # cut off in its answer
        (f"{T} [3] > [2] > [1]", [1, 2, 3], False, False, True),  # no answer tags
        ("<think> [3] > [2] <answer>[2]</answer>", [1, 2, 3], False, False, True),  # never closed
        ("<think> [3] beats [2] and", [1, 2, 3], False, False, True),
        ("<answer>[2] > [3]</answer>", [2, 3, 1], False, True, False),  # no reasoning
        ("[3] > [2] > [1]", [1, 2, 3], False, False, True),
        (f"<answer>[3]</answer> {T} <answer>[2]</answer>", [2, 1, 3], False, True, False),
        (f"{T} <answer>[2]</answer> <answer>[3]</answer>", [2, 1, 3], False, True, False),
        ("<think><answer>[3]</answer></think><answer>[2]</answer>", [2, 1, 3], False, True, False),
        (f"{T} </answer>[3]<answer>[1]", [1, 2, 3], False, False, False),
        (f"{T} <answer>[{'9' * 5000}] > [2]</answer>", [2, 1, 3], True, True, False),
        (f"{T} <answer>[ 2 ] > [003]</answer>", [2, 3, 1], True, False, False),
        (f"{T} <answer>[٣]</answer>", [1, 2, 3], True, False, True),  # other scripts' digits
        ("", [1, 2, 3], False, False, True),
    ],
)
def test_parse_with_reasoning(response, order, tags, listed, malformed):
    parsed = parse_ranking(response, 3)
    assert [i + 1 for i in parsed.order] == order
    assert (parsed.tags, parsed.listed, parsed.malformed) == (tags, listed, malformed)


@pytest.mark.parametrize(
    "response, order, listed, malformed",
    [
        ("[3] > [1] > [2]", [3, 1, 2], True, False),
        ("The order is [3] > [1]", [3, 1, 2], False, False),
        (f"{T} [3] > [1]", [3, 1, 2], True, False),  # a model that reasons all the same
        ("<answer>[3]</answer> not [1]", [3, 1, 2], True, False),
        ("<think> [3] > [1]", [1, 2, 3], False, True),
        ("no idea", [1, 2, 3], False, True),
    ],
)
def test_parse_without_reasoning(response, order, listed, malformed):
    parsed = parse_ranking(response, 3, reasoning=False)
    assert [i + 1 for i in parsed.order] == order
    assert (parsed.listed, parsed.malformed) == (listed, malformed)


def test_reasoning_is_handed_out():
    assert parse_ranking("<think> a [1] b </think><answer>[1]</answer>", 2).reasoning == "a [1] b"
    assert parse_ranking("<think> cut", 2).reasoning == "cut"
    assert parse_ranking("opened by the template</think><answer>[1]</answer>", 2).reasoning == (
        "opened by the template"
    )


pieces = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "[1]", "[2]", "[", "]", ">", " > ", "0", "[0]",
     "[999]", "\x00", "\u202e", "é́", "<", "\n", "[[", "[1 ]"]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(pieces).map("".join)), st.integers(0, 25), st.booleans())
def test_any_string_gives_a_whole_order(response, n, reasoning):
    parsed = parse_ranking(response, n, reasoning)
    assert sorted(parsed.order) == list(range(n))
    if parsed.malformed:
        assert parsed.order == list(range(n))


@given(st.lists(pieces).map("".join), st.permutations(range(5)))
def test_reasoning_never_ranks(noise, order):
    noise = noise.replace("</think>", "").replace("<answer>", "").replace("</answer>", "")
    answer = " > ".join(f"[{i + 1}]" for i in order)
    with_answer = parse_ranking(f"<think>{noise}</think><answer>{answer}</answer>", 5)
    assert with_answer.order == list(order)
    assert parse_ranking(f"<think>{noise}", 5).malformed


@pytest.mark.parametrize(
    "unit", ["[1] > ", "<think>", "</think>", "<answer>", "[", "[ ", "9", " ", ">", "[" + " " * 999]
)
@pytest.mark.parametrize("frame", ["{}", "</think><answer>{}</answer>", "</think><answer>[{}"])
def test_a_megabyte_is_parsed_in_linear_time(unit, frame):
    response = frame.format(unit * (2**20 // len(unit)))
    started = time.perf_counter()
    parse_ranking(response, 20)
    assert time.perf_counter() - started < 0.5


# ----------------------------------------------------------------------------- the sliding window


def test_windows_of_the_paper():
    assert windows(100, 20, 10) == [(s, s + 20) for s in range(80, -1, -10)]
    assert windows(0) == [] and windows(1) == [(0, 1)] and windows(19) == [(0, 19)]
    assert windows(25, 20, 10) == [(5, 25), (0, 20)]


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_windows_cover_everything_from_the_bottom_to_the_top(n, size, draw):
    step = draw.draw(st.integers(1, size))
    spans = windows(n, size, step)
    assert {i for start, end in spans for i in range(start, end)} == set(range(n))
    assert all(end - start == min(size, n) for start, end in spans)
    starts = [start for start, _ in spans]
    assert all(0 < a - b <= step for a, b in pairwise(starts))
    assert not n or (starts[-1] == 0 and spans[0][1] == n)


@pytest.mark.parametrize("size, step", [(1, 1), (20, 0), (20, 21), (0, 0)])
def test_windows_that_would_skip_candidates_are_an_error(size, step):
    with pytest.raises(ValueError, match="window_size"):
        windows(100, size, step)


def run(rankers, answer, collect_from=lambda pending: [pending.pop(0)]):
    pending = []
    orders = run_rankers(
        rankers,
        lambda ticket, given: pending.append((ticket, given)),
        lambda: [(ticket, answer(ticket, given)) for ticket, given in collect_from(pending)],
    )
    return dict(enumerate(orders))


@given(st.integers(1, 60), st.integers(2, 12), st.data())
def test_a_perfect_answerer_lifts_the_best_to_the_top(n, size, draw):
    step = draw.draw(st.integers(1, size - 1))
    worth = draw.draw(st.permutations(range(n)))
    orders = run(
        [slide(n, size, step)],
        lambda _, given: sorted(range(len(given)), key=lambda i: -worth[given[i]]),
    )
    assert sorted(orders[0]) == list(range(n))
    best = sorted(range(n), key=lambda i: -worth[i])
    assert orders[0][: size - step] == best[: size - step]  # what the overlap can carry


def test_each_query_goes_on_by_itself():
    """A query of one slow window does not hold back another's nine."""
    seen = []

    def collect_from(pending):
        fast = [p for p in pending if p[0][0] != 0] or list(pending)
        for p in fast:
            pending.remove(p)
        seen.append([ticket[0] for ticket, _ in fast])
        return fast

    orders = run(
        [slide(100), slide(100), slide(5), slide(0)], lambda _, g: list(range(len(g))), collect_from
    )
    assert seen == [[1, 2]] + [[1]] * 8 + [[0]] * 9
    assert orders == {0: list(range(100)), 1: list(range(100)), 2: list(range(5)), 3: []}


def test_a_batch_of_windows_is_answered_in_its_order():
    def ranker():
        answers = yield [[0, 1], [2, 3], [4, 5]]
        return answers

    def shuffled(pending):
        random.Random(0).shuffle(pending)
        return [pending.pop()]

    assert run([ranker()], lambda ticket, given: given, shuffled) == {0: [[0, 1], [2, 3], [4, 5]]}


# ------------------------------------------------------------------------- how many there will be


def windows_asked(ranker, score: list[float]) -> int:
    """How many windows a ranker asks for, where the scores of the candidates answer them."""
    batches, answers = [], None
    with suppress(StopIteration):
        while True:
            batches.append(ranker.send(answers))
            orders = (sorted(given, key=score.__getitem__) for given in batches[-1])
            answers = [[given.index(i) for i in order] for given, order in zip(batches[-1], orders)]
    return sum(map(len, batches))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "certain, ranker",
    [(True, slide), (True, bubblesort), (False, heapsort)],
)
def test_the_windows_to_come_are_known_or_about_known(certain, ranker, seed):
    rng, sizes = random.Random(seed), [100, 20, 0, 7, 100, 33]
    total, known = expected_windows(ranker, sizes)
    real = sum(windows_asked(ranker(n), rng.sample(range(n), n)) for n in sizes)
    assert known == certain
    assert total == real if certain else abs(total - real) < 0.25 * real
