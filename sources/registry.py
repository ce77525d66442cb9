"""The datasets that are known by name: where pyserini keeps each, and how it is measured."""

from collections.abc import Iterable
from dataclasses import dataclass

from settings import UserError


@dataclass(frozen=True)
class Dataset:
    """One test collection, by its names in pyserini; they stand in three lists, and may differ."""

    index: str
    topics: str
    qrels: str
    relevant: int = 1  # the least grade that is relevant, for the measures that know yes and no
    drop_query: bool = False  # a passage whose docid is the qid is the query itself
    excluded: str = ""  # the list of docids that are no candidates of a query


def beir(name: str) -> Dataset:
    """Of BEIR, on the index of title and text as one field."""
    judged = f"beir-v1.0.0-{name}-test"
    return Dataset(f"beir-v1.0.0-{name}.flat", judged, judged, drop_query=True)


def bright(name: str, excluded: bool = False) -> Dataset:
    """Of BRIGHT, queries and judgments as pyserini's own BM25 figures are for: those are the
    paper's, split by split (docs/data.md)."""
    name = f"bright-{name}"
    return Dataset(name, name, name, drop_query=True, excluded=name if excluded else "")


V1, V2 = "msmarco-v1-passage", "msmarco-v2-passage"
DATASETS = {
    # TREC Deep Learning, passage task: 0 to 3, and NIST counts 2 as relevant
    "dl19": Dataset(V1, "dl19-passage", "dl19-passage", relevant=2),
    "dl20": Dataset(V1, "dl20", "dl20-passage", relevant=2),
    "dl21": Dataset(V2, "dl21", "dl21-passage", relevant=2),
    "dl22": Dataset(V2, "dl22", "dl22-passage", relevant=2),
    "dl23": Dataset(V2, "dl23", "dl23-passage", relevant=2),
    # BEIR: the seven of the paper's table, then the others
    "covid": beir("trec-covid"),
    "nfcorpus": beir("nfcorpus"),
    "dbpedia": beir("dbpedia-entity"),
    "scifact": beir("scifact"),
    "signal": beir("signal1m"),
    "news": beir("trec-news"),
    "robust04": beir("robust04"),
    "arguana": beir("arguana"),
    "bioasq": beir("bioasq"),
    "climate-fever": beir("climate-fever"),
    "cqadupstack-android": beir("cqadupstack-android"),
    "cqadupstack-english": beir("cqadupstack-english"),
    "cqadupstack-gaming": beir("cqadupstack-gaming"),
    "cqadupstack-gis": beir("cqadupstack-gis"),
    "cqadupstack-mathematica": beir("cqadupstack-mathematica"),
    "cqadupstack-physics": beir("cqadupstack-physics"),
    "cqadupstack-programmers": beir("cqadupstack-programmers"),
    "cqadupstack-stats": beir("cqadupstack-stats"),
    "cqadupstack-tex": beir("cqadupstack-tex"),
    "cqadupstack-unix": beir("cqadupstack-unix"),
    "cqadupstack-webmasters": beir("cqadupstack-webmasters"),
    "cqadupstack-wordpress": beir("cqadupstack-wordpress"),
    "fever": beir("fever"),
    "fiqa": beir("fiqa"),
    "hotpotqa": beir("hotpotqa"),
    "nq": beir("nq"),
    "quora": beir("quora"),
    "scidocs": beir("scidocs"),
    "touche": beir("webis-touche2020"),
    # BRIGHT
    "bright-biology": bright("biology"),
    "bright-earth-science": bright("earth-science"),
    "bright-economics": bright("economics"),
    "bright-psychology": bright("psychology"),
    "bright-robotics": bright("robotics"),
    "bright-stackoverflow": bright("stackoverflow"),
    "bright-sustainable-living": bright("sustainable-living"),
    "bright-pony": bright("pony"),
    "bright-leetcode": bright("leetcode", excluded=True),
    "bright-aops": bright("aops", excluded=True),
    "bright-theoremqa-theorems": bright("theoremqa-theorems"),
    "bright-theoremqa-questions": bright("theoremqa-questions", excluded=True),
}

DL = [name for name in DATASETS if name.startswith("dl")]
BEIR = [name for name, dataset in DATASETS.items() if dataset.index.startswith("beir")]
BRIGHT = [name for name in DATASETS if name.startswith("bright")]
PAPER = ["dl19", "dl20", *BEIR[:7], *BRIGHT]  # the columns of REARANK's tables
GROUPS = {"dl": DL, "beir": BEIR, "bright": BRIGHT, "paper": PAPER}


def expand(names: Iterable[str]) -> list[str]:
    """The datasets that names and groups mean, each once. UserError for a name not known."""
    datasets: dict[str, None] = {}
    for name in names:
        if name not in GROUPS and name not in DATASETS:
            raise UserError(
                f"no dataset {name!r}: there are {', '.join(DATASETS)}; and the groups "
                f"{', '.join(GROUPS)}"
            )
        datasets |= dict.fromkeys(GROUPS.get(name, [name]))
    return list(datasets)
