"""README.md's and REPORT.md's tables and chart, of the stored results: `python -m llmq.bench.tables [--check]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a file in `assets/results/` without `.json`,
or 'headline', 'quality', 'lean', 'load', 'prompts', 'peers', 'cpu-ledger' or 'gpu-ledger', which join several of them;
'methods' is their explanations. A chart is one of CHARTS that a document names. What `--check` finds wrong beside what
is out of date, and how a figure in the text is held to a stored result, is told in `checks`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from llmq.bench import batch_tables, chart, checks, shown, speed_tables
from llmq.bench.ledger_tables import ledger_table
from llmq.labs import lab_classes
from llmq.labs.quality import FLOOR, shown_change, shown_margin
from llmq.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "assets" / "results"
DOCUMENTS = ("README.md", "REPORT.md")
HEADLINE, HEADLINE_WINDOWS = ("llm-int8", "int8-weight-only", "bnb-int8", FLOOR), 64
OLD_TEXT = "CPython pydoc_data.topics"
CHARTS = {f"assets/speed-7b-{side}.svg": side for side in chart.SIDES}


def main(arguments: list[str]) -> int:
    """Rewrite the documents, or with `--check` only say what is wrong with them (exit 1)."""
    texts = {name: (ROOT / name).read_text() for name in DOCUMENTS}
    if "--check" in arguments:
        found = list(faults(texts))
        print("\n".join(found) or "tables are up to date, and all that is stored and told is in them")
        return bool(found)
    for name, new in outdated(texts):
        (ROOT / name).write_text(new)
        print(f"wrote {name}")
    return 0


def outdated(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The documents, and the charts that they name, which are not what the stored results make them; with what they
    should be."""
    yield from ((name, new) for name, text in texts.items() if (new := filled(text)) != text)
    for name, side in CHARTS.items():
        path = ROOT / name
        if any(name in text for text in texts.values()):
            drawn = chart.speed_chart(side, _speeds_of_7b())
            if not path.exists() or path.read_text() != drawn:
                yield name, drawn


def faults(texts: dict[str, str]) -> Iterator[str]:
    """What is wrong with the documents, a line each (`checks` says what is looked for)."""
    yield from (f"out of date: {name}" for name, _ in outdated(texts))
    yield from checks.unshown(list(texts.values()), {path.stem for path in RESULTS.iterdir()}, sources)
    for name in dict.fromkeys(found[2] for text in texts.values() for found in checks.TABLE.finditer(text)):
        results = {source: stored(source) for source in sources(name)}
        yield from checks.incomplete_caption(name, table(name), results)
    for name, text in texts.items():
        yield from (f"{name}: {fault}" for fault in checks.wrong_figures(text, stored))


def filled(text: str) -> str:
    """`text` with every marked table made anew."""
    return checks.TABLE.sub(lambda m: f"{m[1]}\n{table(m[2])}\n{m[3]}", text)


def table(name: str) -> str:
    """The table of that name, of the results in `sources(name)`."""
    results = [stored(source) for source in sources(name)]
    if name in _JOINED:
        return _JOINED[name][0](*results)
    kind = results[0]["kind"]
    kinds = {
        "paris": _judged_table,
        "hooks": speed_tables.hooks_table,
        "kernels": speed_tables.kernels_table,
        "others": speed_tables.others_table,
        "transformers": speed_tables.generate_table,
        "stages": batch_tables.stages_table,
        "batch": batch_tables.batch_table,
        "energy": speed_tables.energy_table,
        "quality": _quality_table,
        "memory": ledger_table,
        "tensor-parallel": speed_tables.parallel_table,
    }
    return (kinds.get(kind) or (_lab_table if kind in lab_classes() else speed_tables.decode_table))(results[0])


def sources(name: str) -> list[str]:
    """The stored results that a table shows."""
    if name not in _JOINED:
        return [name]
    found = _JOINED[name][1]
    return found() if callable(found) else list(found)


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _speeds_of_7b() -> dict[str, dict]:
    """What the chart shows, below its headings."""
    generated = stored("gpu-7b-transformers")
    compiled = generated | {"results": [row for row in generated["results"] if row["mode"] == "compiled"]}
    found = {"through transformers": stored("gpu-7b"), "through transformers, compiled": compiled}
    return found | {"through our own loop": stored("gpu-7b-lean")}


def _explanations() -> str:
    """Every method on one screen; methods that share one stand above it together."""
    shared: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        shared.setdefault(method.explanation(), []).append(name)
    titles = {text: ", ".join(f"`{name}`" for name in names) for text, names in shared.items()}
    return "\n".join(f"#### {title}\n\n{text}" for text, title in titles.items()).rstrip()


def _qualities() -> list[str]:
    return sorted(path.stem for path in RESULTS.glob("*-quality.json"))


def _qualities_of_many_windows() -> list[str]:
    return [name for name in _qualities() if stored(name)["conditions"]["windows"] >= HEADLINE_WINDOWS]


def _ledgers(device: str) -> list[str]:
    return sorted(path.stem for path in RESULTS.glob(f"{device}-memory*.json"))


_JOINED = {  # how each is drawn, and from which results
    "headline": (lambda *results: _headline_table(*results), _qualities_of_many_windows),
    "quality": (lambda *results: _quality_table(*results), _qualities),
    "methods": (_explanations, ()),
    "lean": (speed_tables.lean_table, ("gpu-7b-lean", "gpu-7b-lean-2000", "gpu-7b-prefill")),
    "load": (speed_tables.load_table, [f"gpu-7b-load-{name}" for name in ("cold", "warm", "file", "int8")]),
    "peers": (speed_tables.peers_table, ("cpu-peers", "cpu-peers-busy")),
    "cpu-ledger": (ledger_table, lambda: _ledgers("cpu")),
    "gpu-ledger": (ledger_table, lambda: _ledgers("gpu")),
    "prompts": (speed_tables.prompts_table, [f"gpu-7b-prefill-{length}" for length in (64, 300, 512)]),
}


def _quality_table(*results: dict) -> str:
    """One row for each method on each device, text and loop: of several results that have it, the first."""
    lab, rows = lab_classes()["quality"], {}
    for result in results:
        for row in result["results"]:
            named = row | {"method": f"`{row['method']}`"}
            rows.setdefault((_read_by(result), row["method"], row["engine"]), [_read_by(result), *lab.row(named)])
    headers = ["Device and text", *lab.headers()]
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    lines += [f"| {' | '.join(row)} |" for row in rows.values()]
    measured = f"{_model_of(results[0])}, {shown.days(*results)}"
    note = (
        f"*{measured}; windows of 512 tokens, each read in one call. Change: of the "
        "perplexity against FP16, paired by window; equal within: the smallest margin of two one-sided tests at 5 %. "
        "KL in nats per token: the mean, then its spread over tokens.*"
    )
    return "\n".join([*lines, "", note])


def _model_of(result: dict) -> str:
    return "demo model" if result["model"] == "demo" else str(result["model"])


def _read_by(result: dict) -> str:
    """The device and what was read on it. The topics of pydoc differ between versions of Python."""
    c, text = result["conditions"], result["text"]
    text += f" of {c['python']}" if text == OLD_TEXT else ""
    return f"{c['device_name']}: {text}, {c['windows']} windows"


def _headline_table(*results: dict) -> str:
    """What the best known methods cost, from results of many windows alone."""
    lines = ["| | costs in perplexity (95 %) | equal within | KL to FP16, nats | same first choice | measured on |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    said = []
    for result in results:
        for row in result["results"]:
            if row["method"] == "llm-int8":
                said.append(f"`llm-int8` costs {_cost(row)} on {result['conditions']['device_name']}")
            if row["method"] in HEADLINE:
                kl, same = f"{row['kl_to_fp16']:.2g}", f"{row['top1_agreement']:.1%}"
                cells = (f"`{row['method']}`", shown_change(row), shown_margin(row), kl, same, _read_by(result))
                lines.append(f"| {' | '.join(cells)} |")
    about = f"The 135M demo model, {shown.days(*results)}; differences paired by window of 512 tokens."
    note = f"*{'; '.join(said)}. {about}*"
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
