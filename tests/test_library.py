"""Calling it from Python: rankings as dicts, the windows behind them, tokens as they are written,
PyTerrier's frames; and that what goes wrong is an exception."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import collection

from agent import load_agent, rank_batch
from engine.chat import decode_response, text_stream
from engine.sampler import Sample
from rearank import Rearank
from settings import AgentSettings, UserError

HOW = {"window_size": 4, "step_size": 2, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def reranker(tiny) -> Rearank:
    return Rearank(tiny, **HOW)


@pytest.fixture(scope="module")
def queries() -> list:
    return [
        replace(query, passages=query.passages[: 9 - i]) for i, query in enumerate(collection()[0])
    ]


def texts(query) -> list[str]:
    return [passage.text for passage in query.passages]


def test_a_ranking_is_what_the_agent_says(reranker, queries, tiny):
    settings = AgentSettings(model=str(tiny), **HOW)
    (expected,) = rank_batch(load_agent(settings), settings, queries[:1])
    ranking = reranker.rank(queries[0].query, texts(queries[0]), return_documents=True)
    assert [texts(queries[0])[found["corpus_id"]] for found in ranking] == texts(expected)
    assert [found["text"] for found in ranking] == texts(expected)
    assert [found["corpus_id"] for found in ranking] != list(range(9))
    assert [found["rank"] for found in ranking] == list(range(1, 10))
    assert [found["score"] for found in ranking] == [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    best = reranker.rank(queries[0].query, texts(queries[0]), 2)
    assert best == [{k: d[k] for k in ("corpus_id", "score", "rank")} for d in ranking[:2]]
    assert reranker.rank("q", []) == [] and reranker.rank("q", []).windows == []


def test_a_batch_is_each_query_by_itself(reranker, queries):
    together = reranker.rank_batch([q.query for q in queries], [texts(q) for q in queries])
    alone = [reranker.rank(q.query, texts(q)) for q in queries]
    assert together == alone
    own = [[{**w, "query": 0} for w in ranking.windows] for ranking in together]
    assert own == [ranking.windows for ranking in alone]
    assert [[w["window"] for w in r.windows] for r in together[:2]] == [[0, 1, 2, 3], [0, 1, 2]]


def test_windows_and_tokens_come_as_they_are_written(reranker, queries):
    pieces, windows, order = {}, [], []

    def on_token(text: str, query: int, window: int) -> None:
        pieces.setdefault((query, window), []).append(text)
        order.append((query, window))

    def on_window(window: dict) -> None:
        windows.append(window)
        order.append("whole")

    rankings = reranker.rank_batch(
        [q.query for q in queries],
        [texts(q) for q in queries],
        on_token=on_token,
        on_window=on_window,
    )
    assert {(w["query"], w["window"]): w["response"] for w in windows} == {
        key: "".join(written) for key, written in pieces.items()
    }
    assert max(len(written) for written in pieces.values()) > 10
    assert order.index((5, 0)) < order.index("whole")  # all queries are under way at once
    by_query = [[w for w in windows if w["query"] == i] for i in range(len(queries))]
    assert [ranking.windows for ranking in rankings] == by_query
    for ranking in rankings:
        last = ranking.windows[-1]  # the one at the top
        assert [found["corpus_id"] for found in ranking][:4] == last["ranked"]
        assert sorted(last["given"]) == sorted(last["ranked"])
    assert any("Each was read." in w["reasoning"] for w in windows)


def test_a_character_of_several_tokens_is_handed_over_whole(reranker):
    tokenizer = reranker.agent.tokenizer
    text = "na\u00efve \u6f6e\u6c50 \U0001f30a end"
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text)
    text_of = text_stream(tokenizer)
    pieces = [text_of(token) for token in tokens]
    assert "" in pieces and "".join(pieces) == text
    assert "".join(pieces) == decode_response(tokenizer, Sample(tokens))


@pytest.mark.parametrize(
    ("query", "documents", "message"),
    [
        ("q", "one text", "a list of documents, not str"),
        ("q", None, "a list of documents, not NoneType"),
        ("q", {"a", "b"}, "a list of documents, not set"),
        ("q", {"d1": "a"}, "a list of documents, not dict"),
        ("q", ["a", None], "document 1 is no text but NoneType"),
        (3, ["a"], "the query is no text but int"),
    ],
)
def test_what_is_no_text_is_named(reranker, query, documents, message):
    with pytest.raises(ValueError, match=message):
        reranker.rank(query, documents)


def test_what_comes_piece_by_piece_is_a_list(reranker, queries):
    query, documents = queries[0].query, texts(queries[0])
    expected = reranker.rank(query, documents)
    assert reranker.rank(query, (text for text in documents)) == expected
    assert reranker.rank_batch(iter([query]), iter([iter(documents)])) == [expected]


@pytest.mark.parametrize("top_k", [-1, 2.0, "3"])
def test_how_many_are_returned_is_a_number(reranker, top_k):
    with pytest.raises(ValueError, match=r"top_k .*: expected a whole number from 0"):
        reranker.rank("q", ["a", "b"], top_k)
    assert len(reranker.rank("q", ["a", "b"], 99)) == 2 and reranker.rank("q", ["a"], 0) == []


def test_threads_and_callbacks_take_turns(reranker, queries):
    query, documents = queries[0].query, texts(queries[0])
    alone, inside = reranker.rank(query, documents), []

    def on_window(window: dict) -> None:
        inside.append(reranker.rank(query, documents))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reranker.rank, [query] * 4, [documents] * 4)) == [alone] * 4
    assert reranker.rank(query, documents, on_window=on_window) == alone
    assert inside == [alone] * len(alone.windows)


def test_a_callback_that_raises_leaves_the_reranker_whole(reranker, queries):
    query, documents = queries[0].query, texts(queries[0])
    alone = reranker.rank(query, documents)
    for callback in ("on_token", "on_window"):
        with pytest.raises(ZeroDivisionError):
            reranker.rank(query, documents, **{callback: lambda *_: 1 / 0})
        assert reranker.rank(query, documents) == alone


def test_errors_are_exceptions(reranker, tiny, tmp_path):
    with pytest.raises(ValueError, match="a list of documents for each of 2 queries"):
        reranker.rank_batch(["a", "b"], [["c"]])
    with pytest.raises((ValueError, OSError), match="cannot be loaded"):
        Rearank(tmp_path / "nothing")
    with pytest.raises(ValueError, match="--task pointwise: expected one of listwise, setwise"):
        Rearank(tiny, task="pointwise")
    with pytest.raises(ValueError, match="--window_size 1: expected a whole number from 2"):
        Rearank(tiny, window_size=1)
    with pytest.raises(ValueError, match="device nothing: "):
        Rearank(tiny, device="nothing")
    assert Rearank(tiny, window_size="4", step_size="2").settings.window_size == 4
    with pytest.raises(TypeError, match="windowsize"):
        Rearank(tiny, windowsize=4)
    with pytest.raises(ValueError, match="step_size must be 1 to window_size"):
        Rearank(tiny, window_size=4).rank("q", ["a"] * 9)
    with pytest.raises(ValueError, match="exceed the model's 8192 positions"):
        Rearank(tiny, max_new_tokens=8192).rank("q", ["a", "b"])


# ----------------------------------------------------------------------------------- PyTerrier


def frame(queries):
    pd = pytest.importorskip("pandas")
    rows = [
        {
            "qid": q.qid,
            "query": q.query,
            "docno": p.docid,
            "text": p.text,
            "score": p.score,
            "rank": i,
        }
        for q in queries
        for i, p in enumerate(q.passages)
    ]
    return pd.DataFrame(rows)


def check_frame(reranked, queries, reranker):
    assert list(reranked.columns) == ["qid", "query", "docno", "text", "score", "rank"]
    for query in queries:
        own = reranked[reranked["qid"] == query.qid]
        expected = reranker.rank(query.query, texts(query))
        docnos = [query.passages[found["corpus_id"]].docid for found in expected]
        assert own["docno"].tolist() == docnos
        assert own["rank"].tolist() == list(range(len(docnos)))
        assert own["score"].tolist() == [found["score"] for found in expected]
        assert set(zip(own["docno"], own["text"])) == {(p.docid, p.text) for p in query.passages}


def test_a_frame_is_reranked_within_each_query(reranker, queries):
    given = frame(queries)
    before = given.copy()
    check_frame(reranker.transform(given), queries, reranker)
    assert given.equals(before)
    shuffled = given.sample(frac=1, random_state=0)  # the rank tells the first stage's order
    check_frame(reranker.transform(shuffled), queries, reranker)
    without = given.drop(columns=["score", "rank"])
    check_frame(reranker.transform(without), queries, reranker)
    assert reranker.transform(given[:0]).columns.tolist() == given.columns.tolist()
    nameless = given[given["qid"] == queries[0].qid].assign(qid=None)
    assert len(reranker.transform(nameless)) == len(nameless) == 9
    with pytest.raises(UserError, match="no column docno, text"):
        reranker.transform(given.drop(columns=["docno", "text"]))


def test_it_stands_in_a_pipeline_of_pyterrier(reranker, queries):
    pt = pytest.importorskip("pyterrier", reason="pip install python-terrier")
    first_stage = pt.Transformer.from_df(frame(queries))
    pipeline = first_stage % 5 >> pt.apply.generic(reranker.transform)
    topics = frame(queries)[["qid", "query"]].drop_duplicates()
    cut = [replace(query, passages=query.passages[:5]) for query in queries]
    reranked = pipeline(topics)
    check_frame(reranked[["qid", "query", "docno", "text", "score", "rank"]], cut, reranker)


# -------------------------------------------------------------------------- the documentation


def test_the_five_lines_of_the_readme_run(tiny, tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[1] / "README.md"
    (example,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 5
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(tiny)
    (tmp_path / "passages.txt").write_text("".join(f"the tide {i}\n" for i in range(10)))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert [line[:10] for line in capsys.readouterr().out.splitlines()] == [
        f"{rank} the tide" for rank in "123"
    ]


def test_the_examples_of_the_documentation_run(tiny, tmp_path, monkeypatch, capsys):
    document = Path(__file__).parents[1] / "docs" / "library.md"
    examples = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    assert len([line for line in examples[0].splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tiny)
    (tmp_path / "passages.txt").write_text("the tide\nsalt in the sea\nwind\nthe moon\n")
    known, shown = {}, []
    for example in examples:
        if "pyterrier" not in example or find_spec("pyterrier"):
            exec(example, known)
            shown.append(capsys.readouterr().out)
    assert [line[:2] for line in shown[0].splitlines()] == ["1 ", "2 ", "3 "]
    assert "Each was read." in shown[1] and shown[1].startswith("[0, 1, 2, 3] ")
    assert [sorted(json.loads(line)) for line in shown[2].splitlines()] == [[0, 1, 2, 3]] * 2
    assert "</answer>" in shown[3]
    rows = " ".join(re.findall(r"^\| (`.*?) \|", document.read_text(), re.MULTILINE))
    documented = re.findall(r"`(\w+)`", rows)
    assert {*known["ranking"][0], *known["ranking"].windows[0]} <= {*documented}
