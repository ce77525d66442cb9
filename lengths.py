"""Do longer responses rank better? The tokens a model writes against what is gained by them.

    python lengths.py runs/dl19-mine-... runs/scifact-mine-...

reads finished evaluations, prints a table for each, and writes lengths.json and lengths.png into
--output_dir. A query counts once: with the mean tokens of its windows, and with its nDCG@10.
"""

import json
from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.stats import pearsonr, rankdata

from engine.files import damage_named, read_lines, write_whole
from engine.flags import program
from engine.streams import make_unbreakable
from pages.document import Block, Heading, Paragraph, Table, as_text
from results.paired import interval, paired
from results.plots import lengths_figure
from results.systems import Evaluated, find_evaluations, read_evaluated
from settings import UserError

BINS = 4
NO_CAUSE = (
    "This shows no cause: a hard query may make responses longer and gains smaller. See "
    "docs/report.md."
)


def mean_lengths(one: Evaluated) -> dict[str, dict[str, float]]:
    """By qid {"tokens": the mean of its windows, "malformed": their share}."""
    windows, path = defaultdict(list), one.folder / "windows.jsonl"
    records = list(read_lines(path))
    counts = {name: sum(record[name] for record in records) for name in ("tokens", "malformed")}
    for name, count in {"windows": len(records), **counts}.items():
        if count != one.metrics[name]:
            raise UserError(f"{path}: damaged, its {name} are {count}, not {one.metrics[name]}")
    for record in records:
        if not record["too_long"]:
            windows[record["qid"]].append(record)
    return {
        qid: {name: fmean(one[name] for one in records) for name in ("tokens", "malformed")}
        for qid, records in windows.items()
    }


def rank_correlation(x: list[float], y: list[float]) -> dict[str, float | None]:
    """Spearman's, with its 95% interval by Fisher's z; None where it cannot be told."""
    nothing = {"rho": None, "low": None, "high": None}
    if len(x) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return nothing
    found = pearsonr(rankdata(x), rankdata(y))
    low, high = found.confidence_interval(0.95)
    return {"rho": float(found.statistic), "low": float(low), "high": float(high)}


def analyse(one: Evaluated) -> dict:
    """Everything about one evaluation, as it is written."""
    lengths = mean_lengths(one)
    qids = sorted((qid for qid in one.after if qid in lengths), key=lambda q: lengths[q]["tokens"])
    if not any(lengths[qid]["tokens"] for qid in qids):
        raise UserError(f"{one.folder}: no window was asked of a model")
    queries = [
        {
            "qid": qid,
            **lengths[qid],
            "ndcg@10": one.after[qid],
            "gain": one.after[qid] - one.before[qid],
        }
        for qid in qids
    ]
    parts = np.array_split(np.arange(len(queries)), min(BINS, len(queries)))
    tokens = [query["tokens"] for query in queries]
    return {
        "evaluation": str(one.folder),
        "dataset": one.dataset,
        "correlation": {
            name: rank_correlation(tokens, [query[name] for query in queries])
            for name in ("ndcg@10", "gain")
        },
        "bins": [bin_of([queries[i] for i in part]) for part in parts],
        "queries": queries,
    }


def bin_of(queries: list[dict]) -> dict:
    """What neighbours in length have in common: means, and half of the 95% interval of the gain."""
    gains = [query["gain"] for query in queries]
    return {
        "queries": len(queries),
        "from": queries[0]["tokens"],
        "to": queries[-1]["tokens"],
        **{n: fmean(q[n] for q in queries) for n in ("tokens", "malformed", "ndcg@10", "gain")},
        "noise": paired([gains]).noise,
    }


# ------------------------------------------------------------------------------- what is told


def blocks_of(found: dict) -> list[Block]:
    head = ["tokens", "queries", "malformed", "nDCG@10", "gain", "95% interval of it"]
    rows = [
        [
            f"{b['from']:.0f} to {b['to']:.0f}",
            f"{b['queries']}",
            f"{b['malformed']:.1%}",
            f"{b['ndcg@10']:.2f}",
            f"{b['gain']:+.2f}",
            interval(b["gain"], b["noise"]),
        ]
        for b in found["bins"]
    ]
    words = [f"{name} {told(c)}" for name, c in found["correlation"].items()]
    return [
        Heading(f"{found['dataset']}: {found['evaluation']}"),
        Table(head, rows),
        Paragraph(f"Rank correlation of the tokens with {', with '.join(words)}."),
    ]


def told(correlation: dict[str, float | None]) -> str:
    if correlation["rho"] is None:
        return "(cannot be told: too few queries, or all alike)"
    return "{rho:+.2f} (95% interval {low:+.2f} to {high:+.2f})".format(**correlation)


def panel_of(found: dict) -> dict:
    return {
        "tokens": [query["tokens"] for query in found["queries"]],
        "gains": [query["gain"] for query in found["queries"]],
        "bins": [(b["tokens"], b["gain"], b["noise"]) for b in found["bins"]],
    }


@program
def main() -> None:
    make_unbreakable()
    parser = ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of evaluate.py")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lengths"))
    inputs = parser.parse_args()
    with damage_named(*inputs.runs):
        every = [analyse(read_evaluated(folder)) for folder in find_evaluations(inputs.runs)]
    for found in every:
        print(as_text(blocks_of(found)))
    print(as_text([Paragraph(NO_CAUSE)]))
    inputs.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(inputs.output_dir / "lengths.json", json.dumps(every, indent=2) + "\n")
    panels = {f"{n + 1}. {found['dataset']}": panel_of(found) for n, found in enumerate(every)}
    lengths_figure(inputs.output_dir / "lengths.png", panels)
    print(f"written to {inputs.output_dir}")


if __name__ == "__main__":
    main()
