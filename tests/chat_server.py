"""A small server that plays the protocol of chat completions, and whatever fault a test wants."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SOON = {"retry-after-ms": "1"}  # a failure's wish, which the client respects
RANKING = "<think> Both. </think> <answer> [2] > [1] </answer>"


def completion(content: str | None = RANKING, finish: str = "stop", **message) -> dict:
    return {
        "model": "served-1",
        "system_fingerprint": "fp_1",
        "choices": [{"message": {"content": content, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 30, "completion_tokens": 12},
    }


def failure(status: int, message: str) -> tuple[int, dict]:
    return status, {"error": {"message": message}}


class Server:
    """Answers the first request, which is the greeting, well, and the others by `respond`: what is
    asked and how many asked before -> JSON, bytes, or (status, either of them)."""

    def __init__(self, respond: Callable):
        self.respond, self.asked, self.headers = respond, [], []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def reply(self, headers, body: dict):
        with self.lock:
            self.asked.append(body)
            self.headers.append(headers)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            greeting = body["messages"][0]["content"] == "Say yes."
            return completion() if greeting else self.respond(body, len(self.asked) - 2)
        finally:
            with self.lock:
                self.now -= 1


@contextmanager
def serving(respond: Callable = lambda body, n: completion()) -> Iterator[Server]:
    server = Server(respond)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = server.reply(self.headers, body) if self.path == "/v1/chat/completions" else 404
            status, content = reply if isinstance(reply, tuple) else (200, reply)
            if reply == 404:
                status, content = failure(404, "Not Found")
            self.send_response(status)
            for name, value in ({"content-type": "application/json"} | SOON).items():
                self.send_header(name, value)
            self.end_headers()
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, server.url = True, f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
