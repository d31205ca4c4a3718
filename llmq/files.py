"""Files that a person names: read, or written, with one line where that fails."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

from llmq.errors import UserError

LONGEST_INTEGER = 19  # digits: what 64 bit hold
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= LONGEST_INTEGER else _refuse(digits)


def _refuse(number: str) -> Any:
    raise ValueError(f"{number:.30} is no number that is used here")


DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_refuse)


def parse_json(text: str) -> Any:
    """The value of JSON that may come from anybody. Raises ValueError for what nests too deep to be read, for numbers
    that are not finite or beyond 64 bit. A lone surrogate, which no stream of text can carry, becomes a question mark.
    """
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    if not SURROGATE.search(text):
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8: a reader sees the old file or the new one, and a failure leaves the old one.

    Missing folders are made, permissions kept, links followed. A character device, a pipe and this process's own output
    get the text as it is; what else is no file is refused. Raises UserError.
    """
    data = text.encode("utf-8", "backslashreplace")  # in JSON the escape of a lone surrogate is the same string
    try:
        if own := next((handle for handle in (1, 2) if _is_open_as(handle, path)), None):
            sys.stdout.flush()  # a file too gets the text between what is printed: replaced, it would lose the rest
            with open(own, "wb", closefd=False) as out:
                out.write(data)
        elif path.is_char_device() or path.is_fifo():
            path.write_bytes(data)
        elif path.is_file() or not os.path.lexists(os.path.realpath(path)):
            _replace(Path(os.path.realpath(path)), data)
        else:
            raise OSError("it is no file, but a folder, a socket, a disk or a link to itself")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _is_open_as(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _replace(target: Path, data: bytes) -> None:
    if not target.parent.exists():
        target.parent.mkdir(parents=True)
    partial = target.with_name(f".llmq-{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as out:
            out.write(data)
        if target.exists():
            open(target, "r+b").close()  # a replacement would get past a file that may only be read
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
