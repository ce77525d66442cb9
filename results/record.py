"""What an evaluation is: the settings and the inputs that decide it, as it is written down, and as
the name of its folder."""

from dataclasses import asdict
from pathlib import Path

from engine.provenance import hash_files, hash_model, provenance
from settings import AgentSettings, EvaluateSettings, SourceSettings
from sources.formats import candidates_lines
from sources.load import JudgedSet
from sources.naming import changed, key_of, resolved, stem
from sources.text import hash_lines
from sources.trec import qrels_lines

# What counts where no model answers; with one, everything does but CHANGE_NO_ANSWER.
USED = {"none": (), "oracle": ("task", "window_size", "step_size", "sort", "sort_top")}
CHANGE_NO_ANSWER = ("max_in_flight", "max_tokens_total")  # who ran out may go on with others
UNUSED_HERE, UNUSED_ELSEWHERE = ("endpoint", "max_tokens_total"), ("dtype",)  # by where it runs


def used_settings(reranker: str, agent: AgentSettings) -> dict:
    """The agent's settings that a reranker of this kind looks at."""
    settings = asdict(agent)
    unused = UNUSED_ELSEWHERE if agent.endpoint else UNUSED_HERE
    used = [name for name in settings if name not in unused]
    return {name: settings[name] for name in USED.get(reranker, used)}


def deciding_facts(
    judged: JudgedSet, reranker: str, agent: AgentSettings, served: dict | None = None
) -> dict:
    """{"settings", "sha256"}: all that decides the answers, as JSON has it. Candidates and
    judgments by the hash of the files that first_stage.py writes of them; of a server's model,
    "served" is what the server calls it."""
    used = used_settings(reranker, agent)
    hashes = {
        "candidates": hash_lines(candidates_lines(judged.candidates)),
        "qrels": hash_lines(qrels_lines(judged.qrels)),
    }
    if reranker == "model":
        hashes["prompt"] = hash_files([agent.prompt])
        if not served:
            hashes["model"] = hash_model(agent.model)
    deciding = {name: value for name, value in used.items() if name not in CHANGE_NO_ANSWER}
    facts = {"settings": {"reranker": reranker, **deciding}, "sha256": hashes}
    return facts | ({"served": {"model": served["model"]}} if served else {})


def full_record(
    facts: dict,
    sources: SourceSettings,
    settings: EvaluateSettings,
    agent: AgentSettings,
    served: dict | None = None,
) -> dict:
    """The facts with every other setting that was looked at, the code and the versions."""
    every = asdict(sources) | used_settings(settings.reranker, agent) | facts["settings"]
    said = {"served": served} if served else {}
    return facts | said | {"settings": every} | provenance()


def default_folder(
    name: str, sources: SourceSettings, settings: EvaluateSettings, agent: AgentSettings
) -> Path:
    """runs/DATASET-MODEL-CHANGES-KEY: what is measured, by what, the settings that are not the
    default, and a key that no other evaluation has (nor one with a model of the same name)."""
    default = asdict(AgentSettings())
    used = used_settings(settings.reranker, agent)
    differ = {k: v for k, v in used.items() if v != default[k] and k not in CHANGE_NO_ANSWER}
    decides = {k: resolved(v) if k in ("model", "prompt") else v for k, v in differ.items()}
    parts = [
        stem([name] if name else [], sources),
        Path(agent.model).name if settings.reranker == "model" else settings.reranker,
        *([f"top_k={sources.top_k}"] if sources.top_k != SourceSettings().top_k else []),
        *(f"{k}={v}" for k, v in differ.items() if k not in ("model", "prompt", "endpoint")),
        *([Path(agent.prompt).stem] if "prompt" in differ else []),
    ]
    key = key_of([name, settings.reranker, changed(sources), decides])
    return Path("runs") / f"{'-'.join(parts)[:80]}-{key}"
