"""Events, answers and forecasts in words, for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from llmq.events import Event, Failed, Finished, Freed, Loaded, Loading, Planned, Progress, Waiting
from llmq.figures.blocks import Block, Markup, Table, Texts, Verbatim


def progress_line(event: Event | Progress) -> str:
    match event:
        case Progress():
            return event.message
        case Waiting(position=position) if position:
            return "waiting for another run to leave the device"
        case Planned():
            return f"{event.schedule} on {event.device}" + (f": {event.reason}" if event.reason else "")
        case Loading(contestant="", message=message):
            return message.partition(" (")[0].partition(" · ")[0]
        case Loading():
            return f"loading {event.contestant}" + (f": {event.message}" if event.message else "")
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


def memory_lines(result: dict) -> Iterator[str]:
    """The forecast as a table in GB (1e9 bytes)."""
    yield f"{result['model']}, {result['context']:,} tokens, batch {result['batch']}; GB"
    names = ("weights", "scales", "kv", "workspace", "total")
    yield f"  {'method':<14}" + "".join(f"{name:>11}" for name in names)
    for row in result["results"]:
        fits = {None: "", True: "  fits", False: "  does not fit"}[row["fits"]]
        fits += f"; at most {row['largest_context']:,} tokens do" if row["largest_context"] else ""
        cells = ("not known" if row[name] is None else f"{row[name] / 1e9:.3f}" for name in names)
        yield f"  {row['method']:<14}" + "".join(f"{cell:>11}" for cell in cells) + fits
    if device := result["device_memory"]:
        usable = result["usable_memory"]
        size = f"{device / 1e9:.4g} GB ({device / 2**30:.4g} GiB)"
        yield f"To fit is to need at most {usable / device:.0%} of {size}, {usable / 1e9:.3f} GB."
