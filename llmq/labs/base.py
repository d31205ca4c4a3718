"""What a lab is: one question to the machine in one file, and everything that follows from it.

A lab is a frozen record whose annotated fields become flags and controls. `run` yields events, progress and answers,
each more complete than the one before; an answer can be saved, loaded and shown without a model. What people see of an
answer is a sequence of blocks, which the terminal, the page and the written page show each in its own way; none of them
knows a lab by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llmq.events import Event, Progress
from llmq.fields import Field, Switch, Text, check_fields, fields_of
from llmq.figures.blocks import Block

if TYPE_CHECKING:
    from llmq.machine.door import Lease


class Answer(Protocol):
    """What a lab found. `kind`: the lab's; `title`: of a written page."""

    kind: str

    @property
    def title(self) -> str: ...

    def blocks(self) -> Iterator[Block]:
        """What people see, in the order in which they read it; a sentence with the finding comes first."""

    def to_json(self) -> dict:
        """Plain values with stable keys: what `--json` prints."""

    def stored(self) -> dict:
        """Plain values that `Lab.restore` makes the same answer of."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A question. `kind`: its name in files and at the command line; `command`: the words that ask it there; `title`,
    `about`, `button`: on the page, where a lab with `panel` gets a section among the others, and one with `part` a part
    of the Lab tab by that name, with a prompt where it is `prompted`, `example` where none is given."""

    kind: ClassVar[str] = ""
    command: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = ""
    about: ClassVar[str] = ""
    button: ClassVar[str] = "Measure"
    panel: ClassVar[bool] = False
    part: ClassVar[str] = ""
    prompted: ClassVar[str] = ""
    example: ClassVar[str] = ""
    patient: ClassVar[bool] = True
    model: str = "demo"
    device: str = "cpu"

    def __post_init__(self):
        check_fields(self)

    def run(self, lease: Lease) -> Iterator[Event | Progress | Answer]:
        """Yield events, progress and answers."""
        raise NotImplementedError

    def typed(self) -> str:
        """The words that ask this question at the command line."""
        words = ["python", "-m", "llmq", *self.command]
        words += [] if getattr(self, "checkpoint", "") else ["--model", self.model]
        for field in fields_of(type(self)):
            if (value := getattr(self, field.name)) != field.default:
                words += _option(field, value)
        return shlex.join([*words, "--device", self.device])

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> Answer:
        """The answer that `stored` was made of. Raises UserError for what cannot be one."""
        raise NotImplementedError


def _option(field: Field, value: Any) -> list[str]:
    """One field as the command line takes it; a text of one's own is a file there."""
    kind = field.kind
    if isinstance(kind, Switch):
        return [f"--no-{field.name}"]
    if isinstance(kind, Text) and kind.file and not kind.positional:
        return [kind.file, value if value in kind.names else "FILE"]
    return [value] if isinstance(kind, Text) and kind.positional else [field.flag, kind.spell(value)]
