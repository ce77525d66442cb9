"""Every setting of every program, each with its meaning; and how flags, files and presets set them.

A program's settings are one dataclass. Its fields are the flags, their defaults the programs' own.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class UserError(ValueError):
    """What a user can mend or must know. Its message stands alone, and a program ends with it."""


def program(main: Callable[[], None]) -> Callable[[], None]:
    """`main` as a program: an error that a user can mend ends it with one message, no traceback."""

    @wraps(main)
    def run() -> None:
        try:
            main()
        except (UserError, OSError) as error:
            raise SystemExit(str(error)) from None

    return run


def setting(default: Any, meaning: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a settings dataclass, with the line that --help shows for it."""
    metadata = {"help": meaning.replace("%", "%%")}
    if choices:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


MODEL = "Qwen/Qwen2.5-7B-Instruct"
MODEL_MEANING = "Hugging Face name or folder of a causal LM, or of an adapter"
PROMPT_MEANING = "TOML file with every turn's text; default: the task's own"
TASK_NAMES = ["listwise", "setwise"]
IN_FLIGHT_MEANING = "responses under way at once, per process; more need more memory"


@dataclass
class TrainSettings:
    """grpo.py's. The defaults are REARANK's where the paper gives them."""

    preset: str = setting(
        "",
        "rearank, rank-r1: the papers' runs; toy: the offline world of toy.py (see presets.py)",
        ["", "toy", "rearank", "rank-r1"],
    )
    # what is trained, on what
    model: str = setting(MODEL, MODEL_MEANING)
    task: str = setting("listwise", "what the model is asked for", TASK_NAMES)
    prompt: str = setting("", PROMPT_MEANING)
    candidates: str = setting("", "training queries with their first-stage candidates")
    qrels: str = setting("", "their judgments, a TREC qrels file")
    triples: str = setting("", "instead of both: Tevatron's JSON lines of positives and negatives")
    eval_candidates: str = setting("", "held-out candidates, reranked before and after training")
    eval_qrels: str = setting("", "the held-out judgments")
    allow_overlap: bool = setting(
        False, "train though held-out queries are (nearly) among the training queries"
    )
    output_dir: str = setting("", "default: runs/TASK-DATE-TIME")
    # the training windows
    window_size: int = setting(20, "passages the model sees at once")
    draws: int = setting(50, "windows drawn per query")
    min_ndcg: float = setting(0.1, "listwise: windows under this nDCG@10 are dropped")
    ndcg_filter: str = setting(
        "initial",
        "which nDCG@10: of the order given, or the best reachable; the paper says both",
        ["initial", "best"],
    )
    # the reward
    reward: str = setting(
        "", "listwise: relative, absolute, difference; setwise: exact, graded; default: the first"
    )
    weights: list[float] = setting([0.8, 0.1, 0.1], "listwise: of r_rank, r_format1, r_format2")
    # sampling
    steps: int = setting(160, "rollout batches to train on")
    batch_size: int = setting(128, "prompts per step (B), over all processes")
    group_size: int = setting(32, "responses per prompt (G)")
    max_new_tokens: int = setting(2048, "length limit of a response, in tokens")
    temperature: float = setting(1.0, "of the sampling; log-probabilities are taken at it too")
    max_in_flight: int = setting(256, IN_FLIGHT_MEANING)
    resample: int = setting(
        0, "how often a group of equal rewards is sampled again, for another window"
    )
    # the update
    updates_per_batch: int = setting(1, "optimizer steps per rollout batch, each on its share")
    learning_rate: float = setting(1e-6, "of AdamW, constant (not in the paper)")
    beta: float = setting(0.001, "weight of the KL; 0: no reference (the paper gives no value)")
    lora_rank: int = setting(0, "train a LoRA adapter of this rank (Rank-R1: 16); 0: all weights")
    lora_alpha: int = setting(32, "the adapter is scaled by lora_alpha / lora_rank")
    clip: float = setting(0.2, "eps: how far the ratio may move before its gradient stops")
    average: str = setting(
        "sequence",
        "mean over each response's tokens, then over responses; or over all tokens alike",
        ["sequence", "token"],
    )
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_tokens_per_micro_batch: int = setting(
        32768, "distinct tokens in memory at once per process; changes no result"
    )
    activation_checkpointing: bool = setting(True, "recompute layers in backward: less memory")
    dtype: str = setting(
        "auto",
        "to compute in; auto: bfloat16 on a GPU, float32 on a CPU; kept is always float32",
        ["auto", "bfloat16", "float32"],
    )
    seed: int = setting(0, "of the windows drawn, their order, and the sampling")
    tensorboard: bool = setting(False, "write the figures as TensorBoard's event files, too")
    # what may go wrong
    checkpoint_every: int = setting(
        10, "steps between checkpoints; the same --output_dir goes on from the last"
    )
    keep_checkpoints: int = setting(2, "how many checkpoints stay, the newest")
    max_skipped: int = setting(10, "updates that were not finite before training stops")


@dataclass
class DryRunSettings:
    """What grpo.py would take, without doing it (dry_run.py)."""

    dry_run: bool = setting(False, "run one step on tensors without contents, and tell its cost")
    processes: int = setting(8, "dry run: GPUs")
    prompt_tokens: int = setting(3000, "dry run: of every prompt")
    response_tokens: int = setting(0, "dry run: of every response; default: --max_new_tokens")
    tflops: float = setting(400.0, "dry run: TFLOP/s of a GPU in matrix products")
    tbytes: float = setting(3.0, "dry run: TB/s that a GPU reads of its memory")
    network: float = setting(0.3, "dry run: TB/s that a GPU receives from the others")


# They change no result, or only how far it goes; a run that goes on may have others.
FREE_TO_CHANGE = set(
    "output_dir steps max_in_flight max_tokens_per_micro_batch activation_checkpointing "
    "checkpoint_every keep_checkpoints max_skipped allow_overlap tensorboard".split()
)


@dataclass
class AgentSettings:
    """The reranker's, in rearank.py and evaluate.py."""

    model: str = setting(MODEL, MODEL_MEANING)
    task: str = setting(
        "",
        "what the model is asked for; default: what it was trained for, else listwise",
        ["", *TASK_NAMES],
    )
    prompt: str = setting(
        "",
        "TOML file with every turn's text; default: the model's own prompt.toml, else the task's",
    )
    window_size: int = setting(20, "passages the model sees at once")
    step_size: int = setting(10, "listwise: how far the window moves up")
    sort: str = setting(
        "heapsort", "setwise: how choices become a ranking", ["bubblesort", "heapsort"]
    )
    sort_top: int = setting(10, "setwise: how many of the best are sorted out")
    max_new_tokens: int = setting(2048, "length limit of a response, in tokens")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    max_in_flight: int = setting(64, IN_FLIGHT_MEANING)
    seed: int = setting(0, "of the sampling, where the temperature is not 0")
    dtype: str = setting(
        "auto",
        "of the weights; auto: bfloat16 on a GPU, float32 on a CPU",
        ["auto", "bfloat16", "float16", "float32"],
    )


@dataclass
class SourceSettings:
    """Where queries, passages and judgments come from, in evaluate.py, first_stage.py and data.py;
    beside the name of a dataset, instead of what pyserini has (docs/data.md)."""

    candidates: str = setting("", "first-stage candidates (RankGPT's JSON or RankLLM's JSONL)")
    qrels: str = setting("", "judgments (TREC's columns or BEIR's TSV)")
    topics: str = setting("", "queries (TSV or BEIR's queries.jsonl)")
    run: str = setting("", "a retriever's TREC run, instead of BM25's")
    index: str = setting(
        "", "Lucene index, for BM25 and texts: a folder, or pyserini's name of one"
    )
    collection: str = setting(
        "", "the same from texts: BEIR's corpus.jsonl, TSV, pyserini's JSON; a file or a folder"
    )
    exclude: str = setting("", "docids that are no candidates: lines of qid and docid (BRIGHT's)")
    beir: str = setting("", "a BEIR folder: its corpus.jsonl, queries.jsonl and qrels/test.tsv")
    table: str = setting("", "instead of all that, a CSV or TSV of query, passage, label")
    top_k: int = setting(100, "candidates per query")


@dataclass
class FirstStageSettings:
    """Where first_stage.py writes."""

    output_dir: str = setting("", "where to write; default: runs/first-stage-DATASET")


@dataclass
class DataSettings:
    """data.py's: the training set of REARANK, or of other queries made the same way."""

    window_size: int = setting(20, "passages of a window")
    draws: int = setting(50, "windows drawn per query")
    min_ndcg: float = setting(0.1, "windows under this nDCG@10 are dropped")
    ndcg_filter: str = setting(
        "initial",
        "which nDCG@10: of the order given, or the best reachable; the paper says both",
        ["initial", "best"],
    )
    seed: int = setting(0, "of the windows drawn")
    evaluation: list[str] = setting(
        [],
        "files of queries (topics or candidates) that must not be trained on; dl19's and "
        "dl20's are looked for besides",
    )
    allow_overlap: bool = setting(False, "write the training set though it holds such queries")
    output_dir: str = setting("", "where to write; default: runs/training-set-DATASETS")


@dataclass
class EvaluateSettings:
    """What evaluate.py measures, and where it writes."""

    reranker: str = setting(
        "model",
        "model; none: the first stage as it is; oracle: orders each window by the judgments",
        ["none", "oracle", "model"],
    )
    output_dir: str = setting(
        "", "where to write; default: runs/DATASET-MODEL-..., named after the settings"
    )


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a .yaml, .yml or .json file: one mapping, names as on the command line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read settings: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a mapping of settings, like 'steps: 160'")
    return loaded


def parse_settings(
    parser: HfArgumentParser, presets: dict[str, dict[str, Any]] | None = None
) -> tuple:
    """One instance of each of the parser's dataclasses (then a namespace of other arguments).

    A preset (--preset NAME) comes first, a settings file (a first argument that ends in .yaml,
    .yml or .json) over it, flags over both. What no dataclass holds is an error, in all three.
    """
    args = sys.argv[1:]
    if args and Path(args[0]).suffix in (".yaml", ".yml", ".json"):
        path, *args = args
        known = {f.name for settings in parser.dataclass_types for f in fields(settings)}
        for name, value in read_settings(path).items():
            if name not in known:
                parser.error(f"{path}: unknown setting {name!r}")
            flag = f"--{name}"
            values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            # In front of the command line's own, so that those win; parsed alike, so checked alike.
            args = [flag, *values, *args]
    for arg in args:
        # Before argparse takes the value of a misspelt flag for a positional argument.
        if arg.startswith("--") and arg.partition("=")[0] not in parser._option_string_actions:
            parser.error(f"unknown flag {arg}")
    if presets:
        chooser = HfArgumentParser((), add_help=False, allow_abbrev=False)
        chooser.add_argument("--preset", choices=sorted(presets))
        chosen, _ = chooser.parse_known_args(args)
        parser.set_defaults(**presets.get(chosen.preset, {}))
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return tuple(parsed)
