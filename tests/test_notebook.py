"""The Colab notebook, each cell in an interpreter of its own, as after the restart that its second cell asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "assets" / "llmq_colab.ipynb").read_text(encoding="utf-8"))["cells"]
GET, _, START = ("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a cell where a session begins: in a folder that holds nothing of ours."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture
def session(tmp_path):
    """A session in which the first cell has fetched the repository."""
    fetched = run(GET.replace('REPOSITORY = ""', f"REPOSITORY = {str(ROOT)!r}"), tmp_path)
    assert fetched.returncode == 0, fetched.stderr
    return tmp_path


def test_the_app_starts_after_a_restart(session, tiny_folder):
    asked = START.replace('MODEL = ""', f"MODEL = {str(tiny_folder)!r}").replace("share=True", "share=False")
    answered = "\nfrom urllib.request import urlopen\nprint(urlopen(page.local_url).status)\npage.close()"
    assert asked != START
    done = run(asked + answered, session)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "200" in lines and any(line.startswith("http://127.0.0.1:") for line in lines)


def test_without_an_address_it_says_what_to_do(tmp_path):
    done = run(GET, tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Give the address of the llmq repository in REPOSITORY")
