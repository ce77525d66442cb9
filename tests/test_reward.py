"""nDCG against trec_eval's own code, and every rule of the reward."""

import math
import random

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from reward import WEIGHTS, listwise_reward, ndcg_at_k, rank_reward
from settings import TrainSettings
from window import Parsed, parse_ranking


def trec_eval(gains: list[int], judged: list[int], k: int) -> float:
    """`gains` ranked in this order, beside further judged passages that were not retrieved."""
    rest = list(judged)
    for gain in gains:
        rest.remove(gain)
    qrels = {f"d{i}": g for i, g in enumerate([*gains, *rest])}
    run = {f"d{i}": float(len(gains) - i) for i in range(len(gains))}
    evaluator = pytrec_eval.RelevanceEvaluator({"q": qrels}, {f"ndcg_cut.{k}"})
    return evaluator.evaluate({"q": run})["q"][f"ndcg_cut_{k}"]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_ndcg_equals_trec_eval(k):
    rng = random.Random(k)
    for _ in range(300):
        judged = [rng.choice([-1, 0, 0, 1, 2, 3]) for _ in range(rng.randint(1, 40))]
        gains = rng.sample(judged, rng.randint(1, len(judged)))
        assert ndcg_at_k(gains, k, judged) == pytest.approx(trec_eval(gains, judged, k), abs=1e-6)


def test_ndcg_by_hand():
    dcg = 1 / math.log2(2) + 3 / math.log2(4)
    best = 3 / math.log2(2) + 1 / math.log2(3)
    assert ndcg_at_k([1, 0, 3]) == pytest.approx(dcg / best)
    assert ndcg_at_k([1, 0, 3], k=2) == pytest.approx(1 / best)
    assert ndcg_at_k([]) == ndcg_at_k([0, 0]) == ndcg_at_k([1], ideal=[]) == 0.0


def answer(order: list[int], tags=True, listed=True, malformed=False) -> Parsed:
    return Parsed(order, tags, listed, malformed, "")


grades = st.lists(st.integers(0, 3), min_size=2, max_size=20)


@given(grades, st.randoms(use_true_random=False))
def test_reward_is_the_papers_formula(grades, rng):
    order = list(range(len(grades)))
    rng.shuffle(order)

    def dcg(gains):
        return sum(g / math.log2(i + 2) for i, g in enumerate(gains[:10]))

    given, answered = dcg(grades), dcg([grades[i] for i in order])
    best = dcg(sorted(grades, reverse=True))
    if best - given > 1e-6:
        r_rank = max((answered - given) / (best - given), -1)
        assert listwise_reward(answer(order), grades) == pytest.approx(0.8 * r_rank + 0.2)
        # The ideal DCG cancels: other judged passages change nothing.
        more = [*grades, 3, 3, 2]
        assert listwise_reward(answer(order), grades, more) == pytest.approx(0.8 * r_rank + 0.2)


def test_best_order_scores_one_and_the_given_order_nothing():
    assert listwise_reward(answer([2, 1, 0]), [0, 1, 2]) == pytest.approx(1.0)
    assert listwise_reward(answer([0, 1, 2]), [0, 1, 2]) == pytest.approx(0.2)


def test_given_order_already_best():
    assert rank_reward(given=0.6, answer=0.6, best=0.6) == 1.0
    assert rank_reward(given=0.6, answer=0.3, best=0.6) == pytest.approx(-0.5)
    assert rank_reward(given=0.6, answer=0.6 - 1e-16, best=0.6 + 1e-16) == 1.0
    assert rank_reward(given=0.0, answer=0.0, best=0.0) == 1.0  # nothing relevant to misplace


def test_worse_than_given_is_floored():
    assert rank_reward(given=0.5, answer=0.0, best=0.51) == -1.0
    assert rank_reward(given=0.5, answer=0.495, best=0.51) == pytest.approx(-0.5)


def test_a_partial_answer_is_completed_in_given_order():
    grades = [0, 3, 1, 0]
    partial = parse_ranking("<think> x </think><answer>[2]</answer>", 4)
    assert partial.order == [1, 0, 2, 3]
    assert listwise_reward(partial, grades) == listwise_reward(answer([1, 0, 2, 3]), grades) < 1


def test_silence_does_not_pay():
    silent = parse_ranking("<think> x </think> <answer> </answer>", 3)
    for grades in ([3, 1, 0], [0, 1, 3]):  # the given order is the best, and the worst
        for variant in ("relative", "absolute", "difference"):
            assert listwise_reward(silent, grades, variant=variant) == pytest.approx(0.1)


def test_formats_and_weights():
    order = [0, 1]
    assert listwise_reward(answer(order, tags=False), [0, 1]) == pytest.approx(0.1)
    assert listwise_reward(answer(order, listed=False), [0, 1]) == pytest.approx(0.1)
    assert listwise_reward(answer([1, 0]), [0, 1], weights=(2, 3, 4)) == pytest.approx(9)


def test_ablation_rewards():
    grades, order, judged = [0, 1, 2], [2, 0, 1], [2, 2, 1, 0]
    given, answered = ndcg_at_k(grades, 10, judged), ndcg_at_k([2, 0, 1], 10, judged)
    weights = (1, 0, 0)
    for variant, value in (("absolute", answered), ("difference", answered - given)):
        reward = listwise_reward(answer(order), grades, judged, weights, variant)
        assert reward == pytest.approx(value)
    with pytest.raises(ValueError, match="unknown r_rank 'ndcg'"):
        listwise_reward(answer(order), grades, variant="ndcg")


def test_the_default_weights_are_the_papers():
    assert tuple(TrainSettings().weights) == WEIGHTS == (0.8, 0.1, 0.1)
