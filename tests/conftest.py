"""What several test files share: the real data, a small made-up collection, a tiny model of it."""

import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_model import save_tiny_model

import data
from data import Candidates, Passage

torch.set_num_threads(1)  # the models are tiny, and more threads only wait for each other
DATA = Path(os.environ.get("REARANK_DATA", Path(__file__).parents[2] / "shared" / "data"))
WORDS = "tide moon sea salt wind rain cloud sun storm wave sand rock fish boat net reef".split()


@pytest.fixture(scope="session")
def dl19() -> tuple[Path, Path]:
    """(candidates, qrels) of TREC DL 2019."""
    folder = DATA / "dl19"
    if not folder.exists():
        pytest.skip(f"no real data at {folder} (set REARANK_DATA)")
    return folder / "candidates.bm25-top100.json", folder / "qrels.txt"


def collection(queries: int = 6, depth: int = 9) -> tuple[list[Candidates], data.Qrels]:
    rng = random.Random(0)
    candidates, qrels = [], {}
    for q in range(queries):
        texts = [" ".join(rng.choices(WORDS, k=8)) for _ in range(depth)]
        passages = tuple(Passage(f"d{q}-{i}", t, float(depth - i)) for i, t in enumerate(texts))
        candidates.append(Candidates(f"q{q}", " ".join(rng.choices(WORDS, k=3)), passages))
        qrels[f"q{q}"] = {p.docid: rng.choice([0, 0, 1, 2, 3]) for p in passages}
        qrels[f"q{q}"][passages[0].docid] = 1  # none is without a relevant passage
    return candidates, qrels


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """(candidates, qrels) of a collection of 6 queries with 9 passages each."""
    folder = tmp_path_factory.mktemp("small")
    candidates, qrels = collection()
    data.write_candidates(candidates, folder / "candidates.jsonl")
    data.write_qrels(qrels, folder / "qrels.txt")
    return folder / "candidates.jsonl", folder / "qrels.txt"


@pytest.fixture(scope="session")
def tiny(small, tmp_path_factory) -> Path:
    """A model that answers windows of 4 in the right form, most of the time."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(data.read_candidates(small[0]), folder, steps=120, size=4)
    return folder


@pytest.fixture
def process_group():
    """A group of one, as `python grpo.py` starts it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
