"""Where files are kept, and what is said when there is no room, or no right to write there."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmq.errors import UserError
from llmq.models import cache
from llmq.models.cache import cache_folder, require_space
from llmq.models.demo import prepare_demo


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"LLMQ_CACHE": "/a/b"}, "/a/b"),
        ({"LLMQ_CACHE": "~/c", "XDG_CACHE_HOME": "/x"}, "/home/me/c"),
        ({"LLMQ_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/llmq"),
        ({"LLMQ_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/llmq"),
    ],
)
def test_the_cache_is_where_the_environment_says(variables, folder, monkeypatch):
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_too_little_disk_is_said_in_bytes_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=123_000_000))
    with pytest.raises(UserError) as caught:
        list(prepare_demo())
    assert all(words in str(caught.value) for words in ("600 MB", str(cache_folder()), "123 MB are free", "LLMQ_CACHE"))
    assert os.listdir(cache_folder()) == []


@pytest.mark.parametrize(("free", "enough"), [(1000, True), (999, False)])
def test_space_is_enough_or_not(free, enough, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with contextlib.nullcontext() if enough else pytest.raises(UserError, match="it needs 0 MB"):
        require_space(tmp_path / "new", 1000, "it")


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write to .*file/cache: .*Set LLMQ_CACHE"):
        list(prepare_demo())


def test_a_cache_that_may_only_be_read_is_named(monkeypatch, request):
    """It exists, so it need not be made, and its disk has room; only writing into it fails."""
    import filelock  # noqa: F401  Python's own folder may be closed to whom the test becomes

    private_folder = request.getfixturevalue("private_folder")
    monkeypatch.setenv("LLMQ_CACHE", str(private_folder))
    private_folder.chmod(0o555)
    with pytest.raises(UserError, match=f"{private_folder}.*LLMQ_CACHE"):
        list(prepare_demo())
