"""Rerank test collections and measure it.

    python evaluate.py dl19                                   # by name, through pyserini
    python evaluate.py paper --model OUT                      # a group: all windows in one batch
    python evaluate.py --candidates FILE --qrels FILE --reranker oracle
    torchrun --nproc_per_node=8 evaluate.py dl19              # each GPU reranks its share
    python evaluate.py dl19 --endpoint URL --model NAME       # a server's model

Each dataset gets a folder: the TREC run (run.txt), the figures and all that they were made from
(metrics.json, per_query.jsonl), and every window's given order, reasoning and answer
(windows.jsonl); the number of processes changes none of them. An evaluation that died goes on
when started again with the same command; a finished one is not done again.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist

from agent import Agent, Answer, Known, Shown, load_agent, rank_batch, rank_windows
from engine.files import locked
from engine.flags import parse_settings, program
from engine.model import some
from engine.parallel import (
    StopSignal,
    from_first,
    if_first,
    is_out_of_memory,
    processes,
    say,
    together,
)
from engine.streams import make_unbreakable
from measure import Evaluation, Reranker, measurable, measure_all
from results.answers import UNFINISHED, begin, claimed, finished, kept_windows
from results.record import deciding_facts, default_folder, full_record
from settings import AgentSettings, EvaluateSettings, SourceSettings, UserError
from sources.formats import Candidates
from sources.load import JudgedSet, load_each, refuse_files_of_many
from sources.registry import GROUPS, expand
from sources.trec import Qrels
from tasks import TASKS, settle
from window import NoAnswer


def load_judged(names: list[str], sources: SourceSettings, reranker: str) -> list[JudgedSet]:
    """The datasets, or what the flags give alone, with the queries that can be measured."""
    sets = []
    for loaded in load_each(names, sources, texts=reranker == "model"):
        if not loaded.qrels:
            raise UserError("the judgments are missing: give --qrels FILE")
        judged = measurable(loaded.candidates, loaded.qrels, sources.top_k, loaded.name)
        sets.append(replace(loaded, candidates=judged))
    return sets


def load_model(settings: AgentSettings, device: torch.device) -> Agent:
    if settings.endpoint and dist.get_world_size() > 1:
        raise UserError("--endpoint: one process asks the server, so start it without torchrun")
    return load_agent(settings, device)


def choose_reranker(
    name: str, evaluations: list[Evaluation], settings: AgentSettings, agent: Agent | None
) -> Reranker:
    if name == "none":
        return lambda candidates, *_: candidates
    if name == "oracle":
        qrels = {e.key(qid): grades for e in evaluations for qid, grades in e.qrels.items()}
        return partial(oracle_rerank, qrels, settings)
    return partial(rank_batch, agent, settings, keep_too_long=True)


def oracle_rerank(
    qrels: Qrels,
    settings: AgentSettings,
    candidates: list[Candidates],
    on_answer: Callable[[Answer], None],
    known: Known,
) -> list[Candidates]:
    """The task's own ranker with every window answered by the judgments: the most that its
    windows can reach, and a test of the sliding itself."""
    answered: list[tuple[Shown, list[int]]] = []

    def submit(shown: Shown) -> None:
        qid, docids = shown.query.qid, shown.docids()
        order = sorted(range(len(docids)), key=lambda i: -qrels[qid].get(docids[i], 0))
        ranked = [docids[i] for i in order]
        on_answer(Answer(qid, shown.window, docids, ranked, False, "", "", 0, False))
        answered.append((shown, order))

    task = TASKS[settings.task]
    return rank_windows(
        candidates, lambda n: task.ranker(n, settings), submit, lambda: [answered.pop()]
    )


# ------------------------------------------------------------------------------------ what is said


def print_metrics(metrics: list[dict]) -> None:
    if len(metrics) == 1:
        print("              before    after")
        for name, before in metrics[0]["before"].items():
            print(f"{name:10}  {before:8.4f} {metrics[0]['after'][name]:8.4f}")
    else:
        print(f"{'nDCG@10':28}  before    after  queries")
        pairs = [(m["before"]["ndcg@10"], m["after"]["ndcg@10"]) for m in metrics]
        for (before, after), m in zip(pairs, metrics):
            print(f"{m['dataset']:26}  {before:8.4f} {after:8.4f} {m['queries']:8}")
        before, after = (fmean(column) for column in zip(*pairs))
        print(f"{'mean of the datasets':26}  {before:8.4f} {after:8.4f}")
    for m in metrics:
        if qids := m["too_long_queries"]:
            of = f"{m['dataset']}: " if m["dataset"] else ""
            print(
                f"{of}{m['too_long']} windows were too long for the model and kept their order, of "
                f"{len(qids)} queries: {some(qids, 5)}"
            )
    counted = ("queries", "windows", "malformed", "cut_off", "prompt_tokens", "tokens")
    counts = (f"{sum(m[k] for m in metrics)} {k.replace('_', ' ')}" for k in counted)
    print(f"{', '.join(counts)}, {metrics[0]['seconds']} s")


def explain(error: BaseException, stop: StopSignal, folders: list[Path], in_flight: int) -> None:
    """Raise what an evaluation's error means to the one who started it, where it means more."""
    begun = [folder for folder in folders if (folder / UNFINISHED).exists()]
    kept = sum(kept_windows(folder) for folder in begun)
    where = f"{kept} windows are kept in {', '.join(map(str, begun))}, and the same command goes on"
    if stop.number:  # a signal may come out of a library as an error of its own
        stop.at_once = False  # torchrun repeats the signal
        if begun:
            say(f"interrupted: {where}", file=sys.stderr)
        raise SystemExit(128 + stop.number) from None
    if isinstance(error, NoAnswer) and begun:
        raise UserError(f"{error}; {where}") from None
    if is_out_of_memory(error):
        raise UserError(
            f"out of memory: a smaller --max_in_flight than {in_flight} needs less, and goes on "
            f"from the windows on disk\n{error}"
        ) from error


# --------------------------------------------------------------------------------------- the whole


@contextmanager
def all_claimed(folders: list[Path]) -> Iterator[None]:
    """Inside, the folders are this evaluation's alone, held by all processes: where the launcher
    and some of them are killed, the others still hold it."""
    first = dist.get_rank() == 0
    with ExitStack() as locks:

        def claim(joining: bool) -> None:
            for folder in folders:
                locks.enter_context(locked(folder, joining=True) if joining else claimed(folder))

        if_first(lambda: claim(joining=False))
        together(lambda: None if first else claim(joining=True))
        yield


def measure_sets(
    sets: list[JudgedSet],
    folders: list[Path],
    sources: SourceSettings,
    settings: EvaluateSettings,
    agent_settings: AgentSettings,
    load: Callable[[], Agent],
) -> list[dict]:
    """Begin the evaluations of the datasets, or go on with them, each in its folder: the metrics.
    Of those that are finished, the metrics as they are.

    load: gives the agent; called where a model answers.
    """
    if settings.reranker != "model":
        agent_settings = replace(agent_settings, task=agent_settings.task or next(iter(TASKS)))
    evaluations = [
        Evaluation(s.candidates, s.qrels, folder, name=s.name, relevant=s.relevant)
        for s, folder in zip(sets, folders)
    ]

    def begin_all(served: dict | None) -> list[tuple[Evaluation, dict | None]]:
        settled = settle(agent_settings) if settings.reranker == "model" else agent_settings
        begun = []
        for evaluation, judged in zip(evaluations, sets):
            facts = deciding_facts(judged, settings.reranker, settled, served)
            before = finished(evaluation.output_dir, facts)
            if before is None:
                about = full_record(facts, sources, settings, settled, served)
                known = begin(evaluation.output_dir, facts)
                evaluation = replace(evaluation, known=known, about=about)
            begun.append((evaluation, before))
        return begun

    agent = together(lambda: load() if settings.reranker == "model" else None)
    served = agent.endpoint.served if agent and agent.endpoint else None
    rerank = choose_reranker(settings.reranker, evaluations, agent_settings, agent)
    task = agent.task if agent else TASKS[agent_settings.task]
    ranker = partial(task.ranker, settings=agent_settings)
    asks = settings.reranker != "none"
    begun = from_first(lambda: begin_all(served))
    left = [evaluation for evaluation, before in begun if before is None]
    if len(left) < len(begun):
        done = [str(e.output_dir) for e, before in begun if before is not None]
        say(f"nothing is left to do in {', '.join(done)}: without the folder it is measured anew")
    measured = iter(measure_all(left, rerank, ranker if asks else None) if left else [])
    return [next(measured) if before is None else before for _, before in begun]


def evaluate(
    names: list[str],
    sources: SourceSettings,
    settings: EvaluateSettings,
    agent_settings: AgentSettings,
) -> list[dict]:
    """The whole job, on this process or as one of many: the metrics of each dataset."""
    folders = output_folders(names, sources, settings, agent_settings)
    with processes() as device, StopSignal() as stop:
        try:
            with all_claimed(folders):
                sets = from_first(lambda: load_judged(names, sources, settings.reranker))
                metrics = measure_sets(
                    sets,
                    folders,
                    sources,
                    settings,
                    agent_settings,
                    lambda: load_model(agent_settings, device),
                )
        except BaseException as error:
            explain(error, stop, folders, agent_settings.max_in_flight)
            raise
        if dist.get_rank() == 0:
            print_metrics(metrics)
        say("\n".join(f"written to {folder}" for folder in folders))
    return metrics


def output_folders(
    names: list[str],
    sources: SourceSettings,
    settings: EvaluateSettings,
    agent_settings: AgentSettings,
) -> list[Path]:
    """One for each dataset."""
    refuse_files_of_many(names, sources)
    if settings.output_dir:
        folder = Path(settings.output_dir)
        return [folder / name for name in names] if len(names) > 1 else [folder]
    return [default_folder(n, sources, settings, agent_settings) for n in names or [""]]


@program
def main() -> None:
    make_unbreakable()
    meaning = f"names of datasets (docs/data.md) or of groups: {', '.join(GROUPS)}"
    sources, settings, agent_settings, inputs = parse_settings(
        *(__doc__, SourceSettings, EvaluateSettings, AgentSettings),
        others={"datasets": {"nargs": "*", "help": meaning}},
    )
    evaluate(expand(inputs.datasets), sources, settings, agent_settings)


if __name__ == "__main__":
    main()
