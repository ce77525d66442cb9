"""Every setting of every program, each with its meaning and its range.

A program's settings are one dataclass. Its fields are the flags, their defaults the programs' own;
engine/flags.py reads them, and refuses a number that is out of its range.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """What a user can mend or must know. Its message stands alone, and a program ends with it."""


def setting(
    default: Any,
    meaning: str,
    choices: Sequence[str] = (),
    within: tuple[float, float] | None = None,  # of a number: the least and the most it may be
    or_zero: bool = False,  # 0 means something of its own, and is below the least
    count: int = 0,  # of a list: how many there must be; 0: any
) -> Any:
    """A field of a settings dataclass, with the line that --help shows for it."""
    metadata = dict(help=meaning, choices=choices, within=within, or_zero=or_zero, count=count)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


MANY = 1_000_000  # more than anybody means, and few enough to end
MODEL = "Qwen/Qwen2.5-7B-Instruct"
MODEL_MEANING = "Hugging Face name or folder of a causal LM, or of an adapter"
PROMPT_MEANING = "TOML file with every turn's text; default: the task's own"
TASK_NAMES = ["listwise", "setwise"]
IN_FLIGHT_MEANING = "responses under way at once, per process; more need more memory"


@dataclass
class RunSettings:
    """What every training has: grpo.py's and sft.py's. The defaults are REARANK's where the paper
    gives them."""

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
    eval_every: int = setting(
        0, "steps between measurements on them during training; 0: none", within=(0, MANY)
    )
    allow_overlap: bool = setting(
        False, "train though held-out queries are (nearly) among the training queries"
    )
    output_dir: str = setting("", "default: runs/TASK-DATE-TIME")
    allow_changed: bool = setting(
        False, "go on though files have changed since the run in --output_dir began"
    )
    # the training windows
    window_size: int = setting(20, "passages the model sees at once", within=(2, 1000))
    draws: int = setting(50, "windows drawn per query", within=(1, 10_000))
    min_ndcg: float = setting(
        0.1, "listwise: windows under this nDCG@10 are dropped", within=(0, 1)
    )
    ndcg_filter: str = setting(
        "initial",
        "which nDCG@10: of the order given, or the best reachable; the paper says both",
        ["initial", "best"],
    )
    # the responses
    max_new_tokens: int = setting(2048, "length limit of a response, in tokens", within=(1, MANY))
    max_in_flight: int = setting(256, IN_FLIGHT_MEANING, within=(1, 65_536))
    # the updates
    steps: int = setting(160, "batches to train on", within=(1, MANY))
    batch_size: int = setting(128, "windows per step (B), over all processes", within=(1, 65_536))
    learning_rate: float = setting(1e-6, "of AdamW, constant (not in the paper)", within=(1e-12, 1))
    lora_rank: int = setting(
        0, "train a LoRA adapter of this rank (Rank-R1: 16); 0: all weights", within=(0, 10_000)
    )
    lora_alpha: int = setting(
        32, "the adapter is scaled by lora_alpha / lora_rank", within=(1, MANY)
    )
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this norm", within=(1e-6, 1e6)
    )
    max_tokens_per_micro_batch: int = setting(
        32768, "distinct tokens in memory at once per process; changes no result", within=(1, 10**9)
    )
    activation_checkpointing: bool = setting(True, "recompute layers in backward: less memory")
    dtype: str = setting(
        "auto",
        "to compute in; auto: bfloat16 on a GPU, float32 on a CPU; kept is always float32",
        ["auto", "bfloat16", "float32"],
    )
    seed: int = setting(
        0, "of the windows drawn, their order, and the sampling", within=(0, 2**32 - 1)
    )
    tensorboard: bool = setting(False, "write the figures as TensorBoard's event files, too")
    # what may go wrong
    checkpoint_every: int = setting(
        10,
        "steps between checkpoints; the same --output_dir goes on from the last",
        within=(1, MANY),
    )
    keep_checkpoints: int = setting(2, "how many checkpoints stay, the newest", within=(1, MANY))
    max_skipped: int = setting(
        10, "updates that were not finite before training stops", within=(0, MANY)
    )


@dataclass
class TrainSettings(RunSettings):
    """grpo.py's."""

    # the reward
    reward: str = setting(
        "", "listwise: relative, absolute, difference; setwise: exact, graded; default: the first"
    )
    weights: list[float] = setting(
        [0.8, 0.1, 0.1], "listwise: of r_rank, r_format1, r_format2", within=(0, 1000), count=3
    )
    # sampling
    group_size: int = setting(32, "responses per prompt (G)", within=(2, 65_536))
    temperature: float = setting(
        1.0, "of the sampling; log-probabilities are taken at it too", within=(0.01, 100)
    )
    resample: int = setting(
        0,
        "how often a group of equal rewards is sampled again, for another window",
        within=(0, 1000),
    )
    # the update
    updates_per_batch: int = setting(
        1, "optimizer steps per rollout batch, each on its share", within=(1, 65_536)
    )
    beta: float = setting(
        0.001, "weight of the KL; 0: no reference (the paper gives no value)", within=(0, 1000)
    )
    clip: float = setting(
        0.2, "eps: how far the ratio may move before its gradient stops", within=(1e-6, 1)
    )
    average: str = setting(
        "sequence",
        "mean over each response's tokens, then over responses; or over all tokens alike",
        ["sequence", "token"],
    )


@dataclass
class SftSettings(RunSettings):
    """sft.py's."""

    responses: str = setting(
        "",
        "JSON lines of qid, given (docids as shown) and response, such as an evaluation's "
        "windows.jsonl, to learn from instead of the best orders",
    )
    learning_rate: float = setting(1e-5, "of AdamW, constant", within=(1e-12, 1))


@dataclass
class DryRunSettings:
    """What grpo.py would take, without doing it (dry_run.py)."""

    dry_run: bool = setting(False, "run one step on tensors without contents, and tell its cost")
    processes: int = setting(8, "dry run: GPUs", within=(1, MANY))
    prompt_tokens: int = setting(3000, "dry run: of every prompt", within=(1, MANY))
    response_tokens: int = setting(
        0, "dry run: of every response; default: --max_new_tokens", within=(0, MANY)
    )
    tflops: float = setting(
        400.0, "dry run: TFLOP/s of a GPU in matrix products", within=(1e-3, 1e9)
    )
    tbytes: float = setting(3.0, "dry run: TB/s that a GPU reads of its memory", within=(1e-6, 1e6))
    network: float = setting(
        0.3, "dry run: TB/s that a GPU receives from the others", within=(1e-6, 1e6)
    )


# They change no result, or only how far it goes; a run that goes on may have others.
FREE_TO_CHANGE = set(
    "output_dir steps max_in_flight max_tokens_per_micro_batch activation_checkpointing eval_every "
    "checkpoint_every keep_checkpoints max_skipped allow_overlap allow_changed tensorboard".split()
)


@dataclass
class AgentSettings:
    """The reranker's, in rearank.py, evaluate.py and analyses.py."""

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
    window_size: int = setting(20, "passages the model sees at once", within=(2, 1000))
    step_size: int = setting(10, "listwise: how far the window moves up", within=(1, 1000))
    sort: str = setting(
        "heapsort", "setwise: how choices become a ranking", ["bubblesort", "heapsort"]
    )
    sort_top: int = setting(10, "setwise: how many of the best are sorted out", within=(1, 1000))
    max_new_tokens: int = setting(2048, "length limit of a response, in tokens", within=(1, MANY))
    temperature: float = setting(
        0.0, "sampling temperature; 0 is greedy", within=(0.01, 100), or_zero=True
    )
    max_in_flight: int = setting(64, IN_FLIGHT_MEANING, within=(1, 65_536))
    endpoint: str = setting(
        "", "URL of an OpenAI-compatible server that runs --model (docs/endpoint.md)"
    )
    max_tokens_total: int = setting(
        0,
        "endpoint: tokens (prompts and responses) that one start may take; 0: no limit",
        within=(0, 10**12),
    )
    seed: int = setting(0, "of the sampling, where the temperature is not 0", within=(0, 2**32 - 1))
    dtype: str = setting(
        "auto",
        "of the weights; auto: bfloat16 on a GPU, float32 on a CPU",
        ["auto", "bfloat16", "float16", "float32"],
    )


@dataclass
class SourceSettings:
    """Where queries, passages and judgments come from, in all programs but the trainings: beside
    the name of a dataset, instead of what pyserini has (docs/data.md)."""

    candidates: str = setting("", "first-stage candidates (RankGPT's JSON or RankLLM's JSONL)")
    qrels: str = setting("", "judgments (TREC's columns or BEIR's TSV)")
    topics: str = setting("", "queries (TSV or BEIR's queries.jsonl)")
    run: str = setting("", "a retriever's TREC run, instead of BM25's")
    index: str = setting(
        "", "Lucene index, for BM25 and texts: a folder, or pyserini's name of one"
    )
    collection: str = setting(
        "", "instead of an index: BEIR's corpus.jsonl, TSV, pyserini's JSON; a file or a folder"
    )
    exclude: str = setting("", "docids that are no candidates: lines of qid and docid (BRIGHT's)")
    beir: str = setting("", "a BEIR folder: its corpus.jsonl, queries.jsonl and qrels/test.tsv")
    table: str = setting("", "instead of all these, a CSV or TSV of query, passage, label")
    top_k: int = setting(100, "candidates per query", within=(1, MANY))


@dataclass
class AnalysisSettings:
    """What analyses.py varies."""

    passes: int = setting(3, "passes: how many, each over what the one before made", within=(2, 99))
    shuffles: int = setting(3, "orders: how many shuffled ones", within=(1, 99))
    sizes: list[str] = setting(
        ["20:10", "20:5", "10:5", "40:20"],
        "windows: WINDOW:STEP each; the others are compared with the first",
    )
    without: str = setting(
        "", "reasoning: the prompt without it; default: prompts/direct.toml, for listwise"
    )


@dataclass
class FirstStageSettings:
    """Where first_stage.py writes."""

    output_dir: str = setting("", "where to write; default: runs/first-stage-DATASET")


@dataclass
class DataSettings:
    """data.py's: the training set of REARANK, or of other queries made the same way."""

    window_size: int = setting(20, "passages of a window", within=(2, 1000))
    draws: int = setting(50, "windows drawn per query", within=(1, 10_000))
    min_ndcg: float = setting(0.1, "windows under this nDCG@10 are dropped", within=(0, 1))
    ndcg_filter: str = setting(
        "initial",
        "which nDCG@10: of the order given, or the best reachable; the paper says both",
        ["initial", "best"],
    )
    seed: int = setting(0, "of the windows drawn", within=(0, 2**32 - 1))
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
