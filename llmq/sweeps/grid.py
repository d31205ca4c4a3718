"""The cells of a sweep: which there are, what each asks the command line, and which file has its answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from llmq.contestant import Contestant
from llmq.errors import BadChoice, UserError, unknown
from llmq.files import parse_json, read_text, write_text
from llmq.labs.rows import BASELINE

QUALITY, OUTLIERS, SPEED = WHAT = ("quality", "outliers", "speed")
FAILED = ".failed"  # ends the name of a file, before its .json
PLAIN = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Cell:
    """One question: of one model and, but for its outliers, one method beside FP16."""

    what: str
    model: str
    method: str = ""

    @property
    def name(self) -> str:
        """Of its file: plain characters, another for another cell."""
        words = "-".join(filter(None, (self.what, self.model, self.method)))
        plain = PLAIN.sub("_", words)[:120]
        return plain if plain == words else f"{plain}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.model, self.method)))

    def arguments(self, device: str, tokens: int) -> list[str]:
        """What asks it, after `python -m llmq`; `tokens`: of the text that is read, or of the answer whose speed is
        measured."""
        methods = ",".join(dict.fromkeys((BASELINE.label, self.method)))
        asked = {
            QUALITY: ["quality", "--model", self.model, "--methods", methods, "--tokens", str(tokens), "--no-floor"],
            OUTLIERS: ["outliers", "--sweep", self.model],
            SPEED: ["bench", "decode", "--model", self.model, "--methods", methods, "--new-tokens", str(tokens)],
        }[self.what]
        return [*asked, "--device", device]


@dataclass(frozen=True)
class Grid:
    """Every one of `models` under every one of `methods`. Raises BadChoice for what is no sweep."""

    what: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    tokens: int

    def __post_init__(self):
        if self.what not in WHAT:
            raise unknown("sweep", self.what, WHAT)
        if not self.models or len(set(self.models)) < len(self.models):
            raise BadChoice(f"models to sweep: {', '.join(self.models) or 'none'}; name each once")
        for method in self.methods:
            Contestant.parse(method)

    @property
    def cells(self) -> list[Cell]:
        """Model by model, so that a model's files are read once and found in memory then."""
        if self.what == OUTLIERS:
            return [Cell(self.what, model) for model in self.models]
        methods = [Contestant.parse(method).label for method in self.methods]
        return [Cell(self.what, model, method) for model in self.models for method in dict.fromkeys(methods)]


@dataclass(frozen=True)
class Folder:
    """The files of a sweep: a cell's answer, or why it has none."""

    path: Path

    def begin(self, grid: Grid) -> None:
        """Note what is swept. Raises UserError where the folder holds another sweep."""
        file = self.path / "sweep.json"
        known = _read(file) if file.exists() else {"what": grid.what, "tokens": grid.tokens}
        if (there := (known.get("what"), known.get("tokens"))) != (grid.what, grid.tokens):
            of = f"{self.path} holds a sweep of {there[0]} with --tokens {there[1]}"
            raise UserError(f"{of}; ask for the same, or choose another folder")
        write_text(file, json.dumps(asdict(grid), indent=1) + "\n")

    def file(self, cell: Cell) -> Path:
        return self.path / f"{cell.name}.json"

    def failure(self, cell: Cell) -> Path:
        return self.path / f"{cell.name}{FAILED}.json"

    def open_cells(self, grid: Grid, *, again: bool) -> list[Cell]:
        """The cells without an answer; those that failed are among them where they are to be tried `again`."""
        left = [cell for cell in grid.cells if not self.file(cell).exists()]
        return [cell for cell in left if again or not self.failure(cell).exists()]

    def keep(self, cell: Cell, answer: str) -> None:
        write_text(self.file(cell), answer if answer.endswith("\n") else answer + "\n")
        self.failure(cell).unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, reason: str, command: list[str]) -> None:
        told = {"model": cell.model, "method": cell.method, "reason": reason, "command": command}
        write_text(self.failure(cell), json.dumps(told, indent=1) + "\n")

    def answers(self, grid: Grid) -> Iterator[tuple[Cell, dict]]:
        """What there is of the cells of a grid, in its order."""
        return ((cell, _read(self.file(cell))) for cell in grid.cells if self.file(cell).exists())

    def failures(self, grid: Grid) -> dict[str, str]:
        """Cell -> why it has no answer."""
        found = ((cell, self.failure(cell)) for cell in grid.cells)
        return {cell.title: str(_read(file).get("reason", "")) for cell, file in found if file.exists()}


def _read(file: Path) -> dict:
    try:
        found = parse_json(read_text(file))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); delete it, and it is measured anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no answer; delete it, and it is measured anew")
    return found


@cache
def lists() -> dict[str, tuple[str, ...]]:
    """Families of models by name, each from its smallest to its largest."""
    found = json.loads((files("llmq.sweeps") / "families.json").read_text(encoding="utf-8"))
    return {name: tuple(models) for name, models in found.items()}


def models_in(text: str) -> tuple[str, ...]:
    """Names with commas between them, of models and of families. Each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(dict.fromkeys(model for name in names for model in lists().get(name, (name,))))
