"""What a ranking is worth: nDCG, and the reward REARANK trains on.

    reward = 0.8 * r_rank + 0.1 * r_format1 + 0.1 * r_format2          (REARANK, section 3.3)

    r_rank    = (nDCG@10(answer) - nDCG@10(given)) / (nDCG@10(best) - nDCG@10(given))
    r_format1 = 1 where the think and the answer tags are both there
    r_format2 = 1 where the text inside the answer tags is a list like [3] > [1] > [2]

"given" is the order in which the model saw the passages, "answer" the order it answered with,
"best" the passages sorted by their grades. To train on another reward, change this file alone.
"""

from collections.abc import Sequence
from math import log2

from window import Parsed

WEIGHTS = (0.8, 0.1, 0.1)  # of r_rank, r_format1 and r_format2


def dcg_at_k(gains: Sequence[float], k: int = 10) -> float:
    """DCG@k = sum over ranks i = 1..k of gain_i / log2(i + 1), as trec_eval computes it:
    the gain is the grade itself, and a grade below 0 counts as 0."""
    return sum(max(gain, 0) / log2(rank + 1) for rank, gain in enumerate(gains[:k], start=1))


def ndcg_at_k(gains: Sequence[float], k: int = 10, ideal: Sequence[float] | None = None) -> float:
    """nDCG@k = DCG@k / ideal DCG@k, between 0 and 1; 0.0 where nothing is relevant.

    gains: the grade of the passage at each rank, best rank first.
    ideal: every grade the query has, in any order; without it the gains' own, so that the best
        order of these very passages scores 1.
    """
    best = dcg_at_k(sorted(gains if ideal is None else ideal, reverse=True), k)
    return dcg_at_k(gains, k) / best if best > 0 else 0.0


def rank_reward(given: float, answer: float, best: float, variant: str = "relative") -> float:
    """r_rank from three nDCG values of one window: as given, as answered, at best.

    "relative" is REARANK's; "absolute" (the answer's nDCG) and "difference" (answer - given) are
    its ablations. Where the paper leaves "relative" undefined:
    - the given order is already the best (0/0): 1 for keeping it, since nothing more could be
      had; for an answer that loses some, minus the share that is lost;
    - an answer worse than the given order is floored at -1: a window that could gain only a
      little would otherwise punish without bound and drown the rest of its group.
    """
    if variant == "absolute":
        return answer
    if variant == "difference":
        return answer - given
    if variant != "relative":
        raise ValueError(f"unknown r_rank {variant!r}: use relative, absolute or difference")
    # Equal orders can differ in the last bit of their sums, so "nothing to gain" has a width.
    if best - given > 1e-9:
        return max(-1.0, (answer - given) / (best - given))
    if best - answer <= 1e-9:
        return 1.0
    return (answer - best) / best


def listwise_reward(
    parsed: Parsed,
    grades: Sequence[int],
    judged: Sequence[int] | None = None,
    weights: Sequence[float] = WEIGHTS,
    variant: str = "relative",
) -> float:
    """The reward of one response to one window, at most sum(weights).

    parsed: the response as `window.parse_ranking` reads it.
    grades: the grade of each passage, in the order given to the model.
    judged: every grade the query has, for the ideal DCG; without it the window's own. It
        cancels in the relative r_rank, and scales the two others.

    A partial answer is worth what the ranker would make of it: the passages it leaves out
    follow in given order. A malformed response ranks nothing and earns no r_rank, not even
    where the given order is the best: silence must not pay.
    """
    r_rank = 0.0
    if not parsed.malformed:
        given = ndcg_at_k(grades, ideal=judged)
        answer = ndcg_at_k([grades[i] for i in parsed.order], ideal=judged)
        best = ndcg_at_k(sorted(grades, reverse=True), ideal=judged)
        r_rank = rank_reward(given, answer, best, variant)
    return weights[0] * r_rank + weights[1] * parsed.tags + weights[2] * parsed.listed
