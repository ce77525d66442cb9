"""The programs with a model behind a server: one that plays the protocol, and a real one."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from chat_server import completion, failure, serving
from conftest import collection

import evaluate
import tasks
from agent import Agent, load_agent, rank_batch
from engine.model import TooLong
from rearank import Rearank
from settings import AgentSettings, UserError
from tasks import settle
from window import LISTWISE_PROMPT

ROOT = Path(__file__).parents[1]
SETTINGS = AgentSettings(model="m", window_size=4, step_size=2, max_new_tokens=60)
REVERSED = "<think> Last first. </think> <answer> [4] > [3] > [2] > [1] </answer>"
WINDOWS = 24  # of 6 queries with 9 passages each


def reverse(body: dict, n: int) -> dict:
    return completion(REVERSED)


def served_agent(server) -> tuple[Agent, AgentSettings]:
    settings = replace(SETTINGS, endpoint=server.url)
    return load_agent(settings), settings


def run(monkeypatch, small, server, folder: Path, *args) -> None:
    flags = ["--candidates", small[0], "--qrels", small[1], "--endpoint", server.url, "--model",
             "some/m", "--window_size", 4, "--step_size", 2, "--output_dir", folder]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [*flags, *args])])
    evaluate.main()


def questions(server) -> list[str]:
    """What the windows asked, without the greetings."""
    asked = (json.dumps(body["messages"]) for body in server.asked)
    return [text for text in asked if "Say yes." not in text]


def test_windows_are_asked_as_they_are_asked_of_a_model_in_memory():
    (query, *_), _ = collection(queries=1, depth=4)
    answers, heard = [], []
    with serving(reverse) as server:
        (ranked,) = rank_batch(
            *served_agent(server), [query], answers.append, on_text=lambda *said: heard.append(said)
        )
    assert [p.docid for p in ranked.passages] == [f"d0-{i}" for i in (3, 2, 1, 0)]
    (answer,) = answers
    assert (answer.reasoning, answer.prompt_tokens, answer.tokens) == ("Last first.", 30, 12)
    messages = server.asked[1]["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 5, "user"]
    assert messages[3]["content"] == f"[1] {query.passages[0].text}"
    assert [(text, shown.window) for text, shown in heard] == [(REVERSED, 0)]


def test_each_window_has_a_seed_of_its_own_whichever_others_are_asked():
    queries, _ = collection(queries=3)

    def seeds(queries, **changes) -> dict:
        with serving(reverse) as server:
            settings = replace(SETTINGS, endpoint=server.url, temperature=1.0, **changes)
            rank_batch(load_agent(settings), settings, queries)
        return {json.dumps(body["messages"]): body["seed"] for body in server.asked[1:]}

    every, one, other = seeds(queries), seeds(queries[1:2]), seeds(queries, seed=1)
    assert len(set(every.values())) == len(every) == 12
    assert one.items() <= every.items() and not set(other.values()) & set(every.values())
    assert all(0 <= seed < 2**31 for seed in every.values())


def test_a_window_too_long_for_the_server_keeps_its_order():
    def strict(body, n):
        long = "long" in body["messages"][3]["content"]
        return failure(400, "maximum context length is 10 tokens") if long else reverse(body, n)

    queries, _ = collection(queries=2, depth=6)
    first = replace(queries[0].passages[2], text="long long")
    queries[0] = replace(
        queries[0], passages=(*queries[0].passages[:2], first, *queries[0].passages[3:])
    )
    answers = []
    with serving(strict) as server:
        ranked = rank_batch(*served_agent(server), queries, answers.append, keep_too_long=True)
        with pytest.raises(TooLong, match="query q0: maximum context length"):
            rank_batch(*served_agent(server), queries)
    assert sorted((a.qid, a.window) for a in answers if a.too_long) == [("q0", 0)]
    # The lower window was not asked, the upper one was.
    assert [p.docid for p in ranked[0].passages] == [f"d0-{i}" for i in (3, 2, 1, 0, 4, 5)]
    assert len(answers) == 4


def test_from_python():
    with serving(reverse) as server:
        reranker = Rearank("m", endpoint=server.url, window_size=4, step_size=2)
        for _ in range(2):
            ranking = reranker.rank("q", ["a", "b", "c", "d"])
            assert [document["corpus_id"] for document in ranking] == [3, 2, 1, 0]
    assert len(server.asked) == 3  # it greets once


def test_a_failure_is_over_with_the_next_call():
    with serving(lambda body, n: failure(400, "no") if n == 0 else reverse(body, n)) as server:
        reranker = Rearank("m", endpoint=server.url)
        with pytest.raises(UserError, match="HTTP 400: no"):
            reranker.rank("q", ["a", "b"])
        assert len(reranker.rank("q", ["a", "b"])) == 2


def test_an_evaluation_says_who_answered_and_keeps_no_key(monkeypatch, capsys, tmp_path, small):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(reverse) as server:
        run(monkeypatch, small, server, tmp_path)
        with pytest.raises(SystemExit, match="a finished evaluation with another temperature"):
            run(monkeypatch, small, server, tmp_path, "--temperature", 1)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["served"] == {"model": "served-1", "system_fingerprint": "fp_1"}
    assert metrics["settings"]["endpoint"] == server.url and "dtype" not in metrics["settings"]
    assert metrics["sha256"].keys() == {"candidates", "qrels", "prompt"}
    assert (metrics["windows"], metrics["malformed"]) == (WINDOWS, 0)
    assert (metrics["prompt_tokens"], metrics["tokens"]) == (WINDOWS * 30, WINDOWS * 12)
    said = capsys.readouterr()
    assert f"tokens={WINDOWS * 42:,}" in said.err
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"sk-secret" not in written and "sk-secret" not in said.out + said.err


def test_another_model_under_the_same_name_is_refused(monkeypatch, tmp_path, small):
    with serving(reverse) as server:
        run(monkeypatch, small, server, tmp_path)
        server.reply = lambda *_: completion() | {"model": "served-2"}
        with pytest.raises(SystemExit, match="with another model:"):
            run(monkeypatch, small, server, tmp_path)


def test_the_folder_is_named_after_the_model_and_not_after_the_address(monkeypatch):
    name = evaluate.default_folder(
        "dl19", evaluate.SourceSettings(), evaluate.EvaluateSettings(),
        AgentSettings(model="openai/gpt-4o", endpoint="https://host/v1", max_tokens_total=5),
    )  # fmt: skip
    assert name.parent == Path("runs") and name.name.rpartition("-")[0] == "dl19-gpt-4o"


def test_the_limit_ends_an_evaluation_and_the_same_command_goes_on(monkeypatch, tmp_path, small):
    usage = {"prompt_tokens": 500, "completion_tokens": 12}
    kept = []
    with serving(lambda body, n: reverse(body, n) | {"usage": usage}) as server:
        while not (tmp_path / "metrics.json").exists():
            try:
                run(monkeypatch, small, server, tmp_path, "--max_tokens_total", 8000)
            except SystemExit as error:
                kept.append(len((tmp_path / "windows.part0.jsonl").read_text().splitlines()))
                assert f"{kept[-1]} windows are kept in {tmp_path}, and the same" in str(error)
                assert "--max_tokens_total 8000: " in str(error)
    assert 0 < kept[0] < kept[-1] < WINDOWS  # it went on more than once
    assert len(questions(server)) == len(set(questions(server))) == WINDOWS


def test_a_server_that_fails_ends_an_evaluation_and_the_same_command_goes_on(
    monkeypatch, tmp_path, small
):
    with serving(lambda body, n: reverse(body, n) if n < 9 else failure(401, "expired")) as server:
        with pytest.raises(SystemExit, match=r"refused, or missing: expired; [1-9] windows are k"):
            run(monkeypatch, small, server, tmp_path)
        kept = len((tmp_path / "windows.part0.jsonl").read_text().splitlines())
        server.respond, before = reverse, len(questions(server))
        run(monkeypatch, small, server, tmp_path)
    assert len(questions(server)) - before == WINDOWS - kept


def test_ctrl_c_keeps_what_was_answered_and_waits_for_nothing(monkeypatch, capsys, tmp_path, small):
    part, over = tmp_path / "windows.part0.jsonl", threading.Event()

    def press_ctrl_c() -> None:
        while not (part.exists() and part.read_bytes().count(b"\n") == 5):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def never_after_five(body, n):
        if n >= 5:
            over.wait()
        return reverse(body, n)

    threading.Thread(target=press_ctrl_c, daemon=True).start()
    with serving(never_after_five) as server:
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, small, server, tmp_path)
        left = [thread for thread in threading.enumerate() if not thread.daemon]
        over.set()
    assert ended.value.code == 130 and left == [threading.main_thread()]
    assert "interrupted: 5 windows are kept in" in capsys.readouterr().err


def test_one_process_asks(monkeypatch):
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="start it without torchrun"):
        evaluate.load_model(replace(SETTINGS, endpoint="http://localhost/v1"), None)


def test_task_and_prompt_of_a_servers_model(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "file_beside", None)  # nobody is asked about the name
    settled = settle(replace(SETTINGS, model="gpt-4o", endpoint="http://localhost/v1"))
    assert (settled.task, settled.prompt) == ("listwise", str(LISTWISE_PROMPT))
    monkeypatch.undo()
    # A name that is a folder here is an export's, and has its own.
    (tmp_path / "settings.json").write_text('{"task": "setwise"}')
    (tmp_path / "prompt.toml").write_text("")
    settled = settle(replace(SETTINGS, model=str(tmp_path), endpoint="http://localhost/v1"))
    assert (settled.task, settled.prompt) == ("setwise", str(tmp_path / "prompt.toml"))


# ---------------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def real_server(tiny, tmp_path_factory):
    """The URL of `transformers serve`, running the tiny model."""
    for package in ("fastapi", "uvicorn", "rich"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"transformers[serving] lacks {package}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [Path(sys.executable).parent / "transformers", "serve", tiny, "--device", "cpu"]
    with open(log, "wb") as file:
        job = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert job.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"{url}/v1"
    finally:
        job.kill()
        job.wait()


def test_a_real_server_gives_the_ranking_that_the_own_engine_gives(real_server, tiny):
    candidates, _ = collection(queries=3)
    settings = replace(SETTINGS, model=str(tiny))
    here, there = [], []
    ranked = rank_batch(load_agent(settings), settings, candidates, here.append)
    settings = replace(settings, endpoint=real_server, max_in_flight=4)
    assert rank_batch(load_agent(settings), settings, candidates, there.append) == ranked

    def facts(answers) -> dict:
        return {
            (a.qid, a.window): (a.ranked, a.prompt_tokens, a.tokens, a.cut_off, a.reasoning)
            for a in answers
        }

    assert facts(there) == facts(here) and len(here) == 12
    assert any(answer.ranked != answer.given for answer in here)
