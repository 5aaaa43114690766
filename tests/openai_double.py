"""An OpenAI-compatible endpoint in a process of its own, with failures on demand: what tests of remote models ask.

    with endpoint("busy:2", "text:hello") as double:
        … ask double.url …
        double.requests()          # what it was asked, in order

Each call takes the next step of the script, and the last one for ever. Steps:

    text:WORDS      streams the words, one event each
    echo            streams the last message, backwards
    busy:STATUS[:RETRY-AFTER]    refuses with a status
    error:STATUS:JSON            refuses with a body
    garbled         refuses with a body that is not compressed as it says
    deep            refuses with endlessly nested JSON
    cut:WORDS       streams the words and closes the connection without an end
    hang            streams one word and then nothing, until the client goes away
    never           answers nothing at all
    plain           answers with JSON instead of a stream
    inside:JSON     an error inside the stream
    endless         words without end
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

MODELS = ("tiny", "tiny-long")


class Script:
    """What was asked so far, and what comes next."""

    def __init__(self, steps: list[str], key: str) -> None:
        self.steps, self.key, self.lock = steps, key, Lock()
        self.requests: list[dict[str, Any]] = []
        self.seen: list[str] = []

    def next(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        with self.lock:
            step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
            entry = {"body": body, "at": time.time(), "gone": False}
            self.requests.append(entry)
            return step, entry

    def cached(self, prompt: str) -> int:
        """A prefix cache: characters of the longest beginning that was seen before, four a token."""
        with self.lock:
            same = max((sum(1 for _ in _common(prompt, old)) for old in self.seen), default=0)
            self.seen.append(prompt)
            return same // 4


def _common(one: str, other: str) -> Iterator[str]:
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/requests":
            self._json(200, self.script.requests)
        elif self.path == "/v1/models":
            self._json(200, {"data": [{"id": name} for name in MODELS]})
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions":
            self._json(404, {"detail": "Not Found"})
            return
        if self.script.key and self.headers.get("authorization") != f"Bearer {self.script.key}":
            said = self.headers.get("authorization")
            self._json(401, {"error": {"message": f"Incorrect API key provided: {said}", "code": "invalid_api_key"}})
            return
        if body["model"] not in MODELS:
            self._json(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        step, entry = self.script.next(body)
        name, _, rest = step.partition(":")
        try:
            getattr(self, f"_{name}")(rest, body)
        except (BrokenPipeError, ConnectionResetError):
            entry["gone"] = True

    def _text(self, words: str, body: dict[str, Any]) -> None:
        self._stream()
        texts = [message["content"] for message in body["messages"]]
        for number, word in enumerate(words.split(" ")):
            self._event({"choices": [{"delta": {"content": word if not number else f" {word}"}}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        prompt = "\n".join(texts)
        usage = {
            "prompt_tokens": len(prompt) // 3,
            "completion_tokens": len(words.split(" ")),
            "prompt_tokens_details": {"cached_tokens": self.script.cached(prompt)},
        }
        self._event({"choices": [], "usage": usage})
        self._raw(b"data: [DONE]\n\n")
        self._end()

    def _echo(self, _rest: str, body: dict[str, Any]) -> None:
        self._text(body["messages"][-1]["content"][::-1], body)

    def _busy(self, rest: str, _body: dict[str, Any]) -> None:
        status, _, after = rest.partition(":")
        self._json(int(status), {"error": {"message": "too many requests"}}, {"Retry-After": after} if after else {})

    def _error(self, rest: str, _body: dict[str, Any]) -> None:
        status, _, text = rest.partition(":")
        self._json(int(status), json.loads(text))

    def _garbled(self, _rest: str, _body: dict[str, Any]) -> None:
        self._json(400, {}, {"Content-Encoding": "gzip"})

    def _deep(self, _rest: str, _body: dict[str, Any]) -> None:
        self.send_response(400)
        self.send_header("Content-Length", "60000")
        self.end_headers()
        self.wfile.write(b"[" * 60_000)

    def _cut(self, words: str, _body: dict[str, Any]) -> None:
        self._stream()
        for word in filter(None, words.split(" ")):
            self._event({"choices": [{"delta": {"content": word}}]})
        self.close_connection = True
        self.connection.close()

    def _hang(self, _rest: str, _body: dict[str, Any]) -> None:
        self._stream()
        self._event({"choices": [{"delta": {"content": "one"}}]})
        for _ in range(400):
            time.sleep(0.05)
            self._raw(b": still here\n\n")

    def _never(self, _rest: str, _body: dict[str, Any]) -> None:
        time.sleep(20)

    def _plain(self, _rest: str, _body: dict[str, Any]) -> None:
        self._json(200, {"choices": [{"message": {"content": "whole"}}]})

    def _inside(self, rest: str, _body: dict[str, Any]) -> None:
        self._stream()
        self._event(json.loads(rest))
        self._end()

    def _endless(self, _rest: str, _body: dict[str, Any]) -> None:
        self._stream()
        for _ in range(100_000):
            self._event({"choices": [{"delta": {"content": "and on and on "}}]})

    def _json(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(text)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, data: Any) -> None:
        self._raw(f"data: {json.dumps(data)}\n\n".encode())

    def _raw(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")


@dataclass
class Double:
    """A running endpoint."""

    base: str

    @property
    def url(self) -> str:
        return f"{self.base}/v1"

    def requests(self) -> list[dict[str, Any]]:
        """What it was asked: ``body``, ``at`` and whether the client has ``gone`` before the end."""
        with urllib.request.urlopen(f"{self.base}/requests", timeout=10) as answer:  # noqa: S310  # the double's own address
            found: list[dict[str, Any]] = json.load(answer)
            return found


@contextmanager
def endpoint(*steps: str, key: str = "") -> Iterator[Double]:
    """An endpoint that follows a script, in a process of its own, while the context lasts."""
    line = [sys.executable, str(Path(__file__)), key, *steps]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Double(f"http://127.0.0.1:{process.stdout.readline().strip()}")
    finally:
        process.kill()
        process.communicate()


def main(key: str, *steps: str) -> None:
    """Serve until killed; the first line printed is the port."""
    Handler.script = Script(list(steps), key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
