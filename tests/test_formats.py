"""Files round trip, and faults are named."""

import gzip
import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from data import choice_training_set
from sources.formats import (
    Candidates,
    Passage,
    read_candidates,
    read_triples,
    write_candidates,
)
from sources.text import LARGEST
from sources.trec import read_excluded, read_qrels, read_run, read_topics, write_qrels, write_run

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
IDS = TEXTS.filter(lambda text: text.split() == [text] and "\ufeff" not in text)
DOCIDS = TEXTS.filter(
    lambda text: text and text == text.strip() and not set(text) & set("\ufeff\t\n\r\v\f")
)
PASSAGES = st.builds(Passage, DOCIDS, TEXTS, st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def candidate_lists(draw):
    qids = draw(st.lists(IDS, min_size=1, max_size=4, unique=True))
    passages = st.lists(PASSAGES, min_size=1, max_size=5, unique_by=lambda p: p.docid)
    return [Candidates(qid, draw(TEXTS), tuple(draw(passages))) for qid in qids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for the hypothesis tests, which may not take a fresh one per example."""
    return tmp_path_factory.mktemp("data")


def saved(folder, text, name="file.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def trec_ndcg(qrels, run):
    """Mean nDCG@10 by trec_eval's own code."""
    scores = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    return sum(query["ndcg_cut_10"] for query in scores.values()) / len(scores)


# --- Round trips ---------------------------------------------------------------------------------

GRADES = st.integers(1 - LARGEST, LARGEST - 1)


@given(st.dictionaries(IDS, st.dictionaries(DOCIDS, GRADES, min_size=1), min_size=1))
def test_qrels_round_trip(folder, qrels):
    write_qrels(qrels, folder / "qrels.txt")
    assert read_qrels(folder / "qrels.txt") == qrels


@given(st.dictionaries(IDS, st.lists(DOCIDS, min_size=1, unique=True), min_size=1), IDS)
def test_run_round_trip(folder, rankings, tag):
    write_run(rankings, folder / "run.txt", tag)
    run = read_run(folder / "run.txt")
    assert {qid: [docid for docid, _ in ranked] for qid, ranked in run.items()} == rankings
    for ranked in run.values():
        scores = [score for _, score in ranked]
        assert all(above > below for above, below in itertools.pairwise(scores))


@pytest.mark.parametrize("name", ["file.json", "file.jsonl"])
@given(candidates=candidate_lists())
@settings(deadline=None)
def test_candidates_round_trip(folder, name, candidates):
    write_candidates(candidates, folder / name)
    assert read_candidates(folder / name) == candidates


def test_written_forms(tmp_path):
    queries = [Candidates("1", "q", (Passage("d1", "café\u2028", 2.5), Passage("d2", "", 1.0)))]
    write_candidates(queries, tmp_path / "a.json")
    write_candidates(queries, tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {
            "query": "q",
            "hits": [
                {"content": "café\u2028", "qid": "1", "docid": "d1", "rank": 1, "score": 2.5},
                {"content": "", "qid": "1", "docid": "d2", "rank": 2, "score": 1.0},
            ],
        }
    ]
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()  # one, even for who uses splitlines
    assert json.loads(line) == {
        "query": {"text": "q", "qid": "1"},
        "candidates": [
            {"docid": "d1", "score": 2.5, "doc": {"contents": "café\u2028"}},
            {"docid": "d2", "score": 1.0, "doc": {"contents": ""}},
        ],
    }


def test_rankllm_form_keeps_a_query_without_hits(tmp_path):
    write_candidates([Candidates("1", "q", ())], tmp_path / "a.jsonl")
    assert read_candidates(tmp_path / "a.jsonl") == [Candidates("1", "q", ())]
    with pytest.raises(ValueError, match=r"a\.json: record 1: the hits should name one qid"):
        write_candidates([Candidates("1", "q", ())], tmp_path / "a.json")


# --- What readers take ---------------------------------------------------------------------------


def test_trec_files_may_have_crlf_bom_tabs_and_blank_lines(tmp_path):
    path = saved(tmp_path, "\ufeff1 0 d1 2\r\n\r\n1\t0\td2\t-1\r\n 07  Q0 d1 0\n\n")
    assert read_qrels(path) == {"1": {"d1": 2, "d2": -1}, "07": {"d1": 0}}
    path = saved(tmp_path, "\ufeff1\tfirst query \r\n02\ttab\tin query")
    assert read_topics(path) == {"1": "first query", "02": "tab\tin query"}


def test_topics_split_at_newlines_only(tmp_path):
    path = saved(tmp_path, "1\ta\u2028b\x0bc\x85d\n2\te\n")
    assert read_topics(path) == {"1": "a\u2028b\x0bc\x85d", "2": "e"}


def test_docids_may_hold_spaces(tmp_path):
    """Real ones do; what is written has tabs, so that others can split it, too."""
    qrels = {"1": {"a/Memory Management_2.txt": 1, "b  c": 0}}
    path = saved(tmp_path, "1 0 a/Memory Management_2.txt 1\n1\t0\tb  c\t0\n")
    assert read_qrels(path) == qrels
    write_qrels(qrels, path)
    assert path.read_text() == "1\t0\ta/Memory Management_2.txt\t1\n1\t0\tb  c\t0\n"
    assert read_qrels(path) == qrels
    write_run({"1": ["a b", "c"]}, path, "t")
    assert path.read_text() == "1\tQ0\ta b\t1\t2\tt\n1\tQ0\tc\t2\t1\tt\n"
    assert read_run(path) == {"1": [("a b", 2.0), ("c", 1.0)]}
    write_run({"1": ["a", "c"]}, path, "t")
    assert path.read_text() == "1 Q0 a 1 2 t\n1 Q0 c 2 1 t\n"


@pytest.mark.parametrize("split, spaces", [("earth_science", False), ("stackoverflow", True)])
def test_real_runs_with_and_without_spaces_survive(bright, tmp_path, split, spaces):
    run, qrels = read_run(bright / f"run.{split}.txt"), read_qrels(bright / f"qrels.{split}.txt")
    docids = {docid for ranked in run.values() for docid, _ in ranked}
    assert any(" " in docid for docid in docids) == spaces
    rankings = {qid: [docid for docid, _ in ranked] for qid, ranked in run.items()}
    write_run(rankings, tmp_path / "run.txt", "t")
    write_qrels(qrels, tmp_path / "qrels.txt")
    again = read_run(tmp_path / "run.txt")
    assert {qid: [docid for docid, _ in ranked] for qid, ranked in again.items()} == rankings
    assert read_qrels(tmp_path / "qrels.txt") == qrels
    if not spaces:
        with open(tmp_path / "run.txt") as file:
            assert pytrec_eval.parse_run(file) == {q: dict(r) for q, r in again.items()}


def test_beirs_files(tmp_path):
    path = saved(tmp_path, "query-id\tcorpus-id\tscore\r\n1\td 1\t2\r\nPLAIN-2\tMED-3\t0\n")
    assert read_qrels(path) == {"1": {"d 1": 2}, "PLAIN-2": {"MED-3": 0}}
    lines = [
        '{"_id": "1", "text": "how do\\ntides work", "metadata": {}}',
        '{"_id": 2, "text": "b"}',
    ]
    assert read_topics(saved(tmp_path, "\n".join(lines))) == {"1": "how do\ntides work", "2": "b"}


def test_packed_files(tmp_path):
    packed = gzip.compress(b"1\tfirst\n2\tsecond\n")
    assert read_topics(saved(tmp_path, packed, "t.tsv.gz")) == {"1": "first", "2": "second"}
    for damaged in (packed[:-12], b"1\tfirst\n", packed[:10] + b"\xff" * 20):
        with pytest.raises(ValueError, match=r"t\.tsv\.gz: not a whole gzip file"):
            read_topics(saved(tmp_path, damaged, "t.tsv.gz"))


def test_excluded_docids(tmp_path):
    path = saved(tmp_path, "1 a\n1 b c\n\n2\td\n")
    assert read_excluded(path) == {"1": {"a", "b c"}, "2": {"d"}}
    with pytest.raises(ValueError, match=r":2: expected 'qid docid', found 'alone'"):
        read_excluded(saved(tmp_path, "1 a\nalone\n"))


def test_run_is_ordered_by_score_then_rank(tmp_path):
    lines = ["1 Q0 a 3 1.5 t", "1 Q0 b 2 1.5 t", "1 Q0 c 1 -2 t", "1 Q0 d 9 1e3 t"]
    run = read_run(saved(tmp_path, "\n".join(lines)))
    assert run == {"1": [("d", 1000.0), ("b", 1.5), ("a", 1.5), ("c", -2.0)]}


def rankllm(qid, *docs):
    found = [{"docid": i, "score": 9 - i, "doc": doc} for i, doc in enumerate(docs)]
    return {"query": {"text": "q", "qid": qid}, "candidates": found}


def test_rankllm_reads_as_lines_and_as_a_list_whatever_the_name(tmp_path):
    records = [rankllm(1, {"text": "a"}), rankllm("x", {"text": "b"}, {"text": ""})]
    expected = [
        Candidates("1", "q", (Passage("0", "a", 9.0),)),
        Candidates("x", "q", (Passage("0", "b", 9.0), Passage("1", "", 8.0))),
    ]
    lines = "\r\n".join(map(json.dumps, records))
    assert read_candidates(saved(tmp_path, "\ufeff" + lines, "a.json")) == expected
    as_list = "\n " + json.dumps(records, indent=1)
    assert read_candidates(saved(tmp_path, as_list, "a.jsonl")) == expected


@pytest.mark.parametrize("field", ["contents", "content", "text", "passage", "segment", "body"])
def test_document_text_fields(tmp_path, field):
    docs = [
        {field: "some text", "url": "u"},
        {field: "some text", "title": "Title"},
        {field: "some text", "title": ""},
        {field: "some text", "title": None},
        {field: "some text", "title": "  "},
        {field: "Title\nsome text", "title": "Title"},
    ]
    (query,) = read_candidates(saved(tmp_path, json.dumps(rankllm(1, *docs))))
    assert [p.text for p in query.passages] == [
        "some text",
        "Title: Title Content: some text",
        "some text",
        "some text",
        "some text",
        "Title\nsome text",
    ]


def test_dl19_figures_by_trec_eval(dl19_read, tmp_path):
    candidates, qrels = dl19_read
    assert len(candidates) == 43 and all(len(query.passages) == 100 for query in candidates)
    assert sum(map(len, qrels.values())) == 9260

    def figure(order):
        rankings = {q.qid: [p.docid for p in order(q)] for q in candidates}
        write_run(rankings, tmp_path / "run.txt", "test")
        run = read_run(tmp_path / "run.txt")
        return trec_ndcg(qrels, {qid: dict(ranked) for qid, ranked in run.items()})

    def by_grade(query):
        return sorted(query.passages, key=lambda p: -qrels[query.qid].get(p.docid, 0))

    assert figure(lambda query: query.passages) == pytest.approx(0.5058, abs=5e-5)
    assert figure(by_grade) == pytest.approx(0.8922, abs=5e-5)


# --- Faults are named ----------------------------------------------------------------------------

HIT = {"content": "t", "docid": "d", "qid": 1, "rank": 1, "score": 2.0}


def rankgpt(*hits, **changes):
    return json.dumps([{"query": "q", "hits": list(hits)} | changes])


def without(name):
    return {key: value for key, value in HIT.items() if key != name}


def rankllm_with(doc=None, **changes):
    return json.dumps(rankllm(1, {"text": "t"} if doc is None else doc) | changes)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (
            read_qrels,
            "1 0 d 1\n1 0 e\n",
            ":2: expected 4 columns 'qid iteration docid grade'",
        ),
        (read_qrels, "1 0 d e f", ":1: grade should be an integer below 2147483648, found 'f'"),
        (
            read_qrels,
            "\n1 0 d 1.0",
            ":2: grade should be an integer below 2147483648, found '1.0'",
        ),
        (
            read_qrels,
            "1 0 d 1_0",
            ":1: grade should be an integer below 2147483648, found '1_0'",
        ),
        (read_qrels, "1 0 d 1\n1 0 d 1", ":2: second judgment of docid d for qid 1"),
        (read_qrels, " \r\n\n", ": the file is blank"),
        (read_qrels, "\ufeff", ": the file is blank"),
        (read_qrels, b"1 0 d 1\n1 0 \xff 1", ":2: not UTF-8 at byte 4 of the line"),
        (
            read_run,
            "1 Q0 d 1 2",
            ":1: expected 6 columns 'qid Q0 docid rank score tag', foun",
        ),
        (read_qrels, "query-id\tcorpus-id\tscore\n1\td\n", ":2: expected query-id<TAB>corpus"),
        (read_qrels, "query-id\tcorpus-id\tscore\n", ": no judgment under the header"),
        (read_qrels, "query-id\tcorpus-id\tscore\n1\t\t1", ":2: docid should be text in one"),
        (read_topics, '{"_id": "1"}', ":1: field 'text' is missing"),
        (read_topics, '{"_id": "a b", "text": "q"}', ":1: _id should be text without white"),
        (read_run, "1 Q0 d 1 nan t", ":1: score should be a finite number, found 'nan'"),
        (read_run, "1 Q0 d 1 -inf t", ":1: score should be a finite number, found '-inf'"),
        (read_run, "1 Q0 d 1 x t", ":1: score should be a finite number, found 'x'"),
        (
            read_run,
            "1 Q0 d 1.5 2 t",
            ":1: rank should be an integer below 2147483648, found '1.5'",
        ),
        (read_run, "1 Q0 d 1 2 t\n1 Q0 d 2 1 t", ":2: docid d is ranked twice for qid 1"),
        (read_run, "", ": the file is blank"),
        (read_topics, "1 no tab", ":1: expected 'qid<TAB>query', found '1 no tab'"),
        (read_topics, "1\tq\n2\t \n", ":2: expected 'qid<TAB>query'"),
        (read_topics, "\tq", ":1: qid should be text without whitespace, found ''"),
        (read_topics, "1 2\tq", ":1: qid should be text without whitespace, found '1 2'"),
        (read_topics, "1\tq\n1\tq", ":2: second query for qid 1"),
        (read_candidates, "", ": the file is blank"),
        (read_candidates, "[]", ": the list is empty"),
        (read_candidates, '[{"query": ]', r": bad JSON: Expecting value: line 1 column 12"),
        (read_candidates, '{"a": 1\n', ":1: bad JSON: "),
        (read_candidates, rankllm_with() + "\n{", ":2: bad JSON: "),
        (read_candidates, "no json", ":1: bad JSON: "),
        (read_candidates, "[3]", ": record 1: expected an object with 'query', found 3"),
        (read_candidates, '{"hits": []}', ":1: field 'query' is missing"),
        (read_candidates, '[{"query": "q"}]', ": record 1: field 'hits' is missing"),
        (
            read_candidates,
            rankgpt(query=[]),
            ": record 1: field 'query' should be str, found",
        ),
        (
            read_candidates,
            rankgpt(HIT, 3),
            "record 1, hit 2: expected an object with 'conten",
        ),
        (read_candidates, rankgpt(without("content")), "hit 1: field 'content' is missing"),
        (read_candidates, rankgpt(without("docid")), "hit 1: field 'docid' is missing"),
        (read_candidates, rankgpt(without("qid")), "hit 1: field 'qid' is missing"),
        (read_candidates, rankgpt(without("score")), "hit 1: field 'score' is missing"),
        (
            read_candidates,
            rankgpt(HIT | {"content": None}),
            "'content' should be str, found",
        ),
        (
            read_candidates,
            rankgpt(HIT | {"docid": 1.5}),
            "'docid' should be str or int, foun",
        ),
        (
            read_candidates,
            rankgpt(HIT | {"docid": True}),
            "'docid' should be str or int, fou",
        ),
        (
            read_candidates,
            rankgpt(HIT | {"docid": ""}),
            "docid should be text in one line",
        ),
        (
            read_candidates,
            rankgpt(HIT | {"qid": "a b"}),
            "qid should be text without whitesp",
        ),
        (
            read_candidates,
            rankgpt(HIT | {"score": "2"}),
            "'score' should be int or float, fo",
        ),
        (
            read_candidates,
            rankgpt(HIT | {"score": math.nan}),
            "score should be a finite numb",
        ),
        (
            read_candidates,
            rankgpt(HIT | {"score": 10**400}),
            "score should be a finite numbe",
        ),
        (read_candidates, rankgpt(HIT, HIT), ": record 1: qid 1 has a docid twice"),
        (
            read_candidates,
            rankgpt(HIT, HIT | {"qid": 2, "docid": "e"}),
            r": record 1: the hits should name one qid, found \['1', '2'\]",
        ),
        (read_candidates, rankgpt(), ": record 1: the hits should name one qid, found"),
        (
            read_candidates,
            rankllm_with(candidates={}),
            ":1: field 'candidates' should be lis",
        ),
        (read_candidates, rankllm_with(query={"qid": 1}), ":1: field 'text' is missing"),
        (read_candidates, rankllm_with(query={"text": ""}), ":1: field 'qid' is missing"),
        (
            read_candidates,
            rankllm_with(query="q"),
            ":1: field 'query' should be dict, found",
        ),
        (
            read_candidates,
            rankllm_with(doc="text"),
            "candidate 1: field 'doc' should be dict",
        ),
        (
            read_candidates,
            rankllm_with(doc={}),
            "candidate 1: none of the text fields conten",
        ),
        (
            read_candidates,
            rankllm_with(doc={"text": 3}),
            "candidate 1: field 'text' should b",
        ),
        (
            read_candidates,
            rankllm_with(doc={"text": "t", "title": 3}),
            "candidate 1: field 'title' should be str",
        ),
        (
            read_candidates,
            rankllm_with() + "\n" + rankllm_with(),
            ":2: second record of qid 1",
        ),
    ],
)
def test_reader_names_the_fault(tmp_path, read, text, message):
    path = saved(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:")


GOOD = Candidates("1", "q", (Passage("d", "t", 2.0),))


def candidates_with(**changes):
    return [replace(GOOD, qid="0"), replace(GOOD, passages=(replace(GOOD.passages[0], **changes),))]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: write_qrels({}, path), "nothing to write"),
        (
            lambda path: write_qrels({"1": {"d": 1}, "a b": {}}, path),
            "qid should be text wi",
        ),
        (
            lambda path: write_qrels({"1": {"d": 1, "": 1}}, path),
            "docid should be text in one line",
        ),
        (
            lambda path: write_qrels({"1": {"d": 1, "e": 1.0}}, path),
            "grade of e for qid 1 should be",
        ),
        (
            lambda path: write_qrels({"1": {"d": True}}, path),
            "grade of d for qid 1 should be .* True",
        ),
        (lambda path: write_qrels({"1": {5: 1}}, path), "docid should be text .*found 5"),
        (lambda path: write_run({}, path, "t"), "nothing to write"),
        (
            lambda path: write_run({"1": ["d"]}, path, "two words"),
            "tag should be text witho",
        ),
        (
            lambda path: write_run({"1": ["d"], "": []}, path, "t"),
            "qid should be text witho",
        ),
        (
            lambda path: write_run({"1": ["d", "e\n"]}, path, "t"),
            "docid should be text in one line",
        ),
        (
            lambda path: write_run({"\ufeff1": ["d"]}, path, "t"),
            "qid should be text without",
        ),
        (
            lambda path: write_run({"1": ["d", "e", "d"]}, path, "t"),
            "qid 1 ranks a docid tw",
        ),
        (lambda path: write_run({"1": ["\ud800"]}, path, "t"), "docid should be text"),
    ],
)
def test_trec_writer_refuses_and_leaves_the_old_file(tmp_path, write, message):
    path = saved(tmp_path, "old")
    with pytest.raises(ValueError, match=message):
        write(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "nothing to write"),
        ([GOOD, GOOD], "record 2: second record of qid 1"),
        (candidates_with(docid=" ab"), "record 2, .* 1: docid should be text in one line"),
        (candidates_with(score=math.inf), "record 2, .* 1: score should be a finite number"),
        (candidates_with(text=None), "record 2, .* 1: field 'contents?' should be str"),
        ([replace(GOOD, passages=GOOD.passages * 2)], "record 1: qid 1 has a docid twice"),
        ([replace(GOOD, qid="")], "qid should be text without whitespace"),
        ([replace(GOOD, query=None)], "should be str, found None"),
    ],
)
def test_candidates_writer_refuses_and_leaves_the_old_file(tmp_path, name, candidates, message):
    path = saved(tmp_path, "old", name)
    with pytest.raises(ValueError, match=message):
        write_candidates(candidates, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == [name]


def test_candidates_writer_refuses_other_endings(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: candidates go to \.jsonl .* or \.json"):
        write_candidates([GOOD], tmp_path / "a.txt")


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    path = saved(tmp_path, "old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run({"1": ["d"]}, path, "t")
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_writers_give_the_usual_permissions(tmp_path):
    write_run({"1": ["d"]}, tmp_path / "run.txt", "t")
    assert (tmp_path / "run.txt").stat().st_mode == saved(tmp_path, "x").stat().st_mode


# --- Triples -------------------------------------------------------------------------------------

TRIPLE = {
    "query_id": 7,
    "query": "tides",
    "positive_passages": [{"docid": "p", "title": "Moon", "text": "It pulls."}],
    "negative_passages": [
        {"docid": "n1", "text": "wind"},
        {"docid": "n2", "title": "", "text": ""},
    ],
}


def test_triples_are_read_as_candidates_and_judgments(tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_text(json.dumps(TRIPLE) + "\n")
    ((query,), qrels) = read_triples(path)
    assert (query.qid, query.query) == ("7", "tides")
    assert [(p.docid, p.text) for p in query.passages] == [
        ("p", "Title: Moon Content: It pulls."), ("n1", "wind"), ("n2", ""),
    ]  # fmt: skip
    assert qrels == {"7": {"p": 1, "n1": 0, "n2": 0}}
    (window,) = choice_training_set([query], qrels, 3, 1)
    assert sorted(window.grades) == [0, 0, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query_id": None}, "field 'query_id' should be"),
        ({"negative_passages": 3}, "field 'negative_passages' should be list"),
        ({"negative_passages": [{"text": "x"}]}, "negative_passages 1: field 'docid' is missing"),
        ({"negative_passages": [{"docid": "p", "text": "x"}]}, "docid p is there twice"),
        ({"positive_passages": [{"docid": "p"}]}, "none of the text fields"),
    ],
)
def test_bad_triples_are_named(tmp_path, change, message):
    path = tmp_path / "triples.jsonl"
    path.write_text(
        json.dumps(TRIPLE) + "\n" + json.dumps(TRIPLE | {"query_id": 8} | change) + "\n"
    )
    with pytest.raises(ValueError, match=message) as error:
        read_triples(path)
    assert f"{path}:2" in str(error.value)


def test_a_query_with_two_triples_is_an_error(tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_text(2 * (json.dumps(TRIPLE) + "\n"))
    with pytest.raises(ValueError, match=":2: second record of query_id 7"):
        read_triples(path)
