"""Evaluations beside each other and beside the papers: in a terminal, as Markdown, as a page."""

import json
import re
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from page_data import HOSTILE
from scipy import stats

import compare
import evaluate
from pages.document import Heading, Paragraph, Table, as_markdown, as_text
from results.papers import AVERAGED, SOURCES, reported
from sources.registry import DATASETS

SURE = '{"qid": "q", "before": {"ndcg@10": 1}, "after": {"ndcg@10": 1}}\n'


def fake(
    folder: Path, gain: float = 0.1, dataset: str = "dl19", queries: int = 8, **changes
) -> Path:
    """An evaluation's folder; changes: of its settings, or of the hashes of its inputs."""
    rng = np.random.default_rng(queries)
    before = rng.uniform(0.2, 0.5, queries)
    after = before + gain * rng.uniform(0, 2, queries)
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"qid": f"q{i}", "before": {"ndcg@10": b}, "after": {"ndcg@10": a}}) + "\n"
        for i, (b, a) in enumerate(zip(before, after))
    ]
    (folder / "per_query.jsonl").write_text("".join(lines))
    texts = [json.dumps({"qid": f"q{i}", "query": HOSTILE[i % 2]}) + "\n" for i in range(queries)]
    (folder / "queries.jsonl").write_text("".join(texts))
    hashes = {"candidates": dataset, "qrels": dataset, "model": {"weights": "1"}, "prompt": "2"}
    settings = {"reranker": "model", "model": "runs/mine", "prompt": "p.toml", "seed": 0}
    metrics = {
        "dataset": dataset,
        "queries": queries,
        **dict.fromkeys(("windows", "tokens", "malformed"), 0),
        "before": {"ndcg@10": before.mean()},
        "after": {"ndcg@10": after.mean()},
        "settings": settings | {k: v for k, v in changes.items() if k not in hashes},
        "sha256": hashes | {k: v for k, v in changes.items() if k in hashes},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def run(monkeypatch, capsys, output: Path, *folders) -> str:
    argv = ["compare.py", *map(str, folders), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    compare.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def dl19_twice(dl19, tmp_path_factory) -> list[Path]:
    """dl19 as it is, and ordered by the judgments."""
    folder = tmp_path_factory.mktemp("dl19")
    for name in ("none", "oracle"):
        with pytest.MonkeyPatch.context() as patch:
            source = ["--candidates", str(dl19[0]), "--qrels", str(dl19[1]), "--reranker", name]
            argv = ["evaluate.py", "dl19", *source, "--output_dir", str(folder / name)]
            patch.setattr(sys, "argv", argv)
            evaluate.main()
    return [folder / "none", folder / "oracle"]


def test_dl19_beside_the_papers(monkeypatch, capsys, tmp_path, dl19_twice):
    said = run(monkeypatch, capsys, tmp_path / "c", *dl19_twice)
    assert max(map(len, said.splitlines()[:-1])) <= 80
    for name, figure in [
        ("BM25 [1]", "50.58"), ("REARANK-7B [1]", "74.16"), ("first stage", "50.58"),
        ("A first stage as it is", "50.58"), ("B oracle", "89.22"),
    ]:  # fmt: skip
        assert re.search(rf"^{re.escape(name)} +{figure}$", said, re.M)
    assert "other candidates" not in said  # it is the papers' BM25
    assert "Tests made here: 2;" in " ".join(said.split())  # the first stage against itself is none
    lines = map(json.loads, (dl19_twice[1] / "per_query.jsonl").read_text().splitlines())
    gains = [100 * (one["after"]["ndcg@10"] - one["before"]["ndcg@10"]) for one in lines]
    low, high = stats.ttest_1samp(gains, 0).confidence_interval()
    assert f"{fmean(gains):+.2f}  {low:+.2f} to {high:+.2f}  <.001" in said
    noise = (high - low) / 2
    assert re.search(rf"dl19 +43 +0 +0 +{noise:.2f} ", said)
    best = max(gains)
    assert f"{best:+.1f} (when was the salvation army founded)" in " ".join(said.split())
    page, markdown = ((tmp_path / f"c.{end}").read_text() for end in ("html", "md"))
    for form in (page, markdown):
        assert "89.22" in form and f"{noise:.2f}" in form and "REARANK-7B" in form
    assert page.count("<svg") == 2 and "when was the salvation army founded" in page


def test_several_datasets_of_one_system(monkeypatch, capsys, tmp_path):
    """Given as one folder; the means of datasets of 8 and 20 queries count alike."""
    fake(tmp_path / "all" / "dl19", gain=0.1)
    fake(tmp_path / "all" / "dl20", gain=0.2, dataset="dl20", queries=20)
    fake(tmp_path / "bio", gain=0.1, dataset="bright-biology")
    fake(tmp_path / "own", gain=0.1, dataset="")
    folders = [tmp_path / name for name in ("all", "bio", "own")]
    said = run(monkeypatch, capsys, tmp_path / "c", *folders)
    assert re.search(r"^A mine +4 +44 ", said, re.M)
    order = [said.index(f"{name}, lost most") for name in ("dl19", "dl20", "biology")]
    assert order == sorted(order)
    assert re.search(r"^REARANK-7B \[1\] +74.16 +70.00 +72.0$", said, re.M)
    assert re.search(r"^GRPO, no data filter \[1\] +- +- +71.3$", said, re.M)
    assert re.search(r"^BM25 \[1\] +18.2$", said, re.M) and "TREC DL, mean of 2" in said
    means = [float(x) for x in re.findall(r"^dl\d\d +\d+ +([+-]\S+) ", said, re.M)]
    together = float(re.search(r"^TREC DL, mean of 2 +28 +(\S+)", said, re.M)[1])
    assert together == pytest.approx(fmean(means), abs=0.011)


def test_two_systems_are_named_by_what_differs(monkeypatch, capsys, tmp_path):
    fake(tmp_path / "a")
    fake(tmp_path / "b", gain=-0.05, seed=3)
    fake(tmp_path / "c", gain=0.05, model={"weights": "other"})
    said = run(monkeypatch, capsys, tmp_path / "out", *(tmp_path / n for n in "abc"))
    assert "A mine seed=0" in said and "B mine seed=3" in said
    assert (
        "Tests made here: 6;" in " ".join(said.split()) and "B mine seed=3 - A mine seed=0" in said
    )
    assert "lost most: q" in said.partition("B mine seed=3 - first stage")[2]


def test_a_training_has_no_record_and_is_told_by_its_folders(monkeypatch, capsys, tmp_path):
    for name, gain in (("before", 0.1), ("after", 0.2)):
        folder = fake(tmp_path / "mine" / name, gain=gain)
        metrics = json.loads((folder / "metrics.json").read_text())
        del metrics["settings"], metrics["sha256"], metrics["dataset"]
        (folder / "metrics.json").write_text(json.dumps(metrics))
    folders = [tmp_path / "mine" / name for name in ("before", "after")]
    said = run(monkeypatch, capsys, tmp_path / "c", *folders)
    assert "B mine/after - A mine/before" in said and "Own data" in said


def test_one_model_on_two_first_stages(monkeypatch, capsys, tmp_path):
    for name in ("bm25", "dense"):
        for dataset in ("dl19", "dl20"):
            fake(tmp_path / name / dataset, dataset=dataset, candidates=f"{name} of {dataset}")
    said = run(monkeypatch, capsys, tmp_path / "c", tmp_path / "bm25", tmp_path / "dense")
    for system in ("A mine (bm25/dl19)", "B mine (dense/dl19)"):
        assert re.search(rf"^{re.escape(system)} +2 +16 ", said, re.M)
    assert said.count("A and B ranked other candidates") == 2
    assert len(re.findall(r"papers' BM25 (50.58|47.96)", " ".join(said.split()))) == 2


def test_datasets_of_ones_own_are_named_after_their_judgments(monkeypatch, capsys, tmp_path):
    own = {"dataset": "", "model": "m"}
    fake(tmp_path / "a", **own, qrels="1")
    fake(tmp_path / "b", **own, qrels="2")
    for name, changes in (("a", {"qrels": "sets/old/qrels.txt"}), ("b", {"beir": "sets/folder"})):
        path = tmp_path / name / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["settings"] |= changes
        path.write_text(json.dumps(metrics))
    said = run(monkeypatch, capsys, tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert re.search(r"^ +qrels.txt +folder +average$", said, re.M)
    metrics["settings"] |= {"qrels": "sets/new/qrels.txt"}
    path.write_text(json.dumps(metrics))
    said = run(monkeypatch, capsys, tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert re.search(r"^ +old/qrels.txt +new/qrels.txt +average$", said, re.M)


def test_other_candidates_are_named(monkeypatch, capsys, tmp_path):
    fake(tmp_path / "a")
    fake(tmp_path / "b", seed=3, candidates="others")
    said = run(monkeypatch, capsys, tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert "dl19: A and B ranked other candidates" in said


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1, "qrels": "others"}, "a and .*b, both dl19, were measured by different judg"),
        ({"seed": 1, "queries": 9}, "a and .*b, both dl19, are of different queries"),
        ({}, "are dl19 ranked by the same model with the same settings: give one"),
        ({"unfinished.json": "{}"}, "b: the evaluation is unfinished"),
        ({"per_query.jsonl": '{"qid": "q1"}\n'}, "per_query.jsonl: damaged"),
        ({"per_query.jsonl": SURE}, "damaged, its mean ndcg@10 before is not metrics.json's"),
        ({"metrics.json": "{}"}, r"a, .*b: a file is damaged \(KeyError: 'before'\)"),
        ({"per_query.jsonl": ""}, "per_query.jsonl: no query in it"),
        ({"metrics.json": "[]"}, "metrics.json: damaged"),
        (None, "no evaluation here"),
    ],
)
def test_what_cannot_be_compared(monkeypatch, capsys, tmp_path, changes, message):
    fake(tmp_path / "a")
    files = {k: v for k, v in (changes or {}).items() if "." in k}
    if changes is not None:
        fake(tmp_path / "b", **{k: v for k, v in changes.items() if k not in files})
    for name, text in files.items():
        (tmp_path / "b" / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, capsys, tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "c.html").exists()


def test_one_query_and_equal_rankings(monkeypatch, capsys, tmp_path):
    fake(tmp_path / "a", queries=1)
    fake(tmp_path / "b", dataset="dl20", gain=0.0)
    said = run(monkeypatch, capsys, tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert re.search(r"^dl19 +1 +\S+ +- +1.000 +1.000$", said, re.M)
    assert re.search(r"^dl20 +8 +\+0.00 +- +1.000 +1.000$", said, re.M)
    everything = said + (tmp_path / "c.md").read_text() + (tmp_path / "c.html").read_text()
    assert not re.search(r"\bnan\b|\binf\b|NaN|Infinity", everything)


# ------------------------------------------------------------------------------- the papers' rows


def test_the_papers_averages_are_those_of_their_datasets():
    checked = 0
    for figures in reported().values():
        for suite, datasets in AVERAGED.items():
            if suite in figures and figures.keys() >= set(datasets):
                of_all = fmean(float(figures[name]) for name in datasets)
                assert float(figures[suite]) == pytest.approx(of_all, abs=0.09)
                checked += 1
    assert checked == 9  # BEIR of six systems, BRIGHT of two, DL of one


def test_the_papers_columns_and_sources_are_known():
    for name, figures in reported().items():
        assert set(figures) <= {*DATASETS, *AVERAGED}
        assert re.search(r"\[(\d)\]$", name)[1] in SOURCES
    assert reported()["REARANK-7B [1]"]["beir"] == "54.59"  # not the ablation's 54.6


# --------------------------------------------------------------------------------- the documents


def test_a_wide_table_is_continued_below():
    head = ["", *(f"column{i}" for i in range(12))]
    table = Table(head, [["a row", *(f"{i}.5" for i in range(12))]])
    text = as_text([Heading("Wide"), table])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("a row") == 2 and all(f" {i}.5" in text for i in range(12))


def test_markdown_shows_names_as_they_are():
    blocks = [Table(["", "x"], [["a|b_c", "1"]]), Paragraph("<b> [1] *")]
    text = as_markdown(blocks)
    assert text == "|  | x |\n| --- | ---: |\n| a\\|b\\_c | 1 |\n\n\\<b\\> \\[1\\] \\*\n"


def test_a_query_cannot_write_to_the_terminal():
    gains = {"q\x1b[2J": 1.0}
    said = compare.extremes(gains, {"q\x1b[2J": "tide\x1b]0;pwned\x07 \u202emoon"})
    assert said == "lost most: none; gained most: q[2J +1.0 (tide]0;pwned moon)."
