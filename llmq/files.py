"""Files that a person names: read, or written, with one line where that fails."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path

from llmq.errors import UserError


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8: a reader sees the old file or the new one, and a failure leaves the old one.

    Missing folders are made. A symbolic link stays, and the file that it points to is written; that file keeps its
    permissions. A character device, a pipe and this process's own output get the text as it is. Raises UserError for
    everything else that is no regular file, and for every failure.
    """
    data = text.encode("utf-8", "backslashreplace")  # in JSON the escape of a lone surrogate is the same string
    try:
        _write(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _write(path: Path, data: bytes) -> None:
    try:
        there = path.stat()
    except FileNotFoundError:
        return _replace(path, data, None)
    if (own := _own_output(there)) is not None:  # a file too: replaced, it would not get what is printed afterwards
        sys.stdout.flush()
        return _pass_on(own, data)
    if stat.S_ISREG(there.st_mode):
        return _replace(path, data, stat.S_IMODE(there.st_mode))
    if stat.S_ISCHR(there.st_mode) or stat.S_ISFIFO(there.st_mode):
        return _pass_on(path, data)
    raise OSError(f"it is {'a folder' if path.is_dir() else 'a socket or a disk'}; name a file")


def _own_output(there: os.stat_result) -> int | None:
    for handle in (1, 2):
        with suppress(OSError):  # closed by whoever started us
            if os.path.samestat(os.fstat(handle), there):
                return handle
    return None


def _pass_on(target: Path | int, data: bytes) -> None:
    with open(target, "wb", closefd=not isinstance(target, int)) as out:
        out.write(data)


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    """`mode`: the permissions of the file that is there, None where there is none."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".llmq-{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as out:
            out.write(data)
        if mode is not None:
            open(target, "r+b").close()  # a replacement would get past a file that may only be read
            os.chmod(partial, mode)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
