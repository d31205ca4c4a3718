"""Where converted and downloaded files live, and how much room is left there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmq.errors import UserError


def cache_folder() -> Path:
    """`LLMQ_CACHE`, else `$XDG_CACHE_HOME/llmq`, else `~/.cache/llmq`."""
    if override := os.environ.get("LLMQ_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmq"


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
