"""What several test files share: the real data, a small made-up collection, a tiny model of it."""

import os
import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_model import save_tiny_model

from engine.sampler import Sampler
from sources import formats, trec
from sources.formats import Candidates, Passage

torch.set_num_threads(1)  # the models are tiny, and more threads only wait for each other
DATA = Path(os.environ.get("REARANK_DATA", Path(__file__).parents[2] / "shared" / "data"))
WORDS = "tide moon sea salt wind rain cloud sun storm wave sand rock fish boat net reef".split()


def real(name: str) -> Path:
    folder = DATA / name
    if not folder.exists():
        pytest.skip(f"no real data at {folder} (set REARANK_DATA)")
    return folder


@pytest.fixture(scope="session")
def dl19() -> tuple[Path, Path]:
    """(candidates, qrels) of TREC DL 2019."""
    return real("dl19") / "candidates.bm25-top100.json", real("dl19") / "qrels.txt"


@pytest.fixture(scope="session")
def dl21() -> tuple[Path, Path]:
    """(candidates, qrels) of TREC DL 2021."""
    return real("dl21") / "candidates.bm25-top100.json", real("dl21") / "qrels.txt"


@pytest.fixture(scope="session")
def bright() -> Path:
    """The folder of two BRIGHT splits: run.SPLIT.txt of another retriever, qrels.SPLIT.txt."""
    return real("bright")


@pytest.fixture(scope="session")
def dl19_read(dl19) -> tuple[list[Candidates], trec.Qrels]:
    return formats.read_candidates(dl19[0]), trec.read_qrels(dl19[1])


def collection(queries: int = 6, depth: int = 9) -> tuple[list[Candidates], trec.Qrels]:
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
    formats.write_candidates(candidates, folder / "candidates.jsonl")
    trec.write_qrels(qrels, folder / "qrels.txt")
    return folder / "candidates.jsonl", folder / "qrels.txt"


@pytest.fixture(scope="session")
def tiny(small, tmp_path_factory) -> Path:
    """A model that answers windows of 4 in the right form, most of the time."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(formats.read_candidates(small[0]), folder, steps=120, size=4)
    return folder


@pytest.fixture
def pull_the_plug():
    """Inside pull_the_plug(n), every evaluation dies after n batches of answered windows."""

    @contextmanager
    def pulled(after: int):
        collect, calls = Sampler.collect, []

        def fail_later(self):
            calls.append(1)
            if len(calls) > after:
                raise OSError("the plug is pulled")
            return collect(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "collect", fail_later)
            with pytest.raises(SystemExit, match="the plug is pulled"):
                yield patch

    return pulled


@pytest.fixture
def process_group():
    """A group of one, as `python grpo.py` starts it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
