"""data.py builds the training set, and what is measured is not trained on; presets."""

import json
import re
import sys
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import pytest

import data
import grpo
import presets
import toy
from data import refuse_overlap, training_set
from settings import DataSettings, SourceSettings, TrainSettings
from sources.formats import read_candidates, write_candidates
from sources.load import JudgedSet
from sources.lucene import NotDownloaded
from sources.overlap import nearly_same
from sources.trec import read_qrels, write_qrels
from sources.write import write_set


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing of dl19 and dl20 is here."""

    def topics(name: str):
        raise NotDownloaded(f"no topics {name}")

    monkeypatch.setattr(data, "pyserini_topics", topics)


def run(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    data.main()


def test_dl21_as_files(monkeypatch, capsys, tmp_path, dl21):
    out = tmp_path / "set"
    run(monkeypatch, "--candidates", dl21[0], "--qrels", dl21[1], "--output_dir", out)
    said = capsys.readouterr()
    rows = re.findall(r"^(.*?)  +([\d,]+) +(\S.*)$", said.out, re.M)
    assert [(name.strip(), here, paper) for name, here, paper in rows] == [
        ("judged queries", "53", "211"),
        ("windows drawn", "2,650", "10,550"),
        ("with a relevant passage", "2,563", "not said"),
        ("and nDCG@10 >= 0.1 of the order given", "1,840", "12k"),
        ("queries left", "53", "179"),
    ]
    assert "not compared with the queries of dl19, which are not here" in said.err
    assert "dl20" in said.err and "--evaluation FILE" in said.err
    candidates, qrels = read_candidates(out / "candidates.jsonl"), read_qrels(out / "qrels.txt")
    assert candidates == read_candidates(dl21[0]) and qrels == read_qrels(dl21[1])
    assert len(training_set(candidates, qrels)) == 1840  # what grpo.py draws from them
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["queries"], manifest["passages"], manifest["judgments"]) == (53, 5300, 10828)
    for name, digest in manifest["sha256"].items():
        assert sha256((out / name).read_bytes()).hexdigest() == digest
    made_from = manifest["made from"]
    assert made_from["candidates"]["sha256"] == sha256(dl21[0].read_bytes()).hexdigest()
    assert manifest["training set"]["draws"] == 50 and made_from["datasets"] == {}
    assert "git" in manifest["made by"]
    run(monkeypatch, "--candidates", dl21[0], "--qrels", dl21[1], "--output_dir", out,
        "--ndcg_filter", "best")  # fmt: skip
    best = len(training_set(candidates, qrels, ndcg_filter="best"))
    assert re.search(rf"of the best order +{best:,} +12k$", capsys.readouterr().out, re.M)


def test_evaluation_queries_are_refused(monkeypatch, capsys, tmp_path, dl19, dl21):
    """dl19's, one of them reworded, among dl21's."""
    queries = read_candidates(dl21[0])
    leaked = read_candidates(dl19[0])[:2]
    reworded = replace(leaked[1], query=f"The {leaked[1].query.upper()}?")
    write_candidates([*queries, leaked[0], reworded], tmp_path / "train.jsonl")
    qrels = read_qrels(dl21[1]) | {q.qid: {q.passages[0].docid: 1} for q in leaked}
    write_qrels(qrels, tmp_path / "train.txt")
    flags = ["--candidates", tmp_path / "train.jsonl", "--qrels", tmp_path / "train.txt",
             "--evaluation", dl19[0], "--output_dir", tmp_path / "out"]  # fmt: skip
    with pytest.raises(SystemExit, match="2 training queries are those of the evaluation") as stop:
        run(monkeypatch, *flags)
    for query in leaked:
        assert query.query[:50] in str(stop.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "topics.tsv").write_text("".join(f"{q.qid}\t{q.query}\n" for q in leaked))
    flags[5] = tmp_path / "topics.tsv"  # a topics file does, too
    with pytest.raises(SystemExit, match="2 training queries are those of the evaluation"):
        run(monkeypatch, *flags)
    monkeypatch.setattr(data, "pyserini_topics", lambda name: {"1": leaked[0].query})
    with pytest.raises(SystemExit, match=r"1 training queries (.|\n)* is dl19's"):
        run(monkeypatch, *flags[:4], "--output_dir", tmp_path / "out")
    run(monkeypatch, *flags, "--allow_overlap", "true")
    assert "training queries are those" in capsys.readouterr().err
    assert len(read_candidates(tmp_path / "out" / "candidates.jsonl")) == 55


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("what is an active margin", "What is a active margin?", True),
        (
            "types of dysarthria from cerebral palsy",
            "type of dysarthria, from cerebral palsy",
            True,
        ),
        ("café au lait", "CAFE AU LAIT", True),
        ("how long is life cycle of flea", "how long is the life cycle of a flea", True),
        ("population of france 2010", "population of france 2011", False),
        ("do goldfish grow", "do cats grow", False),
        ("rivers and castles", "rivers and beetles", False),
        ("潮汐是什么", "潮汐是什么!", True),
    ],
)
def test_nearly_the_same(one, other, same):
    assert nearly_same([one], ["another one", other]) == ([(one, other)] if same else [])


def test_real_queries_are_not_taken_for_each_other(dl19_read, dl21):
    one, two = ([q.query for q in qs] for qs in (dl19_read[0], read_candidates(dl21[0])))
    assert nearly_same(one, two) == []
    assert nearly_same(one, one) == [(query, query) for query in one]
    for i, query in enumerate(one + two):
        assert nearly_same([query], (one + two)[:i]) == []


def test_the_offline_worlds_queries_are_not_taken_for_each_other():
    train, held_out, _ = toy.make_world(0)
    refuse_overlap((q.query for q in train), {"held out": [q.query for q in held_out]}, False)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--candidates", "{0}"], r"no query has both candidates and judgments \(--qrels FILE\)"),
        (["dl21", "--candidates", "no.json", "--qrels", "{1}"], "no.json"),
        (["dl21", "dl22", "--qrels", "{1}"], "--qrels is of one dataset, and 2 are named"),
        (["nothing"], "no dataset 'nothing'"),
        (["--candidates", "{0}", "--qrels", "{1}", "--evaluation", "no.tsv"], "no.tsv"),
    ],
)
def test_wrong_input_is_named(monkeypatch, small, args, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *(arg.format(*small) for arg in args))


def test_several_datasets_become_one_set(monkeypatch, capsys, tmp_path, small):
    queries, qrels = read_candidates(small[0]), read_qrels(small[1])
    sets = {
        "dl21": JudgedSet("dl21", queries[:2], {q.qid: qrels[q.qid] for q in queries[:2]}),
        "dl22": JudgedSet("dl22", queries[2:4], {q.qid: qrels[q.qid] for q in queries[2:3]}),
        "dl23": JudgedSet("dl23", queries[4:], qrels),
    }
    monkeypatch.setattr(data, "load_each", lambda names, sources: [sets[name] for name in names])
    monkeypatch.chdir(tmp_path)
    run(monkeypatch)
    folder = tmp_path / "runs" / "training-set-dl21-dl22-dl23"
    qids = [q.qid for q in read_candidates(folder / "candidates.jsonl")]
    assert qids == ["q0", "q1", "q2", "q4", "q5"] and set(read_qrels(folder / "qrels.txt")) == {
        *qids
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["made from"]["datasets"]["dl22"]["index"] == "msmarco-v2-passage"
    sets["dl23"] = replace(sets["dl23"], candidates=queries)
    with pytest.raises(SystemExit, match="dl23: qid q0 is another dataset's, too"):
        run(monkeypatch)


# ----------------------------------------------------------------------------------------- presets


def test_presets_hold_settings_and_the_papers_are_the_defaults():
    names = {field.name for field in fields(TrainSettings)}
    for name, preset in presets.PRESETS.items():
        assert preset.keys() <= names
        settings = TrainSettings(preset=name, **preset)
        rewards = grpo.TASKS[settings.task].rewards
        assert not settings.reward or settings.reward in rewards
    assert set(presets.PRESETS) | {""} == set(
        TrainSettings.__dataclass_fields__["preset"].metadata["choices"]
    )
    default = TrainSettings()
    given = {k: v for k, v in presets.REARANK.items() if k != "reward"}
    assert {name: getattr(default, name) for name in given} == given
    rank_r1 = TrainSettings(**presets.RANK_R1)
    assert (rank_r1.task, rank_r1.group_size, rank_r1.lora_rank) == ("setwise", 8, 16)


def test_the_papers_preset_trains_on_the_set_of_its_datasets(
    monkeypatch, tmp_path, small, process_group
):
    queries, qrels, built = read_candidates(small[0]), read_qrels(small[1]), []
    folder = Path("runs/training-set-dl21-dl22-dl23")

    def build(names, sources, settings):
        built.append((tuple(names), sources, settings))
        write_set(data.training_folder(names, sources, settings), queries, qrels, {})

    def fill_in() -> None:
        settings = grpo.fill_in(TrainSettings(preset="rearank", **presets.REARANK))
        assert settings.candidates == str(folder / "candidates.jsonl")
        assert settings.qrels == str(folder / "qrels.txt")
        assert read_qrels(settings.qrels) == qrels

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "build_training_set", build)
    fill_in()
    fill_in()
    assert built == [(("dl21", "dl22", "dl23"), SourceSettings(), DataSettings())]  # built once
    (folder / "qrels.txt").write_text("q0 0 d0-0 1\n")  # as of one that was killed
    fill_in()
    assert len(built) == 2
    own = TrainSettings(preset="rearank", candidates="mine.json", qrels="mine.txt")
    assert grpo.fill_in(own) == own and len(built) == 2
    assert grpo.fill_in(TrainSettings(preset="rank-r1", **presets.RANK_R1)).triples == ""
