"""Where converted and downloaded files live, how much room is left there, and folders for work in progress."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llmq.errors import UserError


def cache_folder() -> Path:
    """`LLMQ_CACHE`, else `$XDG_CACHE_HOME/llmq`, else `~/.cache/llmq`. Raises UserError where there is no home."""
    try:
        if override := os.environ.get("LLMQ_CACHE"):
            return Path(override).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmq"
    except RuntimeError as error:  # neither HOME nor an entry for this user, as in some containers
        raise UserError("there is no home folder for a cache; set LLMQ_CACHE to a folder you can write to") from error


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
            if folder.exists():  # else it was taken for left behind before it was held
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
    """Whether nobody else holds `folder` while the block runs; False where folders have no locks (Windows, some network
    disks), so that nothing is swept there."""
    with ExitStack() as opened:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except (ImportError, OSError):
            held = False
        yield held
