"""What evaluate.py measures, on real data: from candidates, runs, collections and Lucene indexes of
every shape; several datasets in one batch; and what a result says of itself."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import pytrec_eval
from test_bm25 import build_index

import evaluate
from agent import Shown, load_agent, rank_batch
from engine.provenance import hash_model
from engine.sampler import Sampler
from measure import mean, per_query
from results.record import default_folder
from reward import ndcg_at_k
from settings import AgentSettings, EvaluateSettings, SourceSettings
from sources.formats import Candidates, Passage, read_candidates, write_candidates
from sources.load import JudgedSet
from sources.trec import read_qrels, read_run, write_qrels, write_run
from tasks import TASKS, settle
from window import load_prompt

MEASURES = {"ndcg@1": "ndcg_cut_1", "ndcg@5": "ndcg_cut_5", "ndcg@10": "ndcg_cut_10", "map": "map",
            "mrr": "recip_rank", "recall@100": "recall_100"}  # fmt: skip


def run(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    evaluate.main()


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def by_trec_eval(qrels: Path, written: Path, relevant: int = 1) -> dict[str, float]:
    """trec_eval -c on a written run: the mean over all queries of the judgments."""
    with open(written) as file:
        scored = pytrec_eval.parse_run(file)
    judged = read_qrels(qrels)
    evaluator = pytrec_eval.RelevanceEvaluator(
        judged, {"ndcg_cut.1,5,10", "map", "recip_rank", "recall.100"}, relevance_level=relevant
    )
    values = evaluator.evaluate(scored).values()
    return {ours: sum(v[name] for v in values) / len(judged) for ours, name in MEASURES.items()}


# ----------------------------------------------------------------------------------- the figures


@pytest.fixture(scope="module")
def as_files(tmp_path_factory):
    """The same first stage as a run, its topics and a collection file."""
    made = {}

    def make(candidates: Path) -> list:
        if candidates not in made:
            folder = made[candidates] = tmp_path_factory.mktemp("files")
            queries = read_candidates(candidates)
            write_run(
                {q.qid: [p.docid for p in q.passages] for q in queries}, folder / "run.txt", "t"
            )
            (folder / "topics.tsv").write_text("".join(f"{q.qid}\t{q.query}\n" for q in queries))
            texts = {p.docid: p.text for q in queries for p in q.passages}
            lines = (json.dumps({"_id": d, "text": text}) + "\n" for d, text in texts.items())
            (folder / "corpus.jsonl").write_text("".join(lines))
        folder = made[candidates]
        return ["--run", folder / "run.txt", "--topics", folder / "topics.tsv",
                "--collection", folder / "corpus.jsonl"]  # fmt: skip

    return make


@pytest.mark.parametrize(
    "year, reranker, ndcg, windows",
    [
        ("dl19", "none", 0.5058, 0),
        ("dl19", "oracle", 0.8922, 387),
        ("dl21", "none", 0.4458, 0),
        ("dl21", "oracle", 0.8351, 477),
    ],
)
def test_the_figures_are_the_same_from_candidates_and_from_a_run(
    monkeypatch, capsys, tmp_path, request, as_files, year, reranker, ndcg, windows
):
    candidates, qrels = request.getfixturevalue(year)
    for name, source in (("a", ["--candidates", candidates]), ("b", as_files(candidates))):
        run(monkeypatch, *source, "--qrels", qrels, "--reranker", reranker,
            "--output_dir", tmp_path / name)  # fmt: skip
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert round(a["after"]["ndcg@10"], 4) == ndcg and a["windows"] == windows
    assert (a["before"], a["after"], a["windows"]) == (b["before"], b["after"], b["windows"])
    for name in ("run.txt", "windows.jsonl", "per_query.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    theirs = by_trec_eval(qrels, tmp_path / "a" / "run.txt")
    assert a["after"] == pytest.approx(theirs, abs=1e-9)
    said = capsys.readouterr().out
    for name, value in theirs.items():
        assert len(re.findall(rf"^{name} .* {value:.4f}$", said, re.M)) == 2


@pytest.mark.parametrize("split, ndcg", [("earth_science", 0.4300), ("stackoverflow", 0.3073)])
def test_another_retrievers_run(monkeypatch, capsys, tmp_path, bright, split, ndcg):
    qrels = bright / f"qrels.{split}.txt"
    run(monkeypatch, "--run", bright / f"run.{split}.txt", "--qrels", qrels,
        "--reranker", "none", "--output_dir", tmp_path)  # fmt: skip
    metrics = read(tmp_path)
    assert round(metrics["after"]["ndcg@10"], 4) == ndcg
    assert re.search(rf"^ndcg@10 .* {ndcg:.4f}$", capsys.readouterr().out, re.M)
    written = {q: dict(r) for q, r in read_run(tmp_path / "run.txt").items()}
    judged = read_qrels(qrels)
    values = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(written)
    theirs = sum(v["ndcg_cut_10"] for v in values.values()) / len(judged)
    assert metrics["after"]["ndcg@10"] == pytest.approx(theirs, abs=1e-9)


def contents(docid: str, text: str) -> dict:
    return {"id": docid, "contents": text}


def titled(docid: str, text: str) -> dict:
    title, _, rest = text.partition(" ")
    return {"_id": docid, "title": title, "text": rest}


def passage(docid: str, text: str) -> dict:
    return {"pid": docid, "passage": text, "spans": "(0,1)", "docid": "page"}


@pytest.mark.parametrize(
    "year, collection, shape",
    [
        ("dl19", "JsonCollection", contents),
        ("dl19", "BeirFlatCollection", titled),
        ("dl21", "MsMarcoV2PassageCollection", passage),
    ],
)
def test_a_real_index_of_each_shape_is_searched_and_measured(
    monkeypatch, tmp_path, request, year, collection, shape
):
    """Of all passages of the candidates: BM25 finds again most of what it had found."""
    candidates, qrels = request.getfixturevalue(year)
    queries = read_candidates(candidates)
    texts = {p.docid: p.text for q in queries for p in q.passages}
    documents = [shape(docid, text) for docid, text in texts.items()]
    index = build_index(tmp_path, documents, "-storeRaw", collection=collection)
    (tmp_path / "topics.tsv").write_text("".join(f"{q.qid}\t{q.query}\n" for q in queries))
    monkeypatch.setenv("REARANK_CACHE", str(tmp_path / "cache"))
    for reranker in ("none", "oracle"):
        out = tmp_path / reranker
        run(monkeypatch, "--index", index, "--topics", tmp_path / "topics.tsv", "--qrels", qrels,
            "--reranker", reranker, "--output_dir", out)  # fmt: skip
        theirs = by_trec_eval(qrels, out / "run.txt")
        assert read(out)["after"] == pytest.approx(theirs, abs=1e-9)
        assert read(out)["windows"] == (0 if reranker == "none" else 9 * len(queries))
    assert 0.35 < read(tmp_path / "none")["after"]["ndcg@10"] < 0.7
    assert read(tmp_path / "oracle")["after"]["ndcg@10"] > 0.8
    (found,) = (tmp_path / "cache").glob("bm25-topics-*/candidates.jsonl")
    for query in read_candidates(found)[:3]:
        for p in query.passages[:10]:
            title, _, rest = texts[p.docid].partition(" ")
            shown = f"Title: {title} Content: {rest}" if shape is titled else texts[p.docid]
            assert p.text == shown


def test_the_rewards_ndcg_is_the_measured_one(dl19_read, bright):
    """On real runs, ties and passages that are not judged or missing included."""
    candidates, qrels = dl19_read
    runs = [(candidates, qrels)]
    for split in ("earth_science", "stackoverflow"):
        ranked = read_run(bright / f"run.{split}.txt")
        queries = [
            Candidates(qid, "", tuple(Passage(d, "", score) for d, score in hits[: int(qid) % 30]))
            for qid, hits in ranked.items()
        ]
        runs.append((queries[2:], read_qrels(bright / f"qrels.{split}.txt")))
    tied = [
        replace(q, passages=tuple(replace(p, score=1.0) for p in q.passages)) for q in candidates
    ]
    runs.append((tied, qrels))
    for queries, judged in runs:
        values = per_query(queries, judged)
        docids = {q.qid: [p.docid for p in q.passages] for q in queries}
        assert values.keys() == judged.keys()
        for qid, grades in judged.items():
            gains = [grades.get(docid, 0) for docid in docids.get(qid, [])]
            for k in (1, 5, 10):
                ours = ndcg_at_k(gains, k, list(grades.values()))
                assert values[qid][f"ndcg@{k}"] == pytest.approx(ours, abs=1e-9)


def test_the_least_relevant_grade_counts_for_yes_and_no_alone(dl19_read, dl19, tmp_path):
    candidates, qrels = dl19_read
    write_run({q.qid: [p.docid for p in q.passages] for q in candidates}, tmp_path / "r", "t")
    one, two = (mean(per_query(candidates, qrels, grade)) for grade in (1, 2))
    assert one == pytest.approx(by_trec_eval(dl19[1], tmp_path / "r", 1), abs=1e-9)
    assert two == pytest.approx(by_trec_eval(dl19[1], tmp_path / "r", 2), abs=1e-9)
    assert one["ndcg@10"] == two["ndcg@10"] and one["map"] > two["map"]


def test_a_query_with_negative_grades_alone_counts_0():
    """In a process of its own: trec_eval's code ends one on such judgments."""
    code = (
        "from measure import per_query; from sources.formats import Candidates, Passage;"
        "ranked = [Candidates(q, '', (Passage('x', '', 0.0),)) for q in ('a', 'b', 'c')];"
        "qrels = {'a': {'x': 2}, 'b': {'x': -2}, 'c': {'x': 1, 'y': -9}};"
        "print([v['ndcg@10'] for v in per_query(ranked, qrels).values()])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[1.0, 0.0, 1.0]\n", done.stderr


# --------------------------------------------------------------------------------- many datasets


@pytest.fixture
def three(small, tmp_path, monkeypatch) -> dict[str, tuple[Path, Path]]:
    """Three datasets of two queries each, by name; the queries of all have the same qids."""
    candidates, qrels = read_candidates(small[0]), read_qrels(small[1])
    files, sets = {}, {}
    for i, name in enumerate(("dl19", "scifact", "bright-pony")):
        queries = [replace(q, qid=f"q{j}") for j, q in enumerate(candidates[2 * i : 2 * i + 2])]
        judged = {f"q{j}": qrels[q.qid] for j, q in enumerate(candidates[2 * i : 2 * i + 2])}
        sets[name] = JudgedSet(name, queries, judged)
        files[name] = (tmp_path / f"{name}.jsonl", tmp_path / f"{name}.txt")
        write_candidates(queries, files[name][0])
        write_qrels(judged, files[name][1])
    monkeypatch.setattr(
        evaluate, "load_each", lambda names, sources, texts: [sets[name] for name in names]
    )
    return files


@pytest.mark.parametrize("sampling", [[], ["--temperature", 1.0]])
def test_several_datasets_share_a_model_and_a_batch(
    monkeypatch, capsys, tmp_path, three, tiny, sampling
):
    flags = ["--model", tiny, "--window_size", 4, "--step_size", 2, "--max_new_tokens", 50,
             *sampling]  # fmt: skip
    loaded, batches = [], []
    load_agent, rank_batch = evaluate.load_agent, evaluate.rank_batch
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_agent", lambda *a: loaded.append(a) or load_agent(*a))
        patch.setattr(
            evaluate, "rank_batch", lambda *a, **how: batches.append(a[2]) or rank_batch(*a, **how)
        )
        run(patch, *three, *flags, "--output_dir", tmp_path / "all")
    assert len(loaded) == 1 and [len(batch) for batch in batches] == [6]
    said = capsys.readouterr().out
    for name in three:
        run(monkeypatch, name, *flags, "--output_dir", tmp_path / name)
        for file in ("run.txt", "windows.jsonl", "per_query.jsonl"):
            alone, together = tmp_path / name / file, tmp_path / "all" / name / file
            assert alone.read_bytes() == together.read_bytes(), (name, file)
        metrics = read(tmp_path / "all" / name)
        assert metrics["dataset"] == name and metrics["queries"] == 2
        assert f"{name:26}  {metrics['before']['ndcg@10']:8.4f}" in said
        theirs = by_trec_eval(three[name][1], tmp_path / "all" / name / "run.txt")
        assert metrics["after"] == pytest.approx(theirs, abs=1e-9)
    assert "mean of the datasets" in said


def test_several_datasets_go_on_where_they_were(monkeypatch, tmp_path, three, tiny, pull_the_plug):
    flags = [*three, "--model", tiny, "--window_size", 4, "--step_size", 2, "--max_new_tokens", 50]
    run(monkeypatch, *flags, "--output_dir", tmp_path / "whole")
    with pull_the_plug(4) as patch:
        run(patch, *flags, "--output_dir", tmp_path / "out", "--max_in_flight", 3)
    kept = sum(p.read_bytes().count(b"\n") for p in (tmp_path / "out").glob("*/windows.part*"))
    asked = []
    submit = Sampler.submit
    monkeypatch.setattr(Sampler, "submit", lambda self, r: asked.append(r) or submit(self, r))
    run(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    windows = [r for r in asked if isinstance(r.ticket, Shown)]  # not the probe's
    assert kept > 3 and len(windows) == 24 - kept
    for name in three:
        for file in ("run.txt", "windows.jsonl"):
            a, b = (tmp_path / d / name / file for d in ("whole", "out"))
            assert a.read_bytes() == b.read_bytes()


# ---------------------------------------------------------------------- a result says what it is


def test_a_result_holds_all_that_it_was_made_from(monkeypatch, tmp_path, small, tiny):
    run(monkeypatch, "--candidates", small[0], "--qrels", small[1], "--model", tiny,
        "--window_size", 4, "--step_size", 2, "--max_new_tokens", 40, "--seed", 5,
        "--output_dir", tmp_path)  # fmt: skip
    metrics = read(tmp_path)
    settings = metrics["settings"]
    assert settings["seed"] == 5 and settings["window_size"] == 4 and settings["top_k"] == 100
    assert settings["candidates"] == str(small[0]) and settings["model"] == str(tiny)
    assert settings["task"] == "listwise" and settings["reranker"] == "model"
    assert settings["prompt"].endswith("prompts/listwise.toml")
    every = {*SourceSettings.__dataclass_fields__, *AgentSettings.__dataclass_fields__, "reranker"}
    assert settings.keys() == every - {"endpoint", "max_tokens_total"}
    hashes = metrics["sha256"]
    for name, file in (
        ("candidates", small[0]),
        ("qrels", small[1]),
        ("prompt", settings["prompt"]),
    ):
        assert hashes[name] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert hashes["model"] == hash_model(str(tiny)) and "model.safetensors" in hashes["model"]
    assert len(metrics["git"]["revision"]) == 40 and isinstance(metrics["git"]["clean"], bool)
    assert {"python", "torch", "transformers", "ir-measures"} <= metrics["versions"].keys()
    lines = [json.loads(line) for line in (tmp_path / "per_query.jsonl").read_text().splitlines()]
    assert {line["qid"] for line in lines} == read_qrels(small[1]).keys()
    for when in ("before", "after"):
        assert mean({line["qid"]: line[when] for line in lines}) == metrics[when]


def test_nothing_is_said_of_a_model_that_was_not_asked(monkeypatch, tmp_path, small):
    run(monkeypatch, "--candidates", small[0], "--qrels", small[1], "--reranker", "none",
        "--output_dir", tmp_path)  # fmt: skip
    metrics = read(tmp_path)
    assert metrics["sha256"].keys() == {"candidates", "qrels"}
    assert metrics["settings"].keys() == {*SourceSettings.__dataclass_fields__, "reranker"}


def test_no_two_evaluations_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/x/y", "runs/x-y", "a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    sources, settings, agent = SourceSettings(), EvaluateSettings(), AgentSettings()
    others = [
        (sources, settings, agent),
        *((sources, settings, replace(agent, model=m))
          for m in ("runs/x/y", "runs/x-y", "a/model", "b/model", "runs-x-y")),
        *((sources, settings, replace(agent, **{name: value})) for name, value in {
            "task": "setwise", "prompt": "prompts/zero_shot.toml", "temperature": 1.0, "seed": 1,
            "window_size": 10, "step_size": 5, "sort": "bubblesort", "dtype": "float32"}.items()),
        *((sources, replace(settings, reranker=r), agent) for r in ("none", "oracle")),
        (replace(sources, top_k=50), settings, agent),
        (replace(sources, run="runs/x/y"), settings, agent),
        (replace(sources, run="runs/x-y"), settings, agent),
    ]  # fmt: skip
    folders = [str(default_folder(n, *other)) for n in ("dl19", "dl20") for other in others]
    assert len(set(folders)) == len(folders) and max(map(len, folders)) < 100
    assert re.fullmatch(r"runs/dl19-Qwen2\.5-7B-Instruct-[0-9a-f]{6}", folders[0])
    assert any(re.fullmatch(r"runs/dl19-.*-temperature=1\.0-[0-9a-f]{6}", f) for f in folders)
    assert any("-zero_shot-" in f for f in folders) and any("-oracle-" in f for f in folders)
    spellings = (("runs/x/y", 1), ("runs/x/y/", 2), (str(tmp_path / "runs/x/y"), 64))
    same = {
        default_folder("dl19", sources, settings, replace(agent, model=m, max_in_flight=f))
        for m, f in spellings
    }
    assert len(same) == 1


def test_a_foreign_folder_and_a_folder_in_use_are_left_alone(monkeypatch, tmp_path, small):
    flags = ["--candidates", small[0], "--qrels", small[1], "--reranker", "none"]
    foreign = tmp_path / "model"
    foreign.mkdir()
    for name in ("model.safetensors", "windows.part0.jsonl"):
        (foreign / name).write_text("precious")
    with pytest.raises(SystemExit, match=r"model holds something else .model\.safetensors.: give"):
        run(monkeypatch, *flags, "--output_dir", foreign)
    assert {path.name for path in foreign.iterdir()} == {"model.safetensors", "windows.part0.jsonl"}
    with pytest.raises(SystemExit, match=r"model\.safetensors is a file"):
        run(monkeypatch, *flags, "--output_dir", foreign / "model.safetensors")
    hold = (
        "import sys, time; from engine.files import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "out"], cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match=f"out is in use by process {holder.pid} on"):
        run(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    holder.kill()
    holder.wait()
    (tmp_path / "out" / "unfinished.json.123.tmp").write_text("what a killed one left")
    run(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "metrics.json", "per_query.jsonl", "queries.jsonl", "report.html", "run.txt",
        "windows.jsonl",
    ]  # fmt: skip


# ------------------------------------------------------------------------- the model's own prompt


@pytest.fixture
def trained(tiny, tmp_path) -> Path:
    """A model as grpo.py leaves it, trained for setwise with a prompt of its own."""
    folder = shutil.copytree(tiny, tmp_path / "trained")
    text = TASKS["setwise"].prompt.read_text().replace("max_chars = 400", "max_chars = 33")
    assert "33" in text
    (folder / "prompt.toml").write_text(text)
    (folder / "settings.json").write_text('{"task": "setwise", "model": "base"}')
    return folder


def test_task_and_prompt_are_the_flags_else_the_models_own_else_the_tasks(trained, tiny, capsys):
    own = str(trained / "prompt.toml")
    zero_shot = str(TASKS["listwise"].prompt.with_name("zero_shot.toml"))
    settings = AgentSettings(model=str(trained))
    for given, task, prompt in (
        (settings, "setwise", own),
        (replace(settings, task="setwise"), "setwise", own),
        (replace(settings, prompt=zero_shot), "setwise", zero_shot),
        (replace(settings, model=str(tiny)), "listwise", str(TASKS["listwise"].prompt)),
        (
            replace(settings, model=str(tiny), task="setwise"),
            "setwise",
            str(TASKS["setwise"].prompt),
        ),
        (replace(settings, task="listwise"), "listwise", str(TASKS["listwise"].prompt)),
    ):
        settled = settle(given)
        assert (settled.task, settled.prompt) == (task, prompt) and settle(settled) == settled
        agent = load_agent(given)
        assert agent.task is TASKS[task] and agent.prompt == load_prompt(prompt)
        said = f"{trained} was trained for setwise, not for listwise\n"
        another = given.model == str(trained) and task == "listwise"
        assert capsys.readouterr().err.count(said) == another
    (trained / "settings.json").unlink()
    assert settle(settings) == replace(settings, task="listwise", prompt=own)
    (trained / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: cannot be read: .*without it"):
        settle(settings)


def test_a_trained_model_is_measured_as_it_was_trained(monkeypatch, tmp_path, small, trained):
    run(monkeypatch, "--candidates", small[0], "--qrels", small[1], "--model", trained,
        "--window_size", 4, "--sort_top", 1, "--max_new_tokens", 30,
        "--output_dir", tmp_path / "out")  # fmt: skip
    settings = read(tmp_path / "out")["settings"]
    assert settings["task"] == "setwise" and settings["prompt"] == str(trained / "prompt.toml")


# --------------------------------------------------------------------------------- what is too long


def test_a_query_too_long_for_the_model_ends_no_other(monkeypatch, capsys, tmp_path, small, tiny):
    candidates = read_candidates(small[0])
    candidates[2] = replace(candidates[2], query="tide " * 9000)
    write_candidates(candidates, tmp_path / "long.jsonl")
    flags = ["--qrels", small[1], "--model", tiny, "--window_size", 4, "--step_size", 2,
             "--max_new_tokens", 50]  # fmt: skip
    run(
        monkeypatch, "--candidates", tmp_path / "long.jsonl", *flags, "--output_dir", tmp_path / "a"
    )
    assert "4 windows were too long for the model and kept their order, of 1 queries: q2" in (
        capsys.readouterr().out
    )
    run(monkeypatch, "--candidates", small[0], *flags, "--output_dir", tmp_path / "b")
    a, b = (read_run(tmp_path / name / "run.txt") for name in "ab")
    assert {q: a[q] for q in a if q != "q2"} == {q: b[q] for q in b if q != "q2"}
    assert [docid for docid, _ in a["q2"]] == [p.docid for p in candidates[2].passages]
    assert read(tmp_path / "a")["too_long"] == 4 and read(tmp_path / "b")["too_long"] == 0
    agent = load_agent(AgentSettings(model=str(tiny)))
    with pytest.raises(ValueError, match=r"query q2: a prompt of .* exceed the model's 8192"):
        rank_batch(agent, AgentSettings(window_size=4, step_size=2), candidates[2:3])
