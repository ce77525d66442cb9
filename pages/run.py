"""The page of a training run, or of several over each other: curves, settings, and windows with the
responses sampled for them. A run keeps its own, `report.html`, as it goes (`keeper`)."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

import torch.distributed as dist

from engine.files import read_json, read_lines, write_whole
from engine.parallel import say
from pages.curves import Line, figure
from pages.facts import flat, plain
from pages.render import render, script_json
from settings import SftSettings, TrainSettings, UserError

LARGEST = 1_200_000  # characters of responses in a page; the curves and the rest are some 300,000
EVERY, SHARE = 30, 0.02  # a run's page is written every so many seconds, in this share of its time

# What is drawn: the heading, then each figure's name in metrics.jsonl (or among the held-out ones),
# title and meaning. A figure that is not listed here is drawn under a last heading.
CURVES = {
    "What it learns": """
reward          | Reward | mean over all responses
r_rank          | r_rank | part of the possible gain in nDCG@10
r_format1       | r_format1 | share with think and answer tags
r_format2       | r_format2 | share whose answer is a clean list
ndcg            | nDCG@10, training | of the windows, as answered
held-out/ndcg@10 | nDCG@10, held out | greedy; dashed: the first stage
held-out/window_reward | Reward, held out | greedy; windows drawn as in training
""",
    "How the policy moves": """
nll             | Negative log-likelihood | of the given answers, nats a token
entropy         | Entropy | nats a token, estimated from those sampled
kl              | KL to the reference | nats a token (k3)
clip_fraction   | Clip share | tokens whose ratio is outside 1 \N{PLUS-MINUS SIGN} eps
grad_norm       | Gradient norm | before it is clipped
length          | Response length | tokens, mean
loss            | Loss | minus the objective
mismatch        | Mismatch | of update and sampling, nats a token
mismatch_max    | Mismatch, greatest | of one token, nats
""",
    "What teaches nothing": """
equal_groups    | Equal groups | share of groups with equal rewards
thrown_away     | Thrown away | groups sampled again (--resample)
malformed       | Malformed | share of responses without a readable answer
cut_off         | Cut off | share of responses ended by the length limit
skipped_updates | Skipped updates | loss or gradient not finite
""",
    "What it costs": """
sample_seconds  | Sampling | seconds a step
update_seconds  | Update | seconds a step
tokens_per_second | Tokens per second | sampled, all processes together
""",
}
NOT_DRAWN = {"step", "well_formed", "tokens"}
FROM_ZERO = set(
    "clip_fraction equal_groups thrown_away malformed cut_off skipped_updates sample_seconds "
    "update_seconds tokens_per_second grad_norm kl".split()
)


@dataclass(frozen=True)
class TrainingRun:
    """What a run's folder tells of it."""

    name: str
    settings: dict
    figures: list[dict]  # one a step
    held_out: list[dict]  # {"step", "first_stage", "ndcg@10", "window_reward"}; step: of training
    groups: list[dict]  # windows with responses, to read
    facts: dict  # what made it: {"inputs", "starts": [{"git", "versions", ...}]}


def read_run(folder: Path) -> TrainingRun:
    """UserError where the folder holds no training run, or a damaged one."""
    settings = read_json(folder / "settings.json", missing={})
    if not settings:
        raise UserError(f"{folder}: no training run (it has no settings.json)")
    facts = read_json(folder / "provenance.json", missing={})
    held_out = {}
    before, after = (
        read_json(folder / name / "held_out.json", missing={}) for name in ("before", "after")
    )
    for figures in (
        before | {"step": 0},
        *read_lines(folder / "held_out.jsonl"),
        after | {"step": settings.get("steps", 0)},
    ):
        if len(figures) > 1:
            held_out[figures["step"]] = figures
    return TrainingRun(
        name=folder.resolve().name,
        settings=settings,
        figures=list(read_lines(folder / "metrics.jsonl")),
        held_out=[held_out[step] for step in sorted(held_out)],
        groups=list(read_lines(folder / "responses.jsonl")),
        facts=facts,
    )


# --------------------------------------------------------------------------------- the curves


def line_of(run: TrainingRun, place: int, name: str) -> Line | None:
    """One figure of a run, None where it has none. Values that are no finite number are left out,
    and so is an r_rank that is the reward itself."""
    held_out, _, key = name.rpartition("/")
    rows = run.held_out if held_out else run.figures
    points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    if not points or (key == "r_rank" and all(row.get(key) == row["reward"] for row in rows)):
        return None
    steps, values = zip(*points)
    level = rows[0].get("first_stage") if key == "ndcg@10" else None
    return Line(steps, values, place, sparse=bool(held_out), level=level)


def is_number(value: object) -> bool:
    return type(value) in (int, float) and isfinite(value)


def drawn(runs: list[TrainingRun], name: str, title: str, meaning: str) -> dict | None:
    """{"title", "meaning", "values": each run's last (None where it has none), "svg": None where
    all values are the same}; None where no run has measured it."""
    lines = [line_of(run, place, name) for place, run in enumerate(runs)]
    if not (measured := [line for line in lines if line]):
        return None
    steps = max(len(line.steps) for line in measured)
    same = len({value for line in measured for value in line.values}) == 1
    return {
        "title": title,
        "meaning": meaning,
        "values": [line.values[-1] if line else None for line in lines],
        "svg": None if same and steps > 1 else figure(measured, name in FROM_ZERO),
    }


def curves(runs: list[TrainingRun]) -> list[dict]:
    """The headings, each with its figures as `drawn`; what no run has measured is left out."""
    listed = {
        heading: [[part.strip() for part in line.split("|")] for line in text.strip().split("\n")]
        for heading, text in CURVES.items()
    }
    known = {name for rows in listed.values() for name, *_ in rows} | NOT_DRAWN
    others = dict.fromkeys(k for run in runs for row in run.figures for k in row if k not in known)
    listed["Further figures"] = [[name, name.replace("_", " "), ""] for name in others]
    headings = []
    for heading, rows in listed.items():
        if figures := [found for row in rows if (found := drawn(runs, *row))]:
            headings.append({"title": heading, "figures": figures})
    return headings


# ------------------------------------------------------------------------------- the settings


def settings_table(runs: list[TrainingRun]) -> list[dict]:
    """A row a setting: {"name", "values": one a run, "default", "changed": any from the default,
    "differs": between the runs}; those that differ first, then the changed ones."""
    sft = all("responses" in run.settings for run in runs)
    defaults = asdict(SftSettings() if sft else TrainSettings())
    held = {name: "" for run in runs for name in run.settings if name != "output_dir"}
    rows = []
    for name in (name for name in defaults | held if name in held):
        values = [run.settings.get(name, defaults.get(name, "")) for run in runs]
        rows.append(
            {
                "name": name,
                "values": [plain(value) for value in values],
                "default": plain(defaults.get(name, "")),
                "changed": name in defaults and any(v != defaults[name] for v in values),
                "differs": any(value != values[0] for value in values),
            }
        )
    return sorted(rows, key=lambda row: (not row["differs"], not row["changed"]))


# ------------------------------------------------------------------------------ the responses


def chosen_groups(runs: list[TrainingRun], largest: int = LARGEST) -> list[dict]:
    """Groups to read of all runs, in order, as many as `largest` characters of JSON hold: of steps
    spread over the whole training, the last among them."""
    chosen = []
    for place, run in enumerate(runs):
        by_step: dict[int, list[dict]] = {}
        for group in run.groups:
            by_step.setdefault(group["step"], []).append({"run": place} | group)
        steps, room = sorted(by_step), largest / len(runs)
        for index in spread_order(len(steps)):
            for group in by_step[steps[-1 - index]]:
                room -= (size := len(script_json(group)))
                if room < 0:
                    room += size
                else:
                    chosen.append(group)
    return sorted(chosen, key=lambda group: (group["run"], group["step"]))


def spread_order(n: int) -> list[int]:
    """0 to n - 1 so that the first few are spread over all: by their bits, read backwards."""
    bits = max(n - 1, 1).bit_length()
    return sorted(range(n), key=lambda i: f"{i:0{bits}b}"[::-1])


# ----------------------------------------------------------------------------------- the page


def run_page(runs: list[TrainingRun]) -> str:
    """The page of one run, or of several (at most RUNS) over each other."""
    groups = chosen_groups(runs)
    logged = {(place, g["step"]) for place, run in enumerate(runs) for g in run.groups}
    shown = {(group["run"], group["step"]) for group in groups}
    names = [run.name for run in runs]
    return render(
        "run",
        {"runs": names, "groups": groups},
        title=" \N{MULTIPLICATION SIGN} ".join(names),
        runs=runs,
        headings=curves(runs),
        settings=settings_table(runs),
        facts=[dict(flat(run.facts)) for run in runs],
        left_out=len(logged) - len(shown),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def keeper(folder: Path) -> Callable[..., None]:
    """A function that keeps the folder's report.html, to be called after every step: it writes at
    most every EVERY seconds and in SHARE of the time, with now=True at once. No error comes out of
    it: the first is said, and the training goes on."""
    due, failed = 0.0, False

    def keep(now: bool = False) -> None:
        nonlocal due, failed
        started = time.monotonic()
        if dist.get_rank() > 0 or (started < due and not now):
            return
        try:
            write_whole(folder / "report.html", run_page([read_run(folder)]))
        except Exception as error:
            if not failed:
                what = f"{type(error).__name__}: {error}"
                say(f"\n{folder}/report.html is not written ({what})", file=sys.stderr)
            failed = True
        ended = time.monotonic()
        due = ended + max(EVERY, (ended - started) / SHARE)

    return keep
