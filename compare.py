"""Set evaluations beside each other and beside the papers, and tell what difference is noise.

    python compare.py runs/dl19-mine-*                    # an evaluation, against its first stage
    python compare.py runs/paper-mine runs/paper-other    # folders that hold several are fine
    python compare.py runs/mine/before runs/mine/after    # what a training changed

prints tables of nDCG@10 and writes them to comparison.md and comparison.html (docs/report.md).
"""

from argparse import ArgumentParser
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

from engine.files import damage_named, write_whole
from engine.flags import program
from engine.streams import make_unbreakable
from pages.comparison import comparison_page
from pages.document import Block, Heading, Paragraph, Table, as_markdown, as_text
from results.paired import Paired, holm, interval, paired, probability, queries_for
from results.papers import AVERAGED, SOURCES, TWO_TRAININGS, reported
from results.systems import Evaluated, System, find_evaluations, gather, read_evaluated
from sources.registry import BEIR, BRIGHT, DL
from terminal import plain

SUITES = {"TREC DL": ("dl", DL), "BEIR": ("beir", BEIR), "BRIGHT": ("bright", BRIGHT)}
SAME_BM25 = 0.1  # points: BRIGHT's figures have one digit


@dataclass(frozen=True)
class Comparison:
    """What one system gains over its first stage or over another system, by dataset and qid."""

    title: str
    gains: dict[str, dict[str, float]]


# -------------------------------------------------------------------------------- the suites


def suites_of(systems: list[System]) -> dict[str, list[str]]:
    """The datasets that any system has, by the suite that they belong to."""
    datasets = dict.fromkeys(name for system in systems for name in system.evaluated)
    suites = {
        title: [name for name in members if name in datasets]
        for title, (_, members) in SUITES.items()
    }
    known = {name for members in suites.values() for name in members}
    suites["Own data"] = [name for name in datasets if name not in known]
    return {title: members for title, members in suites.items() if members}


def short(dataset: str) -> str:
    return dataset.removeprefix("bright-").removeprefix("cqadupstack-")


def suite_table(title: str, datasets: list[str], systems: list[System]) -> Table:
    """nDCG@10 of each dataset and the average; an average only of systems that have them all."""
    key = SUITES[title][0] if title in SUITES else ""
    whole = AVERAGED.get(key) == datasets
    rows = [
        [name, *(figures.get(d, "-") for d in datasets), figures.get(key, "-") if whole else "-"]
        for name, figures in reported().items()
        if any(d in figures for d in datasets) or (whole and key in figures)
    ]
    first = first_of_each(systems)
    means = [fmean(first[d].before.values()) for d in datasets]
    rows.append(["first stage", *with_average(means)])
    for system in systems:
        of = system.evaluated
        means = [fmean(of[d].after.values()) if d in of else None for d in datasets]
        rows.append([system.title(), *with_average(means)])
    head = ["", *map(short, datasets), "average"]
    columns = len(head) - (len(datasets) == 1)  # of one there is no average
    return Table(head[:columns], [row[:columns] for row in rows])


def with_average(means: list[float | None]) -> list[str]:
    average = None if None in means else fmean(means)
    return ["-" if mean is None else f"{mean:.2f}" for mean in (*means, average)]


# --------------------------------------------------------------------------- the differences


def comparisons(systems: list[System]) -> list[Comparison]:
    """Each system against its first stage (but that itself), then against those before it."""
    found = [
        Comparison(
            f"{s.title()} - first stage",
            {d: subtract(e.after, e.before) for d, e in s.evaluated.items()},
        )
        for s in systems
        if not s.is_first_stage()
    ]
    for a, b in combinations(systems, 2):
        both = {
            d: subtract(e.after, a.evaluated[d].after)
            for d, e in b.evaluated.items()
            if d in a.evaluated
        }
        found += [Comparison(f"{b.title()} - {a.title()}", both)] if both else []
    return found


def subtract(values: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    return {qid: value - others[qid] for qid, value in values.items()}


def lines_of(comparison: Comparison, suites: dict[str, list[str]]) -> dict[str, Paired]:
    """What is tested: each dataset, and the mean of each suite that has several."""
    lines = {}
    for title, datasets in suites.items():
        gains = {d: [*comparison.gains[d].values()] for d in datasets if d in comparison.gains}
        lines |= {short(d): paired([values]) for d, values in gains.items()}
        if len(gains) > 1:
            lines[f"{title}, mean of {len(gains)}"] = paired([*gains.values()])
    return lines


def differences_table(lines: dict[str, Paired], adjusted: list[float]) -> Table:
    head = ["", "queries", "difference", "95% interval", "p", "p, Holm"]
    rows = []
    for (name, d), p in zip(lines.items(), adjusted):
        told = [f"{d.mean:+.2f}", interval(d.mean, d.noise), probability(d.p), probability(p)]
        rows.append([name, f"{d.queries}", *told])
    return Table(head, rows)


def noise_table(lines: dict[str, Paired]) -> Table:
    """What this many queries can tell."""
    head = ["", "better", "equal", "worse", "noise under", "found from", "for 1 point"]
    rows = []
    for name, d in lines.items():
        counts = [f"{n}" for n in (d.better, d.queries - d.better - d.worse, d.worse)]
        if d.noise is None:
            rows.append([name, *counts, "-", "-", "-"])
        else:
            told = [f"{d.noise:.2f}", f"{d.found_from:.2f}", f"{queries_for(1, d):,}"]
            rows.append([name, *counts, *told])
    return Table(head, rows)


def extremes(gains: dict[str, float], queries: dict[str, str], most: int = 3) -> str:
    """The queries that lost and gained most, in words."""
    order = sorted(gains, key=gains.__getitem__)
    lost = [qid for qid in order[:most] if gains[qid] < 0]
    gained = [qid for qid in reversed(order[-most:]) if gains[qid] > 0]

    def told(qids: list[str]) -> str:
        texts = (f"{plain(qid)} {gains[qid]:+.1f} ({cut(queries.get(qid, ''))})" for qid in qids)
        return ", ".join(texts).replace(" ()", "") or "none"

    return f"lost most: {told(lost)}; gained most: {told(gained)}."


def cut(text: str, length: int = 40) -> str:
    text = plain(text)  # a stranger's, in a terminal
    return text if len(text) <= length else text[: length - 3] + "..."


# ------------------------------------------------------------------------------------ the report


def report(
    systems: list[System], compared: list[Comparison], texts: dict[str, dict[str, str]]
) -> list[Block]:
    """All that is said, for each of the three forms."""
    suites = suites_of(systems)
    blocks: list[Block] = [Heading("What was ranked"), health_table(systems)]
    notes = other_first_stages(systems) + other_than_the_papers(systems)
    blocks += [Paragraph(note) for note in notes]
    for title, datasets in suites.items():
        blocks += [Heading(f"{title}: nDCG@10 in points"), suite_table(title, datasets, systems)]
    blocks.append(Paragraph("; ".join(f"[{n}] {source}" for n, source in SOURCES.items()) + "."))
    tested = [lines_of(comparison, suites) for comparison in compared]
    adjusted = iter(holm([line.p for lines in tested for line in lines.values()]))
    blocks.append(Paragraph(how_to_read(sum(map(len, tested)))))
    for comparison, lines in zip(compared, tested):
        blocks.append(Heading(comparison.title))
        blocks.append(differences_table(lines, [next(adjusted) for _ in lines]))
        blocks.append(noise_table(lines))
        for dataset in (d for members in suites.values() for d in members):
            if gains := comparison.gains.get(dataset):
                said = extremes(gains, texts[dataset])
                blocks.append(Paragraph(f"{short(dataset)}, {said}"))
    return blocks


def health_table(systems: list[System]) -> Table:
    """How much each system was asked, and how well formed its answers are."""
    counted = ("queries", "windows", "malformed", "cut_off", "too_long")
    rows = []
    for system in systems:
        metrics = [one.metrics for one in system.evaluated.values()]
        counts = (sum(m.get(name, 0) for m in metrics) for name in counted)
        rows.append([system.title(), f"{len(metrics)}", *(f"{count:,}" for count in counts)])
    return Table(["", "datasets", *(name.replace("_", " ") for name in counted)], rows)


def other_first_stages(systems: list[System]) -> list[str]:
    """Where systems ranked other candidates of the same dataset, so that they began elsewhere."""
    notes = []
    for a, b in combinations(systems, 2):
        for dataset in (d for d in b.evaluated if d in a.evaluated):
            one, other = a.evaluated[dataset], b.evaluated[dataset]
            hashes = {e.hash_of("candidates") for e in (one, other)}
            if len(hashes) > 1 or one.before != other.before:
                means = [fmean(e.before.values()) for e in (one, other)]
                notes.append(
                    f"{dataset}: {a.label} and {b.label} ranked other candidates (first stage "
                    f"{means[0]:.2f} and {means[1]:.2f})."
                )
    return notes


def other_than_the_papers(systems: list[System]) -> list[str]:
    """Where the first stage is not the BM25 that the papers' systems began from."""
    theirs = reported()["BM25 [1]"]
    notes = []
    for dataset, one in first_of_each(systems).items():
        ours = fmean(one.before.values())
        if dataset in theirs and abs(ours - float(theirs[dataset])) > SAME_BM25:
            notes.append(
                f"{dataset}: the first stage here has {ours:.2f}, the papers' BM25 "
                f"{theirs[dataset]}, so the papers' systems ranked other candidates."
            )
    return notes


def first_of_each(systems: list[System]) -> dict[str, Evaluated]:
    """The first evaluation of each dataset."""
    return {d: one for s in reversed(systems) for d, one in s.evaluated.items()}


def how_to_read(tests: int) -> str:
    return (
        "Differences below are of nDCG@10 in points, over the same queries, with 95% intervals "
        f"(t); p is that of the paired permutation test. Tests made here: {tests}; of so many, "
        f"{0.05 * tests:.2g} would have p under 0.05 by chance alone; p, Holm is p among so many. "
        "Noise under: a smaller difference cannot be told from none with these queries. Found "
        "from: a true difference of that size is found 4 times out of 5; for 1 point: so many "
        "queries would find one of 1 point as often. The papers give means, "
        f"not queries: nothing is tested against them. {TWO_TRAININGS}"
    )


def texts_of(systems: list[System]) -> dict[str, dict[str, str]]:
    """The queries, by dataset and qid."""
    return {dataset: one.texts() for dataset, one in first_of_each(systems).items()}


def page_of(
    blocks: list[Block],
    systems: list[System],
    compared: list[Comparison],
    texts: dict[str, dict[str, str]],
) -> str:
    first = first_of_each(systems)

    def values(dataset: str, qid: str) -> list[float | None]:
        of = (s.evaluated.get(dataset) for s in systems)
        return [first[dataset].before[qid], *(one and one.after[qid] for one in of)]

    rows = [
        {
            "dataset": short(dataset),
            "qid": qid,
            "query": cut(texts[dataset].get(qid, ""), 500),
            "values": values(dataset, qid),
        }
        for dataset, one in first.items()
        for qid in one.before
    ]
    figures = {
        c.title: {short(d): [*gains.values()] for d, gains in c.gains.items()} for c in compared
    }
    return comparison_page(blocks, figures, ["first stage", *(s.title() for s in systems)], rows)


@program
def main() -> None:
    make_unbreakable()
    parser = ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of evaluate.py")
    parser.add_argument(
        "--output", default="comparison", help="where to write, without its .md and .html"
    )
    inputs = parser.parse_args()
    with damage_named(*inputs.runs):
        systems = gather([read_evaluated(folder) for folder in find_evaluations(inputs.runs)])
        compared, texts = comparisons(systems), texts_of(systems)
        blocks = report(systems, compared, texts)
        page = page_of(blocks, systems, compared, texts)
    print(as_text(blocks))
    write_whole(f"{inputs.output}.md", as_markdown(blocks))
    write_whole(f"{inputs.output}.html", page)
    print(f"written to {inputs.output}.md and {inputs.output}.html")


if __name__ == "__main__":
    main()
