"""The table of the memory ledger: predicted bytes beside measured ones, of several models."""

from __future__ import annotations

from llmq.bench.shown import drawn, length, origin
from llmq.formatting import format_bytes, format_change

PAIRS = {"weights": "weight", "KV cache": "kv", "activations": "activation"}
REST = {"libraries": "library_bytes", "allocator's slack": "slack_bytes", "not explained": "unexplained_bytes"}


def ledger_table(*results: dict) -> str:
    """A line for every method of every model; predicted, then measured."""
    headers = ["model", "method", "loop", *PAIRS, *REST, "in all", "off, weights + KV", "off, in all"]
    lines = [f"| {' | '.join(headers)} |", f"|---|---|---|{'---:|' * (len(headers) - 3)}"]
    lines += [f"| {' | '.join(_cells(result, row))} |" for result in results for row in result["results"]]
    return drawn(lines, " ".join([_METHOD, *dict.fromkeys(map(_measured, results))]), *results)


_METHOD = (
    "Predicted / measured, at the moment that needs most: the prompt read in one call, or the last token written. In "
    "all: what the process takes more than before the model was loaded, at its highest; libraries: workspace that they "
    "keep in torch's allocator; not explained: what no line has, under 0 where memory was allocated and never touched, "
    "or reused. Off: predicted over measured, less 1."
)


def _cells(result: dict, row: dict) -> list[str]:
    cells = [_shape(result), f"`{row['method']}`", row["engine"]]
    cells += [_pair(row[f"predicted_{name}_bytes"], row[f"{name}_bytes"]) for name in PAIRS.values()]
    cells += [format_bytes(row[key]) for key in REST.values()]
    cells.append(_pair(row["predicted_bytes"], row["process_bytes"]))
    return cells + [format_change(row[key]) for key in ("weights_kv_error", "error")]


def _pair(predicted: int, measured: int) -> str:
    return f"{format_bytes(predicted)} / {format_bytes(measured)}"


def _shape(result: dict) -> str:
    """The model, and what of it is not its own."""
    c = result["conditions"]
    window = f", a window of {c['window']:,} tokens" if c["window"] else ""
    return f"{result['model']}{' (random weights)' if c['random_weights'] else ''}{window}"


def _measured(result: dict) -> str:
    c, before = result["conditions"], format_bytes(max(row["base_bytes"] for row in result["results"]))
    files = max(row["file_bytes"] for row in result["results"])
    mapped = f", less up to {format_bytes(files)} of a mapped file that no weight lies in" if files else ""
    rounds = f"{c['repeats']} counted round{'' if c['repeats'] == 1 else 's'}"
    return (
        f"{_shape(result)}: {c['device_name']}, {length(c)}, {rounds}; in all by {c['counted']}; "
        f"{before} of it was there before{mapped}; {origin(c)}."
    )
