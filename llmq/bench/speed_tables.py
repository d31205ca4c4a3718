"""Tables of what `bench` measured, from the stored results: speed, memory, the time to the first token.

A figure whose rounds lie apart says so in its cell. Older results have no key 'rounds', 'notes' or 'over_fp16': what
they say follows from those that they have.
"""

from __future__ import annotations

from llmq.bench.rounds import SCHEDULE
from llmq.formatting import format_bytes, format_seconds, shown_spread

SPREAD = "Spread: the highest less the lowest, over the median, from 10 % on."


def decode_table(result: dict) -> str:
    """A bench of decoding; any other result of speed that has no table of its own."""
    rows = ["| method | first token | decode, tok/s (lowest–highest) | against FP16 | weights | peak memory |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for row in result["results"]:
        cells = [
            f"`{row['method']}`",
            _seconds(row, "prefill_seconds"),
            _ranged(row, "tokens_per_second"),
            _over_fp16(row, result),
            format_bytes(row["weight_bytes"] + row["scale_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return _drawn(rows, _conditions(result), result)


def generate_table(result: dict) -> str:
    """transformers' own `generate`, eager and compiled."""
    rows = ["| method | `generate` | decode, tok/s (lowest–highest) | against FP16 | against bitsandbytes "]
    rows[0] += "| first token | peak memory |"
    rows.append("|---|---|---:|---:|---:|---:|---:|")
    for row in result["results"]:
        cells = [
            f"`{row['method']}`",
            row["mode"],
            _ranged(row, "tokens_per_second"),
            _times(row, "over_fp16"),
            _times(row, "over_bnb", ".1f"),
            _seconds(row, "prefill_seconds"),
            "" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),  # a CPU has none
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c = result["conditions"]
    note = f"{c['device_name']}, {result['model']} ({_weights(c)}); batch 1, {_length(c)}, greedy; {_schedule(c)}, "
    note += f"against FP16 of the same mode and eager bitsandbytes; {_origin(c)}."
    return _drawn(rows, note, result)


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
            _ranged(row, "tokens_per_second"),
            _over_fp16(row, short),
            _share(row),
            _lone(later[method], "tokens_per_second", unit=" tok/s") if method in later else "",
            _seconds(first[method], "seconds") if method in first else "",
            format_bytes(row["weight_bytes"] + row["scale_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    note = (
        f"{_conditions(short)} Decode after {c[0]['prompt_tokens']:,} tokens: {_other(c[0])}; prefill: {_other(c[1])}."
    )
    return _drawn(rows, note, short, long, prefill)


def _other(conditions: dict) -> str:
    """How the figures of one column were measured that come from another file."""
    new = f"{conditions['new_tokens']:,} new tokens, " if "new_tokens" in conditions else ""
    return f"{new}{_schedule(conditions)}, {_origin(conditions)}"


def load_table(cold: dict, warm: dict, file: dict, int8: dict) -> str:
    """How long until the first token can be decoded, from drawn weights or files, with or without cached kernels."""
    rows = ["| weights from | compiled kernels | method | loaded after | ready after | size | peak while loading |"]
    rows.append("|---|---|---|---:|---:|---:|---:|")
    for result, origin in ((cold, "drawn"), (warm, "drawn"), (file, "FP16 file"), (int8, "int8 file")):
        first = result["conditions"]["kernel_cache"] == "cold"  # in the first round alone nothing is compiled yet
        for row in result["results"]:
            load, ready = (
                f"first_{name}" if first and f"first_{name}" in row else name
                for name in ("load_seconds", "ready_seconds")
            )
            cells = [
                origin,
                "none yet" if first else "cached",
                f"`{row['method']}`",
                _seconds(row, load),
                _seconds(row, ready),
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
    return _drawn(rows, note, cold, warm, file, int8)


def prompts_table(*found: dict) -> str:
    """Time to the first token of short prompts."""
    lengths = [result["conditions"]["prompt_tokens"] for result in found]
    rows = [f"| method | {' | '.join(f'{length} tokens' for length in lengths)} |", f"|---|{'---:|' * len(lengths)}"]
    for entries in zip(*(result["results"] for result in found), strict=True):
        rows.append(f"| `{entries[0]['method']}` | {' | '.join(_seconds(row, 'seconds') for row in entries)} |")
    c = found[0]["conditions"]
    note = f"{c['device_name']}, LLaMA-2-7B's shape, {_schedule(c)}, torch {c['versions']['torch']}, "
    return _drawn(rows, f"{note}{days(*found)}.", *found)


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
            _ranged(row, "tokens_per_second"),
            "" if own else f"{_times(row, 'decode_ratio')} {rival}",
            "" if own else _times(row, "over_fp16"),
            _share(row),
            _lone(row, "prefill_tokens_per_second", ".0f"),
            "" if own else f"{_times(row, 'prefill_ratio')} {rival}",
            format_bytes(row["weight_bytes"]),
            f"{_lone(taken, 'tokens_per_second')}, {taken['tokens_per_second'] / speed:.0%}" if taken else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c, b = quiet["conditions"], busy["conditions"]
    note = (
        f"{c['device_name']}, {c['torch_threads']} threads, {quiet['model']} ({c['model_revision']}); {_length(c)}, "
        f"greedy; {_schedule(c)}; F16 and Q8_0 are llama.cpp's (llama-cpp-python {c['llama_cpp_python']}), made from "
        f"the same weights by its own tool; {_reading(quiet)}; {days(quiet)}{_commit(c)}. The last column, and its "
        f"share of the first: {_length(b)}, {_schedule(b)} beside a process that never rests; {days(busy)}."
    )
    return _drawn(rows, note, quiet, busy)


def hooks_table(result: dict) -> str:
    """What watching a model costs it."""
    rows = ["| method | prefill, watched over not | decode, watched over not | held afterwards |"]
    rows.append("|---|---:|---:|---:|")
    for row in result["results"]:
        ratios = (_ranged(row, f"{phase}_ratio", ".2f", "×") for phase in ("prefill", "decode"))
        rows.append(f"| `{row['method']}` | {' | '.join(ratios)} | {format_bytes(row['held_bytes'])} |")
    c = result["conditions"]
    note = f"{c['device_name']}, {result['model']}, {_length(c)}; medians of {c['repeats']} rounds; {days(result)}"
    return _drawn(rows, f"{note}{_commit(c)}.", result)


def _drawn(rows: list[str], note: str, *results: dict) -> str:
    """The rows above their caption, which ends with what speaks against the figures."""
    against = [SPREAD] if any("spread" in row for row in rows) else []
    against += [f"{said[0].upper()}{said[1:]}." for result in results for said in result.get("notes", ())]
    return "\n".join([*rows, "", f"*{' '.join([note, *dict.fromkeys(against)])}*"])


def _ranged(row: dict, name: str, form: str = ".1f", unit: str = "") -> str:
    """A median with the lowest and the highest; '–' where nothing was measured."""
    if row[name] is None:
        return "–"
    low, middle, high = (row[f"{name}{end}"] for end in ("_min", "", "_max"))
    return f"{middle:{form}}{unit} ({low:{form}}–{high:{form}}{shown_spread(low, middle, high)})"


def _wide(row: dict, name: str) -> str:
    """' (spread 84 %)' behind a figure whose ends are not shown; '' where the rounds are near or not known."""
    if row.get(name) is None or f"{name}_min" not in row:
        return ""
    said = shown_spread(*(row[f"{name}{end}"] for end in ("_min", "", "_max")))
    return said and f" ({said.removeprefix(', ')})"


def _lone(row: dict, name: str, form: str = ".1f", unit: str = "") -> str:
    return f"{row[name]:{form}}{unit}{_wide(row, name)}"


def _seconds(row: dict, name: str) -> str:
    return f"{format_seconds(row[name])}{_wide(row, name)}"


def _times(row: dict, name: str, form: str = ".2f") -> str:
    """A ratio; '' where there is none."""
    return "" if row[name] is None else f"{row[name]:{form}}×{_wide(row, name)}"


def _over_fp16(row: dict, result: dict) -> str:
    """The ratio of the rounds; in older results that of the medians."""
    if "over_fp16" in row:
        return _times(row, "over_fp16")
    fp16 = next(row for row in result["results"] if row["method"] == "fp16")
    return f"{row['tokens_per_second'] / fp16['tokens_per_second']:.2f}×"


def _share(row: dict) -> str:
    if row["bandwidth_fraction"] is None:
        return "not believable" if row.get("bandwidth_refused") else "–"
    return f"{row['bandwidth_fraction']:.0%}"


def _conditions(result: dict) -> str:
    c = result["conditions"]
    return (
        f"{c['device_name']}, {result['model']} ({_weights(c)}); batch 1, {_length(c)}, {_schedule(c)}; "
        f"{_reading(result)}; {_origin(c)}."
    )


def _length(conditions: dict) -> str:
    new = f", {conditions['new_tokens']:,} new tokens" if "new_tokens" in conditions else ""
    return f"{conditions['prompt_tokens']:,} prompt tokens{new}"


def _schedule(conditions: dict) -> str:
    repeats = conditions["repeats"]
    if conditions.get("rounds", conditions.get("schedule") == SCHEDULE):
        return f"medians of {repeats} rounds in which everybody ran in turn, ratios within a round"
    return f"median of {repeats} runs, one method after the other"


def _reading(result: dict) -> str:
    """How fast memory was read meanwhile."""
    spread = _wide(result, "read_bandwidth_bytes_per_second")
    return f"reading memory at {result['read_bandwidth_bytes_per_second'] / 1e9:,.0f} GB/s{spread} in the same run"


def _weights(conditions: dict) -> str:
    random = "random weights, so the text means nothing"
    return random if conditions["random_weights"] else conditions["model_revision"]


def _origin(conditions: dict) -> str:
    versions = (f"{name} {conditions['versions'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    return f"{', '.join(versions)}; {conditions['date'][:10]}{_commit(conditions)}"


def days(*results: dict) -> str:
    """When they were measured."""
    return ", ".join(sorted({result["conditions"]["date"][:10] for result in results}))


def _commit(conditions: dict) -> str:
    """', commit 986bc71'; with the changes that it did not have."""
    if not (commit := conditions.get("commit")):
        return ""
    return f", commit {commit[:7]}" + " and changes not in it" * commit.endswith("-dirty")


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
