"""README.md's and REPORT.md's tables, written from the stored results: `python -m llmq.bench.tables [--check]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a file in `assets/results/` without `.json`,
or 'headline', 'quality', 'lean', 'load', 'prompts' or 'peers', which join several of them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from llmq.formatting import format_bytes, format_seconds
from llmq.labs import lab_classes
from llmq.labs.quality import FLOOR, shown_change, shown_margin

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "assets" / "results"
DOCUMENTS = ("README.md", "REPORT.md")
HEADLINE, HEADLINE_WINDOWS = ("llm-int8", "int8-weight-only", "bnb-int8", FLOOR), 64
OLD_TEXT = "CPython pydoc_data.topics"
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->).*?(<!-- /table -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Rewrite the documents, or with `--check` only say which are out of date (exit 1)."""
    stale = [name for name in DOCUMENTS if (ROOT / name).read_text() != filled((ROOT / name).read_text())]
    if "--check" in arguments:
        print(f"out of date: {', '.join(stale)}" if stale else "tables are up to date")
        return bool(stale)
    for name in stale:
        (ROOT / name).write_text(filled((ROOT / name).read_text()))
        print(f"wrote {name}")
    return 0


def filled(text: str) -> str:
    """`text` with every marked table made anew."""
    return _MARKED.sub(lambda m: f"{m[1]}\n{table(m[2])}\n{m[3]}", text)


def table(name: str) -> str:
    if name == "quality":
        return _quality_table([json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-quality.json"))])
    if name in _JOINED:
        return _JOINED[name]()
    result = json.loads((RESULTS / f"{name}.json").read_text())
    kinds = {"paris": _judged_table, "hooks": _hooks_table, "kernels": _kernels_table}
    kinds |= {"quality": lambda one: _quality_table([one])}
    return (kinds.get(result["kind"]) or (_lab_table if result["kind"] in lab_classes() else _decode_table))(result)


def _decode_table(result: dict) -> str:
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


def _lean_table() -> str:
    """The lean loop at LLaMA-2-7B's shape: decode at two context lengths and prefill, every method against FP16."""
    short, long, prefill = (
        {row["method"]: row for row in json.loads((RESULTS / f"gpu-7b-{name}.json").read_text())["results"]}
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
    return "\n".join([*rows, "", _conditions(json.loads((RESULTS / "gpu-7b-lean.json").read_text()))])


def _load_table() -> str:
    """How long until the first token can be decoded, from drawn weights or files, with or without cached kernels."""
    names = {"load-cold": "drawn", "load-warm": "drawn", "load-file": "FP16 file", "load-int8": "int8 file"}
    rows = ["| weights from | compiled kernels | method | loaded after | ready after | size | peak while loading |"]
    rows.append("|---|---|---|---:|---:|---:|---:|")
    for name, origin in names.items():
        result = json.loads((RESULTS / f"gpu-7b-{name}.json").read_text())
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


def _prompts_table() -> str:
    """Time to the first token of short prompts."""
    lengths = (64, 300, 512)
    results = [json.loads((RESULTS / f"gpu-7b-prefill-{length}.json").read_text()) for length in lengths]
    rows = [f"| method | {' | '.join(f'{length} tokens' for length in lengths)} |", f"|---|{'---:|' * len(lengths)}"]
    for entries in zip(*(result["results"] for result in results), strict=True):
        rows.append(f"| `{entries[0]['method']}` | {' | '.join(format_seconds(e['seconds']) for e in entries)} |")
    c = results[0]["conditions"]
    note = f"*{c['device_name']}, LLaMA-2-7B's shape, medians of {c['repeats']}, torch {c['versions']['torch']}, "
    return "\n".join([*rows, "", f"{note}{c['date'][:10]}.*"])


def _peers_table() -> str:
    """Our CPU loop and llama.cpp in turn on the same weights; and again while another process takes a core."""
    quiet, busy = (json.loads((RESULTS / f"cpu-peers{name}.json").read_text()) for name in ("", "-busy"))
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


_JOINED = {
    "headline": lambda: _headline_table(),
    "lean": _lean_table,
    "load": _load_table,
    "peers": _peers_table,
    "prompts": _prompts_table,
}


def _conditions(result: dict) -> str:
    c = result["conditions"]
    weights = "random weights, so the text means nothing" if c["random_weights"] else c["model_revision"]
    versions = ", ".join(f"{name} {c['versions'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    bandwidth = result["read_bandwidth_bytes_per_second"] / 1e9
    return (
        f"*{c['device_name']}, {result['model']} ({weights}); batch 1, {c['prompt_tokens']} prompt tokens, "
        f"{c['new_tokens']} new tokens, median of {c['repeats']} runs, one method after the other; reading memory at "
        f"{bandwidth:,.0f} GB/s in the same run; {versions}; {c['date'][:10]}.*"
    )


def _quality_table(results: list[dict]) -> str:
    """One row for each method on each device, text and loop: of several results that have it, the first."""
    lab, rows = lab_classes()["quality"], {}
    for result in results:
        for row in result["results"]:
            named = row | {"method": f"`{row['method']}`"}
            rows.setdefault((_read_by(result), row["method"], row["engine"]), [_read_by(result), *lab.row(named)])
    headers = ["Device and text", *lab.headers()]
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    lines += [f"| {' | '.join(row)} |" for row in rows.values()]
    note = (
        "*demo model; windows of 512 tokens, each read in one call. Change: of the perplexity against FP16, paired by "
        "window; equal within: the smallest margin of two one-sided tests at 5 %. KL in nats per token: the mean, then "
        "its spread over tokens.*"
    )
    return "\n".join([*lines, "", note])


def _read_by(result: dict) -> str:
    """The device and what was read on it. The topics of pydoc differ between versions of Python."""
    c, text = result["conditions"], result["text"]
    text += f" of {c['python']}" if text == OLD_TEXT else ""
    return f"{c['device_name']}: {text}, {c['windows']} windows"


def _headline_table() -> str:
    """What the best known methods cost, from results of many windows alone."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-quality.json"))]
    lines = ["| | costs in perplexity (95 %) | equal within | KL to FP16, nats | same first choice | measured on |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    said = []
    for result in results:
        for row in result["results"] if result["conditions"]["windows"] >= HEADLINE_WINDOWS else ():
            if row["method"] == "llm-int8":
                said.append(f"`llm-int8` costs {_cost(row)} on {result['conditions']['device_name']}")
            if row["method"] in HEADLINE:
                kl, same = f"{row['kl_to_fp16']:.2g}", f"{row['top1_agreement']:.1%}"
                cells = (f"`{row['method']}`", shown_change(row), shown_margin(row), kl, same, _read_by(result))
                lines.append(f"| {' | '.join(cells)} |")
    note = f"*{'; '.join(said)}. The 135M demo model; differences paired by window of 512 tokens.*"
    return "\n".join([*lines, "", note])


def _cost(row: dict) -> str:
    low, high = (f"{100 * end:.1f}" for end in row["perplexity_change_interval"])
    return f"{100 * row['perplexity_change']:.1f} % perplexity (95 %: {low} to {high})"


def _judged_table(result: dict) -> str:
    rows = ["| method | keeps the request | factual slips | what else |", "|---|---|---|---|"]
    for row in result["results"]:
        slips = row["factual_slips"]
        said = f"{len(slips)}: {'; '.join(slips)}" if slips else "none"
        rows.append(f"| `{row['method']}` | {row['keeps_the_request']} | {said} | {row['other']} |")
    where = f"'{result['prompt']}', {result['model']} on {result['device_name']}"
    return "\n".join([*rows, "", f"*{where}: {result['conditions']}; {result['date']}.*"])


def _lab_table(result: dict) -> str:
    """A lab's rows as the page shows them; what the models wrote is left to the page."""
    lab = lab_classes()[result["kind"]]
    answer = lab.restore(result)
    headers = lab.headers()
    columns = [i for i, name in enumerate(headers) if name != "Text"]
    lines = [f"| {' | '.join(headers[i] for i in columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(lab.row(row)[i] for i in columns)} |" for row in answer.rows]
    conditions = result["conditions"]
    sweep = "device_name" not in conditions  # of several models, each with its own
    conditions = next(iter(conditions.values())) if sweep else conditions
    text = f"; {result['tokens']:,} tokens of {result['text']}" if "tokens" in result else ""
    where = f"{conditions['device_name']}, Python {conditions['python']}"
    said = f"{lab.finding(answer.rows)} " if lab.finding(answer.rows) else ""
    model = "" if sweep else f", {result['model']} model"
    return "\n".join([*lines, "", f"*{said}{where}{model}{text}; {conditions['date'][:10]}.*"])


def _hooks_table(result: dict) -> str:
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


def _kernels_table(result: dict) -> str:
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
