"""Events, answers and forecasts in words, for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from llmq.events import Event, Failed, Finished, Freed, Loaded, Loading, Planned, Progress, Waiting
from llmq.figures.blocks import Block, Markup, Table, Texts, Verbatim
from llmq.formatting import format_bytes


def progress_line(event: Event | Progress) -> str:
    match event:
        case Progress():
            return event.message
        case Waiting(position=position) if position:
            return "waiting for another run to leave the device"
        case Planned():
            where = ", ".join(f"{name} on {device}" for name, device in event.devices.items()) or f"on {event.device}"
            return f"{event.schedule} {where}" + (f": {event.reason}" if event.reason else "")
        case Loading(contestant="", message=message):
            return message.partition(" (")[0].partition(" · ")[0]
        case Loading():
            return f"loading {event.contestant}" + (f": {event.message}" if event.message else "")
        case Loaded(weight_bytes=None):
            return f"{event.contestant}: answers"
        case Loaded():
            return f"{event.contestant}: {event.weight_bytes / 1e6:,.0f} MB of weights in {event.seconds:.1f} s"
        case Finished():
            return f"{event.contestant}: finished ({event.reason})"
        case Freed():
            seen = "verified" if event.verified else "NOT verified"
            return f"{event.contestant}: freed {event.freed_bytes / 1e6:,.0f} MB ({seen})"
        case Failed():
            return f"{event.contestant}: failed: {event.message}"
    return ""


def reported(items: Iterable) -> Iterator:
    """Pass everything through, telling the person at the terminal what is going on; of many small steps every tenth
    of the whole."""
    last, told = "", -1.0
    for item in items:
        line = progress_line(item)
        fraction = item.fraction if isinstance(item, Progress) else None
        small = fraction is not None and told <= fraction < told + 0.1
        if line and line != last and not small:
            print(f"llmq: {line}", file=sys.stderr)
            last, told = line, told if fraction is None else fraction
        yield item


def shown_block(block: Block) -> str:
    """A block of an answer as a terminal shows it; '' for what it cannot."""
    if isinstance(block, Texts):
        return "\n\n".join(_titled(block))
    if isinstance(block, Table):
        return "\n".join(_aligned(block)) if block.rows else ""
    if isinstance(block, Verbatim):
        return block
    return block.replace("**", "") if isinstance(block, str) and not isinstance(block, Markup) else ""


def _titled(texts: Texts) -> Iterator[str]:
    yield texts.label
    for name, *cells in texts.rows:
        yield from (f"{name}, {header}:\n{cell}" for header, cell in zip(texts.headers[1:], cells, strict=True))


def _aligned(table: Table) -> Iterator[str]:
    rows = [table.headers, *table.rows]
    widths = [min(40, max(len(row[i]) for row in rows)) for i in range(len(table.headers))]
    for row in rows:
        yield "  ".join(f"{cell[:width]:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


PARTS = {"weights": "weights", "scales": "scales", "kv": "KV cache", "workspace": "workspace", "total": "total"}


def memory_lines(result: dict) -> Iterator[str]:
    """The forecast as a table, then its formulas with the numbers of their symbols."""
    written = f" ({result['answer']:,} of them written)" if result["answer"] else ""
    yield f"{result['model']}, {result['context']:,} tokens{written}, batch {result['batch']}"
    yield f"  {'method':<14}" + "".join(f"{name:>11}" for name in PARTS.values())
    for row in result["results"]:
        fits = {None: "", True: "  fits", False: "  does not fit"}[row["fits"]]
        if row["largest_context"]:
            fits += f"; at most {row['largest_context']:,} tokens do, or a batch of {row['largest_batch']:,}"
        cells = (_forecast_bytes(row[name]) for name in PARTS)
        yield f"  {row['method']:<14}" + "".join(f"{cell:>11}" for cell in cells) + fits
    if device := result["device_memory"]:
        usable = result["usable_memory"]
        size = f"{device / 1e9:.4g} GB ({device / 2**30:.4g} GiB)"
        yield f"To fit is to need at most {usable / device:.0%} of {size}, {usable / 1e9:.3f} GB."
    yield from _formula_lines(result)


def _forecast_bytes(size: int | None) -> str:
    """With the digits by which methods differ."""
    if size is None:
        return "not known"
    return f"{size / 1e9:.3f} GB" if size >= 1e9 else format_bytes(size)


def _formula_lines(result: dict) -> Iterator[str]:
    """Every formula once, with the methods that it holds for, and what its symbols are."""
    methods: dict[str, list[str]] = {}
    for row in result["results"]:
        for name, formula in row["formulas"].items():
            if formula and formula["symbols"]:
                numbers = ", ".join(f"{symbol} = {value:,.10g}" for symbol, value in formula["symbols"].items())
                line = f"  {PARTS[name]} = {formula['text']} with {numbers}"
                methods.setdefault(line, []).append(row["method"])
    everybody = len(result["results"])
    yield from (line + ("" if len(own) == everybody else f" ({', '.join(own)})") for line, own in methods.items())
    formulas = [formula for row in result["results"] for formula in row["formulas"].values() if formula]
    used = {symbol for formula in formulas for symbol in formula["symbols"]}
    yield "  " + "; ".join(f"{symbol}: {told}" for symbol, told in result["symbols"].items() if symbol in used)
