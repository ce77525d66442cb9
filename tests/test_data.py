"""Windows are drawn as the papers say."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import choice_training_set, training_set
from sources.formats import Candidates, Passage

ROOT = Path(__file__).parents[1]


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
        training_set([pool("1", n)], qrels, size, 8, threshold, tested, seed)
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
    instances = training_set([pool("1", 100)], {"1": grades}, min_ndcg=0)
    assert len(instances) == 50 and {len(i.passages) for i in instances} == {20}
    places = [int(p.docid[1:]) for i in instances for p in i.passages]
    # 1,000 draws: each of 100 passages is expected 10 times, at any place of the window.
    assert len(set(places)) == 100 and sum(places) / len(places) == pytest.approx(49.5, abs=4)
    firsts = [i.passages[0].docid for i in instances]
    assert len(set(firsts)) > 25
    assert all(list(i.passages) != sorted(i.passages, key=lambda p: -p.score) for i in instances)


def test_few_candidates_are_all_used_and_shuffled():
    instances = training_set([pool("1", 7)], {"1": {"d3": 1}}, min_ndcg=0)
    assert len(instances) == 50
    assert all(set(i.passages) == set(pool("1", 7).passages) for i in instances)
    assert len({i.passages for i in instances}) > 25


def test_draws_depend_on_seed_and_qid_alone():
    qrels = {qid: {f"d{i}": 1 for i in range(0, 60, 3)} for qid in "123"}
    one = training_set([pool("1", 60)], qrels, min_ndcg=0)
    both = training_set([pool("2", 60), pool("1", 60)], qrels, min_ndcg=0)
    assert one == [i for i in both if i.qid == "1"]
    assert one[:5] == training_set([pool("1", 60)], qrels, draws=5, min_ndcg=0)
    assert one != training_set([pool("1", 60)], qrels, seed=1, min_ndcg=0)
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
    here = training_set([pool("1", 60)], {"1": {"d3": 1}}, draws=9, min_ndcg=0)
    assert said.stdout.decode().strip() == str([[p.docid for p in i.passages] for i in here])


def test_ideal_is_over_all_judgments():
    # The one relevant candidate is always in the set, so "best" over the set alone would be 1;
    # with 10 better passages that BM25 missed it is far under 0.1.
    judgments = {"d0": 1} | {f"missed{i}": 3 for i in range(10)}
    assert training_set([pool("1", 20)], {"1": judgments}, ndcg_filter="best") == []
    found = training_set([pool("1", 20)], {"1": judgments}, min_ndcg=0, draws=1)
    assert found[0].judged == (3,) * 10 + (1,)


def test_queries_without_relevant_judgments_give_nothing():
    queries = [pool("1", 30), pool("2", 30), pool("3", 30)]
    qrels = {"1": {}, "2": {"d1": 0, "d2": -1}, "4": {"d1": 3}}
    assert training_set(queries, qrels, min_ndcg=0) == []


def test_unknown_filter():
    with pytest.raises(ValueError, match="unknown ndcg_filter 'first': use initial or best"):
        training_set([], {}, ndcg_filter="first")


def test_dl19_training_set(dl19_read):
    candidates, qrels = dl19_read
    initial = training_set(candidates, qrels)
    best = training_set(candidates, qrels, ndcg_filter="best")
    assert 0 < len(initial) < len(best) < 43 * 50
    texts = {p.docid: p.text for query in candidates for p in query.passages}
    assert all(texts[p.docid] == p.text for i in initial for p in i.passages)


# --- Choices -------------------------------------------------------------------------------------


def test_choice_windows_hold_one_best_passage_among_negatives():
    passages = tuple(Passage(f"d{i}", f"text {i}", 9.0 - i) for i in range(9))
    candidates = [Candidates("q", "a query", passages)]
    qrels = {"q": {"d0": 1, "d1": 3, "d2": 3, "d3": 0, "gone": 2}}
    windows = choice_training_set(candidates, qrels, 4, 200, seed=1)
    assert len(windows) == 200
    positives = set()
    for window in windows:
        assert len(window.passages) == len({p.docid for p in window.passages}) == 4
        assert sorted(window.grades) == [0, 0, 0, 3] and window.judged == (3, 3, 2, 1)
        assert "d0" not in {p.docid for p in window.passages}  # relevant, but not the best
        positives.add((window.passages[window.grades.index(3)].docid, window.grades.index(3)))
    assert positives == {(d, place) for d in ("d1", "d2") for place in range(4)}
    assert choice_training_set(candidates, qrels, 4, 200, seed=1) == windows
    assert choice_training_set(candidates, qrels, 4, 200, seed=2) != windows


def test_choice_windows_with_few_negatives_take_all_and_without_any_there_are_none():
    passages = tuple(Passage(f"d{i}", "", 0.0) for i in range(3))
    candidates = [Candidates("q", "a query", passages)]
    (window,) = choice_training_set(candidates, {"q": {"d0": 1}}, 20, 1)
    assert sorted(window.grades) == [0, 0, 1]
    assert choice_training_set(candidates, {"q": {"d0": 0}}, 20, 5) == []
    assert choice_training_set(candidates, {"q": {f"d{i}": 1 for i in range(3)}}, 20, 5) == []
    assert choice_training_set(candidates, {}, 20, 5) == []
