"""What a person names for writing is written whole or not at all, and nothing that is no file is ever replaced."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmq.errors import UserError
from llmq.events import Run
from llmq.files import write_text

ROOT = Path(__file__).parents[1]
WRITE = (
    "import sys; from pathlib import Path; from llmq.files import write_text; write_text(Path(sys.argv[1]), 'new\\n')"
)


def as_child(path, *, code: str = WRITE, **streams) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=60, check=True, **streams)


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def test_text_is_written_as_utf_8_with_its_line_ends(tmp_path):
    write_text(tmp_path / "out", "é\r\n\u2028\n")
    assert (tmp_path / "out").read_bytes() == "é\r\n\u2028\n".encode()
    assert names(tmp_path) == {"out"}


def test_half_a_character_in_json_comes_back(tmp_path):
    """A path that the locale could not read holds some."""
    write_text(tmp_path / "out", json.dumps("a\udcc3", ensure_ascii=False))
    assert json.loads((tmp_path / "out").read_text(encoding="utf-8")) == "a\udcc3"


def test_folders_that_are_missing_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "out", "new")
    assert (tmp_path / "a" / "b" / "out").read_text() == "new"


def test_a_name_as_long_as_a_name_may_be(tmp_path):
    write_text(tmp_path / ("n" * 255), "new")
    assert names(tmp_path) == {"n" * 255}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_file_that_is_there_keeps_its_permissions(mode, tmp_path):
    (tmp_path / "out").write_text("old")
    (tmp_path / "out").chmod(mode)
    write_text(tmp_path / "out", "new")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_permissions_of_any_new_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "out", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing yet"])
def test_a_link_stays_and_its_target_is_written(there, tmp_path):
    target, link, chained = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "chained"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    link.symlink_to("far/target")
    chained.symlink_to(link)
    write_text(chained, "new")
    assert link.is_symlink() and chained.is_symlink() and not target.is_symlink()
    assert target.read_text() == "new" and names(target.parent) == {"target"}


def test_a_link_to_itself_is_refused_and_stays(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot write .*loop: it is no file"):
        write_text(tmp_path / "loop", "new")
    assert (tmp_path / "loop").is_symlink() and names(tmp_path) == {"loop"}


def test_a_device_stays_a_device(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        write_text(path, "new")
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert link.is_symlink()


def test_a_device_that_is_full_is_one_line():
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        write_text(Path("/dev/full"), "new")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_named_pipe_gets_the_text_and_stays(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "new" * 100_000)
    reader.join(60)
    assert found == ["new" * 100_000] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_a_socket_and_a_file_for_a_folder_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door"))
        for name, reason in (("folder", "it is no file"), ("door", "it is no file"), ("file/x", "Not a directory")):
            with pytest.raises(UserError, match=f"cannot write .*{name}: {reason}"):
                write_text(tmp_path / name, "new")
    assert names(tmp_path) == {"folder", "file", "door"} and names(tmp_path / "folder") == set()
    assert (tmp_path / "file").read_text() == "old" and stat.S_ISSOCK((tmp_path / "door").stat().st_mode)


@pytest.mark.parametrize("call", ["replace", "chmod"])
def test_the_old_file_survives_a_failure(call, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="cannot write .*out: No space left on device"):
        write_text(tmp_path / "out", "new")
    assert names(tmp_path) == {"out"} and (tmp_path / "out").read_text() == "old"


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_what_may_only_be_read_is_left_alone(locked, private_folder):
    folder = private_folder
    (folder / "out").write_text("old")
    (folder / "out" if locked == "file" else folder).chmod(0o444 if locked == "file" else 0o555)
    with pytest.raises(UserError, match="cannot write .*out: Permission denied"):
        write_text(folder / "out", "new")
    assert names(folder) == {"out"} and (folder / "out").read_text() == "old"


def test_our_own_output_through_its_device_may_be_a_pipe():
    assert as_child("/dev/stdout", stdout=subprocess.PIPE).stdout == b"new\n"
    assert as_child("/dev/stderr", stderr=subprocess.PIPE).stderr == b"new\n"


def test_our_own_output_through_its_device_may_be_a_socket():
    """Some programs give their children sockets, which cannot be opened by name."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        as_child("/dev/stdout", stdout=theirs)
        assert ours.recv(100) == b"new\n"


@pytest.mark.parametrize("named", ["/dev/stdout", "itself"])
def test_our_own_output_that_is_a_file_keeps_what_is_printed_around(named, tmp_path):
    out = tmp_path / "out"
    code = f"print('before'); {WRITE}; print('after')"
    with open(out, "wb") as handle:
        as_child(out if named == "itself" else named, code=code, stdout=handle)
    assert out.read_text() == "before\nnew\nafter\n"


def test_a_run_goes_the_same_way(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    assert Run({}, {}).save(tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and Run.load(tmp_path / "file") == Run({}, {})


def test_nobody_else_writes_what_a_person_names():
    """The rest keeps its own caches, and the tables of this repository."""
    writing = re.compile(r"\.write_(text|bytes)\(|open\([^)\n]*[\"'][wax]b?[\"']")
    found = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "llmq").rglob("*.py") if writing.search(path.read_text())
    }
    own = {"llmq/files.py", "llmq/kernels/cpu/build.py", "llmq/bench/tables.py"}
    assert {name for name in found if not name.startswith("llmq/models/")} == own
