"""Queries that are the same as others, or nearly: what is measured must not be trained on.

Two queries are nearly the same where they have most runs of three letters in common (by default
70% of all that either has) and the same numbers; case, accents and punctuation do not count.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

ALIKE = 0.7  # no two of the 96 judged queries of TREC DL 2019 and 2021 share more than 40%


def normalized(query: str) -> str:
    letters = unicodedata.normalize("NFKD", query).casefold()
    return " ".join(re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c))))


def runs_of_three(text: str) -> set[str]:
    padded = f"  {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def nearly_same(
    queries: Iterable[str], others: Iterable[str], alike: float = ALIKE
) -> list[tuple[str, str]]:
    """The pairs of a query and another that it is nearly the same as, each query once."""
    others = list(others)
    parts = [runs_of_three(normalized(other)) for other in others]
    holders: dict[str, list[int]] = defaultdict(list)  # run of three letters -> others
    for i, runs in enumerate(parts):
        for run in runs:
            holders[run].append(i)
    pairs = []
    for query in queries:
        runs = runs_of_three(normalized(query))
        shared = Counter(i for run in runs for i in holders.get(run, ()))
        for i, common in shared.most_common():
            is_alike = common >= alike * (len(runs) + len(parts[i]) - common)
            if is_alike and numbers(query) == numbers(others[i]):
                pairs.append((query, others[i]))
                break
    return pairs


def numbers(query: str) -> set[str]:
    return set(re.findall(r"\d+", query))
