"""Tables of what several rows at once do: to one layer, step by step, and to the throughput of a whole model."""

from __future__ import annotations

from llmq.bench.shown import drawn, length, origin, ranged, schedule, seconds, times, weights, wide
from llmq.formatting import MISSING, format_bytes

STEPS = {  # as a header has them
    "search": "search, wait",
    "quantize": "quantize",
    "gather": "gather",
    "int8_product": "int8 product",
    "scale": "scale",
    "outlier_product": "FP16 product",
    "dispatch": "dispatch",
}
COUNTS = {"waits": ("host_syncs", 1), "launches": ("kernel_launches", 1), "GPU computes": ("kernel_seconds", 1e6)}


def stages_table(result: dict) -> str:
    """A line for every case: microseconds of a call by method, then bitsandbytes' steps."""
    rows, c = result["results"], result["conditions"]
    methods = [f"`{name}`" for name in dict.fromkeys(row["method"] for row in rows)]
    headers = ["layer", "rows", "outlier columns", *methods, *COUNTS, *STEPS.values(), "sum of the steps"]
    lines = [f"| {' | '.join(headers)} |", f"|---|{'---:|' * (len(headers) - 1)}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        lines.append(f"| {' | '.join(_case_cells([row for row in rows if row['case'] == case]))} |")
    counted = "a CPU has none of it" if c["device"] == "cpu" else "of a call, in the order of the methods"
    about = "; ".join(f"{STEPS[name]}: {told}" for name, told in c["steps"].items())
    note = (
        f"{c['device_name']}, one linear layer (outputs x inputs) with random weights, {c['layers']} of them called "
        f"one after the other. Microseconds of a call; {schedule(c)}. Waits of the host, kernels and their time: "
        f"{counted}. Then the steps inside bitsandbytes' own code, and their sum against the layer without marks "
        f"({about}). {origin(c)}."
    )
    return drawn(lines, note, result)


def _case_cells(rows: list[dict]) -> list[str]:
    """Of one case, whose rows are those of the methods."""
    first, told = rows[0], next((row for row in rows if row["stages"]), None)
    cells = [first["shape"], str(first["rows"]), str(first["outlier_columns"])]
    cells += [f"{1e6 * row['seconds']:,.1f}{wide(row, 'seconds')}" for row in rows]
    cells += [_counts(rows, name, unit) for name, unit in COUNTS.values()]
    cells += [_step(told, step) for step in STEPS]
    return [*cells, f"{told['stages_over_whole']:.0%}" if told else ""]


def _counts(rows: list[dict], name: str, unit: float) -> str:
    """'0; 2; 0': of every method; '–' where none is known."""
    counts = [row[name] for row in rows]
    if not any(count is not None for count in counts):
        return MISSING
    return "; ".join(MISSING if count is None else f"{count * unit:.3g}" for count in counts)


def _step(row: dict | None, step: str) -> str:
    return f"{1e6 * row['stages'][step]:,.1f}" if row and row["stages"][step] else ""


def batch_table(result: dict) -> str:
    """A line for every batch of every method."""
    lines = ["| batch | method | `generate` | tok/s together (lowest–highest) | tok/s each | against FP16 "]
    lines[0] += "| first token | peak memory | predicted |"
    lines.append("|---:|---|---|---:|---:|---:|---:|---:|---:|")
    for row in result["results"]:
        each = row["row_tokens_per_second"]
        cells = [
            str(row["batch"]),
            f"`{row['method']}`",
            row["mode"],
            row["error"].partition(". ")[0] or ranged(row, "tokens_per_second"),
            MISSING if each is None else f"{each:.1f}",
            times(row, "over_fp16"),
            seconds(row, "prefill_seconds"),
            format_bytes(row["peak_bytes"]),
            format_bytes(row["predicted_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    c = result["conditions"]
    known = any(row["predicted_bytes"] for row in result["results"])
    predicted = "predicted: weights, keys and values, and one prefill's activations; " if known else ""
    note = (
        f"{c['device_name']}, {result['model']} ({weights(c)}); {length(c)} for every sequence, greedy; {schedule(c)}; "
        f"{predicted}{origin(c)}. "
        f"{' '.join(result['findings'])}"
    )
    return drawn(lines, note, result)
