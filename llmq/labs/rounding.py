"""One tensor of a model, or numbers of one's own, under every method's rounding: codes, errors, the sums behind them.

SQNR is 10 log10 of the power of the numbers over that of their errors. A planted outlier counts in no error: what is
measured is what it does to the others.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from llmq.contestant import Contestant, shown_name
from llmq.engine.loading import Key
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Choice, Number, Text
from llmq.figures.blocks import Block, Drawing, Table
from llmq.formatting import format_number, format_share, plain_json
from llmq.labs.base import Lab
from llmq.methods import Method, parse_method
from llmq.methods.rtn import BITS, GROUP
from llmq.methods.swap import linear_layers
from llmq.models.opening import Model
from llmq.stored import from_stored, to_stored

if TYPE_CHECKING:  # numpy comes with it, which the command line starts without
    import torch

    from llmq.inspect.rounding import Errors, Row, View
    from llmq.machine.door import Lease

METHODS_SHOWN = ("absmax", "zeropoint", "vectorwise", "groupwise", "llm-int8", "fp8@tensor", "fp8", "nf4", "rtn")
FEW_BITS = (8, 4, 3, 2)  # of which `rtn` stands in every table
MOST_NUMBERS = 4096  # that somebody types
PROMPT = "Name three colours."
HEADERS = ["Method", "Bits a number", "Largest error", "Mean error", "SQNR (dB)", "Become 0", "Made for"]
EXAMPLE = "0.0312 -0.12 0.4 0.05\n-0.3 0.22 0.011 -0.08\n0.15 -0.41 0.09 0.27\n0.02 0.33 -0.19 -0.27"
BASELINE = Contestant.parse("fp16")


@dataclass(frozen=True, kw_only=True)
class Rounding(Lab):
    """`layer`: a linear layer by its name, '' for the first down projection; `what`: its 'input' over the prompt, or
    its 'weight'. `numbers`: rows of numbers to round instead. `method`: what is drawn; `bits` and `group`: of the
    methods that have them; `outlier`: times the largest number that one number becomes, 0 for none."""

    kind, command, title = "rounding", ("rounding",), "How a tensor is rounded"
    about, button = "One tensor under every method's rounding: codes, errors, and the sums behind them.", "Take it"
    layer: Annotated[str, Text(help="a linear layer of a block, such as 1.down_proj")] = ""
    what: Annotated[str, Choice(("input", "weight"), help="the layer's input over the prompt, or its weight")] = "input"
    prompt: Annotated[str, Text(file="--file", help=f"what is read for an input; default: {PROMPT}")] = ""
    numbers: Annotated[str, Text(help="numbers to round instead, rows with ; between them")] = ""
    method: Annotated[str, Choice(METHODS_SHOWN, help="whose rounding is worked out")] = "absmax"
    bits: Annotated[int, replace(BITS, help="of rtn's codes")] = 4
    group: Annotated[int, replace(GROUP, help="numbers of a row that share a scale, for groupwise and rtn")] = 128
    outlier: Annotated[float, Number(0, 1000, help="times the largest number that one is made; 0 is none")] = 0.0

    def run(self, lease: Lease) -> Iterator[Event | Progress | Taken | Rounded]:
        """Yield events, the tensor, then answers as `answers` does."""
        taken = typed(self.numbers) if self.numbers.strip() else (yield from self.taken(lease))
        yield taken
        for answer in self.answers(taken):
            yield answer
            lease.check()

    def taken(self, lease: Lease) -> Generator[Event | Progress, None, Taken]:
        """Take the tensor out of the model."""
        model = yield from lease.open(self.model)
        name = self.layer.strip() or first_layer(model)
        engine = yield from lease.load(Key.of(model, BASELINE.method, self.device), BASELINE)
        layers = {}
        for path, module in linear_layers(engine.model):
            layers.setdefault(short_name(path), module)
        if name not in layers:
            raise BadChoice(
                f"unknown layer {name!r:.80}; choose a linear layer of a block, such as {first_layer(model)}"
            )
        module = layers[name]
        if self.what == "weight":
            weight = module.weight.data
            return Taken.of(weight if type(module).__name__ != "Conv1D" else weight.T, f"{name}, weight")
        from llmq.hooks import Watched

        found = {}
        ids = model.encode(self.prompt.strip() or PROMPT)
        with Watched({name: module}, on_input=lambda _, __, x: found.update(x=x.reshape(-1, x.shape[-1]).clone())):
            yield lease.progress(f"reading {len(ids)} tokens")
            engine.logits(ids, lease.stop.is_set)
        return Taken.of(found["x"], f"{name}, input")

    def answers(self, taken: Taken) -> Iterator[Rounded]:
        """Yield what is drawn of the method, then also the table of all. No device is needed."""
        from llmq.inspect.rounding import Planted, Row, check, errors_of, view_of

        weight = self.what == "weight" or bool(self.numbers.strip())
        tensor = Planted.into(check(taken.numbers), self.outlier)
        answer = Rounded(self, taken.name, tuple(taken.shape), *view_of(tensor, _rounding(self.chosen, weight)))
        yield answer
        rows = tuple(
            Row(method.spelled, errors_of(tensor, _rounding(method, weight)), *_facts(method, tensor.numbers.shape))
            for method in self.shown
        )
        yield replace(answer, rows=rows)

    @property
    def chosen(self) -> Method:
        return self._set(self.method)

    @property
    def shown(self) -> tuple[Method, ...]:
        """The methods of the table."""
        bits = dict.fromkeys((*FEW_BITS, self.bits))
        few = (f"rtn@{bits}:group={self.group}" for bits in sorted(bits, reverse=True))
        return tuple(map(self._set, (*METHODS_SHOWN[:-1], *few)))

    def _set(self, name: str) -> Method:
        return parse_method(name, {"bits": self.bits, "group": self.group})

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> Rounded:
        from llmq.inspect.rounding import Found

        asked = {f.name: stored["stored"]["question"][f.name] for f in fields(cls)}
        found = from_stored(Found, stored["stored"]["found"])
        return Rounded(cls(**asked), found.name, found.shape, found.errors, found.view, found.rows)


@dataclass(frozen=True)
class Taken:
    """A tensor as it was found, (rows, columns), on the host, cut to what is looked at; `shape`: of the whole."""

    name: str
    shape: tuple[int, int]
    numbers: torch.Tensor

    @classmethod
    def of(cls, numbers: torch.Tensor, name: str) -> Taken:
        from llmq.inspect.rounding import LARGEST

        return cls(name, tuple(numbers.shape), numbers[:LARGEST, :LARGEST].cpu().clone())


@dataclass(frozen=True)
class Rounded:
    """The question, the tensor's name and shape, the method's errors and drawing, and a row for every method."""

    question: Rounding
    name: str
    shape: tuple[int, int]
    errors: Errors
    view: View
    rows: tuple[Row, ...] = ()
    kind = "rounding"

    @property
    def title(self) -> str:
        return f"Rounding: {self.name}"

    @property
    def method(self) -> str:
        """The method that is drawn, as people read it."""
        return shown_name(self.question.chosen.spelled)

    @property
    def finding(self) -> str:
        """The method's errors in a sentence."""
        rows, columns = self.shape
        looked_at = f"{rows:,} × {columns:,} numbers"
        tall, wide = (min(size, 4096) for size in self.shape)
        looked_at += f", of which the first {tall:,} × {wide:,}" if (tall, wide) != self.shape else ""
        planted = self.question.outlier
        beside = f" beside an outlier of {planted:g} times the largest" if planted else ""
        return (
            f"{self.method} on {self.name} ({looked_at}){beside}: SQNR **{_decibels(self.errors)} dB**, largest error "
            f"{format_number(self.errors.largest)}, {format_share(self.errors.zeroed)} of the numbers become 0."
        )

    def figures(self) -> list[Drawing]:
        from llmq.figures.rounding import error_figure, histogram_figure

        return [Drawing.of(draw, self.view, self.method) for draw in (histogram_figure, error_figure)]

    def table(self) -> list[list[str]]:
        return [
            [
                shown_name(row.method),
                f"{row.bits:.3g}",
                format_number(row.errors.largest),
                format_number(row.errors.mean),
                _decibels(row.errors),
                format_share(row.errors.zeroed),
                row.made_for,
            ]
            for row in self.rows
        ]

    def blocks(self) -> Iterator[Block]:
        yield self.finding
        yield "\n\n".join("\n".join(lines) for lines in self.view.worked)
        yield from self.figures()
        yield Table(HEADERS, self.table(), "Every method on this tensor")

    def to_json(self) -> dict:
        asked = {f.name: getattr(self.question, f.name) for f in fields(self.question)}
        rows = [
            {"method": row.method, "bits": row.bits, "made_for": row.made_for, **vars(row.errors)} for row in self.rows
        ]
        return {
            "kind": self.kind, **asked, "tensor": self.name, "shape": list(self.shape),
            "worked": [list(lines) for lines in self.view.worked], "results": rows,
        }  # fmt: skip

    def stored(self) -> dict:
        from llmq.inspect.rounding import Found

        found = Found(self.name, self.shape, self.errors, self.view, self.rows)
        asked = {f.name: getattr(self.question, f.name) for f in fields(self.question)}
        return plain_json(self.to_json()) | {"stored": {"question": asked, "found": to_stored(found)}}


def typed(text: str) -> Taken:
    """Numbers that somebody typed: rows on lines or between ;, numbers with spaces or commas between them. Raises
    BadChoice for what is none, for rows of different lengths and for more than 4,096."""
    import torch

    rows = [line.replace(",", " ").split() for line in text.replace("\u2212", "-").replace(";", "\n").splitlines()]
    rows = [row for row in rows if row]
    for word in (word for row in rows for word in row):
        if not _is_number(word):
            raise BadChoice(f"{word!r:.40} is no number; write numbers such as 0.5 -1.2 with spaces between them")
    if not rows or len({len(row) for row in rows}) != 1:
        lengths = ", ".join(str(len(row)) for row in rows) or "none"
        raise BadChoice(f"the rows hold {lengths:.60} numbers; give each the same, and at least one")
    numbers = torch.tensor([[float(word) for word in row] for row in rows])
    if numbers.numel() > MOST_NUMBERS:
        raise BadChoice(f"{numbers.numel():,} numbers are given; give at most {MOST_NUMBERS:,}")
    return Taken.of(numbers, "your numbers")


def layer_names(model: Model) -> list[str]:
    """The linear layers that methods replace, by their short names."""
    return list(dict.fromkeys(short_name(path) for path, _ in linear_layers(model.shape)))


def short_name(path: str) -> str:
    """'1.down_proj' for model.layers.1.mlp.down_proj: the number of the block and the name of the layer."""
    from llmq.hooks import kind_and_layer

    _, number = kind_and_layer(path)
    *_, last = path.split(".")
    return path if number is None else f"{number}.{last}"


def first_layer(model: Model) -> str:
    """The second block's down projection, where a LLaMA has its first large activations; else the first layer."""
    names = layer_names(model)
    return "1.down_proj" if "1.down_proj" in names else names[0]


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _rounding(method: Method, weight: bool):
    """The method's rounding of an input or a weight; of a weight where it does not round inputs."""
    return method.rounding(weight=weight) or method.rounding(weight=True)


def _facts(method: Method, shape: tuple[int, int]) -> tuple[float, str]:
    stored = method.bytes(tuple(shape))
    bits = 8 * (stored.weights + stored.scales) / math.prod(shape)
    both = method.rounding(weight=False) is not None
    return bits, "weights and inputs" if both else "weights"


def _decibels(errors: Errors) -> str:
    return f"{errors.sqnr_db:.1f}" if math.isfinite(errors.sqnr_db) else "∞" if errors.sqnr_db > 0 else "−∞"
