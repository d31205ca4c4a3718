"""Where files are kept, and what is said when there is no room, or no right to write there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmq import cache
from llmq.cache import cache_folder, require_space, sweep, workplace
from llmq.cli import main
from llmq.errors import UserError
from llmq.models.demo import MANIFEST, demo_folder, prepare_demo


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


@pytest.fixture
def homeless(monkeypatch):
    """A user who is a bare number, as in some containers."""

    def getpwuid(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("LLMQ_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


@pytest.mark.parametrize(("name", "value", "folder"), [("LLMQ_CACHE", "/a", "/a"), ("XDG_CACHE_HOME", "/x", "/x/llmq")])
def test_without_a_home_the_variables_still_hold(name, value, folder, homeless, monkeypatch):
    monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


@pytest.mark.parametrize("override", ["", "~/models"])
def test_without_a_home_one_line_says_what_to_do(override, homeless, monkeypatch, capsys):
    monkeypatch.setenv("LLMQ_CACHE", override)
    assert main(["models", "--fetch", "demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no home folder" in line and "set LLMQ_CACHE" in line


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


WORKING = """
import sys
from pathlib import Path
from llmq.cache import workplace
with workplace(Path(sys.argv[1]), ".work-") as folder:
    (folder / "half").write_text("done")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def worker(tmp_path):
    """Another process that works in `tmp_path`, and the name of its folder."""
    command = [sys.executable, "-c", WORKING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def test_what_a_living_process_works_on_stays_and_what_a_killed_one_left_goes(worker, tmp_path):
    process, name = worker
    (tmp_path / ".work-yes").write_text("a file, and no workplace")
    (tmp_path / "other").mkdir()
    sweep(tmp_path, ".work-")
    with workplace(tmp_path, ".work-") as own:
        sweep(tmp_path, ".work-")
        assert set(os.listdir(tmp_path)) == {name, own.name, ".work-yes", "other"}
    process.kill()
    process.wait()
    sweep(tmp_path, ".work-")
    assert set(os.listdir(tmp_path)) == {".work-yes", "other"}


def test_a_workplace_goes_with_its_work(worker, tmp_path):
    process, name = worker
    process.communicate("")
    assert process.returncode == 0 and os.listdir(tmp_path) == []
    with pytest.raises(KeyError), workplace(tmp_path, ".work-") as folder:
        (folder / "half").write_text("done")
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_workplace_swept_before_it_was_held_is_made_again(tmp_path, monkeypatch):
    made, mkdtemp = [], tempfile.mkdtemp

    def seen_by_a_sweeper(**where):
        made.append(mkdtemp(**where))
        if len(made) == 1:
            sweep(tmp_path, ".work-")
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", seen_by_a_sweeper)
    with workplace(tmp_path, ".work-") as folder:
        assert folder.is_dir() and len(made) == 2 and str(folder) == made[1]


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    """As on Windows, and on network disks that lock no folders."""

    def flock(*_):
        raise OSError("Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".work-left").mkdir()
    with workplace(tmp_path, ".work-") as folder:
        sweep(tmp_path, ".work-")
        assert folder.is_dir()
    assert os.listdir(tmp_path) == [".work-left"]


def test_a_demo_model_in_a_cache_that_may_only_be_read_is_used(private_folder, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(private_folder))
    folder = demo_folder()
    folder.mkdir()
    (folder / "weights").write_text("w")
    (folder / MANIFEST).write_text(json.dumps({"weights": hashlib.sha256(b"w").hexdigest()}))
    for path in (folder, private_folder):
        path.chmod(0o555)
    assert list(prepare_demo()) == [] and os.listdir(private_folder) == [folder.name]
    folder.chmod(0o755)
