"""The texts that ship: fixed bytes, enough of them, and calibration on none of what is measured."""

from __future__ import annotations

import hashlib
import re

import pytest
from conftest import tiny_llama
from tiny_runs import run_cli

from llmq.methods import METHODS
from llmq.models.reference_text import CALIBRATION, FOLDER, TEXTS, WINDOW, fingerprint, reference_text, windows

ALL = [*TEXTS, CALIBRATION]
STATED = dict(
    reversed(line.split()) for line in re.findall(r"^    (\w{64}  \w+\.txt)$", (FOLDER / "README.md").read_text(), re.M)
)


@pytest.mark.parametrize("name", ALL)
def test_a_text_is_the_bytes_that_are_stated_with_its_source_and_licence(name):
    data = (FOLDER / f"{name}.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == STATED[f"{name}.txt"] and b"\r" not in data
    assert fingerprint(name) == STATED[f"{name}.txt"][:8]
    (row,) = (line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| `{name}.txt`"))
    assert all(len(cell.strip()) > 3 for cell in row.split("|")[1:-1]) and len(row.split("|")) == 6


@pytest.mark.demo
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_has_64_windows(demo, name):
    from llmq.models.opening import Model

    cut = windows(Model(demo), 64, name)
    assert [len(ids) for ids in cut] == [WINDOW] * 64


def passages(name: str, words: int = 10) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", reference_text(name).lower())
    return {tuple(found[i : i + words]) for i in range(len(found) - words)}


@pytest.mark.parametrize("name", TEXTS)
def test_calibration_reads_no_passage_that_is_measured(name):
    assert passages(name) & passages(CALIBRATION) == set()
    assert len(passages(CALIBRATION)) > 10_000, "there was something to find"


def test_calibration_takes_its_own_text(tmp_path, capsys, monkeypatch):
    from test_quality import saved

    from llmq.machine import door

    taken = []
    monkeypatch.setattr(door, "windows", lambda *asked: taken.append(asked[1:]) or windows(*asked))
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "model", tiny_llama(max_position_embeddings=2 * WINDOW))
    arguments = ["--methods", "smoothquant", "--tokens", 1024, "--no-floor", "--device", "cpu"]
    assert run_cli(capsys, "quality", "--model", folder, *arguments)[0] == 0
    assert taken == [(METHODS["smoothquant"].calibration_windows, CALIBRATION)]
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    assert fingerprint(CALIBRATION) in kept.parent.name
