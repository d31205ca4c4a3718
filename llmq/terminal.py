"""What a terminal hands over and what it can show: texts and paths under any locale, and progress."""

from __future__ import annotations

import locale
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llmq.errors import UserError

if TYPE_CHECKING:
    from llmq.models.demo import Progress

BAR = 30  # characters


def accept_any_output() -> None:
    """Show what the output's encoding has no sign for as an escape, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None, or something of a notebook's, has no encoding to fail
            stream.reconfigure(errors="backslashreplace")


def typed(argument: str) -> str:
    """The text that was typed in UTF-8. Under a locale without those letters Python keeps its bytes as surrogates; what
    is no UTF-8 stays as it is, to be refused where it is used."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return argument


def spelled(path: str) -> str:
    """`path` as it is. Raises UserError where the locale cannot spell it, as the libraries that open models must."""
    if path == path.encode("utf-8", "replace").decode("utf-8"):
        return path
    name = locale.setlocale(locale.LC_CTYPE)
    raise UserError(f"the locale {name!r} cannot spell {typed(path)!r}; set LC_ALL=C.UTF-8, or use a path in ASCII")


def show_progress(steps: Iterable[Progress]) -> None:
    """A bar that fills, on standard error. In a log, which keeps every bar, a line for each tenth of the way."""
    told = None
    for step in steps:
        if sys.stderr.isatty():
            drawn = "#" * round(BAR * step.fraction)
            print(f"\r[{drawn:.<{BAR}}] {step.message:<70}", end="", file=sys.stderr, flush=True)
        elif told is not None and told <= step.fraction < min(told + 0.1, 1):
            continue
        else:
            print(f"llmq: {step.message} ({step.fraction:.0%})", file=sys.stderr)
        told = step.fraction
    if told is not None and sys.stderr.isatty():
        print(file=sys.stderr)
