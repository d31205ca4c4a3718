"""What a terminal hands over and what it can show: texts and paths under any locale."""

from __future__ import annotations

import locale
import sys

from llmq.errors import UserError


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
