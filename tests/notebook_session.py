"""The Colab notebook in a real kernel, in a folder of its own, with a restart where people restart.

`python tests/notebook_session.py [MODEL]` runs it on this machine, with a GPU where there is one and without internet,
asks the page that it opens for one comparison, and prints the answer. MODEL: a name or a folder; default: a tiny LLaMA
made on the spot.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from shutil import make_archive

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((ROOT / "assets" / "llmq_colab.ipynb").read_text(encoding="utf-8"))
GET, INSTALL, START = ("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
CELL_SECONDS = 300


class CellFailed(AssertionError):
    """A cell ended in an error; its last line is the message."""


class Session:
    """One kernel in one folder. `run(code)` returns what a cell prints, then the HTML that it shows."""

    def __init__(self, folder: Path):
        from jupyter_client import KernelManager

        self.kernel = KernelManager()
        self.kernel.start_kernel(cwd=str(folder))
        self._connect()

    def _connect(self) -> None:
        self.client = self.kernel.client()
        self.client.start_channels()
        self.client.wait_for_ready(CELL_SECONDS)

    def restart(self) -> None:
        self.client.stop_channels()
        self.kernel.restart_kernel(now=True)
        self._connect()

    def run(self, code: str) -> tuple[str, str]:
        printed, shown, failed = [], [], []

        def hear(message: dict) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
            elif message["msg_type"] == "error":
                failed.append(f"{content['ename']}: {content['evalue']}")
            elif "data" in content:
                shown.append(content["data"].get("text/html", ""))

        try:
            self.client.execute_interactive(code, output_hook=hear, timeout=CELL_SECONDS, allow_stdin=False)
        except (Empty, TimeoutError) as error:
            raise CellFailed(f"a cell ran longer than {CELL_SECONDS} s") from error
        if failed:
            raise CellFailed(failed[0])
        return "".join(printed), "".join(shown)

    def close(self) -> None:
        self.client.stop_channels()
        self.kernel.shutdown_kernel(now=True)


@contextmanager
def session(folder: Path) -> Iterator[Session]:
    opened = Session(folder)
    try:
        yield opened
    finally:
        opened.close()


def pack(folder: Path) -> None:
    """Write llmq.zip there, as the README says."""
    command = ["git", "archive", "--format", "zip", "-o", str(folder / "llmq.zip"), "HEAD"]
    if subprocess.run(command, cwd=ROOT, capture_output=True).returncode:  # a copy without its history
        make_archive(str(folder / "llmq"), "zip", ROOT)


def filled(cell: str, **fields: object) -> str:
    """A cell whose form somebody has filled in."""
    lines = cell.splitlines()
    for name, value in fields.items():
        (place,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[place] = f"{name} = {value!r}"
    return "\n".join(lines)


def address_in(printed: str) -> str:
    return printed.split()[-1]


def main(model: str | None) -> None:
    from gradio_client import Client

    with tempfile.TemporaryDirectory() as name, session(Path(name)) as opened:
        if model is None:
            sys.path.insert(0, str(ROOT))
            from conftest import byte_tokenizer, tiny_llama

            model = f"{name}/tiny-llama"
            tiny_llama().save_pretrained(model)
            byte_tokenizer().save_pretrained(model)
        pack(Path(name))
        for cell in (GET, INSTALL):
            print(*opened.run(cell))
        opened.restart()
        printed, shown = opened.run(filled(START, MODEL=model))
        print(printed, shown)
        asked = {"model": model, "methods": "fp16,llm-int8", "max_new_tokens": 8, "api_name": "/compare"}
        answer = Client(address_in(printed), verbose=False).predict("Name three colours.", **asked)
        print(json.dumps(answer, indent=1)[:4000])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
