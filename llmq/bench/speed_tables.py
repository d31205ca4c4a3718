"""Tables of what `bench` measured, from the stored results: speed, memory, the time to the first token.

Older results have no key 'over_fp16': what they say follows from those that they have.
"""

from __future__ import annotations

from itertools import chain

from llmq.bench.energy import PHASES
from llmq.bench.shown import (
    commit,
    days,
    drawn,
    length,
    lone,
    origin,
    ranged,
    reading,
    schedule,
    seconds,
    times,
    weights,
    wide,
)
from llmq.formatting import format_bytes, format_joules, format_seconds


def decode_table(result: dict) -> str:
    """A bench of decoding; any other result of speed that has no table of its own."""
    rows = ["| method | first token | decode, tok/s (lowest–highest) | against FP16 | weights | peak memory |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for row in result["results"]:
        cells = [
            f"`{row['method']}`",
            seconds(row, "prefill_seconds"),
            ranged(row, "tokens_per_second"),
            _over_fp16(row, result),
            format_bytes(row["weight_bytes"] + row["scale_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return drawn(rows, _conditions(result), result)


def generate_table(result: dict) -> str:
    """transformers' own `generate`, eager and compiled."""
    rows = ["| method | `generate` | decode, tok/s (lowest–highest) | against FP16 | against bitsandbytes "]
    rows[0] += "| first token | peak memory |"
    rows.append("|---|---|---:|---:|---:|---:|---:|")
    for row in result["results"]:
        cells = [
            f"`{row['method']}`",
            row["mode"],
            ranged(row, "tokens_per_second"),
            times(row, "over_fp16"),
            times(row, "over_bnb", ".1f"),
            seconds(row, "prefill_seconds"),
            "" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),  # a CPU has none
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c = result["conditions"]
    note = f"{c['device_name']}, {result['model']} ({weights(c)}); batch 1, {length(c)}, greedy; {schedule(c)}, "
    note += f"against FP16 of the same mode and eager bitsandbytes; {origin(c)}."
    return drawn(rows, note, result)


def parallel_table(result: dict) -> str:
    """One model on several GPUs by tensor parallelism."""
    rows = ["| GPUs | decode, tok/s (lowest–highest) | against the fewest | first token | peak memory of each "]
    rows[0] += "| same tokens |"
    rows.append("|---:|---:|---:|---:|---:|---:|")
    c = result["conditions"]
    for row in result["results"]:
        cells = [
            str(row["gpus"]),
            ranged(row, "tokens_per_second"),
            times(row, "over_fewest"),
            seconds(row, "prefill_seconds"),
            format_bytes(max(row["peak_bytes"])),
            f"{row['same_tokens']} of {c['new_tokens']}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    note = (
        f"{c['device_name']}, {result['model']} ({weights(c)}) in FP16 through transformers, eager, a process for each "
    )
    note += (
        f"GPU; batch 1, {length(c)}, medians of {c['repeats']} generations after two that do not count; {origin(c)}."
    )
    return drawn(rows, note, result)


def lean_table(short: dict, long: dict, prefill: dict) -> str:
    """The lean loop at LLaMA-2-7B's shape: decode at two context lengths and prefill, every method against FP16."""
    later, first = ({row["method"]: row for row in result["results"]} for result in (long, prefill))
    rows = ["| method | decode, tok/s (lowest–highest) | against FP16 | of the read bandwidth "]
    c = long["conditions"], prefill["conditions"]
    rows[0] += f"| decode after {c[0]['prompt_tokens']:,} tokens | prefill of {c[1]['prompt_tokens']:,} tokens "
    rows[0] += "| weights | peak memory |"
    rows.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in short["results"]:
        method = row["method"]
        cells = [
            f"`{method}`",
            ranged(row, "tokens_per_second"),
            _over_fp16(row, short),
            _share(row),
            lone(later[method], "tokens_per_second", unit=" tok/s") if method in later else "",
            seconds(first[method], "seconds") if method in first else "",
            format_bytes(row["weight_bytes"] + row["scale_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    note = (
        f"{_conditions(short)} Decode after {c[0]['prompt_tokens']:,} tokens: {_other(c[0])}; prefill: {_other(c[1])}."
    )
    return drawn(rows, note, short, long, prefill)


def _other(conditions: dict) -> str:
    """How the figures of one column were measured that come from another file."""
    new = f"{conditions['new_tokens']:,} new tokens, " if "new_tokens" in conditions else ""
    return f"{new}{schedule(conditions)}, {origin(conditions)}"


def load_table(cold: dict, warm: dict, file: dict, int8: dict) -> str:
    """How long until the first token can be decoded, from drawn weights or files, with or without cached kernels."""
    rows = ["| weights from | compiled kernels | method | loaded after | ready after | size | peak while loading |"]
    rows.append("|---|---|---|---:|---:|---:|---:|")
    for result, source in ((cold, "drawn"), (warm, "drawn"), (file, "FP16 file"), (int8, "int8 file")):
        first = result["conditions"]["kernel_cache"] == "cold"  # in the first round alone nothing is compiled yet
        for row in result["results"]:
            load, ready = (
                f"first_{name}" if first and f"first_{name}" in row else name
                for name in ("load_seconds", "ready_seconds")
            )
            cells = [
                source,
                "none yet" if first else "cached",
                f"`{row['method']}`",
                seconds(row, load),
                seconds(row, ready),
                format_bytes(row["weight_bytes"] + row["scale_bytes"]),
                format_bytes(row["peak_load_bytes"]),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    c = cold["conditions"]
    note = (
        f"{c['device_name']}, LLaMA-2-7B's shape, torch {c['versions']['torch']}, {days(cold, warm, file, int8)}. One "
        "process for each group of rows: the first method in it also starts CUDA. Ready: the graph is captured and a "
        "token decoded. The files were in the system's page cache."
    )
    if any("first_ready_seconds" in row for row in warm["results"]):
        note += " Of drawn weights with cached kernels: medians of rounds in which CUDA had started."
    return drawn(rows, note, cold, warm, file, int8)


def prompts_table(*found: dict) -> str:
    """Time to the first token of short prompts."""
    lengths = [result["conditions"]["prompt_tokens"] for result in found]
    rows = [f"| method | {' | '.join(f'{length} tokens' for length in lengths)} |", f"|---|{'---:|' * len(lengths)}"]
    for entries in zip(*(result["results"] for result in found), strict=True):
        rows.append(f"| `{entries[0]['method']}` | {' | '.join(seconds(row, 'seconds') for row in entries)} |")
    c = found[0]["conditions"]
    note = f"{c['device_name']}, LLaMA-2-7B's shape, {schedule(c)}, torch {c['versions']['torch']}, "
    return drawn(rows, f"{note}{days(*found)}.", *found)


def peers_table(quiet: dict, busy: dict) -> str:
    """Our CPU loop and llama.cpp in turn on the same weights; and again while another process takes a core."""
    kept = {row["method"]: row for row in busy["results"]}
    rows = ["| | decode, tok/s (lowest–highest) | against | over `fp16` | of the read bandwidth "]
    rows[0] += "| prompt of 512, tok/s | against | weights | decode with one core taken |"
    rows.append("|---|---:|---|---:|---:|---:|---|---:|---:|")
    for row in quiet["results"]:
        speed, own, taken = row["tokens_per_second"], row["engine"] == "llama.cpp", kept.get(row["method"])
        rival = row["against"].removeprefix("llama.cpp ")
        cells = [
            row["method"] if own else f"`{row['method']}`",
            ranged(row, "tokens_per_second"),
            "" if own else f"{times(row, 'decode_ratio')} {rival}",
            "" if own else times(row, "over_fp16"),
            _share(row),
            lone(row, "prefill_tokens_per_second", ".0f"),
            "" if own else f"{times(row, 'prefill_ratio')} {rival}",
            format_bytes(row["weight_bytes"]),
            f"{lone(taken, 'tokens_per_second')}, {taken['tokens_per_second'] / speed:.0%}" if taken else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c, b = quiet["conditions"], busy["conditions"]
    note = (
        f"{c['device_name']}, {c['torch_threads']} threads, {quiet['model']} ({c['model_revision']}); {length(c)}, "
        f"greedy; {schedule(c)}; F16 and Q8_0 are llama.cpp's (llama-cpp-python {c['llama_cpp_python']}), made from "
        f"the same weights by its own tool; {reading(quiet)}; {days(quiet)}{commit(c)}. The last column, and its "
        f"share of the first: {length(b)}, {schedule(b)} beside a process that never rests; {days(busy)}."
    )
    return drawn(rows, note, quiet, busy)


def others_table(result: dict) -> str:
    """Loops that others made beside ours on one card."""
    rows = ["| system | decode, tok/s | weights | compiles for | what it computes |", "|---|---:|---:|---:|---|"]
    for row in result["results"]:
        low, high = (row.get(f"tokens_per_second_{end}") for end in ("min", "max"))
        cells = [
            row["method"],
            f"{row['tokens_per_second']:.1f}" + (f" ({low:.1f}–{high:.1f})" if low else ""),
            format_bytes(row["weight_bytes"]),
            f"{row['compile_seconds']} s" if row["compile_seconds"] else "",
            "; ".join(filter(None, (row["about"], "another start of the machine" * (row["start"] > 1)))),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
    note = f"{c['device_name']}, {result['model']} ({weights(c)}); batch {c['batch']}, {length(c)}; {versions}; "
    return drawn(rows, f"{note}{days(result)}{commit(c)}; {c['how']}.", result)


def hooks_table(result: dict) -> str:
    """What watching a model costs it."""
    rows = ["| method | prefill, watched over not | decode, watched over not | held afterwards |"]
    rows.append("|---|---:|---:|---:|")
    for row in result["results"]:
        ratios = (ranged(row, f"{phase}_ratio", ".2f", "×") for phase in ("prefill", "decode"))
        rows.append(f"| `{row['method']}` | {' | '.join(ratios)} | {format_bytes(row['held_bytes'])} |")
    c = result["conditions"]
    note = f"{c['device_name']}, {result['model']}, {length(c)}; medians of {c['repeats']} rounds; {days(result)}"
    return drawn(rows, f"{note}{commit(c)}.", result)


def energy_table(result: dict) -> str:
    """Joules a token of prompt and of answer, with and without what the device takes when nothing computes."""
    rows = ["| method |" + "".join(f" {what}, a token | against FP16 | over idle | power |" for what in PHASES)]
    rows.append(f"|---|{'---:|' * 4 * len(PHASES)}")
    for row in result["results"]:
        cells = chain.from_iterable(_energy_cells(row, phase) for phase in PHASES)
        rows.append(f"| `{row['method']}` | {' | '.join(cells)} |")
    c, idle = result["conditions"], f"{result['idle_watts']:.0f} W{wide(result, 'idle_watts')}"
    note = (
        f"{c['device_name']}, {result['model']} ({weights(c)}); batch 1, {length(c)}; {schedule(c)}. {c['counter']}, "
        f"over stretches of {c['seconds']} s or longer that begin and end with a step of the counter "
        f"({format_seconds(c['counter_step_seconds'])} apart). Over idle: without the {idle} that are drawn while all "
        f"models are loaded and nothing computes. {origin(c)}."
    )
    return drawn(rows, note, result)


def _energy_cells(row: dict, phase: str) -> list[str]:
    joules = f"{phase}_joules_per_token"
    over_idle = f"{format_joules(row[f'{joules}_over_idle'])}{wide(row, f'{joules}_over_idle')}"
    ratio, watts = times(row, f"{phase}_joules_over_fp16"), lone(row, f"{phase}_watts", ".0f", " W")
    return [f"{format_joules(row[joules])}{wide(row, joules)}", ratio, over_idle, watts]


def _over_fp16(row: dict, result: dict) -> str:
    """The ratio of the rounds; in older results that of the medians."""
    if "over_fp16" in row:
        return times(row, "over_fp16")
    fp16 = next(row for row in result["results"] if row["method"] == "fp16")
    return f"{row['tokens_per_second'] / fp16['tokens_per_second']:.2f}×"


def _share(row: dict) -> str:
    if row["bandwidth_fraction"] is None:
        return "not believable" if row.get("bandwidth_refused") else "–"
    return f"{row['bandwidth_fraction']:.0%}"


def _conditions(result: dict) -> str:
    c = result["conditions"]
    return (
        f"{c['device_name']}, {result['model']} ({weights(c)}); batch 1, {length(c)}, {schedule(c)}; "
        f"{reading(result)}; {origin(c)}."
    )


def kernels_table(result: dict) -> str:
    """Microseconds of matrix-vector products, and of making int8 codes and a list of outliers from a vector."""
    cells: dict[str, dict[str, float]] = {}
    for row in result["products"]:
        name = row["arithmetic"] + ", dependent launch" * row["dependent_launch"]
        cells.setdefault(name, {})[f"{row['outputs']:,} × {row['inputs']:,}"] = row["microseconds"]
    for row in result["splits"]:
        kind = f"{row['values']:,} values{', norm first' * row['norm']}"
        cells.setdefault(f"outlier list: {row['list']}", {})[kind] = row["microseconds"]
    columns = list(dict.fromkeys(column for found in cells.values() for column in found))
    lines = [f"| microseconds | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, found in cells.items():
        lines.append(f"| {name} | {' | '.join(f'{found[c]:.2f}' if c in found else '' for c in columns)} |")
    c = result["conditions"]
    about = f"{c['device_name']}, torch {c['torch']}, triton {c['triton']}, {c['date']}"
    return "\n".join([*lines, "", f"*{about}; {c['how']}.*"])
