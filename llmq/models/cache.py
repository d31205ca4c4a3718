"""Where converted and downloaded files live, and how much room is left there."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
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
