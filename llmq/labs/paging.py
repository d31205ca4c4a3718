"""Several requests at once: one padded batch beside a paged KV cache: tokens a second, memory, and the block table.

Through transformers in FP16, greedily, the same requests both ways; how long each is was drawn once and for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.engine.loading import Key
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Number
from llmq.figures.blocks import Drawing
from llmq.figures.lines import Line, line_figure
from llmq.figures.paging import table_figure
from llmq.formatting import format_bytes, format_share, format_speed, shown_spread
from llmq.formulas import kv_bytes
from llmq.labs.rows import BASELINE, RowAnswer, Rows, TableLab
from llmq.machine.door import Lease
from llmq.models.reference_text import reference_text

if TYPE_CHECKING:
    from llmq.engine.hf import HFEngine
    from llmq.inspect.paging import Request, Served

ROUNDS = 3
SIDES = {"batch": "one batch", "paged": "pages"}


@dataclass(frozen=True, kw_only=True)
class Paging(TableLab):
    """1, 2, 4, … `requests` of up to `longest` tokens with their answers, in pages of `page`. `prompt`: the page's,
    which plays no part."""

    kind, command, part = "paged-cache", ("experiment", "paged-cache"), "Attention"
    title = "Several requests, in one batch and in pages"
    about = (
        "Requests of different lengths share the machine: as one batch, padded to the longest, or with a paged KV "
        "cache and continuous batching, where each takes a page when it needs one and leaves when it is done."
    )
    explained = (
        "**Where the memory goes.** In one batch every request has the length of the longest: short prompts are "
        "padded, and whoever is done waits until the longest answer is written. A paged cache (PagedAttention, Kwon et "
        "al. 2023) cuts memory into pages of a few tokens; a request's block table says which pages hold its tokens, "
        "in their order. A page belongs to one request at a time and is free again when that is done, so that only a "
        "part of each request's last page is empty. What is saved holds more requests at once, and how many fit sets "
        "a server's tokens a second. Pages cost something, too: attention finds its keys and values through the table. "
        "Memory is that of keys and values at the fullest moment; a server sets aside all its pages beforehand."
    )
    requests: Annotated[int, Number(1, 64, whole=True, help="most requests at once", label="Requests", shown=16)] = 8
    longest: Annotated[
        int, Number(32, 8192, whole=True, help="most tokens of a request and its answer", label="Longest", shown=1024,
                    step=32),
    ] = 256  # fmt: skip
    page: Annotated[int, Number(1, 256, whole=True, help="tokens of a page", label="Page", shown=64)] = 16
    prompt: str = ""
    columns = {
        "Requests": "{requests}",
        "Tokens written": "{tokens:,}",
        "One batch": lambda row: _speed(row, "batch"),
        "Pages": lambda row: _speed(row, "paged"),
        "Pages over batch": "{paged_over_batch:.2f}×",
        "Batch holds (unused)": lambda row: _held(row, "batch"),
        "Pages hold (unused)": lambda row: _held(row, "paged"),
        "Same text": "{same} of {requests}",
    }

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Yield events, progress, and an answer after every row. Raises BadChoice for requests longer than the model
        reads, and for a model that does not keep the keys and values of every token."""
        model = yield from lease.open(self.model)
        config = model.config.get_text_config()
        if self.longest > model.context:
            raise BadChoice(
                f"longest is {self.longest:,} and {self.model} reads {model.context:,} tokens; choose fewer"
            )
        one, all_of_them = (kv_bytes(config, tokens=tokens) for tokens in (1, self.longest))
        if one is None or all_of_them != one * self.longest:
            raise BadChoice(
                f"{self.model} does not keep the keys and values of every token; choose a LLaMA, such as demo"
            )
        ids = model.tokenize(reference_text()[: 20 * self.longest + 200])
        engine = yield from lease.load(Key.of(model, BASELINE.method, self.device), BASELINE)
        asked = {"method": BASELINE.label, "engine": "hf", "page": self.page, "longest": self.longest, "rounds": ROUNDS}
        conditions = asked | {"command": self.typed()} | describe(self.device, model.source)
        yield from self.gathered(self.measure(lease, engine, ids), conditions)

    def measure(self, lease: Lease, engine: HFEngine, ids: list[int]) -> Rows:
        """Yield a row for 1, 2, 4, … requests."""
        from llmq.inspect.paging import requests_of

        numbers = list(dict.fromkeys([*(2**k for k in range(self.requests.bit_length())), self.requests]))
        every = requests_of(ids, self.requests, self.longest)
        for place, number in enumerate(numbers):
            yield from self._row(lease, engine, every[:number], sum(numbers[:place]) / sum(numbers))

    def _row(self, lease: Lease, engine: HFEngine, requests: list[Request], done: float) -> Rows:
        """Serve the same requests both ways in turn, round by round; the first round is not counted."""
        from llmq.inspect.paging import in_one_batch, in_pages

        ways = {
            "batch": lambda: in_one_batch(engine, requests, lease.stop.is_set),
            "paged": lambda: in_pages(engine, requests, self.page, lease.stop.is_set),
        }
        seconds: dict[str, list[float]] = {side: [] for side in ways}
        served: dict[str, Served] = {}
        for number in range(ROUNDS + 1):
            for side in list(ways)[:: 1 if number % 2 else -1]:
                yield lease.progress(f"{len(requests)} at once, {SIDES[side]}: round {number} of {ROUNDS}", done)
                served[side] = ways[side]()
                seconds[side].append(served[side].seconds)
        yield self._figures(requests, served, {side: times[1:] for side, times in seconds.items()}, engine)

    def _figures(self, requests, served: dict[str, Served], seconds: dict[str, list[float]], engine: HFEngine) -> dict:
        tokens, one = sum(request.tokens for request in requests), _bytes_of_token(engine)
        row = {"requests": len(requests), "tokens": tokens, "lengths": [request.kept for request in requests]}
        for side, times in seconds.items():
            speeds = [tokens / time for time in times]
            row |= {
                f"{side}_tokens_per_second": statistics.median(speeds),
                f"{side}_tokens_per_second_min": min(speeds),
                f"{side}_tokens_per_second_max": max(speeds),
                f"{side}_bytes": served[side].reserved * one,
                f"{side}_unused": 1 - served[side].used / served[side].reserved,
            }
        ratios = [batch / paged for batch, paged in zip(*(seconds[side] for side in SIDES), strict=True)]
        pairs = zip(*(served[side].written for side in SIDES), strict=True)
        return row | {
            "paged_over_batch": statistics.median(ratios),
            "same": sum(own == other for own, other in pairs),
            "page": self.page,
            "block_table": served["paged"].table,
            "filled": served["paged"].filled,
        }

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        if not rows:
            return ""
        row = rows[-1]
        batch, paged = (format_bytes(row[f"{side}_bytes"]) for side in SIDES)
        return (
            f"{row['requests']} requests hold {batch} of keys and values as one batch, "
            f"**{format_share(row['batch_unused'])} of it unused**, and {paged} in pages of {row['page']} tokens, "
            f"{format_share(row['paged_unused'])} unused. Pages write {row['paged_over_batch']:.2f} times the batch's "
            f"tokens a second here."
        )

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        """The block table of the last row, which a page shows, and tokens a second by requests."""
        row = rows[-1]
        lines = [
            Line(name, [(row["requests"], row[f"{side}_tokens_per_second"]) for row in rows], number)
            for number, (side, name) in enumerate(SIDES.items())
        ]
        numbers = [row["requests"] for row in rows]
        return [
            Drawing.of(
                table_figure, "The block table: whose tokens lie in which page of memory", row["block_table"],
                row["page"], row["filled"],
            ),
            Drawing.of(
                line_figure, "Tokens a second by requests at once", lines, "%{x} requests: %{y:.1f} tok/s",
                x={"title": {"text": "requests"}, "tickvals": numbers}, y={"title": {"text": "tok/s"},
                                                                            "rangemode": "tozero"},
            ),
        ]  # fmt: skip


def _bytes_of_token(engine: HFEngine) -> int:
    return kv_bytes(engine.model.config.get_text_config(), tokens=1, itemsize=engine.model.dtype.itemsize)


def _speed(row: dict, side: str) -> str:
    low, middle, high = (row[f"{side}_tokens_per_second{end}"] for end in ("_min", "", "_max"))
    return format_speed(middle) + shown_spread(low, middle, high)


def _held(row: dict, side: str) -> str:
    return f"{format_bytes(row[f'{side}_bytes'])} ({format_share(row[f'{side}_unused'])})"
