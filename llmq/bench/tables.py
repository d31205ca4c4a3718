"""README.md's and REPORT.md's tables, written from the stored results: `python -m llmq.bench.tables [--check]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a file in `assets/results/` without `.json`,
or 'headline', 'quality', 'lean', 'load', 'prompts' or 'peers', which join several of them; 'methods' is their
explanations.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from llmq.bench import speed_tables
from llmq.labs import lab_classes
from llmq.labs.quality import FLOOR, shown_change, shown_margin
from llmq.methods import METHODS

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
    kinds = {
        "paris": _judged_table,
        "hooks": speed_tables.hooks_table,
        "kernels": speed_tables.kernels_table,
        "transformers": speed_tables.generate_table,
    }
    kinds |= {"quality": lambda one: _quality_table([one])}
    return (
        kinds.get(result["kind"]) or (_lab_table if result["kind"] in lab_classes() else speed_tables.decode_table)
    )(result)


def _explanations() -> str:
    """Every method on one screen; methods that share one stand above it together."""
    shared: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        shared.setdefault(method.explanation(), []).append(name)
    titles = {text: ", ".join(f"`{name}`" for name in names) for text, names in shared.items()}
    return "\n".join(f"#### {title}\n\n{text}" for text, title in titles.items()).rstrip()


_JOINED = {
    "headline": lambda: _headline_table(),
    "methods": _explanations,
    "lean": lambda: speed_tables.lean_table(RESULTS),
    "load": lambda: speed_tables.load_table(RESULTS),
    "peers": lambda: speed_tables.peers_table(RESULTS),
    "prompts": lambda: speed_tables.prompts_table(RESULTS),
}


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
    lines += [f"| {' | '.join(lab.row(row)[i] for i in columns)} |" for row in lab.shown(answer.rows)]
    conditions = result["conditions"]
    sweep = "device_name" not in conditions  # of several models, each with its own
    conditions = next(iter(conditions.values())) if sweep else conditions
    text = f"; {result['tokens']:,} tokens of {result['text']}" if "tokens" in result else ""
    where = f"{conditions['device_name']}, Python {conditions['python']}"
    said = f"{lab.finding(answer.rows)} " if lab.finding(answer.rows) else ""
    model = "" if sweep else f", {result['model']} model"
    return "\n".join([*lines, "", f"*{said}{where}{model}{text}; {conditions['date'][:10]}.*"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
