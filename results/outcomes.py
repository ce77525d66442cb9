"""What an analysis found: its variants against the first, in a table, as JSON, as a figure."""

import json
from pathlib import Path
from statistics import fmean

from engine.files import write_whole
from pages.document import Block, Heading, Paragraph, Table, as_text
from results.paired import Paired, holm, interval, paired, probability
from results.plots import variants_figure
from results.systems import Evaluated

RESULT, FIGURE = "analysis.json", "analysis.png"
Found = dict[str, list[Evaluated]]  # by variant: of each dataset, in the same order


def tell(analysis: str, found: Found, root: Path) -> None:
    """Print the table, write the JSON and the figure."""
    rows = all_rows(found)
    print("\n" + as_text(blocks_of(analysis, rows)))
    write_whole(root / RESULT, json.dumps({"analysis": analysis, "rows": rows}, indent=2) + "\n")
    variants_figure(root / FIGURE, panels_of(rows))
    print(f"written to {root}")


def all_rows(found: Found) -> list[dict]:
    """One of each variant and dataset, and where there are several of their mean; differences are
    from the first variant, over the same queries, in points."""
    reference = next(iter(found.values()))
    groups = [[i] for i in range(len(reference))]
    groups += [list(range(len(reference)))] if len(reference) > 1 else []
    rows = []
    for group in groups:
        for name, evaluated in found.items():
            ours, theirs = ([of[i] for i in group] for of in (evaluated, reference))
            rows.append({"variant": name, **row_of(ours, theirs)})
    tested = [row for row in rows if row["variant"] != next(iter(found))]
    for row, p in zip(tested, holm([row["p"] for row in tested])):
        row["p_holm"] = p
    return rows


def row_of(ours: list[Evaluated], theirs: list[Evaluated]) -> dict:
    d = differences(ours, theirs)
    windows = sum(one.metrics["windows"] for one in ours)
    counted = {
        name: sum(one.metrics[name] for one in ours) for name in ("malformed", "cut_off", "tokens")
    }
    return {
        "dataset": ours[0].dataset if len(ours) == 1 else f"mean of {len(ours)}",
        "queries": d.queries,
        "given": fmean(fmean(one.before.values()) for one in ours),
        "ndcg@10": fmean(fmean(one.after.values()) for one in ours),
        "difference": d.mean,
        "noise": d.noise,
        "p": d.p,
        "p_holm": None,
        "windows": windows,
        **counted,
    }


def differences(ours: list[Evaluated], theirs: list[Evaluated]) -> Paired:
    return paired([[a.after[qid] - b.after[qid] for qid in b.after] for a, b in zip(ours, theirs)])


def by_dataset(rows: list[dict]) -> dict[str, list[dict]]:
    datasets = dict.fromkeys(row["dataset"] for row in rows)
    return {name: [row for row in rows if row["dataset"] == name] for name in datasets}


def blocks_of(analysis: str, rows: list[dict]) -> list[Block]:
    blocks: list[Block] = []
    for dataset, (first, *others) in by_dataset(rows).items():
        head = ["", "given", "reranked", "difference", "95% interval", "p, Holm"]
        head += ["malformed", "tokens"]
        table = Table(head, [cells(first), *map(cells, others)])
        blocks += [Heading(f"{analysis}, {dataset} ({first['queries']} queries)"), table]
    tests = sum(row["p_holm"] is not None for row in rows)
    blocks.append(
        Paragraph(
            "nDCG@10 in points: of the order given, and of what was made of it. Differences are "
            f"from {rows[0]['variant']}, over the same queries; p, Holm is that of the paired "
            f"permutation test, corrected for the tests made here ({tests}). See docs/report.md."
        )
    )
    return blocks


def cells(row: dict) -> list[str]:
    windows = max(row["windows"], 1)
    shares = [f"{row['malformed'] / windows:.1%}", f"{row['tokens'] / windows:.0f}"]
    if row["p_holm"] is None:
        told = ["-", "-", "-"]
    else:
        told = [
            f"{row['difference']:+.2f}",
            interval(row["difference"], row["noise"]),
            probability(row["p_holm"]),
        ]
    return [row["variant"], f"{row['given']:.2f}", f"{row['ndcg@10']:.2f}", *told, *shares]


def panels_of(rows: list[dict]) -> dict[str, dict]:
    return {
        dataset: {
            "first_stage": of[0]["given"],
            "variants": {row["variant"]: (row["ndcg@10"], row["noise"]) for row in of},
        }
        for dataset, of in by_dataset(rows).items()
    }
