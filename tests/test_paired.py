"""Intervals, tests and noise of paired differences, each against an independent computation."""

from itertools import product
from math import isfinite

import numpy as np
import pytest
from scipy import stats

from results.paired import holm, paired, queries_for


def sample(n: int, seed: int = 0, mean: float = 2.0) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 10, n))


def test_one_dataset_is_the_paired_t_test():
    before, after = np.array(sample(43, 1)), np.array(sample(43, 2, mean=6))
    found = paired([list(after - before)])
    theirs = stats.ttest_rel(after, before)
    low, high = theirs.confidence_interval(0.95)
    assert found.mean == pytest.approx((after - before).mean())
    assert (found.mean - found.noise, found.mean + found.noise) == pytest.approx((low, high))
    assert found.p == pytest.approx(theirs.pvalue, abs=0.02)  # of another test of the same
    assert found.queries == 43 and found.better + found.worse == 43


def test_two_datasets_count_alike_as_in_welchs_test():
    a, b = sample(12, 3), sample(90, 4)
    found = paired([a, b])
    welch = stats.ttest_ind(a, -np.array(b), equal_var=False)  # of mean(a) + mean(b)
    low, high = welch.confidence_interval(0.95)
    assert found.mean == pytest.approx((np.mean(a) + np.mean(b)) / 2)
    assert found.noise == pytest.approx((high - low) / 4)


@pytest.mark.parametrize("parts", [[sample(9)], [sample(4), sample(6, 1)], [[1.0, 2.0, 3.0]]])
def test_p_is_the_share_of_all_exchanges(parts):
    weighed = np.concatenate([np.array(values) / len(values) for values in parts])
    sums = [abs(np.dot(signs, weighed)) for signs in product([1, -1], repeat=len(weighed))]
    by_hand = np.mean(np.array(sums) >= abs(weighed.sum()) - 1e-12)
    assert paired(parts).p == pytest.approx(by_hand)


def test_p_under_no_difference_is_uniform():
    ps = [paired([sample(20, seed, mean=0)]).p for seed in range(40)]
    assert stats.kstest(ps, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    "parts, p, told",
    [
        ([[3.0]], 1.0, False),  # one query
        ([[0.0] * 43], 1.0, False),  # the same ranking
        ([[0.1] * 5], 2 / 2**5, False),  # all equal
        ([[2.0, 2.0], [1.0]], 2 / 2**3, False),  # a dataset of one query
        ([[2.0, 2.0], [1.0, 3.0]], 2 / 2**4, True),
    ],
)
def test_few_or_equal_differences(parts, p, told):
    found = paired(parts)
    assert found.p == pytest.approx(p)
    assert (found.noise is not None) == (found.found_from is not None) == told
    assert all(isfinite(v) for v in (found.mean, found.noise or 0, found.found_from or 0))


def test_what_is_found_4_times_out_of_5():
    """Of drawn differences whose true mean is found_from, a t-test finds so many."""
    n, rng = 43, np.random.default_rng(0)
    spread = 10.0
    drawn = list(rng.normal(0, spread, n))
    found_from = paired([drawn]).found_from * spread / np.std(drawn, ddof=1)
    trials = rng.normal(found_from, spread, (4000, n))
    found = stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_queries_for_a_difference():
    found = paired([sample(43)])
    n = queries_for(1, found)
    again = paired([list(np.resize(sample(43), n))])  # so many queries of the same spread
    assert again.found_from == pytest.approx(1, abs=0.05)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
