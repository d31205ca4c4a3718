"""What an answer is shown as: text, tables and drawings, each shown by the terminal, the page and a file in its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Table:
    """Rows of cells under `headers`."""

    headers: list[str]
    rows: list[list[str]]
    label: str = ""


class Texts(Table):
    """A table whose cells are whole texts, each row's below its first cell, which names it."""


@dataclass(frozen=True)
class Drawing:
    """A figure that is made when somebody looks at it."""

    make: Callable[[], go.Figure]

    @classmethod
    def of(cls, draw: Callable[..., go.Figure], *values, **options) -> Drawing:
        """The figure that `draw` makes of these values."""
        return cls(partial(draw, *values, **options))


class Markup(str):
    """Text that is HTML already."""


class Verbatim(str):
    """Text with words of a prompt or a model in it: every sign in it is meant."""


Block = str | Markup | Verbatim | Table | Drawing  # plain text may be Markdown of one kind: **bold**
