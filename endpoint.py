"""A model behind an OpenAI-compatible server: OpenAI's own, or vLLM, SGLang and others.

It is asked over HTTP, many windows at once, each in a thread of its own. What may pass by itself
(no connection, no answer in 10 minutes, HTTP 408, 409, 429 and 5xx) is tried again, RETRIES times;
what does not ends the asking, once the responses that are under way have come.
"""

import os
import re
import sys
from collections import deque
from collections.abc import Hashable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import openai

from engine.chat import Messages
from engine.model import TooLong
from settings import AgentSettings, UserError
from window import NoAnswer, Response

RETRIES = 10  # after 0.5, 1, 2, 4, then 8 s each, 50 s in all; or when the server says, up to 2 min
LAST_WAIT = 60  # seconds for the responses that are under way when one has failed for good
PATIENCE = 600  # seconds for one response
NO_KEY = "-"  # what a server of one's own is sent
TURN_TOKENS = 16  # for what a chat template adds to a turn
TOO_LONG = re.compile(r"context|too long|longer than|exceeds? the maximum", re.IGNORECASE)


class Endpoint:
    """The model that `settings` name, on its server. NoAnswer where it does not answer."""

    def __init__(self, settings: AgentSettings):
        check_address(settings.endpoint)
        self.settings = settings
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        self.limit = "max_tokens"  # what the server calls it
        self.client = openai.OpenAI(
            base_url=settings.endpoint, api_key=self.key, timeout=PATIENCE, max_retries=RETRIES
        )
        try:
            greeting = self.greet()
            response = read_completion(greeting)
        except Exception as error:
            raise self.meaning(error) from None
        if not response.tokens:
            print(f"{settings.endpoint} counts no tokens: they stand as 0", file=sys.stderr)
        self.spent = response.prompt_tokens + response.tokens
        # What the server says it runs.
        self.served = {name: getattr(greeting, name) for name in ("model", "system_fingerprint")}

    def greet(self) -> Any:
        """Ask for a word, so that a wrong address, key or name is told at once."""
        hasty = self.client.with_options(max_retries=1)
        messages: Messages = [{"role": "user", "content": "Say yes."}]
        try:
            return self.ask(hasty, messages)
        except openai.BadRequestError as error:
            if "max_completion_tokens" not in str(error):
                raise
        self.limit = "max_completion_tokens"  # OpenAI's newer models
        return self.ask(hasty, messages)

    def ask(self, client: openai.OpenAI, messages: Messages, seed: int = 0) -> Any:
        settings = self.settings
        options = {self.limit: settings.max_new_tokens}
        if settings.temperature:
            options["seed"] = seed
        return client.chat.completions.create(
            model=settings.model, messages=messages, temperature=settings.temperature, **options
        )

    def answer(self, messages: Messages, seed: int) -> Response | Exception:
        try:
            return read_completion(self.ask(self.client, messages, seed))
        except Exception as error:  # for the thread that collects, a bug too
            return self.meaning(error)

    def meaning(self, error: Exception) -> Exception:
        """What an error means to who started the program; a bug stays what it is."""
        settings = self.settings
        body = getattr(error, "body", None)
        words = str(body.get("message", body) if isinstance(body, dict) else body or error)
        if isinstance(error, openai.APIConnectionError):
            words = str(error.__cause__)
        if self.key != NO_KEY:
            words = words.replace(self.key, "***")
        words = " ".join(words.split())[:300]
        status = getattr(error, "status_code", None)
        if status in (400, 413, 422) and TOO_LONG.search(words):
            return TooLong(f"{words}: lower --window_size or --max_new_tokens")
        meanings = {
            **dict.fromkeys((401, 403), "the key in OPENAI_API_KEY is refused, or missing"),
            404: f"no --model {settings.model} there, or the URL lacks its end, /v1 for most",
            429: "too many requests (lower --max_in_flight) or no credit",
        }
        if status:
            meaning = meanings.get(status, f"HTTP {status}")
        elif isinstance(error, openai.APIConnectionError):
            meaning = "no answer"
        elif isinstance(error, ValueError | openai.OpenAIError):
            meaning = "what came back cannot be read"
        else:
            return error
        return NoAnswer(f"--endpoint {settings.endpoint}: {meaning}: {words}")


class Conversations:
    """Many at once with the model of an endpoint: `submit` one, `collect` the responses."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.settings = endpoint, endpoint.settings
        self.waiting: deque[tuple[Hashable, Messages, int]] = deque()
        self.under_way: dict[Hashable, int] = {}  # the most tokens that each may take
        self.answered: SimpleQueue[tuple[Hashable, Response | Exception]] = SimpleQueue()
        self.failed: Exception | None = None

    def submit(self, ticket: Hashable, messages: Messages, seed: int) -> None:
        """seed: of the sampling, where the temperature is not 0."""
        self.waiting.append((ticket, messages, seed))

    def collect(self) -> list[tuple[Hashable, Response | TooLong]]:
        """Wait for a response. NoAnswer where there is none to wait for any more: one has failed,
        or the next may pass --max_tokens_total."""
        self.send()
        if not self.under_way and (self.failed or self.waiting):
            raise self.failed or NoAnswer(
                f"--max_tokens_total {self.settings.max_tokens_total}: {self.endpoint.spent} "
                "tokens are spent, and the next window may take more than is left"
            )
        if not self.under_way:
            return []
        try:
            ticket, response = self.answered.get(timeout=LAST_WAIT if self.failed else None)
        except Empty:
            raise self.failed from None
        most = self.under_way.pop(ticket)
        if isinstance(response, TooLong):
            return [(ticket, response)]
        if isinstance(response, Exception):
            self.failed = self.failed or response
            return []
        self.endpoint.spent += (response.prompt_tokens + response.tokens) or most
        return [(ticket, response)]

    def send(self) -> None:
        """Start what is waiting, as far as --max_in_flight and --max_tokens_total allow."""
        total = self.settings.max_tokens_total
        while self.waiting and len(self.under_way) < self.settings.max_in_flight:
            ticket, messages, seed = self.waiting[0]
            most = most_tokens(messages) + self.settings.max_new_tokens
            taken = self.endpoint.spent + sum(self.under_way.values())
            if self.failed or (total and taken + most > total):
                return
            self.waiting.popleft()
            self.under_way[ticket] = most

            def work(ticket: Hashable = ticket, asked: tuple = (messages, seed)) -> None:
                self.answered.put((ticket, self.endpoint.answer(*asked)))

            Thread(target=work, daemon=True).start()  # which no stopped program waits for


def check_address(url: str) -> None:
    """UserError where this is no address, or one with a secret in it: it is written to files."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise UserError("--endpoint: the URL must hold no key: set OPENAI_API_KEY instead")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--endpoint {url}: expected a URL like http://localhost:8000/v1")


def most_tokens(messages: Messages) -> int:
    """More than a tokenizer makes of them: a token holds a byte at least."""
    try:
        return sum(len(m["content"].encode()) + TURN_TOKENS for m in messages)
    except UnicodeEncodeError:
        raise UserError("the query or a passage holds a lone surrogate, which is no text") from None


def read_completion(completion: Any) -> Response:
    """What a chat completion says. ValueError where it is none."""
    try:
        choice, usage = completion.choices[0], completion.usage
        message, cut_off = choice.message, choice.finish_reason == "length"
        # Servers that cut the reasoning out of the text call it one of these.
        thought = getattr(message, "reasoning_content", "") or getattr(message, "reasoning", "")
        text = message.content or message.refusal or ""
        if thought:
            text = f"<think>{thought}" + ("" if cut_off and not text else f"</think>\n{text}")
        prompt_tokens = int(usage.prompt_tokens) if usage else 0
        tokens = int(usage.completion_tokens) if usage else 0
        return Response("" + text, prompt_tokens, tokens, cut_off)
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ValueError(f"no chat completion: {completion!r}") from None
