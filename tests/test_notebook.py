"""The Colab notebook: every cell as shipped in a real kernel, with the restart; what it installs; where it is found."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from browser_support import PATIENCE, new_tab
from notebook_session import GET, INSTALL, ROOT, START, CellFailed, address_in, filled, pack, session
from packaging.requirements import Requirement

README = (ROOT / "README.md").read_text(encoding="utf-8")
BADGE = re.search(r"\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)", README)[1]
ADDRESS = runpy.run_path(str(ROOT / ".ci" / "address"))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel whose folder holds llmq.zip and nothing else."""
    folder = tmp_path_factory.mktemp("content")
    pack(folder)
    with session(folder) as opened:
        yield opened


def test_every_cell_runs_as_shipped_also_after_a_restart(kernel, tiny_folder):
    assert kernel.run(GET)[0].endswith("go on with the second cell.\n")
    assert kernel.run(INSTALL)[0].endswith("Go on with the third cell.\n")
    for _ in range(2):  # a third cell that runs again closes its first page
        kernel.restart()
        for _ in range(2):
            printed, shown = kernel.run(filled(START, MODEL=str(tiny_folder), METHODS="fp16,llm-int8", SHARE=False))
            address = address_in(printed)
            assert httpx.get(address).status_code == 200
            assert f'<iframe src="{address}"' in shown and 'height="900"' in shown


@contextmanager
def notebook_page(shown: str) -> Iterator[str]:
    """A page of another origin, as a notebook's is, that shows what a cell shows; yields its address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(shown.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def test_the_page_in_the_cell_gives_a_verdict_after_the_restart(kernel, tiny_folder, browser):
    """Generate is pressed where people see it: in the frame that the third cell shows."""
    for cell in (GET, INSTALL):
        kernel.run(cell)
    kernel.restart()
    _, shown = kernel.run(filled(START, MODEL=str(tiny_folder), METHODS="fp16,llm-int8", SHARE=False))
    tab = new_tab(browser, viewport={"width": 1000, "height": 1000})
    with notebook_page(shown) as address:
        tab.goto(address)
        cell = tab.frame_locator("iframe")
        cell.locator("#prompt textarea").fill("Name three colours.")
        cell.locator("#generate").click()
        verdict = cell.locator("#status").filter(has_text="memory")
        verdict.wait_for(timeout=PATIENCE)
        assert verdict.inner_text().startswith("int8 · ours needs")
    tab.close()


def test_without_the_model_the_page_plays_its_recorded_runs(kernel):
    asked = filled(START, MODEL="nobody/nothing", SHARE=False)
    printed, _ = kernel.run(asked)
    assert "nobody/nothing" in printed and "plays its recorded runs without a model" in printed
    assert httpx.get(address_in(printed)).status_code == 200


def test_a_wrong_choice_says_what_to_do(kernel):
    with pytest.raises(CellFailed, match="SystemExit: unknown .*'int3'.*Change the form and run this cell again"):
        kernel.run(filled(START, METHODS="fp16,int3", SHARE=False))


def test_the_repository_is_fetched_or_what_to_do_is_said(tmp_path):
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", GET], **run)
    assert done.returncode == 1 and done.stderr.startswith("Put llmq.zip here, or the address of the llmq repository")
    done = subprocess.run([sys.executable, "-c", filled(GET, REPOSITORY=str(ROOT))], **run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "llmq-app" / "app.py").is_file()


COLABS = {"torch": "2.11.0", "gradio": "6.20.0", "numpy": "2.0.2"}  # what a session begins with


def write_wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """A package of one empty module."""
    module, about = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}/__init__.py": "",
        f"{about}/METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/top_level.txt": f"{module}\n",
    }
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{about}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"]))


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A Python with Colab's versions of three packages, and an index that has newer ones of all."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name, version in COLABS.items():
        write_wheel(tmp_path, name, version)
    for wanted in map(Requirement, (ROOT / "requirements.txt").read_text().split()):
        version = next(part.version for part in wanted.specifier if part.operator == ">=")
        newest = "2.13.0" if wanted.name == "torch" else f"{version}.1"
        write_wheel(tmp_path, wanted.name, newest, "torch>=2.4" if wanted.name == "bitsandbytes" else "")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    begun = [f"{name}=={version}" for name, version in COLABS.items()]
    subprocess.run([python, "-m", "pip", "install", "-q", *begun], check=True)
    return python


def test_torch_stays_and_what_was_loaded_before_it_changed_asks_for_a_restart(colab, tmp_path):
    for name in ("app.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    told = [
        subprocess.run([colab, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for code in (f"import gradio, numpy, torch\n{INSTALL}", INSTALL)
    ]
    assert told[0].endswith("(Runtime, Restart session), then run the third cell: gradio changed.\n")
    assert told[1] == "Go on with the third cell.\n"
    frozen = subprocess.run([colab, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch==2.11.0", "numpy==2.0.2", "gradio==6.31.1"} <= {line.partition(" @")[0] for line in frozen}
    assert len(frozen) == len((ROOT / "requirements.txt").read_text().split())


def test_the_badge_opens_the_notebook_that_fetches_this_repository():
    repository = re.search(r'^REPOSITORY = "(.*?)"', GET, re.MULTILINE)[1]
    assert ADDRESS["badge"](repository) == BADGE


@pytest.mark.parametrize(
    "remote",
    ["git@github.com:me/llmq.git", "https://github.com/me/llmq", "ssh://git@github.com/me/llmq.git", "https://github.com/me/llmq/"],
)  # fmt: skip
def test_the_remote_is_written_into_badge_and_notebook(remote, tmp_path):
    for name in (".ci/address", "README.md", "assets/llmq_colab.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for command in (["git", "init", "-q"], ["git", "remote", "add", "origin", remote], [".ci/address"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    opened = "https://colab.research.google.com/github/me/llmq/blob/main/assets/llmq_colab.ipynb"
    assert f"]({opened})" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert 'REPOSITORY = \\"https://github.com/me/llmq\\"' in (tmp_path / "assets" / "llmq_colab.ipynb").read_text()


@pytest.mark.parametrize("remote", ["", "file:///srv/llmq", "https://example.com/me/llmq", "https://github.com/me"])
def test_a_remote_elsewhere_is_refused(remote):
    with pytest.raises(SystemExit, match="is not on github.com"):
        ADDRESS["public"](remote)
