"""Rank-R1's task (arXiv 2503.06034): reason about up to 20 passages and name the one best. A sort
turns such choices into the top 10.

    reward = 1 if the tags are right and the answer is the label of a best passage, else 0

The sorts (Zhuang et al. 2024, "A Setwise Approach ...", arXiv 2310.09497) compare a parent with its
`children` in one question. They are rankers as `window.slide` is one: they yield the windows they
need answered next, all that are independent in one batch, and are sent the answers. The first
passage of a window, which the first stage ranked best, is kept where no answer can be read.
"""

import re
from collections.abc import Sequence

from settings import UserError
from window import LABEL, Parsed, Ranker, read_answer, split_response, well_tagged

CHOICE = re.compile(r"\s*\[[0-9]+\]\s*")

# -------------------------------------------------------------------------------- the response


def parse_choice(response: str, n: int, reasoning: bool = True) -> Parsed:
    """Read the one label out of a response. Never raises; linear in its length.

    The order is the chosen passage, then the others as given. An answer that names no passage in
    range, or more than one, is malformed and keeps the given order; reasoning never chooses.

    For n = 3, with reasoning:
        <think>..</think> <answer>[3]</answer>         -> 3 1 2
        <think>..</think> <answer>It is [3]</answer>   -> 3 1 2, not listed
        <think>..</think> <answer>[3] or [1]</answer>  -> 1 2 3, malformed: two labels
        <think>..</think> <answer>[4]</answer>         -> 1 2 3, malformed: out of range
        <think> It is [3]                              -> 1 2 3, malformed: cut off
    """
    thought, reply = split_response(response)
    answer, closed = read_answer(reply, reasoning)
    named = {int(label) - 1 for label in LABEL.findall(answer)}
    chosen = [i for i in named if len(named) == 1 and 0 <= i < n]
    return Parsed(
        order=chosen + [i for i in range(n) if i not in chosen],
        tags=well_tagged(response),
        listed=closed and bool(CHOICE.fullmatch(answer)),
        malformed=not chosen,
        reasoning=thought,
    )


def write_choice(order: Sequence[int]) -> str:
    """The answer that chooses the first of an order."""
    return f"[{order[0] + 1}]"


# ---------------------------------------------------------------------------------- the reward


def exact_reward(parsed: Parsed, grades: Sequence[int], *_) -> float:
    """Rank-R1's reward: 1 for the bare label of a best-graded passage in the right tags, else 0.

    Where several passages share the best grade any of them is right: the judgments prefer none.
    Where no passage is relevant none is right: naming just any must not pay.
    """
    right = parsed.tags and parsed.listed and not parsed.malformed
    return float(right and grades[parsed.order[0]] == max(grades) > 0)


def graded_reward(parsed: Parsed, grades: Sequence[int], *_) -> float:
    """The gain of the chosen passage over the best gain, in the right tags; else 0.

    A second-best choice now earns something, so that groups differ (and teach) even where no
    response finds the best; but a policy that settles for good instead of best loses less.
    """
    if not (parsed.tags and parsed.listed) or parsed.malformed or max(grades) <= 0:
        return 0.0
    return max(grades[parsed.order[0]], 0) / max(grades)


# ----------------------------------------------------------------------------------- the sorts


def check_children(children: int) -> None:
    """UserError where a window would hold the parent alone, so that no choice could be made."""
    if children < 1:
        raise UserError(
            f"a window of {children + 1} offers no choice: window_size must be at least 2"
        )


def heapsort(n: int, k: int = 10, children: int = 19) -> Ranker:
    """The top k of n by a heap with `children` children per parent; the rest in given order.

    Building the heap asks level by level from the bottom, a level's parents in one batch. Taking
    the top asks along the path that the last passage sinks. A window shows its passages in given
    order, whichever is the parent: an answer that cannot be read keeps the best-ranked of them, and
    without any readable answer the given order stays. UserError for `children` under 1.
    """
    check_children(children)
    heap = list(range(n))
    # The places of each level of the heap that have children, from the top level down.
    levels, first = [], 0
    while first * children + 1 < n:
        last = min(first * children, (n - 2) // children)
        levels.append(list(range(first, last + 1)))
        first = first * children + 1
    for parents in reversed(levels):
        yield from sift_down(heap, n, parents, children)
    top = []
    for size in range(n, max(n - k, 0), -1):
        if top:
            heap[0] = heap[size]  # the last passage takes the place of the one just taken
            yield from sift_down(heap, size, [0], children)
        top.append(heap[0])
    return top + sorted(set(range(n)) - set(top))


def sift_down(heap: list[int], size: int, parents: list[int], children: int):
    """Let each of `parents` (all of one level) sink in the heap's first `size` places until it is
    the best of its own. Their subtrees share nothing, so each round is one batch of windows."""
    while parents := [place for place in parents if place * children + 1 < size]:
        families = [
            [place, *range(place * children + 1, min(place * children + children + 1, size))]
            for place in parents
        ]
        for family in families:
            family.sort(key=heap.__getitem__)
        answers = yield [[heap[place] for place in family] for family in families]
        sinking = []
        for parent, family, answer in zip(parents, families, answers):
            best = family[answer[0]]
            if best != parent:
                heap[parent], heap[best] = heap[best], heap[parent]
                sinking.append(best)
        parents = sinking


def bubblesort(n: int, k: int = 10, children: int = 19) -> Ranker:
    """The top k of n by k passes from the bottom up, each carrying the best so far to the top.

    A window's first passage is the lowest-numbered place of the pass; its best moves there.
    Stable: where the answers prefer, of equally good passages, the one shown first, so does the
    top k; and where no answer can be read, nothing moves. UserError for `children` under 1.
    """
    check_children(children)
    order = list(range(n))
    for rank in range(min(k, n)):
        end = n
        while end - rank > 1:
            start = max(rank, end - children - 1)
            (answer,) = yield [order[start:end]]
            order.insert(start, order.pop(start + answer[0]))
            end = start + 1
    return order[:k] + sorted(order[k:])


SORTS = {"heapsort": heapsort, "bubblesort": bubblesort}
