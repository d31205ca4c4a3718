"""Where converted and downloaded files live, how much room is left there, and folders for work in progress."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from llmq.errors import UserError


def cache_folder() -> Path:
    """`LLMQ_CACHE`, else `$XDG_CACHE_HOME/llmq`, else `~/.cache/llmq`; where there is no home, as in a container that
    runs as a bare number, a folder among the temporary files. Raises UserError where that cannot be had."""
    try:
        if override := os.environ.get("LLMQ_CACHE"):
            return Path(override).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmq"
    except RuntimeError:  # neither HOME nor an entry for this user
        return _cache_without_home()


@cache
def _cache_without_home() -> Path:
    folder = Path(tempfile.gettempdir()) / f"llmq-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # anybody may have made it before us, and what is in it will be run
    except OSError as error:
        raise UserError(f"no home folder, and {folder} cannot be made: {error.strerror}; set LLMQ_CACHE") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"no home folder, and {folder} belongs to somebody else; set LLMQ_CACHE to a folder of yours")
    print(f"llmq: no home folder, so files are kept in {folder}; LLMQ_CACHE names another", file=sys.stderr)
    return folder


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Create `folder` and raise UserError unless `needed_bytes` are free on its disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}. Set LLMQ_CACHE to a folder you can write to."
        ) from error
    if free < needed_bytes:
        raise UserError(
            f"{what} needs {needed_bytes / 1e6:.0f} MB in {folder}, and {free / 1e6:.0f} MB are free. "
            "Make room, or set LLMQ_CACHE to a folder on another disk."
        )


@contextmanager
def workplace(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` for work in progress, removed at the end. While the block runs its process holds a lock
    on it, which the system takes back however the process ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with _held(folder, wait=True):
            if not folder.exists():  # taken for left behind before it was held
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def sweep(parent: Path, prefix: str) -> None:
    """Remove the workplaces under this prefix that killed processes left behind: those that nobody holds."""
    for left in parent.glob(f"{prefix}*"):
        with _held(left, wait=False) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether nobody else holds `folder` while the block runs; False where the system does not say (Windows, some
    network disks), so that nothing is swept there."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except (ImportError, OSError):
        held = False
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)
