"""A ZeroGPU Space without a GPU: the real package `spaces`, and a stand-in for the host that it asks for a device.

Run as a script it starts `app.py` as a Space does, on a CPU build of torch: the fork finds a device in its place that
is the CPU, and everything else of the package is as shipped.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parent.parent


class Host(ThreadingHTTPServer):
    """Lends device 0 to whoever asks, and remembers what was asked: path and query of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.news = threading.Condition()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def times(self, path: str) -> int:
        return len(self.queries(path))

    def queries(self, path: str) -> list[dict[str, str]]:
        return [query for asked, query in self.asked if asked == path]

    def wait_for(self, path: str, times: int, seconds: float) -> bool:
        """Whether `path` has been asked for that often before `seconds` are over."""
        with self.news:
            return self.news.wait_for(lambda: self.times(path) >= times, seconds)


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        parts = urlsplit(self.path)
        with self.server.news:
            self.server.asked.append((parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}))
            self.server.news.notify_all()
        lent = {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": "GPU-stand-in", "allowToken": "token"}
        body = json.dumps(lent if parts.path == "/schedule" else {}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing: the server's log belongs to the app."""


@contextmanager
def lending_host() -> Iterator[Host]:
    with Host() as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        try:
            yield host
        finally:
            host.shutdown()


def environment(host: Host, **more: str) -> dict[str, str]:
    """Of a Space whose device comes from `host`."""
    space = {"SPACE_ID": "me/llmq", "SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": host.address}
    return os.environ | space | more


def stand_in_for_the_device() -> None:
    """Give a CPU build of torch what `spaces` looks at, and its forks no device to prepare."""
    import bitsandbytes  # noqa: F401  # while torch says that there is no GPU: it looks for more than is here
    import torch

    torch.version.cuda = torch.version.cuda or "12.8"
    torch._C._cuda_init = getattr(torch._C, "_cuda_init", lambda: None)
    torch.cuda._is_in_bad_fork = bool  # False, and known by name in another process
    import spaces.zero.torch as device

    device.init, device.move = lambda uuid: None, lambda callback=None: None


if __name__ == "__main__":
    stand_in_for_the_device()
    sys.path.insert(0, str(ROOT))
    sys.argv[0] = str(ROOT / "app.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
