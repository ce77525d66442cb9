"""A model behind a server: a small one that plays the protocol, its faults too, stands for it."""

import threading
import time
from dataclasses import replace

import openai
import pytest
from chat_server import RANKING, Server, completion, failure, serving

import endpoint
from endpoint import Conversations, Endpoint
from engine.model import TooLong
from settings import AgentSettings, UserError
from window import Response


def connect(server: Server | str, **changes) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    return Endpoint(AgentSettings(model="m", endpoint=url, max_new_tokens=50, **changes))


def ask_all(endpoint: Endpoint, texts: list[str]) -> dict:
    asked, replies = Conversations(endpoint), {}
    for i, text in enumerate(texts):
        asked.submit(i, [{"role": "user", "content": text}], seed=i)
    while len(replies) < len(texts):
        replies |= dict(asked.collect())
    return replies


def test_many_are_asked_at_once_and_each_reply_finds_its_ticket():
    def echo(body, n):
        time.sleep(0.05)
        return completion(body["messages"][0]["content"])

    with serving(echo) as server:
        replies = ask_all(connect(server, max_in_flight=4), [f"text {i}" for i in range(12)])
    assert {i: reply.text for i, reply in replies.items()} == {i: f"text {i}" for i in range(12)}
    assert 1 < server.most <= 4


def test_what_is_sent():
    with serving() as server:
        ask_all(connect(server), ["a"])
        ask_all(connect(server, temperature=0.7), ["b", "c"])
    greeting, greedy, _, *warm = server.asked
    messages = [{"role": "user", "content": "a"}]
    asked = {"model": "m", "messages": messages, "temperature": 0.0, "max_tokens": 50}
    assert greedy == asked and set(greeting) == set(asked)
    assert sorted(body["seed"] for body in warm) == [0, 1]
    assert {body["temperature"] for body in warm} == {0.7}


def test_the_key_comes_from_the_environment_alone(monkeypatch):
    with serving() as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        connect(server)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
        connect(server)
    sent = [headers["authorization"] for headers in server.headers]
    assert sent == [f"Bearer {endpoint.NO_KEY}", "Bearer sk-secret"]
    for url in ("http://me:sk-secret@localhost/v1", "https://host/v1?key=sk-secret"):
        with pytest.raises(UserError, match="must hold no key") as error:
            connect(url)
        assert "sk-secret" not in str(error.value)


def test_what_the_server_runs_is_told():
    with serving() as server:
        assert connect(server).served == {"model": "served-1", "system_fingerprint": "fp_1"}


@pytest.mark.parametrize(
    "reply, expected",
    [
        (completion(), Response(RANKING, 30, 12, False)),
        (completion("[2]", "length"), Response("[2]", 30, 12, True)),
        (completion("b", reasoning_content="a"), Response("<think>a</think>\nb", 30, 12, False)),
        (completion("b", reasoning="a"), Response("<think>a</think>\nb", 30, 12, False)),
        (completion(None, "length", reasoning="a"), Response("<think>a", 30, 12, True)),
        (completion(None, "stop", reasoning="a"), Response("<think>a</think>\n", 30, 12, False)),
        (completion(None, refusal="I will not."), Response("I will not.", 30, 12, False)),
        (completion(None, "content_filter"), Response("", 30, 12, False)),
        (completion() | {"usage": None}, Response(RANKING, 0, 0, False)),
    ],
)
def test_a_completion_is_read(reply, expected):
    with serving(lambda *_: reply) as server:
        assert ask_all(connect(server), ["a"]) == {0: expected}


UNREADABLE = [
    b"<html>welcome</html>", b'{"choices": [', b"null", b"[1]", {}, {"choices": []},
    {"choices": [{"finish_reason": "stop"}]}, completion(["text"]), completion(7),
    completion() | {"usage": {"prompt_tokens": "many"}},
]  # fmt: skip


@pytest.mark.parametrize("content", UNREADABLE)
def test_what_is_no_completion_is_a_clear_error(content):
    with (
        serving(lambda *_: content) as server,
        pytest.raises(UserError, match=f"--endpoint {server.url}: what came back cannot be read"),
    ):
        ask_all(connect(server), ["a"])


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(status):
    with serving(lambda _, n: failure(status, "busy") if n < 3 else completion()) as server:
        assert ask_all(connect(server), ["a"])[0].text == RANKING
    assert len(server.asked) == 1 + 3 + 1


def test_what_does_not_pass_ends_with_its_cause(monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 2)
    with (
        serving(lambda *_: failure(429, "no credit left")) as server,
        pytest.raises(UserError, match=r"too many requests .*no credit: no credit left"),
    ):
        ask_all(connect(server), ["a"])
    assert len(server.asked) == 1 + 3


def test_a_lost_connection_and_a_slow_reply_are_tried_again(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(endpoint, "PATIENCE", 0.2)

    def slow(body, n):
        if n == 0:
            raise ConnectionError  # the server says nothing and hangs up
        if n == 1:
            time.sleep(0.4)
        return completion()

    with serving(slow) as server:
        assert ask_all(connect(server), ["a"])[0].text == RANKING
        assert len(server.asked) == 1 + 3
        server.respond = lambda *_: time.sleep(0.4)
        monkeypatch.setattr(endpoint, "RETRIES", 0)
        with pytest.raises(UserError, match="no answer: timed out"):
            ask_all(connect(server), ["a"])


@pytest.mark.parametrize(
    "status, words, expected",
    [
        (401, "Incorrect API key: sk-secret", r"key in OPENAI_API_KEY is refused.*key: \*\*\*"),
        (403, "no", "key in OPENAI_API_KEY is refused"),
        (404, "The model `m` does not exist.", "no --model m there.*does not exist"),
        (400, "temperature must be 1", "HTTP 400: temperature must be 1"),
    ],
)
def test_what_the_server_refuses_is_said_at_once(status, words, expected, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving() as server:
        monkeypatch.setattr(server, "reply", lambda *_: failure(status, words))
        with pytest.raises(UserError, match=f"--endpoint {server.url}: .*{expected}"):
            connect(server)
    with (
        serving(lambda *_: failure(status, words)) as server,
        pytest.raises(UserError, match=expected),
    ):
        ask_all(connect(server), ["a", "b"])
    assert len(server.asked) <= 3


@pytest.mark.parametrize(
    "content, words",
    [({"detail": "pinned to m"}, "pinned to m"), (b"<p>Bad Gateway</p>", "Bad Gateway"), ({}, "")],
)
def test_a_refusal_in_other_words(content, words):
    with serving() as server:
        server.reply = lambda *_: (418, content)
        with pytest.raises(UserError, match=f"HTTP 418: .*{words}"):
            connect(server)


def test_an_address_that_is_none_or_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    with serving() as server:
        pass
    with pytest.raises(UserError, match=f"--endpoint {server.url}: no answer: .*refused"):
        connect(server)
    with serving() as server, pytest.raises(UserError, match="the URL lacks its end, /v1 for most"):
        connect(server.url.removesuffix("/v1"))
    for url in ("localhost:8000/v1", "ftp://host/v1", "http://", "v1"):
        with pytest.raises(UserError, match="expected a URL like"):
            connect(url)


def test_a_model_that_calls_the_limit_by_its_new_name():
    def particular(headers, body):
        server.asked.append(body)
        if "max_tokens" in body:
            return failure(400, "'max_tokens' is not supported, use 'max_completion_tokens'.")
        return completion()

    with serving() as server:
        server.reply = particular
        ask_all(connect(server), ["a", "b"])
    assert [body.get("max_completion_tokens") for body in server.asked] == [None, 50, 50, 50]


@pytest.mark.parametrize(
    "status, words",
    [
        (400, "This model's maximum context length is 4096 tokens."),
        (400, "The input (9000 tokens) is longer than the model's context length"),
        (400, "the request exceeds the available context size"),
        (413, "prompt is too long"),
    ],
)
def test_a_window_too_long_for_the_model_is_its_own_reply(status, words):
    def strict(body, n):
        long = len(body["messages"][0]["content"]) > 5
        return failure(status, words) if long else completion()

    with serving(strict) as server:
        replies = ask_all(connect(server), ["short", "so long a text"])
    assert replies[0].text == RANKING and isinstance(replies[1], TooLong)


def test_the_replies_under_way_are_kept_when_one_fails():
    def one_fails(body, n):
        if body["messages"][0]["content"] == "bad":
            return failure(400, "no such thing")
        time.sleep(0.2)
        return completion()

    with serving(one_fails) as server:
        asked = Conversations(connect(server, max_in_flight=3))
        for i, text in enumerate(["a", "bad", "b", "never sent"]):
            asked.submit(i, [{"role": "user", "content": text}], seed=i)
        replies = {}
        with pytest.raises(UserError, match="no such thing"):
            while True:
                replies |= dict(asked.collect())
    assert set(replies) == {0, 2} and len(server.asked) == 4


def test_a_failed_asking_does_not_wait_for_a_response_that_hangs(monkeypatch):
    monkeypatch.setattr(endpoint, "LAST_WAIT", 0.1)
    over = threading.Event()

    def hangs(body, n):
        if body["messages"][0]["content"] == "a":
            over.wait()
        return failure(400, "no such thing")

    with serving(hangs) as server:
        with pytest.raises(UserError, match="no such thing"):
            ask_all(connect(server), ["a", "b"])
        over.set()


@pytest.mark.parametrize("usage", [{"prompt_tokens": 30, "completion_tokens": 12}, None])
def test_the_limit_on_tokens_is_kept(usage):
    texts, replies = ["x" * 40] * 20, {}
    most = 40 + endpoint.TURN_TOKENS + 50
    with serving(lambda *_: completion() | {"usage": usage}) as server:
        asked = Conversations(connect(server, max_tokens_total=600, max_in_flight=8))
        for i, text in enumerate(texts):
            asked.submit(i, [{"role": "user", "content": text}], seed=i)
        with pytest.raises(UserError, match=r"--max_tokens_total 600: [0-9]+ tokens are spent"):
            while True:
                replies |= dict(asked.collect())
    each = 42 if usage else most  # where the server does not count, the most it can be
    assert asked.endpoint.spent == 42 + len(replies) * each <= 600 < asked.endpoint.spent + most
    assert len(server.asked) == 1 + len(replies)


def test_a_server_that_does_not_count_is_told_of(capsys):
    with serving() as server:
        server.reply = lambda *_: completion() | {"usage": None}
        connect(server)
    assert "counts no tokens" in capsys.readouterr().err


def test_what_is_no_text_is_refused():
    with serving() as server, pytest.raises(UserError, match="lone surrogate"):
        ask_all(connect(server), ["a\ud800"])


def test_a_bug_stays_a_bug(monkeypatch):
    monkeypatch.setattr(endpoint, "read_completion", replace)  # which wants a dataclass
    with serving() as server, pytest.raises(TypeError):
        connect(server)
