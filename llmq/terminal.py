"""What a terminal hands over and what it can show: texts and paths under any locale, and progress."""

from __future__ import annotations

import locale
import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress

from llmq.errors import UserError

TEXTS = ("prompt", "text")  # options that are no names of files or models
BAR = 30  # characters


def leave(status: int) -> None:
    """End the process at once: what is ours is closed, and taking the libraries apart takes seconds, or ends in an
    abort (status 134) where one of theirs still has a thread."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


def accept_any_output() -> None:
    """Show what the output's encoding has no sign for as an escape, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None, or something of a notebook's, has no encoding to fail
            stream.reconfigure(errors="backslashreplace")


def as_typed(options: Namespace) -> Namespace:
    """Read texts as UTF-8 also under a locale without those letters. Raises UserError as `spelled`; paths are left."""
    for name, value in vars(options).items():
        if isinstance(value, str):
            setattr(options, name, _decoded(value) if name in TEXTS else spelled(value))
    return options


def spelled(path: str) -> str:
    """`path` as it is. Raises UserError where the locale cannot spell it, as the libraries that open models must."""
    if path == path.encode("utf-8", "replace").decode("utf-8"):
        return path
    name = locale.setlocale(locale.LC_CTYPE)
    raise UserError(f"the locale {name!r} cannot spell {_decoded(path)!r}; set LC_ALL=C.UTF-8, or use a path in ASCII")


def _decoded(text: str) -> str:
    """Python keeps bytes that the locale cannot read as surrogates. What is no UTF-8 either stays, to be refused."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def show_progress(steps: Iterable) -> None:
    """Show `models.demo.Progress` on standard error: a bar that fills; in a log, which would keep every bar, a line for
    each tenth of the way."""
    told, ends = -1.0, ""
    for step in steps:
        if sys.stderr.isatty():
            drawn, ends = "#" * round(BAR * step.fraction), "\n"
            print(f"\r[{drawn:.<{BAR}}] {step.message:<70}", end="", file=sys.stderr, flush=True)
        elif not told <= step.fraction < min(told + 0.1, 1):
            print(f"llmq: {step.message} ({step.fraction:.0%})", file=sys.stderr)
            told = step.fraction
    print(end=ends, file=sys.stderr)
