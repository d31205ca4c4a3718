"""A ZeroGPU Space without its host: the real package `spaces`, and a stand-in for what it asks for a device.

Run as a script it starts `app.py` as a Space does. Where there is no GPU the fork finds nothing to prepare and computes
on the CPU; everything else of the package is as shipped. `python tests/space_stand_in.py` alone starts a Space on the
GPU of this machine, without internet: a run that is stopped, and another one.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parent.parent


class Host(ThreadingHTTPServer):
    """Lends device 0 to whoever asks, and remembers what was asked: path and query of every request."""

    def __init__(self, uuid: str = "GPU-stand-in"):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.uuid = uuid
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
        lent = {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": self.server.uuid, "allowToken": "token"}
        body = json.dumps(lent if parts.path == "/schedule" else {}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing: the server's log belongs to the app."""


@contextmanager
def lending_host(**options: str) -> Iterator[Host]:
    with Host(**options) as host:
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


def serve() -> None:
    """Start `app.py` with the arguments of this script."""
    if not gpu():
        stand_in_for_the_device()
    sys.path.insert(0, str(ROOT))
    sys.argv[0] = str(ROOT / "app.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


def gpu() -> str:
    """The name by which the driver knows the first GPU; '' without one. Nothing of CUDA is started."""
    if not (tool := shutil.which("nvidia-smi")):
        return ""
    asked = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.partition("\n")[0].strip()


def save_model(folder: Path) -> None:
    """A random LLaMA of 0.9 B parameters over bytes, so that a run takes long enough to be stopped."""
    import torch
    from conftest import byte_tokenizer, tiny_llama

    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    tiny_llama(torch.float16, **shape, **heads).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)


def try_out(model: Path) -> None:
    """Start a Space here, stop a run, make another, and print what happened when."""
    from browser_support import press_stop, raw_messages, running_app
    from page_form import filled

    save_model(model)
    flags = ["--model", str(model), "--device", "cuda:0"]
    with (
        lending_host(uuid=gpu()) as host,
        running_app(*flags, program=Path(__file__), env=environment(host)) as address,
    ):
        for number, tokens in enumerate((1024, 64, 64), 1):
            form = filled("Hello", str(model), ("fp16", "llm-int8"), tokens=tokens)
            began = stopped = time.monotonic()
            for _, message in raw_messages(address, "generate", form, f"session{number}"):
                said = json.dumps(message)
                if tokens == 1024 and "tok/s" in said and stopped == began:
                    press_stop(address, f"session{number}")
                    stopped = time.monotonic()
            host.wait_for("/release", number, 60)
            now = time.monotonic()
            print(f"run {number}: {now - began:.2f} s, the fork was over {now - stopped:.2f} s after Stop or the start")
            print(said[:6000])
        print(*host.asked, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve()
    else:
        os.environ["LLMQ_TEST_GPU"] = "1"  # kernels are compiled, not interpreted
        sys.path.insert(0, str(ROOT))
        with tempfile.TemporaryDirectory() as place:
            try_out(Path(place) / "model")
