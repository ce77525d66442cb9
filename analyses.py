"""Experiments on any model: what its reasoning, the order it is given, passes or windows are worth.

    python analyses.py reasoning dl19 --model OUT               # with and without reasoning
    python analyses.py passes dl19 --model OUT                  # reranks what it has reranked
    python analyses.py orders dl19 --model OUT                  # shuffled and inverted first stages
    python analyses.py windows dl19 --sizes 20:10 10:5          # window and step sizes

take evaluate.py's flags, print a table, and write analysis.json and analysis.png into --output_dir.
Each variant is an evaluation in a folder there, so that what is finished is not done again.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from agent import Agent
from engine.files import read_json, refuse_foreign, write_whole
from engine.flags import parse_settings, program
from engine.parallel import StopSignal, from_first, if_first, processes, say, together
from engine.streams import make_unbreakable
from evaluate import (
    all_claimed,
    explain,
    load_judged,
    load_model,
    measure_sets,
)
from results.outcomes import RESULT, tell
from results.record import default_folder
from results.systems import read_evaluated
from settings import (
    AgentSettings,
    AnalysisSettings,
    EvaluateSettings,
    SourceSettings,
    UserError,
)
from sources.formats import Candidates
from sources.load import JudgedSet, refuse_files_of_many
from sources.registry import expand
from sources.trec import read_run
from tasks import TASKS, settle
from window import PROMPTS, load_prompt

Order = Callable[[list[Candidates], str], list[Candidates]]  # of a dataset, which is named


@dataclass(frozen=True)
class Variant:
    """One of the ways that are compared."""

    name: str
    agent: AgentSettings
    order: Order = lambda candidates, dataset: candidates  # what is ranked


# ------------------------------------------------------------------------------- the analyses


def reasoning(settings: AnalysisSettings, agent: AgentSettings, root: Path) -> list[Variant]:
    """The model's own prompt, and one that asks for the answer alone."""
    if agent.task != "listwise" and not settings.without:
        raise UserError(f"--without: give a prompt without reasoning for the task {agent.task}")
    without = replace(agent, prompt=settings.without or str(PROMPTS / "direct.toml"))
    if not load_prompt(agent.prompt).reasoning:
        raise UserError(f"{agent.prompt} does not reason: give a --prompt that does")
    if load_prompt(without.prompt).reasoning:
        raise UserError(f"--without {without.prompt} reasons: give one that does not")
    return [Variant("with reasoning", agent), Variant("without", without)]


def passes(settings: AnalysisSettings, agent: AgentSettings, root: Path) -> list[Variant]:
    """Each ranks what the one before made."""

    def of_pass(number: int) -> Order:
        def order(candidates: list[Candidates], dataset: str) -> list[Candidates]:
            run = read_run(root / f"pass-{number}" / dataset / "run.txt")
            return [reorder(query, [docid for docid, _ in run[query.qid]]) for query in candidates]

        return order

    later = (Variant(f"pass {n + 1}", agent, of_pass(n)) for n in range(1, settings.passes))
    return [Variant("pass 1", agent), *later]


def reorder(query: Candidates, docids: list[str]) -> Candidates:
    passages = {passage.docid: passage for passage in query.passages}
    return replace(query, passages=tuple(passages[docid] for docid in docids))


def orders(settings: AnalysisSettings, agent: AgentSettings, root: Path) -> list[Variant]:
    """The first stage's order, then shuffled by several seeds, then upside down."""

    def shuffled(seed: int) -> Order:
        def shuffle(query: Candidates) -> Candidates:
            rng, passages = random.Random(f"{seed}/{query.qid}"), list(query.passages)
            rng.shuffle(passages)
            return replace(query, passages=tuple(passages))

        return lambda candidates, dataset: [shuffle(query) for query in candidates]

    def inverted(candidates: list[Candidates], dataset: str) -> list[Candidates]:
        return [replace(query, passages=query.passages[::-1]) for query in candidates]

    shuffles = range(1, settings.shuffles + 1)
    return [
        Variant("as given", agent),
        *(Variant(f"shuffled {seed}", agent, shuffled(seed)) for seed in shuffles),
        Variant("inverted", agent, inverted),
    ]


def windows(settings: AnalysisSettings, agent: AgentSettings, root: Path) -> list[Variant]:
    """WINDOW:STEP each; the sorts of setwise know no step, and take each window once."""
    variants: dict[str, Variant] = {}
    for size in settings.sizes:
        found = re.fullmatch("([0-9]{1,4}):([0-9]{1,4})", size)
        window, step = map(int, found.groups()) if found else (0, 0)
        if not (2 <= window <= 1000 and 1 <= step <= window):
            raise UserError(
                f"--sizes {size:.60}: expected WINDOW:STEP, the window from 2 to 1,000, the step "
                "at most the window"
            )
        sized = replace(agent, window_size=window, step_size=step)
        name = f"{window} by {step}" if agent.task == "listwise" else str(window)
        variants.setdefault(name, Variant(name, sized))
    return [*variants.values()]


ANALYSES = {each.__name__: each for each in (reasoning, passes, orders, windows)}


# ------------------------------------------------------------------------------ the measuring


@dataclass(frozen=True)
class Bench:
    """What all variants share."""

    sets: list[JudgedSet]
    sources: SourceSettings
    evaluate: EvaluateSettings
    agent: Agent | None  # None: no model answers
    root: Path

    def folders(self, variant: Variant) -> list[Path]:
        folder = self.root / variant.name.replace(" ", "-")
        return [folder / (s.name or "own") for s in self.sets]


def measure_variant(bench: Bench, variant: Variant) -> None:
    """Evaluate it, unless that is done."""

    def ordered() -> list[JudgedSet]:
        return [
            replace(s, candidates=variant.order(s.candidates, s.name or "own")) for s in bench.sets
        ]

    def load() -> Agent:
        return replace(bench.agent, prompt=load_prompt(variant.agent.prompt))

    sets, folders = from_first(ordered), bench.folders(variant)
    with all_claimed(folders):
        say(f"{variant.name}:")
        measure_sets(sets, folders, bench.sources, bench.evaluate, variant.agent, load)


def analyse(
    name: str,
    datasets: list[str],
    sources: SourceSettings,
    settings: AnalysisSettings,
    evaluate: EvaluateSettings,
    agent_settings: AgentSettings,
) -> None:
    """The whole job, on this process or as one of many."""
    refuse_files_of_many(datasets, sources)
    if name == "reasoning" and evaluate.reranker != "model":
        raise UserError("--reranker: only a model can reason or not")
    default = default_root(name, datasets, sources, evaluate, agent_settings)
    root = Path(evaluate.output_dir or default)
    folders: list[Path] = []
    if name == "windows":
        windows(settings, agent_settings, root)  # before the weights: sizes may be misspelt
    if settings.without:
        load_prompt(settings.without)
    with processes() as device, StopSignal() as stop:
        try:
            sets = from_first(lambda: load_judged(datasets, sources, evaluate.reranker))
            if_first(lambda: refuse_another(root, name))
            agent, settled = together(lambda: load(evaluate.reranker, agent_settings, device))
            bench = Bench(sets, sources, evaluate, agent, root)
            variants = together(lambda: ANALYSES[name](settings, settled, root))
            if_first(lambda: claim(root, name))
            for variant in variants:
                folders = bench.folders(variant)
                measure_variant(bench, variant)
        except BaseException as error:
            explain(error, stop, folders, agent_settings.max_in_flight)
            raise
        if dist.get_rank() == 0:
            found = {v.name: [*map(read_evaluated, bench.folders(v))] for v in variants}
            tell(name, found, root)


def default_root(
    name: str,
    datasets: list[str],
    sources: SourceSettings,
    evaluate: EvaluateSettings,
    agent: AgentSettings,
) -> Path:
    """runs/ANALYSIS-... as the evaluation of these datasets would be named."""
    one = default_folder("-".join(datasets), sources, evaluate, agent)
    return one.with_name(f"{name}-{one.name}")


def refuse_another(root: Path, name: str) -> None:
    """UserError where the folder holds something else, or another analysis."""
    refuse_foreign(root, [RESULT])
    if (root / RESULT).exists() and (other := read_json(root / RESULT).get("analysis")) != name:
        raise UserError(f"{root} holds the analysis {other}: give another --output_dir")


def claim(root: Path, name: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if not (root / RESULT).exists():
        write_whole(root / RESULT, json.dumps({"analysis": name}) + "\n")


def load(
    reranker: str, settings: AgentSettings, device: torch.device
) -> tuple[Agent | None, AgentSettings]:
    """The agent, where a model answers; and the settings with task and prompt decided."""
    if reranker == "model":
        return load_model(settings, device), settle(settings)
    return None, replace(settings, task=settings.task or next(iter(TASKS)))


@program
def main() -> None:
    make_unbreakable()
    sources, settings, evaluate, agent, inputs = parse_settings(
        *(__doc__, SourceSettings, AnalysisSettings, EvaluateSettings, AgentSettings),
        others={
            "analysis": {"choices": [*ANALYSES], "help": "what is varied"},
            "datasets": {"nargs": "*", "help": "as of evaluate.py"},
        },
    )
    analyse(inputs.analysis, expand(inputs.datasets), sources, settings, evaluate, agent)


if __name__ == "__main__":
    main()
