"""README.md and docs/ are true: their Python runs, the map names every module, and the pictures are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import light

from llmq import face

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "REPORT.md", *ROOT.glob("docs/*.md")]
README, PYTHON, CHANGING = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/python.md", "docs/contributing.md")
)
MOST_CHARACTERS = 6000  # of the README, without a Space's card
MOST_BYTES = 2_000_000  # of its moving picture


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def blocks_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_python_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    """In one session, as somebody would type it; on the tiny model instead of the demo one."""
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(README) + blocks_of(PYTHON)
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
    drawn = CHANGING.partition("## Where things live\n")[2]
    there = {path.name for path in (ROOT / "llmq").iterdir() if path.name not in ("__main__.py", "__pycache__")}
    named = set(re.findall(r"\w+\.py\b", drawn)) | set(re.findall(r"llmq/(\w+)/", drawn))
    assert there - named == set()
    known = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "llmq").rglob("*")]}
    assert named - known == set()
    paths = re.findall(r"(?:llmq|tests)/[\w/.]+\w(?:\.py|/)", CHANGING)
    assert len(paths) > 20 and [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_is_short_and_leads_to_every_document():
    _, _, body = README.split("---\n", 2)
    assert len(body) <= MOST_CHARACTERS
    assert [path.name for path in DOCUMENTS if f"({path.relative_to(ROOT).as_posix()})" not in body] == []


def test_the_pictures_are_there_and_the_film_moves_and_is_small():
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert len(pictures) == 4 and all((ROOT / picture).exists() for picture in pictures)
    film = ROOT / "assets" / "film.webp"
    with Image.open(film) as opened:
        assert opened.n_frames > 20 and film.stat().st_size < MOST_BYTES
