"""README.md is true: its Python runs, and its map names every module that there is and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_runs import light

from llmq import face

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def test_the_python_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    """In one session, as somebody would type it; on the tiny model instead of the demo one."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    session: dict = {}
    for block in blocks:
        assert '"demo"' in block
        exec(block.replace('"demo"', repr(str(tiny_folder))), session)
    called = set(re.findall(r"llmq\.(\w+)\(", "".join(blocks)))
    assert called == {
        "compare",
        "outliers",
        "agreement",
        "quality",
        "ask",
        "open_model",
        "load",
        "free",
        "save_quantized",
    }
    assert "tok/s" in capsys.readouterr().out and list(face.machine().pool) == []
    assert (tmp_path / "paris.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_map_names_every_module():
    (drawn,) = re.findall(r"## Where things live\n(.*?)\n## ", README, re.DOTALL)
    there = {path.name for path in (ROOT / "llmq").iterdir() if path.name not in ("__main__.py", "__pycache__")}
    named = set(re.findall(r"\w+\.py\b", drawn)) | set(re.findall(r"llmq/(\w+)/", drawn))
    assert there - named == set()
    known = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "llmq").rglob("*")]}
    assert named - known == set()
    paths = re.findall(r"(?:llmq|tests)/[\w/.]+\w(?:\.py|/)", README)
    assert len(paths) > 20 and [path for path in paths if not (ROOT / path).exists()] == []
