"""README.md and docs/ are true: their Python runs, their links lead somewhere, and the map names every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_runs import light

from llmq import face

ROOT = Path(__file__).parents[1]
TEXTS = {path: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
README, PYTHON = TEXTS[ROOT / "README.md"], TEXTS[ROOT / "docs" / "python.md"]
MOST_CHARACTERS = 6000  # of the README, without a Space's card


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
    text = TEXTS[ROOT / "docs" / "contributing.md"]
    drawn = text.partition("## Where things live\n")[2]
    there = {path.name for path in (ROOT / "llmq").iterdir() if path.name not in ("__main__.py", "__pycache__")}
    named = set(re.findall(r"\w+\.py\b", drawn)) | set(re.findall(r"llmq/(\w+)/", drawn))
    assert there - named == set()
    known = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "llmq").rglob("*")]}
    assert named - known == set()
    paths = re.findall(r"(?:llmq|tests)/[\w/.]+\w(?:\.py|/)", text)
    assert len(paths) > 20 and [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_is_short_and_leads_to_every_document():
    _, _, body = README.split("---\n", 2)
    assert len(body) <= MOST_CHARACTERS
    documents = {path.relative_to(ROOT).as_posix() for path in TEXTS} - {"README.md"}
    assert documents - set(links(body)) == set()


def links(text: str) -> list[str]:
    """Where a document leads within the repository, pictures too."""
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [link for link in found if not re.match(r"\w+:", link)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for link in links(TEXTS[path]):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(TEXTS[target]), link
