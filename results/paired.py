"""Paired differences of two rankings of the same queries: their mean, interval, test, and noise.

Of several datasets the mean is that of the datasets' means, so that a small one counts as a large
one. For dataset d with n_d differences of standard deviation s_d, of D datasets:

    v_d = s_d^2 / (n_d D^2)      SE = sqrt(sum v_d)      df = SE^4 / sum(v_d^2 / (n_d - 1))

(Welch and Satterthwaite's; of one dataset, the paired t-test's). All of it is about the queries:
what the mean would be on other queries of the same kind, not after another training.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.stats import permutation_test, t

CONFIDENCE, POWER = 0.95, 0.8
LEAST, MOST, DRAWS = 9_999, 99_999, 20_000_000  # exchanges, and of queries in all of them


@dataclass(frozen=True)
class Paired:
    """What the differences of some queries tell. None: a dataset has one query alone, or all are
    equal in each, which says nothing of how they spread."""

    queries: int
    better: int
    worse: int
    mean: float
    noise: float | None  # half of the 95% interval's width: a smaller difference may be none
    found_from: float | None  # the true difference that a test finds 4 times out of 5
    p: float


def paired(differences: list[list[float]]) -> Paired:
    """differences: of each dataset, a value for every query; one query at least."""
    every = np.concatenate(differences)
    error, df = standard_error(differences)
    sure, power = t.ppf([(1 + CONFIDENCE) / 2, POWER], df)
    return Paired(
        queries=len(every),
        better=int((every > 1e-9).sum()),
        worse=int((every < -1e-9).sum()),
        mean=float(np.mean([np.mean(values) for values in differences])),
        noise=None if error is None else float(sure * error),
        found_from=None if error is None else float((sure + power) * error),
        p=sign_flip_p(differences),
    )


def standard_error(differences: list[list[float]]) -> tuple[float | None, float]:
    """(SE, df); (None, 1) where it cannot be told."""
    if min(map(len, differences)) < 2:
        return None, 1.0
    n = np.array([len(values) for values in differences])
    v = np.array([np.var(values, ddof=1) for values in differences]) / n / len(n) ** 2
    if v.sum() < 1e-20:
        return None, 1.0
    return sqrt(v.sum()), float(v.sum() ** 2 / (v**2 / (n - 1)).sum())


def sign_flip_p(differences: list[list[float]]) -> float:
    """The two-sided permutation test: how often a mean this far from 0 comes about where each
    query's two rankings are exchanged at random. With few queries every exchange is tried."""
    parts = np.concatenate([np.array(values) / len(values) for values in differences])
    if len(parts) < 2:
        return 1.0  # exchanged or not, one query is as far from 0
    tested = permutation_test(
        (parts,),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=min(MOST, max(LEAST, DRAWS // len(parts))),
        batch=max(1, 2_000_000 // len(parts)),
        rng=0,
    )
    return float(tested.pvalue)


def holm(ps: list[float]) -> list[float]:
    """Each p as it is among so many tests (Holm): under 0.05 in one of twenty reports at most is
    any of them by chance alone."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def queries_for(difference: float, found: Paired) -> int:
    """About how many queries it takes to find a true difference 4 times out of 5, where they
    differ as these do."""
    return int(np.ceil(found.queries * (found.found_from / difference) ** 2))


# ----------------------------------------------------------------------------- as it is written


def interval(mean: float, noise: float | None) -> str:
    return "-" if noise is None else f"{mean - noise:+.2f} to {mean + noise:+.2f}"


def probability(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}"
