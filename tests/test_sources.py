"""Datasets by name, and first stages of one's own: runs, collections, tables, BEIR folders."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_bm25 import build_index

import first_stage
from settings import SourceSettings, UserError
from sources import load as loading
from sources import lucene, testsets
from sources.collection import collection_texts
from sources.formats import read_candidates, write_candidates
from sources.load import load
from sources.registry import DATASETS, GROUPS, expand
from sources.tables import read_table
from sources.trec import read_qrels, write_qrels, write_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("REARANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------ the registry


def test_every_name_is_one_that_pyserini_knows():
    lucene.load_lucene()
    from jnius import autoclass
    from pyserini.prebuilt_index_info import TF_INDEX_INFO, TF_INDEX_INFO_BEIR, TF_INDEX_INFO_BRIGHT
    from pyserini.search import _base

    excludable = autoclass("io.anserini.eval.ExcludeDocs").isExcludable
    for name, dataset in DATASETS.items():
        assert dataset.index in TF_INDEX_INFO, name
        assert dataset.topics in _base.topics_mapping, name
        assert dataset.qrels in _base.qrels_mapping, name
        assert bool(dataset.excluded) == excludable(dataset.topics), name
    # and none of its public ones is left out
    ours = {dataset.index for dataset in DATASETS.values()}
    assert {name for name in TF_INDEX_INFO_BEIR if name.endswith(".flat")} <= ours
    assert set(TF_INDEX_INFO_BRIGHT) <= ours


# Of the paper's tables: BRIGHT split by split, and BEIR.
PAPERS_BM25 = {
    "bright": [18.2, 27.9, 16.4, 13.4, 10.9, 16.3, 16.1, 4.3, 24.7, 6.5, 2.1, 7.3],
    "beir": {"covid": 59.47, "dbpedia": 31.80, "scifact": 67.89, "signal": 33.05, "news": 39.52,
             "robust04": 40.70},
}  # fmt: skip


def test_the_papers_bm25_is_pyserinis_on_the_names_in_the_registry():
    """By the figures that pyserini itself gives for these indexes, topics and judgments."""
    import pyserini

    def figures(suite: str) -> dict[str, float]:
        path = Path(pyserini.__file__).parent / "2cr" / f"{suite}.yaml"
        first = yaml.safe_load(path.read_text())["conditions"][0]
        assert "--bm25 --remove-query" in first["command"]
        assert f"--index {suite}" in first["command"] and "original" not in first["command"]
        return {d["dataset"]: 100 * d["scores"][0]["nDCG@10"] for d in first["datasets"]}

    bright = figures("bright")
    for name, papers in zip(GROUPS["bright"], PAPERS_BM25["bright"], strict=True):
        assert bright[DATASETS[name].topics.removeprefix("bright-")] == pytest.approx(
            papers, abs=0.06
        )
    beir = figures("beir")
    for name, papers in PAPERS_BM25["beir"].items():
        split = DATASETS[name].qrels.removeprefix("beir-v1.0.0-").removesuffix("-test")
        assert beir[split] == pytest.approx(papers, abs=0.01)


def test_groups():
    assert expand(["dl", "dl19", "scifact"]) == ["dl19", "dl20", "dl21", "dl22", "dl23", "scifact"]
    assert len(expand(["beir"])) == 29 and len(expand(["bright"])) == 12
    assert expand(["paper"])[:9] == (
        "dl19 dl20 covid nfcorpus dbpedia scifact signal news robust04".split()
    )
    assert len(expand(["paper"])) == 21 and expand([]) == []
    with pytest.raises(
        UserError, match=r"no dataset 'dl18': there are dl19, .*the groups dl, beir"
    ):
        expand(["dl18"])


FIRST_DAY_SCRIPT = """
import json
from settings import SourceSettings
from sources import lucene, testsets
from sources.load import load

def found(name):
    judged = load(name, SourceSettings())
    passages = [[(p.docid, p.text) for p in query.passages] for query in judged.candidates]
    return {"passages": passages, "qrels": judged.qrels}

said = {"found": [found("bright-pony"), found("bright-aops")], "missing": {}}
for name in ("dl20", "covid"):
    try:
        found(name)
    except ValueError as error:
        said["missing"][name] = str(error)

def no_java():
    raise AssertionError("Java was started")

lucene.load_lucene = testsets.load_lucene = no_java
said["again"] = [found("bright-pony"), found("bright-aops")]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def first_day(tmp_path_factory) -> dict:
    """What happens to a user without a network, in whose cache pyserini has all of two datasets and
    nothing of the others."""
    home = tmp_path_factory.mktemp("home")
    (home / "bright-pony").mkdir()  # a folder of that name where the program runs is no index
    for name, docs in (
        ("bright-pony", {"a": "ponies graze", "b c": "a pony"}),
        ("bright-aops", {"q1": "pony", "d1": "pony problem", "d2": "pony"}),
    ):
        documents = [{"id": docid, "contents": text} for docid, text in docs.items()]
        index = build_index(tmp_path_factory.mktemp(name), documents, "-storeRaw")
        named = {part.flag: part.path.name for part in testsets.parts(DATASETS[name])}
        cache = home / ".cache" / "pyserini"
        (cache / "indexes").mkdir(parents=True, exist_ok=True)
        shutil.copytree(index, cache / "indexes" / named["--index"])
        (files := cache / "topics-and-qrels").mkdir(exist_ok=True)
        (files / named["--topics"]).write_bytes(gzip.compress(b"q1\tpony\nq9\tunjudged\n"))
        (files / named["--qrels"]).write_text("q1\t0\tb c\t1\nq1\t0\td2\t1\n")
        if "--exclude" in named:
            (files / named["--exclude"]).write_text("q1 d1\n")
    java = f"-Duser.home={home} -Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=9"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "JAVA_TOOL_OPTIONS": java,
           "https_proxy": "http://127.0.0.1:9", "REARANK_CACHE": str(home / "ours"),
           "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-c", FIRST_DAY_SCRIPT]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_pyserini_has_is_searched_once(first_day):
    pony, aops = first_day["found"]
    assert pony["passages"] == [[["b c", "a pony"], ["a", "ponies graze"]]]
    assert aops["passages"] == [[["d2", "pony"]]]  # d1 is excluded, q1 the query itself
    assert pony["qrels"] == aops["qrels"] == {"q1": {"b c": 1, "d2": 1}}
    assert first_day["again"] == first_day["found"]


def check_message(name: str, message: str) -> None:
    first, *_, last = message.split("\n")
    assert first.startswith(f"{name} is not on this machine, and cannot be downloaded: no ")
    for flag in ("--index", "--topics", "--qrels"):
        assert f"\n  {flag:9} https://" in message, name
    assert ("  --exclude https://" in message) == bool(DATASETS[name].excluded)
    assert "/.cache/pyserini/topics-and-qrels/" in message
    assert "/indexes/lucene-inverted." in message
    assert last.startswith("Or give a first stage of your own: --candidates FILE --qrels FILE")


def test_without_a_network_each_dataset_says_what_to_do(first_day, monkeypatch, tmp_path):
    assert first_day["missing"].keys() == {"dl20", "covid"}
    for name, message in first_day["missing"].items():
        check_message(name, message)
        assert "Error downloading topics from https://" in message
    # What the others say, without asking: nothing of them is in this cache.
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path))
    files = tmp_path / ".cache" / "pyserini" / "topics-and-qrels"
    monkeypatch.setattr(testsets, "cached_file", files.joinpath)
    for name, dataset in DATASETS.items():
        error = lucene.NotDownloaded("no topics")
        check_message(name, str(testsets.what_is_missing(name, dataset, set(), error)))
        error = testsets.what_is_missing(name, dataset, {"--topics", "--index"}, error)
        assert "  --topics " not in str(error) and "  --index " not in str(error)


# --------------------------------------------------------------------- runs, topics and collections

QUERIES = {"1": "tide moon", "2": "salt mines"}
TEXTS = {"a": "The moon pulls.", "b b": "Salt in hills.", "c": "Rain", "2": "salt mines"}
RUN = {"1": ["a", "c", "b b"], "2": ["2", "b b", "a"]}


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A run with its topics and judgments."""
    write_run(RUN, tmp_path / "run.txt", "t")
    write_qrels({"1": {"a": 1}, "2": {"b b": 2}}, tmp_path / "qrels.txt")
    (tmp_path / "topics.tsv").write_text("".join(f"{q}\t{t}\n" for q, t in QUERIES.items()))
    return {name: str(tmp_path / f"{name}.{kind}")
            for name, kind in (("run", "txt"), ("qrels", "txt"), ("topics", "tsv"))}  # fmt: skip


def jsonl(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


COLLECTIONS = {
    "corpus.jsonl": jsonl(*({"_id": d, "title": "", "text": t} for d, t in TEXTS.items())),
    "docs.jsonl": jsonl(*({"id": d, "contents": t} for d, t in TEXTS.items())),
    "docs.json": json.dumps([{"id": d, "contents": t} for d, t in TEXTS.items()]),
    "v2.jsonl": jsonl(*({"pid": d, "passage": t, "docid": "page"} for d, t in TEXTS.items())),
    "collection.tsv": "".join(f"{d}\t{t}\n" for d, t in TEXTS.items()),
}


@pytest.mark.parametrize("name", COLLECTIONS)
@pytest.mark.parametrize("way", ["file", "packed", "folder"])
def test_a_run_gets_its_texts_from_a_collection(tmp_path, files, name, way):
    folder = tmp_path / "collection"
    folder.mkdir()
    content = COLLECTIONS[name].encode()
    if way == "packed":
        name, content = f"{name}.gz", gzip.compress(content)
    (folder / name).write_bytes(content)
    (folder / "README.md").write_text("no text of it")
    where = folder if way == "folder" else folder / name
    judged = load("", SourceSettings(**files, collection=str(where)))
    assert [(q.qid, q.query) for q in judged.candidates] == list(QUERIES.items())
    for query in judged.candidates:
        assert [p.docid for p in query.passages] == RUN[query.qid]
        assert [p.score for p in query.passages] == [3.0, 2.0, 1.0]
        assert all(p.text == TEXTS[p.docid] for p in query.passages)
    assert judged.qrels == {"1": {"a": 1}, "2": {"b b": 2}}


def test_titles_are_shown_whatever_the_form(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        jsonl(
            {"_id": "1", "title": "Tides", "text": "pull"},
            {"id": "2", "contents": "T\nx", "title": "T"},
        )
    )
    (tmp_path / "twice.tsv").write_text("a\tone\na\tone\na\ttwo\nb\tlast\n")
    with pytest.raises(UserError, match=r"twice\.tsv:3: docid a had another text before"):
        collection_texts(tmp_path / "twice.tsv", ["a", "b"])
    assert collection_texts(tmp_path / "a.jsonl", ["1", "2"]) == {
        "1": "Title: Tides Content: pull", "2": "T\nx",
    }  # fmt: skip


def test_without_a_model_a_run_needs_neither_topics_nor_texts(files):
    del files["topics"]
    judged = load("", SourceSettings(**files, top_k=2), texts=False)
    assert [(q.qid, q.query) for q in judged.candidates] == [("1", ""), ("2", "")]
    assert [[p.docid for p in q.passages] for q in judged.candidates] == [["a", "c"], ["2", "b b"]]


def test_docids_are_left_out_by_a_file(tmp_path, files):
    (tmp_path / "exclude.txt").write_text("1 a\n2 b b\n3 x\n")
    given = SourceSettings(**files, exclude=str(tmp_path / "exclude.txt"), top_k=2)
    judged = load("", given, texts=False)
    assert [[p.docid for p in q.passages] for q in judged.candidates] == [["c", "b b"], ["2", "a"]]


def test_a_named_dataset_leaves_out_the_query_itself_and_what_pyserini_excludes(files, monkeypatch):
    monkeypatch.setattr(loading, "pyserini_excluded", {"bright-aops": {"1": {"c"}}}.get)
    for name, expected in (
        ("bright-aops", [["a", "b b"], ["b b", "a"]]),
        ("scifact", [["a", "c", "b b"], ["b b", "a"]]),
        ("dl19", [["a", "c", "b b"], ["2", "b b", "a"]]),
    ):
        judged = load(name, SourceSettings(**files), texts=False)
        assert [[p.docid for p in q.passages] for q in judged.candidates] == expected
        assert judged.name == name and judged.relevant == (2 if name == "dl19" else 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"topics": ""}, r"the queries are missing: give --topics FILE"),
        ({"collection": ""}, r"the texts are missing: give --index or --collection"),
        (
            {"collection": "{}/few.tsv"},
            r"few\.tsv: 2 of 4 passages are not in it \(the first: docid c",
        ),
        ({"collection": "{}/bad.tsv"}, r"bad\.tsv:2: expected 'docid<TAB>text', found 'alone'"),
        ({"collection": "{}/bad.jsonl"}, r"bad\.jsonl:1: field '_id' is missing"),
        ({"collection": "{}/empty"}, r"empty: no collection in this folder"),
        ({"topics": "{}/one.tsv"}, r"1 queries of .*run\.txt are not among the topics .*qid 2"),
        ({"qrels": "{}/other.txt"}, r"run\.txt and the qrels have no query in common"),
        ({"run": "", "collection": ""}, r"--topics with --index or --collection"),
        ({"table": "x.csv"}, r"give --table or --run, not both"),
        ({"candidates": "x.json"}, r"give --candidates or --run, not both"),
        ({"index": "x"}, r"give --index or --collection, not both"),
        ({"beir": "{}/empty"}, r"--beir .*empty: no corpus\.jsonl in it"),
        ({"beir": "{}/half", "qrels": ""}, r"half: no qrels/test\.tsv in it: give it by --qrels F"),
    ],
)
def test_what_is_missing_or_too_much_is_said(tmp_path, files, change, message):
    (tmp_path / "all.tsv").write_text(COLLECTIONS["collection.tsv"])
    (tmp_path / "few.tsv").write_text("a\tx\n2\ty\n")
    (tmp_path / "bad.tsv").write_text("zz\tx\nalone\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "one.tsv").write_text("1\tx\n")
    (tmp_path / "other.txt").write_text("7 0 d 1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "corpus.jsonl").touch()
    given = files | {"collection": str(tmp_path / "all.tsv")}
    given |= {name: value.format(tmp_path) for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        load("", SourceSettings(**given))


# -------------------------------------------------------------------------- indexes of one's own


def test_bm25_over_a_collection_is_searched_once(tmp_path, files, cache, monkeypatch):
    (tmp_path / "corpus.jsonl").write_text(COLLECTIONS["corpus.jsonl"])
    given = SourceSettings(
        topics=files["topics"], qrels=files["qrels"], collection=str(tmp_path / "corpus.jsonl")
    )
    first = load("", given)
    assert [p.docid for p in first.candidates[0].passages] == ["a"]
    assert {p.docid for p in first.candidates[1].passages} == {"2", "b b"}
    manifest = json.loads(next(cache.glob("bm25-topics-*/manifest.json")).read_text())
    assert manifest["made from"]["BM25"] == {"k1": 0.9, "b": 0.4, "depth": 100}
    assert "pyserini" in manifest["made by"]["versions"]

    def no_java():
        raise AssertionError("Java was started")

    with monkeypatch.context() as patch:
        patch.setattr(lucene, "load_lucene", no_java)
        patch.setattr(testsets, "load_lucene", no_java)
        assert load("", given) == first
        (one,) = load("", replace(given, top_k=1)).candidates[1:]
        assert one.passages == first.candidates[1].passages[:1]
        (tmp_path / "corpus.jsonl").write_text(COLLECTIONS["docs.jsonl"])  # another collection
        with pytest.raises(AssertionError, match="Java was started"):
            load("", given)
    assert sorted(p.name[:12] for p in cache.iterdir()) == ["bm25-topics-", "index-corpus"]


def test_where_nothing_can_be_kept_it_is_said_and_done(tmp_path, files, capsys, monkeypatch):
    (tmp_path / "corpus.jsonl").write_text(COLLECTIONS["corpus.jsonl"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REARANK_CACHE", str(tmp_path / "file" / "cache"))
    given = SourceSettings(topics=files["topics"], collection=str(tmp_path / "corpus.jsonl"))
    assert [q.qid for q in load("", given).candidates] == ["1", "2"]
    assert "nothing is kept for the next time" in capsys.readouterr().err


def test_a_beir_folder_is_indexed_searched_and_written(tmp_path, monkeypatch, capsys):
    beir = tmp_path / "mine"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text(
        jsonl(
            {"_id": "d1", "title": "Tides", "text": "the moon pulls"},
            {"_id": "d2", "title": "", "text": "salt"},
        )
    )
    (beir / "queries.jsonl").write_text(
        jsonl(
            {"_id": "q1", "text": "tides"},
            {"_id": "q2", "text": "salt"},
            {"_id": "train", "text": "moon"},
        )
    )
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n")
    out = tmp_path / "out"
    run_first_stage(monkeypatch, "--beir", beir, "--output_dir", out)
    assert "2 queries, 2 of them judged; written" in capsys.readouterr().out
    one, two = read_candidates(out / "candidates.jsonl")
    assert [(p.docid, p.text) for p in one.passages] == [
        ("d1", "Title: Tides Content: the moon pulls")
    ]
    assert [(p.docid, p.text) for p in two.passages] == [("d2", "salt")]
    assert read_qrels(out / "qrels.txt") == {"q1": {"d1": 1}, "q2": {"d2": 1}}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["queries"] == 2 and set(manifest["sha256"]) == {"candidates.jsonl", "qrels.txt"}
    assert manifest["made from"]["beir"]["path"] == str(beir)
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\ntrain\td1\t1\n")
    flags = ["--beir", beir, "--qrels", beir / "qrels" / "dev.tsv", "--output_dir"]
    with pytest.raises(SystemExit, match="out holds what was made from another source"):
        run_first_stage(monkeypatch, *flags, out)
    run_first_stage(monkeypatch, *flags, tmp_path / "dev")
    assert [q.qid for q in read_candidates(tmp_path / "dev" / "candidates.jsonl")] == ["train"]


def run_first_stage(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["first_stage.py", *map(str, args)])
    first_stage.main()


def test_first_stage_without_judgments_and_into_a_foreign_folder(tmp_path, files, monkeypatch):
    (tmp_path / "corpus.jsonl").write_text(COLLECTIONS["corpus.jsonl"])
    args = ["--topics", files["topics"], "--run", files["run"], "--collection",
            tmp_path / "corpus.jsonl"]  # fmt: skip
    run_first_stage(monkeypatch, *args, "--output_dir", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["candidates.jsonl", "manifest.json"]
    with pytest.raises(SystemExit, match=r"holds something else .corpus\.jsonl.: give another"):
        run_first_stage(monkeypatch, *args, "--output_dir", tmp_path)
    with pytest.raises(SystemExit, match="--topics is of one dataset, and 2 are named"):
        run_first_stage(monkeypatch, "dl19", "dl20", *args)


# ------------------------------------------------------------------------------------------ tables


def test_a_table_is_candidates_and_judgments(tmp_path):
    (tmp_path / "mine.csv").write_text(
        'query,passage,label\ntides,The moon pulls.,2\ntides,"Salt, in\nhills",0\n'
        "salt,The moon pulls.,\n"
        "salt,Rain,-1\n"
    )
    candidates, qrels = read_table(tmp_path / "mine.csv")
    assert [(q.qid, q.query, [p.docid for p in q.passages]) for q in candidates] == [
        ("q1", "tides", ["d1", "d2"]), ("q2", "salt", ["d1", "d3"]),
    ]  # fmt: skip
    assert candidates[0].passages[1].text == "Salt, in\nhills"
    assert qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d3": -1}}
    write_candidates(candidates, tmp_path / "again.jsonl")
    assert read_candidates(tmp_path / "again.jsonl") == candidates
    (tmp_path / "mine.tsv").write_text(
        'tides\tthe "moon\t2\n\ntides\tsalt\t0\n'
    )  # no names, quotes
    candidates, qrels = read_table(tmp_path / "mine.tsv")
    assert [p.text for p in candidates[0].passages] == ['the "moon', "salt"]
    (tmp_path / "ids.tsv").write_text("label\tqid\tpassage\tdocid\tquery\n1\t7\tx\td 1\ttides\n")
    candidates, qrels = read_table(tmp_path / "ids.tsv")
    assert candidates[0].qid == "7" and qrels == {"7": {"d 1": 1}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ": the file is blank"),
        ("query,passage,label\n", ": no row under the names"),
        ("query,passage\na,b\n", ":1: expected query, passage, label, or a row of names"),
        ("a,b,1\na,c\n", ":2: 2 columns, expected query, passage, label"),
        ("a,b,good\n", ":1: label should be an integer"),
        ("a,b,1\na,b,0\n", ":2: the query had this passage before"),
        ("a,b,1\n,b,0\n", ":2: the query or the passage is empty"),
        ("query,passage,label,grade\na,b,1,2\n", ":1: unknown column 'grade'"),
        ("query,passage,label,qid\na,b,1,7\nb,c,1,7\n", ":3: qid 7 had another query before"),
        ("query,passage,label,docid\na,b,1,7\na,c,1,7\n", ":3: docid 7 had another passage"),
        ('a,"b,1\n', ":1: unexpected end of data"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match=r"mine\.csv" + message):
        read_table(tmp_path / "mine.csv")
    with pytest.raises(UserError, match=r"x\.xlsx: a table ends in \.csv or \.tsv"):
        read_table("x.xlsx")
