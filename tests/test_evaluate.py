"""evaluate.py: the figures of the real data, its files and its errors; many processes, and runs
that die and go on."""

import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import pytrec_eval
import torch

import evaluate
from agent import Answer, load_agent, rank_batch
from engine.flags import read_settings
from engine.sampler import Sampler
from results import answers
from settings import AgentSettings, UserError
from sources import formats, trec
from window import LISTWISE_PROMPT

ROOT = Path(__file__).parents[1]


def run(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    evaluate.main()


def trec_ndcg(qrels_path, run_path, k: int) -> float:
    qrels = trec.read_qrels(qrels_path)
    with open(run_path) as file:
        scored = pytrec_eval.parse_run(file)
    values = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{k}"}).evaluate(scored)
    return sum(v[f"ndcg_cut_{k}"] for v in values.values()) / len(qrels)


KILLED = """
import os, sys, time
from pathlib import Path
from engine.parallel import processes
from evaluate import all_claimed
with processes(), all_claimed([Path(sys.argv[1])]):
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), 9)
        os.kill(os.getpid(), 9)
    time.sleep(1)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_second_start_is_refused_while_any_process_of_the_first_lives(tmp_path):
    (tmp_path / "job.py").write_text(KILLED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    first = subprocess.Popen(
        [*launch, tmp_path / "job.py", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    alive = int(first.stdout.readline())
    try:
        with pytest.raises(UserError, match="is in use"), answers.claimed(tmp_path / "out"):
            pass
    finally:
        os.kill(alive, signal.SIGKILL)
        first.wait()
        first.stdout.close()


@pytest.mark.parametrize("reranker, ndcg, windows", [("none", 0.5058, 0), ("oracle", 0.8922, 387)])
def test_dl19(monkeypatch, capsys, tmp_path, dl19, reranker, ndcg, windows):
    candidates, qrels = dl19
    run(monkeypatch, "dl19", "--candidates", candidates, "--qrels", qrels,
        "--reranker", reranker, "--output_dir", tmp_path)  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert round(metrics["after"]["ndcg@10"], 4) == ndcg and metrics["windows"] == windows
    assert round(metrics["before"]["ndcg@10"], 4) == 0.5058 and metrics["queries"] == 43
    for k in (1, 5, 10):
        theirs = trec_ndcg(qrels, tmp_path / "run.txt", k)
        assert metrics["after"][f"ndcg@{k}"] == pytest.approx(theirs, abs=1e-6)
    assert f"{ndcg}" in capsys.readouterr().out
    lines = (tmp_path / "windows.jsonl").read_text().splitlines()
    assert len(lines) == windows
    assert all(len(json.loads(line)["given"]) == 20 for line in lines)


@pytest.mark.parametrize("sort, windows", [("heapsort", 903), ("bubblesort", 2322)])
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
              trec.read_run(tmp_path / "run.txt").items()}  # fmt: skip
    for query in formats.read_candidates(candidates):
        order = [p.docid for p in query.passages[:7]]
        for record in (r for r in records if r["qid"] == query.qid):  # replayed, window by window
            at = order.index(record["given"][0])
            assert order[at : at + 4] == record["given"]
            order[at : at + 4] = record["ranked"]
        assert ranked[query.qid] == order
    assert {r["qid"] for r in records} == set(ranked)
    assert metrics["after"] != metrics["before"]


@pytest.mark.parametrize(
    "task, start, end",
    [
        ("listwise", "windows:   0%| | 0/24 ", "windows: 100%| | 24/24 "),
        ("setwise", "windows, about:   0%| | 0/", "windows, about: 100%| | "),
    ],
)
def test_the_bar_tells_how_many_windows_there_will_be(
    monkeypatch, capsys, tmp_path, small, task, start, end
):
    flags = ["--candidates", small[0], "--qrels", small[1], "--output_dir", tmp_path]
    sizes = ["--window_size", "4", "--step_size", "2"]
    run(monkeypatch, *flags, "--reranker", "oracle", "--task", task, *sizes)
    bars = re.sub(r"\|[^|]*\|", "| |", capsys.readouterr().err).split("\r")
    assert bars[1].startswith(start) and bars[-1].startswith(end)
    if task == "setwise":
        asked = json.loads((tmp_path / "metrics.json").read_text())["windows"]
        assert f"{asked}/{asked} " in bars[-1]


def test_no_bar_where_no_window_is_asked(monkeypatch, capsys, tmp_path, small):
    flags = ["--candidates", small[0], "--qrels", small[1], "--output_dir", tmp_path]
    run(monkeypatch, *flags, "--reranker", "none")
    assert "windows" not in capsys.readouterr().err


def test_queries_without_candidates_count_as_zero(monkeypatch, capsys, tmp_path, small):
    candidates, qrels = formats.read_candidates(small[0]), trec.read_qrels(small[1])
    del qrels["q0"]
    qrels |= {"absent1": {"d": 3}, "absent2": {"d": 1}}
    trec.write_qrels(qrels, tmp_path / "qrels.txt")
    run(monkeypatch, "--candidates", small[0], "--qrels", tmp_path / "qrels.txt",
        "--reranker", "none", "--output_dir", tmp_path / "out")  # fmt: skip
    out = capsys.readouterr().out
    assert "2 judged queries have no candidates and count as 0" in out
    assert "1 queries have no judgments and are left out" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    theirs = trec_ndcg(tmp_path / "qrels.txt", tmp_path / "out" / "run.txt", 10)
    assert metrics["after"]["ndcg@10"] == pytest.approx(theirs, abs=1e-6)
    assert metrics["queries"] == 7 and len(candidates) == 6


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "give a dataset's name; or a first stage: --candidates"),
        (["--candidates", "no.json", "--qrels", "no.txt"], "no.json"),
        (["--candidates", "{0}"], "the judgments are missing: give --qrels FILE"),
        (["--topics", "no.tsv"], "--topics with --index or --collection"),
        (["--index", "x", "--collection", "y"], "give --index or --collection, not both"),
        (["--table", "x.csv", "--run", "y"], "give --table or --run, not both"),
        (["--beir", "x"], "--beir x: no corpus.jsonl in it"),
        (["dl19", "dl20", "--qrels", "x"], "--qrels is of one dataset, and 2 are named"),
        (["dl18"], "no dataset 'dl18': there are dl19, dl20"),
        (["--rerankr", "none"], "unknown flag --rerankr"),
        (["--step_size", "30", "{}"], "step_size must be 1 to window_size"),
        (["--window_size", "1", "{}"], "--window_size 1: expected a whole number from 2 to 1,000"),
    ],
)
def test_wrong_input_is_named(monkeypatch, capsys, tmp_path, small, args, message):
    files = ["--candidates", small[0], "--qrels", small[1], "--reranker", "oracle",
             "--output_dir", tmp_path]  # fmt: skip
    files = {"{}": files, "{0}": [small[0]]}
    args = [a for arg in args for a in files.get(arg, [arg])]
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
              "window_size": 4, "step_size": 3, "output_dir": str(tmp_path / "out")}  # fmt: skip
    path = tmp_path / f"settings.{suffix}"
    path.write_text(json.dumps(values))  # JSON is YAML, too
    run(monkeypatch, path, "--step_size", 2)  # a flag wins over the file
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["windows"] == 6 * 4
    path.write_text(json.dumps(values | {"windowsize": 3}))
    with pytest.raises(SystemExit):
        run(monkeypatch, path)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="expected a mapping"):
        read_settings(path)


# ---------------------------------------------------------- many processes, and runs that go on


@pytest.fixture(scope="module")
def flags(small, tiny) -> list:
    """24 windows, 4 of each query."""
    return ["--candidates", small[0], "--qrels", small[1], "--model", tiny, "--window_size", 4,
            "--step_size", 2, "--max_new_tokens", 60]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Where one process wrote what it made of `flags` and more, in one go."""
    done = {}

    def run_once(*more) -> Path:
        if more not in done:
            done[more] = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                run(patch, *flags, *more, "--output_dir", done[more])
        return done[more]

    return run_once


def start(*args, processes: int = 1) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [sys.executable, *(launch if processes > 1 else []), "evaluate.py", *args]
    return subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def on_disk(out: Path, part: str = "*") -> int:
    """How many whole lines the parts hold."""
    return sum(p.read_bytes().count(b"\n") for p in out.glob(f"windows.part{part}.jsonl"))


def wait_until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def check_same(out: Path, other: Path) -> None:
    names = ["per_query.jsonl", "queries.jsonl", "run.txt", "windows.jsonl"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "metrics.json", "report.html"])
    for name in names:
        assert (out / name).read_bytes() == (other / name).read_bytes()
    a, b = (json.loads((d / "metrics.json").read_text()) for d in (out, other))
    assert a | {"seconds": 0} == b | {"seconds": 0}, "but for the time it took"


def count_asked(monkeypatch) -> list:
    asked = []
    submit = Sampler.submit

    def count(self, request) -> None:
        if not isinstance(request.ticket, int):  # which is a probe's, as a model is loaded
            asked.append(request)
        submit(self, request)

    monkeypatch.setattr(Sampler, "submit", count)
    return asked


def test_windows_are_in_order(whole):
    lines = (whole() / "windows.jsonl").read_text().splitlines()
    places = [(record["qid"], record["window"]) for record in map(json.loads, lines)]
    assert places == [(f"q{q}", window) for q in range(6) for window in range(4)]


def test_two_processes_write_what_one_does(flags, whole, tmp_path):
    process = start(*flags, "--output_dir", tmp_path, processes=2)
    wait_until(lambda: on_disk(tmp_path, "0") and on_disk(tmp_path, "1"), process)
    out, err = process.communicate()
    assert process.returncode == 0, err
    check_same(tmp_path, whole())
    assert out.count("written to") == 1


def test_killed_runs_go_on(monkeypatch, flags, whole, tmp_path):
    kept = [0]
    for number, code in [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGKILL, -9)]:
        process = start(*flags, "--output_dir", tmp_path, "--max_in_flight", 1)
        wait_until(lambda: on_disk(tmp_path) > kept[-1] + 1, process)
        process.send_signal(number)
        out, err = process.communicate()
        assert process.returncode == code
        assert kept == [0] or f"going on: {kept[-1]} windows are on disk" in out
        kept.append(on_disk(tmp_path))
        if number == signal.SIGINT:
            assert f"interrupted: {kept[-1]} windows are kept" in err and "Traceback" not in err
    assert 6 <= kept[-1] < 24
    assert not (tmp_path / "metrics.json").exists()
    (tmp_path / "windows.part0.jsonl").rename(tmp_path / "windows.part7.jsonl")
    asked = count_asked(monkeypatch)
    run(monkeypatch, *flags, "--output_dir", tmp_path)
    assert len(asked) == 24 - kept[-1]
    check_same(tmp_path, whole())


def test_sampling_depends_on_neither_the_split_nor_the_kill(monkeypatch, flags, whole, tmp_path):
    """One of two processes is killed, and a single one goes on."""
    sampling = ("--temperature", 1.0, "--seed", 3)
    process = start(*flags, *sampling, "--output_dir", tmp_path, "--max_in_flight", 1, processes=2)
    wait_until(lambda: on_disk(tmp_path, "0") > 1 and on_disk(tmp_path, "1") > 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate()
    kept = on_disk(tmp_path)
    assert process.returncode != 0 and 4 <= kept < 24
    asked = count_asked(monkeypatch)
    run(monkeypatch, *flags, *sampling, "--output_dir", tmp_path)
    assert len(asked) == 24 - kept
    check_same(tmp_path, whole(*sampling))
    greedy, sampled = ((d / "windows.jsonl").read_text() for d in (whole(), whole(*sampling)))
    assert greedy != sampled


def test_an_error_is_said_once(small, tmp_path):
    process = start("--candidates", "no.json", "--qrels", small[1], "--output_dir", tmp_path,
                    processes=2)  # fmt: skip
    _, err = process.communicate()
    assert process.returncode == 1 and err.count("No such file or directory: 'no.json'") == 1


@pytest.fixture
def unfinished(flags, tmp_path, pull_the_plug) -> Path:
    """The folder of an evaluation that died after some windows."""
    out = tmp_path / "out"
    with pull_the_plug(4) as patch:
        run(patch, *flags, "--output_dir", out, "--max_in_flight", 2)
    assert 4 <= on_disk(out) < 24
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "names, more",
    [
        ("temperature", ["--temperature", 0.5]),
        ("candidates", ["--top_k", 8]),
        ("prompt", ["--prompt", "{}/prompt.toml"]),
        ("qrels", ["--qrels", "{}/qrels.txt"]),
        ("model", ["--model", "{}/model"]),
        ("model", []),
    ],
)
def test_another_evaluation_is_never_mixed_in(
    monkeypatch, flags, unfinished, tmp_path, names, more
):
    tiny, qrels = Path(flags[5]), Path(flags[3])
    (tmp_path / "prompt.toml").write_text(LISTWISE_PROMPT.read_text().replace("careful", "fair"))
    (tmp_path / "qrels.txt").write_text(qrels.read_text() + "q0 0 late 1\n")
    shutil.copytree(tiny, tmp_path / "model")
    weights = (tiny / "model.safetensors").read_bytes()
    os.utime(tiny / "model.safetensors")  # changes nothing
    if not more:  # trained once more, into the same folder
        (tiny / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    before = contents(unfinished)
    message = f"unfinished evaluation with another {names}: give another --output_dir"
    with pytest.raises(SystemExit, match=f"{unfinished} holds [0-9]+ windows of an {message}"):
        more = [str(arg).format(tmp_path) for arg in more]
        run(monkeypatch, *flags, *more, "--output_dir", unfinished)
    (tiny / "model.safetensors").write_bytes(weights)
    assert contents(unfinished) == before


def test_running_out_of_memory_names_the_flag(monkeypatch, flags, tmp_path):
    def fail(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "rank_batch", fail)
    with pytest.raises(SystemExit, match="a smaller --max_in_flight than"):
        run(monkeypatch, *flags, "--output_dir", tmp_path)


def test_a_torn_line_is_asked_again(monkeypatch, capsys, flags, whole, unfinished):
    kept = on_disk(unfinished)
    with open(unfinished / "windows.part0.jsonl", "r+b") as part:
        part.truncate(os.path.getsize(part.name) - 5)
    asked = count_asked(monkeypatch)
    run(monkeypatch, *flags, "--output_dir", unfinished)
    assert f"going on: {kept - 1} windows are on disk" in capsys.readouterr().out
    assert len(asked) == 24 - (kept - 1)
    check_same(unfinished, whole())


def test_a_torn_line_is_off_the_disk_before_the_next(monkeypatch, flags, whole, unfinished):
    """So that what is written behind it can be read when the run dies once more."""
    kept = on_disk(unfinished)
    with open(unfinished / "windows.part0.jsonl", "ab") as part:
        part.write(b'{"qid": "q0", "win')

    def answer_one(candidates, on_answer, known):
        on_answer(Answer("q5", 9, ["a"], ["a"], False, "", "", 0, False))
        raise OSError("the plug is pulled again")

    monkeypatch.setattr(evaluate, "choose_reranker", lambda *_: answer_one)
    with pytest.raises(SystemExit, match="pulled again"):
        run(monkeypatch, *flags, "--output_dir", unfinished)
    assert len(answers.read_parts(unfinished)) == kept + 1


@pytest.mark.parametrize("damage", ["", "{", '{"qid": "q0"}', "[1]", "\0\0\0"])
def test_a_damaged_line_is_named(monkeypatch, flags, unfinished, damage):
    part = unfinished / "windows.part0.jsonl"
    lines = part.read_text().split("\n")
    part.write_text("\n".join([lines[0], damage, *lines[2:]]))
    with pytest.raises(SystemExit, match=r"windows\.part0\.jsonl:2: damaged"):
        run(monkeypatch, *flags, "--output_dir", unfinished)
    assert not (unfinished / "metrics.json").exists()


def test_of_a_finished_evaluation_nothing_is_left_to_do(
    monkeypatch, capsys, flags, whole, unfinished
):
    whole()  # made before anything is counted
    run(monkeypatch, *flags, "--output_dir", unfinished)
    asked, before = count_asked(monkeypatch), contents(unfinished)
    capsys.readouterr()
    run(monkeypatch, *flags, "--output_dir", unfinished)
    said = capsys.readouterr().out
    assert f"nothing is left to do in {unfinished}" in said and "ndcg@10" in said
    assert not asked and contents(unfinished) == before
    check_same(unfinished, whole())
    with pytest.raises(SystemExit, match="a finished evaluation with another candidates, temper"):
        run(monkeypatch, *flags, "--output_dir", unfinished, "--top_k", 4, "--temperature", 1.0)
    assert not asked and contents(unfinished) == before


def test_what_answered_nothing_holds_up_nothing(monkeypatch, flags, whole, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"--model .*empty: cannot be loaded"):
        run(monkeypatch, *flags, "--model", tmp_path / "empty", "--output_dir", tmp_path / "out")
    run(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    check_same(tmp_path / "out", whole())


@pytest.mark.parametrize("call", [1, 2, 3])  # call 0 begins
def test_a_write_that_fails_loses_nothing(monkeypatch, flags, whole, tmp_path, call):
    """Neither windows.jsonl nor run.txt nor metrics.json: once there is room, nothing is asked."""
    os_replace, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) == call + 1:
            raise OSError("no space left on device")
        os_replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit, match="no space left"):
            run(patch, *flags, "--output_dir", tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    asked = count_asked(monkeypatch)
    run(monkeypatch, *flags, "--output_dir", tmp_path)
    assert not asked
    check_same(tmp_path, whole())


@pytest.mark.parametrize("task", ["listwise", "setwise"])
def test_known_answers_are_not_asked_again(monkeypatch, small, tiny, task):
    """As a library, without a process group."""
    settings = AgentSettings(
        model=str(tiny), task=task, window_size=4, step_size=2, max_new_tokens=60, temperature=1.0
    )
    agent = load_agent(settings)
    candidates = formats.read_candidates(small[0])
    answers, others = [], []
    ranked = rank_batch(agent, settings, candidates, answers.append)
    known = {(a.qid, a.window): a for a in answers[::2]}
    assert rank_batch(agent, settings, candidates, others.append, known) == ranked
    key = operator.attrgetter("qid", "window")
    assert sorted(others, key=key) == sorted(answers[1::2], key=key)
    wrong = answers[2]
    known[wrong.qid, wrong.window] = replace(wrong, given=wrong.given[::-1])
    message = f"known answer to window {wrong.window} of query {wrong.qid} is for other passages"
    with pytest.raises(ValueError, match=message):
        rank_batch(agent, settings, candidates, known=known)
