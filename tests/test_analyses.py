"""The analyses: each variant is an evaluation, and what is told of them is computed anew here."""

import json
import re
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy import stats
from test_compare import fake
from test_evaluate import count_asked

import agent
import analyses
import lengths
from measure import per_query
from pages.document import as_text
from results.outcomes import all_rows, blocks_of
from results.plots import variants_figure
from results.systems import read_evaluated
from sources.formats import read_candidates
from sources.trec import read_qrels, read_run
from window import PROMPTS, load_prompt

PNG = b"\x89PNG"


def run(monkeypatch, program, *args) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, args)])
    program.main()


def rows_of(folder: Path) -> dict[str, dict]:
    result = json.loads((folder / "analysis.json").read_text())
    return {row["variant"]: row for row in result["rows"]}


@pytest.fixture
def flags(small, tiny) -> list:
    """24 windows, 4 of each query."""
    return ["--candidates", small[0], "--qrels", small[1], "--model", tiny, "--window_size", 4,
            "--step_size", 2, "--max_new_tokens", 60]  # fmt: skip


@pytest.fixture
def counted(monkeypatch) -> list:
    """A line for each time that a model is loaded."""
    loaded, load = [], agent.load_whole
    monkeypatch.setattr(agent, "load_whole", lambda *args: loaded.append(1) or load(*args))
    return loaded


def test_windows_of_the_oracle_on_dl19(monkeypatch, capsys, tmp_path, dl19):
    flags = ["windows", "dl19", "--candidates", dl19[0], "--qrels", dl19[1], "--reranker", "oracle",
             "--sizes", "20:10", "10:5", "--output_dir", tmp_path]  # fmt: skip
    run(monkeypatch, analyses, *flags)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[:-1])) <= 80
    rows = rows_of(tmp_path)
    wide, narrow = rows["20 by 10"], rows["10 by 5"]
    assert round(wide["ndcg@10"], 2) == 89.22 and round(wide["given"], 2) == 50.58
    assert (wide["windows"], narrow["windows"]) == (387, 43 * 19)
    found = [read_evaluated(tmp_path / name / "dl19").after for name in ("20-by-10", "10-by-5")]
    gains = [found[1][qid] - found[0][qid] for qid in found[0]]
    low, high = stats.ttest_1samp(gains, 0).confidence_interval()
    assert narrow["difference"] == pytest.approx(fmean(gains)) and wide["p_holm"] is None
    assert f"{fmean(gains):+.2f} {low:+.2f} to {high:+.2f} <.001" in " ".join(said.split())
    assert (tmp_path / "analysis.png").read_bytes().startswith(PNG)
    run(monkeypatch, analyses, *flags)
    assert capsys.readouterr().out.count("nothing is left to do") == 2 and rows_of(tmp_path) == rows


def test_setwise_takes_each_window_once(monkeypatch, tmp_path, small):
    args = ["windows", "--candidates", small[0], "--qrels", small[1], "--reranker", "oracle"]
    run(monkeypatch, analyses, *args, "--task", "setwise", "--output_dir", tmp_path / "a")
    assert list(rows_of(tmp_path / "a")) == ["20", "10", "40"]


def test_orders_are_those_that_are_named(monkeypatch, tmp_path, small):
    flags = ["orders", "--candidates", small[0], "--qrels", small[1], "--reranker", "none"]
    for name in ("a", "b"):
        run(monkeypatch, analyses, *flags, "--shuffles", 2, "--output_dir", tmp_path / name)
    given = {q.qid: [p.docid for p in q.passages] for q in read_candidates(small[0])}
    folders = [folder for folder in (tmp_path / "a").iterdir() if folder.is_dir()]
    runs = {folder.name: read_run(folder / "own/run.txt") for folder in folders}
    orders = {
        name: {qid: [docid for docid, _ in hits] for qid, hits in ranked.items()}
        for name, ranked in runs.items()
    }
    assert orders["as-given"] == given
    assert orders["inverted"] == {qid: docids[::-1] for qid, docids in given.items()}
    one, two = orders["shuffled-1"], orders["shuffled-2"]
    assert given != one != two != given
    assert all(sorted(one[qid]) == sorted(given[qid]) for qid in given)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    upside_down = [type(q)(q.qid, q.query, q.passages[::-1]) for q in read_candidates(small[0])]
    by_query = per_query(upside_down, read_qrels(small[1]))
    mean = 100 * fmean(figures["ndcg@10"] for figures in by_query.values())
    assert rows_of(tmp_path / "a")["inverted"]["ndcg@10"] == pytest.approx(mean)


def test_passes_go_on_where_they_died(monkeypatch, capsys, tmp_path, flags, counted, pull_the_plug):
    whole, died = tmp_path / "whole", tmp_path / "died"
    run(monkeypatch, analyses, "passes", *flags, "--passes", 2, "--output_dir", whole)
    assert len(counted) == 1
    first, second = (read_run(whole / name / "own" / "run.txt") for name in ("pass-1", "pass-2"))
    windows = map(json.loads, (whole / "pass-2/own/windows.jsonl").read_text().splitlines())
    given = {w["qid"]: w["given"] for w in windows if w["window"] == 0}
    assert given == {qid: [docid for docid, _ in hits[-4:]] for qid, hits in first.items()}
    assert first != second
    again = ["passes", *flags, "--passes", 2, "--output_dir", died, "--max_in_flight", 2]
    with pull_the_plug(16) as patch:
        run(patch, analyses, *again)
    done = [(died / name / "own/metrics.json").exists() for name in ("pass-1", "pass-2")]
    assert done == [True, False]
    capsys.readouterr()
    asked = count_asked(monkeypatch)
    run(monkeypatch, analyses, *again)
    said = capsys.readouterr().out
    assert "pass 1:\nnothing is left to do" in said and "windows are on disk" in said
    assert 0 < len(asked) < 24
    for name in ("pass-1", "pass-2"):
        for file in ("run.txt", "windows.jsonl", "per_query.jsonl"):
            ours, theirs = ((folder / name / "own" / file) for folder in (died, whole))
            assert ours.read_bytes() == theirs.read_bytes()
    assert rows_of(died) == rows_of(whole)


def test_reasoning_on_and_off(monkeypatch, tmp_path, flags, counted):
    run(monkeypatch, analyses, "reasoning", *flags, "--output_dir", tmp_path)
    assert len(counted) == 1
    written = {
        name: json.loads((tmp_path / name / "own" / "metrics.json").read_text())
        for name in ("with-reasoning", "without")
    }
    prompts = {Path(m["settings"]["prompt"]).name for m in written.values()}
    assert prompts == {"listwise.toml", "direct.toml"}
    windows = [(tmp_path / name / "own/windows.jsonl").read_text() for name in written]
    assert windows[0] != windows[1]  # the prompt itself was another
    rows = rows_of(tmp_path)
    for name, variant in (("with-reasoning", "with reasoning"), ("without", "without")):
        assert rows[variant]["tokens"] == written[name]["tokens"]


def test_the_direct_prompt_shows_the_same():
    direct, listwise = (load_prompt(PROMPTS / f"{name}.toml") for name in ("direct", "listwise"))
    assert listwise.reasoning and not direct.reasoning
    for same in ("max_chars", "opening", "ready", "passage", "received"):
        assert getattr(direct, same) == getattr(listwise, same)


@pytest.mark.parametrize(
    "args, message",
    [
        (["reasoning", "--reranker", "none"], "--reranker: only a model can reason"),
        (["reasoning", "--prompt", PROMPTS / "direct.toml"], "does not reason: give a --prompt"),
        (["reasoning", "--without", PROMPTS / "listwise.toml"], "--without .* reasons"),
        (["reasoning", "--task", "setwise"], "--without: give a prompt .* the task setwise"),
        (["windows", "--sizes", "20:10", "5:10"], "--sizes 5:10: expected WINDOW:STEP"),
        (["windows", "--sizes", "20"], "--sizes 20: expected WINDOW:STEP"),
        (["windows", "--sizes", "9" * 5000 + ":1"], "--sizes 9{60}: expected WINDOW:STEP"),
        (["passes", "--passes", "1"], "--passes 1: expected"),
        (["nothing"], "nothing"),
    ],
)
def test_what_cannot_be_analysed(monkeypatch, tmp_path, flags, args, message):
    if args[0] == "windows":
        monkeypatch.setattr(analyses, "load_model", None)  # which takes minutes
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, analyses, *args, *flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(monkeypatch, tmp_path, small):
    flags = ["--candidates", small[0], "--qrels", small[1], "--reranker", "oracle"]
    here = ["--output_dir", tmp_path / "out"]
    run(monkeypatch, analyses, "passes", *flags, *here)
    with pytest.raises(SystemExit, match="holds the analysis passes: give another --output_dir"):
        run(monkeypatch, analyses, "orders", *flags, *here)
    with pytest.raises(SystemExit, match=r"a finished evaluation with another .*window_size"):
        run(monkeypatch, analyses, "passes", *flags, *here, "--window_size", 4, "--step_size", 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match="holds something else"):
        run(monkeypatch, analyses, "passes", *flags, "--output_dir", tmp_path / "other")


def test_several_datasets_have_a_mean(tmp_path):
    counted = {"windows": 4, "malformed": 1, "cut_off": 0, "tokens": 400}
    found = {}
    for name, gain in (("first", 0.1), ("second", 0.2)):
        folders = [
            fake(tmp_path / name / dataset, gain, dataset, queries)
            for dataset, queries in (("dl19", 8), ("dl20", 20))
        ]
        found[name] = [read_evaluated(folder) for folder in folders]
        for one in found[name]:
            one.metrics.update(counted)
    rows = all_rows(found)
    assert [row["dataset"] for row in rows] == ["dl19"] * 2 + ["dl20"] * 2 + ["mean of 2"] * 2
    differences = [row["difference"] for row in rows if row["variant"] == "second"]
    assert differences[2] == pytest.approx(fmean(differences[:2])) and differences[0] > 1
    said = as_text(blocks_of("passes", rows))
    assert "passes, mean of 2 (28 queries)" in said and "tests made here (3)" in " ".join(
        said.split()
    )
    assert re.search(r"^second .* 25.0% +100$", said, re.M)


def test_figures_of_any_number_of_panels(tmp_path):
    panel = {"first_stage": 50.0, "variants": {"a": (50.0, None), "b": (50.0, 2.0)}}
    for count in (1, 5):
        variants_figure(tmp_path / f"{count}.png", {f"set {i}": panel for i in range(count)})
        assert (tmp_path / f"{count}.png").read_bytes().startswith(PNG)


# ------------------------------------------------------------------------------- the lengths


def with_windows(folder: Path, tokens: list[int]) -> Path:
    """An evaluation of as many queries, with two windows each, around so many tokens."""
    fake(folder, queries=len(tokens))
    lines = [
        {"qid": f"q{i}", "tokens": n + off, "malformed": i == 0, "too_long": False}
        for i, n in enumerate(tokens)
        for off in (-1, 1)
    ]
    lines.append({"qid": "q0", "tokens": 0, "malformed": True, "too_long": True})  # was not asked
    (folder / "windows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {name: sum(line[name] for line in lines) for name in ("tokens", "malformed")}
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | counts | {"windows": len(lines)}))
    return folder


def test_lengths_against_gains(monkeypatch, capsys, tmp_path):
    tokens = [int(n) for n in np.random.default_rng(0).integers(500, 1200, 30)]
    folder = with_windows(tmp_path / "e", tokens)
    run(monkeypatch, lengths, folder, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[:-1])) <= 80
    one = read_evaluated(folder)
    gains = [one.after[f"q{i}"] - one.before[f"q{i}"] for i in range(30)]
    (found,) = json.loads((tmp_path / "out" / "lengths.json").read_text())
    told = found["correlation"]["gain"]
    assert told["rho"] == pytest.approx(stats.spearmanr(tokens, gains).statistic)
    z = np.arctanh(told["rho"]) + np.array([-1, 1]) * stats.norm.ppf(0.975) / np.sqrt(27)
    assert (told["low"], told["high"]) == pytest.approx(tuple(np.tanh(z)))
    assert f"with gain {told['rho']:+.2f} (95% interval {told['low']:+.2f} to" in " ".join(
        said.split()
    )
    shortest = sorted(range(30), key=lambda i: tokens[i])[:8]
    first = found["bins"][0]
    assert (first["queries"], first["from"]) == (8, min(tokens))
    assert first["gain"] == pytest.approx(fmean(gains[i] for i in shortest))
    assert sum(b["queries"] * b["malformed"] for b in found["bins"]) == pytest.approx(1)
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(PNG)


def test_lengths_that_tell_nothing(monkeypatch, capsys, tmp_path):
    alike = with_windows(tmp_path / "alike", [900] * 9)
    few = with_windows(tmp_path / "few", [900, 1000, 800])
    run(monkeypatch, lengths, alike, few, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("cannot be told") == 4 and "nan" not in said
    assert "NaN" not in (tmp_path / "out" / "lengths.json").read_text()
    with (few / "windows.jsonl").open("a") as file:
        file.write('{"tokens": 1, "malformed": false}\n')
    with pytest.raises(SystemExit, match=r"windows\.jsonl: damaged, its windows are 8, not 7"):
        run(monkeypatch, lengths, few, "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match="no window was asked of a model"):
        oracle = with_windows(tmp_path / "oracle", [0] * 8)
        run(monkeypatch, lengths, oracle, "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match="no window was asked of a model"):
        run(monkeypatch, lengths, fake(tmp_path / "none"), "--output_dir", tmp_path / "out")
