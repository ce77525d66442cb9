"""Finished evaluations, read back: which system ranked which datasets, and each query's nDCG@10.

Evaluations belong to one system where all that decides their answers is the same but the dataset:
settings, prompt and model, the last two by their hashes.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase

from engine.files import read_json, read_lines
from results.answers import METRICS, UNFINISHED
from results.record import CHANGE_NO_ANSWER
from settings import SourceSettings, UserError

MEASURE = "ndcg@10"
OF_THE_DATASET = ("candidates", "qrels")  # hashes
TOLD_BY_HASHES = ("model", "prompt")  # settings, which are paths


@dataclass(frozen=True)
class Evaluated:
    """One dataset, ranked by one system: nDCG@10 in points, by qid."""

    folder: Path
    dataset: str
    system: str  # all that decides the answers but the dataset, as one text
    metrics: dict
    before: dict[str, float]
    after: dict[str, float]

    def hash_of(self, name: str) -> str | None:
        return self.metrics.get("sha256", {}).get(name)

    def texts(self) -> dict[str, str]:
        """The queries by qid, where the evaluation kept them."""
        kept = read_lines(self.folder / "queries.jsonl")
        return {record["qid"]: record["query"] for record in kept}


@dataclass(frozen=True)
class System:
    """One reranker and its evaluations by dataset."""

    label: str  # A, B, ...
    name: str
    evaluated: dict[str, Evaluated]

    def title(self) -> str:
        return f"{self.label} {self.name}"

    def is_first_stage(self) -> bool:
        metrics = next(iter(self.evaluated.values())).metrics
        return metrics.get("settings", {}).get("reranker") == "none"


def find_evaluations(given: list[Path]) -> list[Path]:
    """The folders, and of one that is no evaluation those in it."""
    found: dict[Path, None] = {}
    for folder in given:
        if (folder / UNFINISHED).exists():
            raise UserError(f"{folder}: the evaluation is unfinished: end it first")
        inside = [folder] if (folder / METRICS).exists() else []
        inside = inside or sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
        if not inside:
            raise UserError(f"{folder}: no evaluation here (it has no {METRICS})")
        found |= dict.fromkeys(inside)
    return list(found)


def read_evaluated(folder: Path) -> Evaluated:
    metrics = read_json(folder / METRICS)
    path = folder / "per_query.jsonl"
    try:
        lines = list(read_lines(path))
        before, after = (
            {line["qid"]: 100 * line[when][MEASURE] for line in lines}
            for when in ("before", "after")
        )
    except (KeyError, TypeError):
        raise UserError(f"{path}: damaged, a line without qid or {MEASURE}") from None
    if not lines:
        raise UserError(f"{path}: no query in it")
    for when, values in (("before", before), ("after", after)):
        if not abs(fmean(values.values()) - 100 * metrics[when][MEASURE]) < 1e-4:
            raise UserError(f"{path}: damaged, its mean {MEASURE} {when} is not {METRICS}'s")
    return Evaluated(
        folder, dataset_of(metrics), system_of(metrics, folder), metrics, before, after
    )


def dataset_of(metrics: dict) -> str:
    """Its name; of one that came from files, the name of that of the judgments."""
    return metrics.get("dataset") or Path(judgments_of(metrics)).name or "held out"


def judgments_of(metrics: dict) -> str:
    """The file that they came from, or the folder in BEIR's form; "" where that is not known."""
    settings = metrics.get("settings", {})
    return settings.get("qrels") or settings.get("table") or settings.get("beir") or ""


def tell_apart(evaluations: list[Evaluated]) -> list[Evaluated]:
    """With the folder in the names of datasets from files, where files of one name (qrels.txt)
    hold different judgments."""
    known: dict[str, set[str]] = {}
    for one in evaluations:
        known.setdefault(one.dataset, set()).add(one.hash_of("qrels"))

    def told_apart(one: Evaluated) -> str:
        source = judgments_of(one.metrics)
        several = source and not one.metrics.get("dataset") and len(known[one.dataset]) > 1
        return last_two(Path(source)) if several else one.dataset

    return [replace(one, dataset=told_apart(one)) for one in evaluations]


def system_of(metrics: dict, folder: Path) -> str:
    """What tells this reranker from others, whatever it ranked. Measured during a training there is
    no record, and the folder tells."""
    if "sha256" not in metrics:
        return str(folder.resolve())
    hashes = {k: v for k, v in metrics["sha256"].items() if k not in OF_THE_DATASET}
    served = metrics.get("served", {}).get("model")
    return json.dumps([deciding(metrics), hashes, served], sort_keys=True)


def deciding(metrics: dict) -> dict:
    """The settings that decide the answers, but for the dataset and what hashes tell."""
    told = {name for name in TOLD_BY_HASHES if name in metrics.get("sha256", {})}
    leave_out = {*asdict(SourceSettings()), *told, *CHANGE_NO_ANSWER}
    return {k: v for k, v in metrics.get("settings", {}).items() if k not in leave_out}


def gather(evaluations: list[Evaluated]) -> list[System]:
    """The systems in the order given; one that ranked several first stages of a dataset is one of
    each. UserError for what cannot be compared."""
    evaluations = tell_apart(evaluations)
    systems: list[dict[str, Evaluated]] = []
    for one in evaluations:
        alike = [of for of in systems if next(iter(of.values())).system == one.system]
        for other in (of[one.dataset] for of in alike if one.dataset in of):
            if other.hash_of("candidates") == one.hash_of("candidates"):
                raise UserError(
                    f"{other.folder} and {one.folder} are {one.dataset} ranked by the same model "
                    "with the same settings: give one of them"
                )
        having_none = [of for of in alike if one.dataset not in of]
        if not having_none:
            systems.append({})
        (having_none or systems[-1:])[0][one.dataset] = one
    if len(systems) > len(ascii_uppercase):
        raise UserError(f"{len(systems)} systems are too many: at most {len(ascii_uppercase)}")
    refuse_other_judgments(evaluations)
    names = name_systems([next(iter(of.values())) for of in systems])
    return [System(*each) for each in zip(ascii_uppercase, names, systems)]


def refuse_other_judgments(evaluations: list[Evaluated]) -> None:
    first: dict[str, Evaluated] = {}
    for one in evaluations:
        other = first.setdefault(one.dataset, one)
        qrels = [e.hash_of("qrels") for e in (other, one)]
        both = f"{other.folder} and {one.folder}, both {one.dataset},"
        if None not in qrels and qrels[0] != qrels[1]:
            raise UserError(f"{both} were measured by different judgments")
        if one.after.keys() != other.after.keys():
            raise UserError(f"{both} are of different queries")


def name_systems(firsts: list[Evaluated]) -> list[str]:
    """A name for each system, by one of its evaluations: the model's, with the settings in which
    it differs from another of that name; with its folder where that is not enough."""
    settings = [one.metrics.get("settings", {}) for one in firsts]
    plain = [base_name(one) for one in firsts]
    names = []
    for i, one in enumerate(firsts):
        alike = [settings[j] for j in range(len(firsts)) if plain[j] == plain[i]]
        changed = [
            f"{key}={value}"
            for key, value in deciding(one.metrics).items()
            if any(other.get(key) != value for other in alike)
        ]
        prompts = {other.get("prompt") for other in alike}
        changed += [Path(settings[i]["prompt"]).stem] if len(prompts) > 1 else []
        names.append(" ".join([plain[i], *changed]))
    twice = Counter(names)
    return [
        f"{name} ({last_two(one.folder)})" if twice[name] > 1 else name
        for name, one in zip(names, firsts)
    ]


def last_two(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])  # mine/after, of a training; pass-1/dl19


def base_name(one: Evaluated) -> str:
    settings = one.metrics.get("settings", {})
    if "reranker" not in settings:
        return last_two(one.folder)
    if settings["reranker"] == "model":
        served = one.metrics.get("served", {}).get("model")
        return Path(served or settings["model"]).name
    return {"none": "first stage as it is"}.get(settings["reranker"], settings["reranker"])
