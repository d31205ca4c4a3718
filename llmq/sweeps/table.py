"""What a sweep comes to: a table and the figures over the sizes of its models, from the files of its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmq.contestant import shown_name
from llmq.errors import UserError
from llmq.figures.blocks import Block, Drawing, Table
from llmq.figures.lines import Line, line_figure
from llmq.formatting import MISSING, format_bytes, format_share, format_speed, plain_json
from llmq.labs.emergence import Sweep
from llmq.labs.quality import shown_change
from llmq.labs.rows import BASELINE
from llmq.models.opening import describe_model
from llmq.sweeps.grid import OUTLIERS, QUALITY, Folder, Grid

QUALITY_COLUMNS: dict[str, Callable[[dict], str]] = {
    "Perplexity": lambda row: f"{row['perplexity']:.2f}",
    "Change (95 %, paired)": lambda row: shown_change(row),
    "KL to FP16": lambda row: f"{row['kl_to_fp16']:.3g}",
    "Same first choice": lambda row: format_share(row["top1_agreement"]),
}
SPEED_COLUMNS: dict[str, Callable[[dict], str]] = {
    "Decode": lambda row: format_speed(row["tokens_per_second"]),
    "Over FP16": lambda row: f"{row['over_fp16']:.2f}" if row["over_fp16"] else MISSING,
    "Weights": lambda row: format_bytes(row["weight_bytes"]),
}
COLUMNS = {QUALITY: QUALITY_COLUMNS, "speed": SPEED_COLUMNS}


@dataclass(frozen=True)
class SweepAnswer:
    """The rows that there are, and what is missing. `result`: plain values."""

    result: dict
    kind = "sweeps"

    @property
    def title(self) -> str:
        return f"Sweep: {self.result['what']} of {len(self.result['models'])} models"

    @property
    def rows(self) -> list[dict]:
        return self.result["results"]

    def blocks(self) -> Iterator[Block]:
        """How much there is, what is missing, the table, the figures."""
        result, cells = self.result, "cell" if self.result["cells"] == 1 else "cells"
        yield f"{len(self.rows)} of {result['cells']} {cells} measured."
        for name, reason in result["missing"].items():
            yield f"{name}: not measured: {reason}"
        if not self.rows:
            return
        if result["what"] == OUTLIERS:
            yield Table(Sweep.headers(), [Sweep.row(row) for row in self.rows], "Measured")
            yield from Sweep.figures(self.rows)
            return
        columns = COLUMNS[result["what"]]
        rows = [[*_named(row), *(cell(row) for cell in columns.values())] for row in self.rows]
        yield Table(["Model", "Parameters", "Method", *columns], rows, "Measured")
        yield from self._figures()

    def _figures(self) -> Iterator[Drawing]:
        """By size, a line for each method: how far from FP16, or how many times as fast."""
        title, name, key, scale = "KL to FP16 by size", "KL (nats)", "kl_to_fp16", "log"
        if self.result["what"] != QUALITY:
            title, name, key, scale = "Decode speed by size", "times FP16's", "over_fp16", "linear"
        methods = list(dict.fromkeys(row["method"] for row in self.rows))
        lines = []
        for number, method in enumerate(methods):
            own = [row for row in self.rows if row["method"] == method and row["parameters"] and row[key]]
            own.sort(key=lambda row: row["parameters"])
            points, texts = [(row["parameters"], row[key]) for row in own], [row["model"] for row in own]
            lines += [Line(shown_name(method), points, number, texts=texts)] if points else []
        if lines:
            sizes, heights = {"title": {"text": "parameters"}, "type": "log"}, {"title": {"text": name}, "type": scale}
            yield Drawing.of(line_figure, title, lines, "%{text}<br>%{y:.3~r}", x=sizes, y=heights)

    def to_json(self) -> dict:
        return plain_json(self.result)

    stored = to_json


def swept(folder: Folder, grid: Grid) -> SweepAnswer:
    """Read what there is of a sweep."""
    rows, conditions = [], {}
    for cell, found in folder.answers(grid):
        rows += [row | {"model": cell.model} for row in _rows(grid.what, cell.method, found)]
        conditions[cell.name] = found.get("conditions", {})
    sizes = {model: _parameters(model) for model in dict.fromkeys(row["model"] for row in rows)}
    rows = [{"parameters": sizes[row["model"]]} | row for row in rows]
    told = {"what": grid.what, "models": list(grid.models), "methods": list(grid.methods), "cells": len(grid.cells)}
    return SweepAnswer(told | {"missing": folder.failures(grid), "conditions": conditions, "results": rows})


def _rows(what: str, method: str, found: dict) -> list[dict]:
    """The rows of one cell's answer: those of the method itself."""
    if what == OUTLIERS:
        return found["results"]
    own = [row for row in found["results"] if row["method"] == method]
    if what == QUALITY:
        return own
    speeds = {row["method"]: row["tokens_per_second"] for row in found["results"]}
    return [row | {"over_fp16": row["tokens_per_second"] / speeds[BASELINE.label]} for row in own]


def _parameters(model: str) -> int | None:
    """Of a model's configuration; None where that is not at hand."""
    try:
        return sum(weight.numel() for weight in describe_model(model).shape.parameters())
    except UserError:
        return None


def _named(row: dict) -> list[str]:
    size = row["parameters"]
    return [row["model"], MISSING if not size else f"{size / 1e6:,.0f} M", shown_name(row["method"])]
