"""Tables of what `bench` measured, from the stored results: speed, memory, the time to the first token."""

from __future__ import annotations

import json
from pathlib import Path

from llmq.formatting import format_bytes, format_seconds


def decode_table(result: dict) -> str:
    """A bench of decoding; any other result of speed that has no table of its own."""
    rows = ["| method | first token | decode, tok/s (lowest–highest) | against FP16 | weights | peak memory |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    baseline = next(row for row in result["results"] if row["method"] == "fp16")
    for row in result["results"]:
        speed = row["tokens_per_second"]
        cells = [
            f"`{row['method']}`",
            format_seconds(row["prefill_seconds"]),
            f"{speed:.1f} ({row['tokens_per_second_min']:.1f}–{row['tokens_per_second_max']:.1f})",
            f"{speed / baseline['tokens_per_second']:.2f}×",
            format_bytes(row["weight_bytes"] + row["scale_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", _conditions(result)])


def generate_table(result: dict) -> str:
    """transformers' own `generate`, eager and compiled."""
    rows = ["| method | `generate` | decode, tok/s (lowest–highest) | against FP16 | against bitsandbytes "]
    rows[0] += "| first token | peak memory |"
    rows.append("|---|---|---:|---:|---:|---:|---:|")
    for row in result["results"]:
        cells = [
            f"`{row['method']}`",
            row["mode"],
            f"{row['tokens_per_second']:.1f} ({row['tokens_per_second_min']:.1f}–{row['tokens_per_second_max']:.1f})",
            f"{row['over_fp16']:.2f}×",
            f"{row['over_bnb']:.1f}×",
            format_seconds(row["prefill_seconds"]),
            "" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),  # a CPU has none
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c = result["conditions"]
    note = (
        f"*{c['device_name']}, {result['model']} ({_weights(c)}); batch 1, {c['prompt_tokens']} prompt tokens, "
        f"{c['new_tokens']} new tokens, greedy; medians of {c['repeats']} rounds in which everybody ran in turn, "
        "ratios within a round, against FP16 of the same mode and eager bitsandbytes; "
        f"{_versions(c)}; {c['date'][:10]}.*"
    )
    return "\n".join([*rows, "", note])


def lean_table(results: Path) -> str:
    """The lean loop at LLaMA-2-7B's shape: decode at two context lengths and prefill, every method against FP16."""
    short, long, prefill = (
        {row["method"]: row for row in json.loads((results / f"gpu-7b-{name}.json").read_text())["results"]}
        for name in ("lean", "lean-2000", "prefill")
    )
    rows = ["| method | decode, tok/s (lowest–highest) | against FP16 | of the read bandwidth "]
    rows[0] += "| decode after 1,936 tokens | prefill of 2,048 tokens | weights | peak memory |"
    rows.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for method, row in short.items():
        speed = row["tokens_per_second"]
        cells = [
            f"`{method}`",
            f"{speed:.1f} ({row['tokens_per_second_min']:.1f}–{row['tokens_per_second_max']:.1f})",
            f"{speed / short['fp16']['tokens_per_second']:.2f}×",
            f"{row['bandwidth_fraction']:.0%}",
            f"{long[method]['tokens_per_second']:.1f} tok/s" if method in long else "",
            format_seconds(prefill[method]["seconds"]) if method in prefill else "",
            format_bytes(row["weight_bytes"] + row["scale_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", _conditions(json.loads((results / "gpu-7b-lean.json").read_text()))])


def load_table(results: Path) -> str:
    """How long until the first token can be decoded, from drawn weights or files, with or without cached kernels."""
    names = {"load-cold": "drawn", "load-warm": "drawn", "load-file": "FP16 file", "load-int8": "int8 file"}
    rows = ["| weights from | compiled kernels | method | loaded after | ready after | size | peak while loading |"]
    rows.append("|---|---|---|---:|---:|---:|---:|")
    for name, origin in names.items():
        result = json.loads((results / f"gpu-7b-{name}.json").read_text())
        for row in result["results"]:
            cells = [
                origin,
                "none yet" if result["conditions"]["kernel_cache"] == "cold" else "cached",
                f"`{row['method']}`",
                format_seconds(row["load_seconds"]),
                format_seconds(row["ready_seconds"]),
                format_bytes(row["weight_bytes"] + row["scale_bytes"]),
                format_bytes(row["peak_load_bytes"]),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    c = result["conditions"]
    where = f"{c['device_name']}, LLaMA-2-7B's shape, torch {c['versions']['torch']}, {c['date'][:10]}"
    note = (
        f"*{where}. One process for each group of rows: the first method in it also starts CUDA. Ready: the graph is "
        "captured and a token decoded. The files were in the system's page cache.*"
    )
    return "\n".join([*rows, "", note])


def prompts_table(results: Path) -> str:
    """Time to the first token of short prompts."""
    lengths = (64, 300, 512)
    found = [json.loads((results / f"gpu-7b-prefill-{length}.json").read_text()) for length in lengths]
    rows = [f"| method | {' | '.join(f'{length} tokens' for length in lengths)} |", f"|---|{'---:|' * len(lengths)}"]
    for entries in zip(*(result["results"] for result in found), strict=True):
        rows.append(f"| `{entries[0]['method']}` | {' | '.join(format_seconds(e['seconds']) for e in entries)} |")
    c = found[0]["conditions"]
    note = f"*{c['device_name']}, LLaMA-2-7B's shape, medians of {c['repeats']}, torch {c['versions']['torch']}, "
    return "\n".join([*rows, "", f"{note}{c['date'][:10]}.*"])


def peers_table(results: Path) -> str:
    """Our CPU loop and llama.cpp in turn on the same weights; and again while another process takes a core."""
    quiet, busy = (json.loads((results / f"cpu-peers{name}.json").read_text()) for name in ("", "-busy"))
    kept = {row["method"]: row["tokens_per_second"] for row in busy["results"]}
    rows = ["| | decode, tok/s (lowest–highest) | against | over `fp16` | of the read bandwidth "]
    rows[0] += "| prompt of 512, tok/s | against | weights | decode with one core taken |"
    rows.append("|---|---:|---|---:|---:|---:|---|---:|---:|")
    for row in quiet["results"]:
        speed, own = row["tokens_per_second"], row["engine"] == "llama.cpp"
        rival = row["against"].removeprefix("llama.cpp ")
        cells = [
            row["method"] if own else f"`{row['method']}`",
            f"{speed:.1f} ({row['tokens_per_second_min']:.1f}–{row['tokens_per_second_max']:.1f})",
            "" if own else f"{row['decode_ratio']:.2f}× {rival}",
            "" if own else f"{row['over_fp16']:.2f}×",
            f"{row['bandwidth_fraction']:.0%}",
            f"{row['prefill_tokens_per_second']:.0f}",
            "" if own else f"{row['prefill_ratio']:.2f}× {rival}",
            format_bytes(row["weight_bytes"]),
            f"{kept[row['method']]:.1f} ({kept[row['method']] / speed:.0%})" if row["method"] in kept else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c, bandwidth = quiet["conditions"], quiet["read_bandwidth_bytes_per_second"] / 1e9
    note = (
        f"*{c['device_name']}, {c['torch_threads']} threads, {quiet['model']} ({c['model_revision']}); prompt of "
        f"{c['prompt_tokens']}, {c['new_tokens']} new tokens, greedy; medians of {c['repeats']} rounds in which "
        f"everybody ran in turn, ratios within a round; F16 and Q8_0 are llama.cpp's (llama-cpp-python "
        f"{c['llama_cpp_python']}), made from the same weights by its own tool; reading memory at {bandwidth:.0f} GB/s "
        f"in the same run; {c['date'][:10]}. The last column: {busy['conditions']['repeats']} rounds beside a process "
        "that never rests.*"
    )
    return "\n".join([*rows, "", note])


def _conditions(result: dict) -> str:
    c = result["conditions"]
    bandwidth = result["read_bandwidth_bytes_per_second"] / 1e9
    return (
        f"*{c['device_name']}, {result['model']} ({_weights(c)}); batch 1, {c['prompt_tokens']} prompt tokens, "
        f"{c['new_tokens']} new tokens, median of {c['repeats']} runs, one method after the other; reading memory at "
        f"{bandwidth:,.0f} GB/s in the same run; {_versions(c)}; {c['date'][:10]}.*"
    )


def _weights(conditions: dict) -> str:
    random = "random weights, so the text means nothing"
    return random if conditions["random_weights"] else conditions["model_revision"]


def _versions(conditions: dict) -> str:
    return ", ".join(f"{name} {conditions['versions'][name]}" for name in ("torch", "transformers", "bitsandbytes"))


def hooks_table(result: dict) -> str:
    """What watching a model costs it."""
    lines = ["| method | prefill, watched over not | decode, watched over not | held afterwards |"]
    lines.append("|---|---:|---:|---:|")
    for row in result["results"]:
        ratios = (
            f"{row[f'{phase}_ratio']:.2f}× ({row[f'{phase}_ratio_min']:.2f}–{row[f'{phase}_ratio_max']:.2f})"
            for phase in ("prefill", "decode")
        )
        lines.append(f"| `{row['method']}` | {' | '.join(ratios)} | {format_bytes(row['held_bytes'])} |")
    conditions = result["conditions"]
    about = f"{conditions['device_name']}, {result['model']}, prompt of {conditions['prompt_tokens']:,} tokens"
    return "\n".join([*lines, "", f"*{about}; medians of {conditions['repeats']} rounds; {conditions['date'][:10]}.*"])


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
