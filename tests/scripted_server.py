"""A server that answers as it is told: every dialect, and everything that can go wrong with one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = ("Paris", " is", " big", ".")
Say = Callable[["Answering", dict], None]


@dataclass
class Scripted:
    """`requests`: (path, headers, body) of what came in; `left`: set when a client went away in mid-answer."""

    port: int
    requests: list[tuple[str, dict, dict]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def name(self, kind: str = "openai", model: str = "m") -> str:
        return f"{kind}@http://{self.host}/v1" + (f"#{model}" if model else "")

    @property
    def bodies(self) -> list[dict]:
        return [body for path, _, body in self.requests if path.endswith("completions")]


class Answering:
    """One answer under way."""

    def __init__(self, handler: BaseHTTPRequestHandler):
        self._handler = handler

    def begin(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> Answering:
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        for name, value in headers.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()
        return self

    def raw(self, data: bytes) -> Answering:
        self._handler.wfile.write(data)
        self._handler.wfile.flush()
        return self

    def event(self, value: object) -> Answering:
        text = value if isinstance(value, str) else json.dumps(value)
        return self.raw(f"data: {text}\n\n".encode())


def chat(text: str | None, end: str | None = None, **more: object) -> dict:
    """An event of the chat's stream."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": end} | more
    return {"id": "1", "object": "chat.completion.chunk", "choices": [choice]}


def usage(prompt: int = 9, answer: int = len(WORDS)) -> dict:
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": counts}


def whole(answer: Answering, body: dict, *, pause: float = 0.0) -> None:
    """An answer as it should be."""
    answer.begin().event(chat(None))
    for word in WORDS:
        time.sleep(pause)
        answer.event(chat(word))
    answer.event(chat(None, "stop")).event(usage()).event("[DONE]")


@contextmanager
def scripted(say: Say = whole, *, models: tuple[str, ...] = ("m",), pages: dict[str, str] | None = None) -> Iterator:
    """Serve on a free port; `say` answers what is asked for, `pages` are other paths' texts."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def _page(self, status: int, text: str, kind: str = "application/json") -> None:
            Answering(self).begin(status, kind).raw(text.encode())

        def do_GET(self) -> None:
            server.requests.append((self.path, dict(self.headers), {}))
            if self.path in (pages or {}):
                self._page(200, pages[self.path], "text/plain")
            elif self.path.endswith("/models"):
                self._page(200, json.dumps({"object": "list", "data": [{"id": name} for name in models]}))
            else:
                self._page(404, '{"detail": "Not Found"}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, dict(self.headers), body))
            try:
                say(Answering(self), body)
            except (BrokenPipeError, ConnectionResetError):
                server.left.set()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Scripted(http.server_address[1])
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
