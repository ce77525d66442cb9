"""The training windows: which passages of which query a policy learns on (REARANK, section 3.1).

    python data.py                                     # REARANK's: dl21, dl22, dl23
    python data.py --candidates FILE --qrels FILE      # of other queries, the same way

writes the judged queries' candidates, their judgments and a manifest into --output_dir, and says
how many windows each filter leaves; `grpo.py` draws the same windows from these files.
"""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.flags import parse_settings, program
from engine.streams import make_unbreakable
from reward import ndcg_at_k
from settings import DataSettings, RunSettings, SourceSettings, UserError
from sources.formats import Candidates, Passage, read_candidates, read_triples
from sources.load import load_each, refuse_files_of_many
from sources.lucene import NotDownloaded
from sources.naming import folder_name
from sources.overlap import nearly_same
from sources.registry import DATASETS, expand
from sources.testsets import pyserini_topics
from sources.trec import Qrels, read_qrels, read_topics
from sources.write import sources_of, write_set


@dataclass(frozen=True)
class TrainingWindow:
    """n passages of one query, in the order the model is shown them."""

    qid: str
    query: str
    passages: tuple[Passage, ...]
    grades: tuple[int, ...]  # of each passage; 0 where it was not judged
    judged: tuple[int, ...]  # every positive grade the query has, falling: the ideal DCG's


def training_set(
    candidates: list[Candidates],
    qrels: Qrels,
    window_size: int = 20,
    draws: int = 50,
    min_ndcg: float = 0.1,
    ndcg_filter: str = "initial",
    seed: int = 0,
) -> list[TrainingWindow]:
    """Windows to train on: per judged query, `draws` random sets of `window_size` candidates.

    The order in which a set is drawn is the order it is given in, so windows are shuffled, not in
    BM25 order; a query with fewer candidates than `window_size` gives all, shuffled each time.
    Sets without a relevant passage are dropped, and those whose nDCG@10 is under `min_ndcg`:
    of the given order for ndcg_filter "initial" (the paper's text), of the best reachable order
    for "best" (its ablation). The ideal is over all the query's judgments: over the set alone
    the best order would always score 1.
    """
    if ndcg_filter not in ("initial", "best"):
        raise ValueError(f"unknown ndcg_filter {ndcg_filter!r}: use initial or best")
    windows = []
    for query, grade_of, judged, rng in judged_queries(candidates, qrels, seed):
        for _ in range(draws):
            passages = tuple(rng.sample(query.passages, min(window_size, len(query.passages))))
            grades = tuple(grade_of.get(p.docid, 0) for p in passages)
            tested = grades if ndcg_filter == "initial" else sorted(grades, reverse=True)
            if max(grades, default=0) > 0 and ndcg_at_k(tested, 10, judged) >= min_ndcg:
                windows.append(TrainingWindow(query.qid, query.query, passages, grades, judged))
    return windows


def choice_training_set(
    candidates: list[Candidates],
    qrels: Qrels,
    window_size: int = 20,
    draws: int = 50,
    seed: int = 0,
) -> list[TrainingWindow]:
    """Windows to learn choosing on: per judged query, `draws` times, one of its best-graded
    candidates among `window_size` - 1 that are not relevant, all shuffled (Rank-R1, section 3).

    A query with fewer such negatives gives all of them; one without a relevant candidate, or
    without a negative, gives nothing.
    """
    windows = []
    for query, grade_of, judged, rng in judged_queries(candidates, qrels, seed):
        grade = {p: grade_of.get(p.docid, 0) for p in query.passages}
        best = max(grade.values(), default=0)
        positives = [p for p in query.passages if grade[p] == best > 0]
        negatives = [p for p in query.passages if grade[p] <= 0]
        if not (positives and negatives):
            continue
        for _ in range(draws):
            passages = rng.sample(negatives, min(window_size - 1, len(negatives)))
            passages.insert(rng.randint(0, len(passages)), rng.choice(positives))
            grades = tuple(grade[p] for p in passages)
            windows.append(TrainingWindow(query.qid, query.query, tuple(passages), grades, judged))
    return windows


def judged_queries(
    candidates: list[Candidates], qrels: Qrels, seed: int
) -> Iterator[tuple[Candidates, dict[str, int], tuple[int, ...], random.Random]]:
    """(query, its grades by docid, its positive grades, its random numbers). What is drawn for a
    query depends on `seed` and its qid alone, not on the other queries."""
    for query in candidates:
        grade_of = qrels.get(query.qid, {})
        judged = tuple(sorted((g for g in grade_of.values() if g > 0), reverse=True))
        yield query, grade_of, judged, random.Random(f"{seed} {query.qid}")


def read_training_queries(settings: RunSettings) -> tuple[list[Candidates], Qrels]:
    """The queries to train on, from the files that the settings name. UserError without any."""
    if settings.triples:
        return read_triples(settings.triples)
    if settings.candidates and settings.qrels:
        return read_candidates(settings.candidates), read_qrels(settings.qrels)
    raise UserError("training needs --candidates and --qrels, or --triples (or try --preset toy)")


def batch_at(step: int, size: int, n: int, seed: int) -> list[int]:
    """The indices of a step's batch: one random order of all n after the other, cut in pieces."""

    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(n)

    places = range(step * size, (step + 1) * size)
    orders = {place // n: order(place // n) for place in places}
    return [int(orders[place // n][place % n]) for place in places]


# ------------------------------------------------------------------------ the training set as files

TRAINED_ON, MEASURED_ON = ("dl21", "dl22", "dl23"), ("dl19", "dl20")  # by REARANK
# 211 is how many judged queries these have; 179 and 12k stand in the paper, though 179 queries have
# no more than 8,950 windows of 50 draws.
PAPER = {"judged": "211", "drawn": "10,550", "windows left": "12k", "queries left": "179"}


def build_training_set(
    names: Sequence[str], sources: SourceSettings, settings: DataSettings
) -> tuple[Path, Path]:
    """Write the training set of the named datasets, or of what the flags give; (candidates,
    qrels). UserError where it holds queries that are measured on, unless that is allowed."""
    refuse_files_of_many(list(names), sources)
    candidates, qrels = judged_candidates(names, sources)
    held_out = evaluation_queries(settings.evaluation)
    refuse_overlap((query.query for query in candidates), held_out, settings.allow_overlap)
    print_counts(candidates, qrels, settings)
    folder, made_from = training_folder(names, sources, settings), sources_of(names, sources)
    paths = write_set(folder, candidates, qrels, made_from, {"training set": asdict(settings)})
    print("written " + ", ".join(map(str, paths)))
    return paths[0], paths[1]


def training_folder(names: Sequence[str], sources: SourceSettings, settings: DataSettings) -> Path:
    """Where a training set is written."""
    return Path(settings.output_dir or f"runs/training-set-{folder_name(names, sources)}")


def judged_candidates(
    names: Sequence[str], sources: SourceSettings
) -> tuple[list[Candidates], Qrels]:
    """The judged queries of all the datasets together. UserError where two share a qid."""
    candidates: dict[str, Candidates] = {}
    qrels: Qrels = {}
    for judged in load_each(names, sources):
        found = [query for query in judged.candidates if query.qid in judged.qrels]
        if not found:
            raise UserError("no query has both candidates and judgments (--qrels FILE)")
        if twice := [query.qid for query in found if query.qid in candidates]:
            raise UserError(f"{judged.name}: qid {twice[0]} is another dataset's, too")
        candidates |= {query.qid: query for query in found}
        qrels |= {query.qid: judged.qrels[query.qid] for query in found}
    return list(candidates.values()), qrels


def print_counts(candidates: list[Candidates], qrels: Qrels, settings: DataSettings) -> None:
    """How much each filter leaves, beside what the paper says of its own."""

    def windows(min_ndcg: float) -> list[TrainingWindow]:
        drawn = (settings.window_size, settings.draws)
        return training_set(
            candidates, qrels, *drawn, min_ndcg, settings.ndcg_filter, settings.seed
        )

    left = windows(settings.min_ndcg)
    of = "the order given" if settings.ndcg_filter == "initial" else "the best order"
    rows = [
        ("judged queries", len(candidates), PAPER["judged"]),
        ("windows drawn", len(candidates) * settings.draws, PAPER["drawn"]),
        ("  with a relevant passage", len(windows(0.0)), "not said"),
        (f"  and nDCG@10 >= {settings.min_ndcg} of {of}", len(left), PAPER["windows left"]),
        ("queries left", len({window.qid for window in left}), PAPER["queries left"]),
    ]
    print(f"{'':44}    here  REARANK")
    for name, here, paper in rows:
        print(f"{name:44}{here:8,}{paper:>9}")


# ----------------------------------------------------------------- what must not be trained on


def evaluation_queries(files: Sequence[str]) -> dict[str, list[str]]:
    """The queries of the files and of the datasets that REARANK is measured on, by what they are
    of; says which of those are not here."""
    queries = {str(file): read_queries(file) for file in files}
    for name in MEASURED_ON:
        try:
            queries[name] = list(pyserini_topics(DATASETS[name].topics).values())
        except (NotDownloaded, UserError) as error:
            print(
                f"not compared with the queries of {name}, which are not here ({error}); "
                "--evaluation FILE compares with a file's",
                file=sys.stderr,
            )
    return queries


def read_queries(file: str) -> list[str]:
    """The queries of a topics or a candidates file."""
    try:
        return list(read_topics(file).values())
    except UserError:
        return [query.query for query in read_candidates(file)]


def refuse_overlap(
    training: Iterable[str], evaluation: Mapping[str, Sequence[str]], allowed: bool
) -> None:
    """UserError where training queries are the same as evaluation queries, or nearly; where that
    is allowed, it is only said."""
    training = dict.fromkeys(training)
    found = [(of, pair) for of, qs in evaluation.items() for pair in nearly_same(training, qs)]
    if not found:
        return
    some = "".join(f"\n  {query!r:.60} is {of}'s {other!r:.60}" for of, (query, other) in found[:5])
    queries = len({query for _, (query, _) in found})
    message = f"{queries} training queries are those of the evaluation, or nearly:{some}"
    if not allowed:
        raise UserError(f"{message}\nleave them out, or give --allow_overlap true")
    print(message, file=sys.stderr)


@program
def main() -> None:
    make_unbreakable()
    meaning = f"names of datasets or groups; default, without files: {' '.join(TRAINED_ON)}"
    sources, settings, inputs = parse_settings(
        *(__doc__, SourceSettings, DataSettings),
        others={"datasets": {"nargs": "*", "help": meaning}},
    )
    files = [value for name, value in asdict(sources).items() if name != "top_k" and value]
    build_training_set(expand(inputs.datasets or ([] if files else TRAINED_ON)), sources, settings)


if __name__ == "__main__":
    main()
