"""Settings by name, for `grpo.py --preset NAME`: the papers' runs, and the offline world.

What a paper does not give keeps this project's default, and is marked so.
"""

import toy
from data import REARANK as REARANK_DATASETS
from data import build_training_set, training_folder
from settings import DataSettings, SourceSettings, TrainSettings
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


def prepare(settings: TrainSettings) -> dict[str, str]:
    """The settings that point to what a preset trains on, which is made on its first use."""
    if settings.preset == "toy":
        return toy.prepare(settings.seed, settings.task)
    if settings.preset == "rearank" and not (settings.candidates or settings.triples):
        sources, how = SourceSettings(), DataSettings()
        folder = training_folder(REARANK_DATASETS, sources, how)
        if not is_whole(folder):
            build_training_set(REARANK_DATASETS, sources, how)
        return {"candidates": str(folder / CANDIDATES), "qrels": str(folder / QRELS)}
    return {}
