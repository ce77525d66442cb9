"""evaluate.py: the figures of the real data, its files, and its errors."""

import json
import sys

import pytest
import pytrec_eval

import data
import evaluate
from settings import read_settings


def run(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    evaluate.main()


def trec_ndcg(qrels_path, run_path, k: int) -> float:
    qrels = data.read_qrels(qrels_path)
    with open(run_path) as file:
        scored = pytrec_eval.parse_run(file)
    values = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{k}"}).evaluate(scored)
    return sum(v[f"ndcg_cut_{k}"] for v in values.values()) / len(qrels)


@pytest.mark.parametrize("reranker, ndcg, windows", [("none", 0.5058, 0), ("oracle", 0.8922, 387)])
def test_dl19(monkeypatch, capsys, tmp_path, dl19, reranker, ndcg, windows):
    candidates, qrels = dl19
    run(monkeypatch, "dl19", "--candidates", candidates, "--qrels", qrels,
        "--reranker", reranker, "--output_dir", tmp_path)  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert round(metrics["after"]["ndcg@10"], 4) == ndcg and metrics["windows"] == windows
    assert round(metrics["before"]["ndcg@10"], 4) == 0.5058 and metrics["queries"] == 43
    for k in (1, 5, 10):
        trec = trec_ndcg(qrels, tmp_path / "run.txt", k)
        assert metrics["after"][f"ndcg@{k}"] == pytest.approx(trec, abs=1e-6)
    assert f"{ndcg}" in capsys.readouterr().out
    lines = (tmp_path / "windows.jsonl").read_text().splitlines()
    assert len(lines) == windows
    assert all(len(json.loads(line)["given"]) == 20 for line in lines)


@pytest.mark.parametrize("sort, windows", [("heapsort", 933), ("bubblesort", 2322)])
def test_dl19_setwise(monkeypatch, tmp_path, dl19, sort, windows):
    """A perfect comparer sorts out the ten best, so nDCG@10 is the best of the 100 candidates."""
    candidates, qrels = dl19
    run(monkeypatch, "dl19", "--candidates", candidates, "--qrels", qrels, "--reranker", "oracle",
        "--task", "setwise", "--sort", sort, "--output_dir", tmp_path)  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert round(metrics["after"]["ndcg@10"], 4) == 0.8922
    assert metrics["windows"] == windows  # a heapsort's number depends on what it finds


def test_a_model_reranks_and_every_window_is_written(monkeypatch, tmp_path, small, tiny):
    candidates, qrels = small
    run(monkeypatch, "--candidates", candidates, "--qrels", qrels, "--model", tiny,
        "--window_size", 4, "--step_size", 2, "--top_k", 7, "--max_new_tokens", 60,
        "--output_dir", tmp_path)  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "windows.jsonl").read_text().splitlines()]
    assert len(records) == metrics["windows"] == 6 * 3  # 7 candidates: windows at 3, 1 and 0
    assert sum(r["malformed"] for r in records) == metrics["malformed"] < len(records)
    assert sum(r["tokens"] for r in records) == metrics["tokens"] > 0
    ranked = {qid: [docid for docid, _ in docs] for qid, docs in
              data.read_run(tmp_path / "run.txt").items()}  # fmt: skip
    for query in data.read_candidates(candidates):
        order = [p.docid for p in query.passages[:7]]
        for record in (r for r in records if r["qid"] == query.qid):  # replayed, window by window
            at = order.index(record["given"][0])
            assert order[at : at + 4] == record["given"]
            order[at : at + 4] = record["ranked"]
        assert ranked[query.qid] == order
    assert {r["qid"] for r in records} == set(ranked)
    assert metrics["after"] != metrics["before"]


def test_queries_without_candidates_count_as_zero(monkeypatch, capsys, tmp_path, small):
    candidates, qrels = data.read_candidates(small[0]), data.read_qrels(small[1])
    del qrels["q0"]
    qrels |= {"absent1": {"d": 3}, "absent2": {"d": 1}}
    data.write_qrels(qrels, tmp_path / "qrels.txt")
    run(monkeypatch, "--candidates", small[0], "--qrels", tmp_path / "qrels.txt",
        "--reranker", "none", "--output_dir", tmp_path)  # fmt: skip
    out = capsys.readouterr().out
    assert "2 judged queries have no candidates and count as 0" in out
    assert "1 queries have no judgments and are left out" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    trec = trec_ndcg(tmp_path / "qrels.txt", tmp_path / "run.txt", 10)
    assert metrics["after"]["ndcg@10"] == pytest.approx(trec, abs=1e-6)
    assert metrics["queries"] == 7 and len(candidates) == 6


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give a dataset's name, or both --candidates and --qrels"),
        (["--candidates", "no.json", "--qrels", "no.txt"], "no.txt"),
        (["dl18"], "invalid choice: 'dl18'"),
        (["--rerankr", "none"], "unknown flag --rerankr"),
        (["--step_size", "30", "{}"], "step_size must be 1 to window_size"),
        (["--window_size", "1", "{}"], "window_size must be at least 2"),
    ],
)
def test_wrong_input_is_named(monkeypatch, capsys, tmp_path, small, args, message):
    files = ["--candidates", small[0], "--qrels", small[1], "--reranker", "oracle",
             "--output_dir", tmp_path]  # fmt: skip
    args = [a for arg in args for a in (files if arg == "{}" else [arg])]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args)
    assert message in str(stop.value) + capsys.readouterr().err


def test_nothing_in_common(monkeypatch, tmp_path, small):
    (tmp_path / "qrels.txt").write_text("other 0 d 1\n")
    with pytest.raises(SystemExit, match="no query in common"):
        run(monkeypatch, "--candidates", small[0], "--qrels", tmp_path / "qrels.txt")


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_settings_from_a_file(monkeypatch, tmp_path, small, suffix):
    values = {"candidates": str(small[0]), "qrels": str(small[1]), "reranker": "oracle",
              "window_size": 4, "step_size": 3, "output_dir": str(tmp_path)}  # fmt: skip
    path = tmp_path / f"settings.{suffix}"
    path.write_text(json.dumps(values))  # JSON is YAML, too
    run(monkeypatch, path, "--step_size", 2)  # a flag wins over the file
    assert json.loads((tmp_path / "metrics.json").read_text())["windows"] == 6 * 4
    path.write_text(json.dumps(values | {"windowsize": 3}))
    with pytest.raises(SystemExit):
        run(monkeypatch, path)
    path.write_text("[1, 2]")
    with pytest.raises(SystemExit, match="expected a mapping"):
        read_settings(path)
