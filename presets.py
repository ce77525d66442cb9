"""Settings by name, for --preset NAME of the trainings: the papers' runs, and the offline world.

What a paper does not give keeps this project's default, and is marked so.
"""

from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist

import toy
from data import TRAINED_ON, build_training_set, training_folder
from engine.events import require_tensorboard
from engine.parallel import if_first
from settings import DataSettings, RunSettings, SourceSettings, UserError
from sources.write import CANDIDATES, QRELS, is_whole

# arXiv 2505.20046, section 4.1 and appendix. Not given: beta, the learning rate, the clip range.
REARANK = {
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "task": "listwise",
    "reward": "relative",
    "weights": [0.8, 0.1, 0.1],
    "window_size": 20,
    "draws": 50,
    "min_ndcg": 0.1,
    "ndcg_filter": "initial",
    "steps": 160,
    "batch_size": 128,
    "group_size": 32,
    "max_new_tokens": 2048,
    "temperature": 1.0,
}
# arXiv 2503.06034, section 4. Not given: the batch, the number of steps, beta. The training
# queries are MS MARCO's with one positive each, --triples FILE (docs/data.md says which).
RANK_R1 = {
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "task": "setwise",
    "reward": "exact",
    "window_size": 20,
    "draws": 1,
    "lora_rank": 16,
    "lora_alpha": 32,
    "learning_rate": 1e-5,
    "group_size": 8,
    "max_new_tokens": 2048,
}
PRESETS = {"toy": toy.PRESET, "rearank": REARANK, "rank-r1": RANK_R1}


Settings = TypeVar("Settings", bound=RunSettings)


def fill_in(settings: Settings, updates_per_batch: int = 1) -> Settings:
    """With what the preset prepares; UserError where settings do not go together."""
    world = dist.get_world_size()
    if settings.batch_size < world * updates_per_batch:
        raise UserError(
            f"--batch_size {settings.batch_size} must be at least --updates_per_batch "
            f"{updates_per_batch} times the number of processes, {world}"
        )
    if settings.triples and (settings.candidates or settings.qrels):
        raise UserError("give --triples, or --candidates and --qrels, not both")
    if settings.tensorboard:
        require_tensorboard()
    if settings.preset == "toy":
        torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    if_first(lambda: prepare(settings))
    # What the command line says of these stays.
    prepared, default = prepare(settings), type(settings)()
    unset = {k: v for k, v in prepared.items() if getattr(settings, k) == getattr(default, k)}
    return replace(settings, **unset)


def prepare(settings: RunSettings) -> dict[str, str]:
    """The settings that point to what a preset trains on, which is made on its first use."""
    if settings.preset == "toy":
        return toy.prepare(settings.seed, settings.task)
    if settings.preset == "rearank" and not (settings.candidates or settings.triples):
        sources, how = SourceSettings(), DataSettings()
        folder = training_folder(TRAINED_ON, sources, how)
        if not is_whole(folder):
            build_training_set(TRAINED_ON, sources, how)
        return {"candidates": str(folder / CANDIDATES), "qrels": str(folder / QRELS)}
    return {}
