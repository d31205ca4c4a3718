"""Findings as HTML files that need nothing else: plotly.js is inside, every text is escaped. No gradio."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from llmq.experiments.tables import HEADERS, finding, rows_of
from llmq.figures.bars import columns_figure, layer_error_figure
from llmq.figures.heatmaps import map_figure
from llmq.figures.lines import FIGURES, features_figure, peaks_figure, sweep_figure
from llmq.figures.palette import DARK, KL_EDGES, LIGHT, PAINT, properties
from llmq.figures.reading_value import reading_value
from llmq.inspect.cause import Cause
from llmq.inspect.emergence import emergence
from llmq.inspect.reading import Read
from llmq.inspect.report import OutlierReport
from llmq.inspect.wording import (
    MASSIVE_HEADERS,
    PATCH_HEADERS,
    account_line,
    cause_line,
    drift_line,
    emergence_line,
    massive_rows,
    patch_rows,
    summary_of,
)

# plotly.js 4 offers a button that uploads the chart; a local file has no business with another host.
NO_CLOUD = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False, "responsive": True}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ font-family: system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5;
  color: var(--llmq-ink); background: var(--llmq-surface); }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
.scroll {{ overflow-x: auto; }}
th, td {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--llmq-grid);
  vertical-align: top; }}
.text {{ border: 1px solid var(--llmq-grid); border-radius: 6px; padding: .8rem 1rem; line-height: 2;
  overflow-wrap: anywhere; }}
.text span {{ border-radius: 3px; padding: 1px 2px; white-space: pre-wrap; }}
.k1 {{ background: var(--llmq-kl-1); }} .k2 {{ background: var(--llmq-kl-2); }}
.k3 {{ background: var(--llmq-kl-3); }} .k4 {{ background: var(--llmq-kl-4); }}
.other {{ text-decoration: underline 3px var(--llmq-text-1); text-underline-offset: 4px; font-weight: 650; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
_FIGURE = '<script type="application/json">{json}</script><div class="figure" style="height: {height}px"></div>'
# Each figure's JSON stands in front of its place.
_DRAW = """
const draw = () => document.querySelectorAll(".figure").forEach((place) => {
  const { data, layout } = painted(JSON.parse(place.previousElementSibling.textContent), place);
  Plotly.react(place, data, layout, config);
});
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


def outliers_page(report: OutlierReport, threshold: float) -> str:
    """One watched prompt: what was sent to 16 bit, the paper's figures, every heatmap."""
    phases = ("prefill", "decode") if report.generated_tokens else ("prefill",)
    found = emergence(report)
    about = (
        f"Largest |x| at the input of every linear layer over {report.prompt_tokens} prompt tokens (prefill) and "
        f"{report.generated_tokens} generated tokens (decode). Threshold {threshold:g}."
    )
    inside = [kind for kind in report.kinds if kind != "lm_head"]
    return page(
        f"Activation outliers: {report.model}, {report.method}",
        [
            about,
            account_line(report, threshold),
            emergence_line(found).replace("**", ""),
            features_figure(found),
            peaks_figure(report),
            *(columns_figure(report, kind, 0, threshold) for kind in inside),
            (MASSIVE_HEADERS, massive_rows(report)),
            *(map_figure(report, kind, phase, threshold) for kind in report.kinds for phase in phases),
        ],
    )


def agreement_page(read: Read) -> str:
    """A text that both methods read, each token with both lists of five as its tooltip."""
    return page(_reading_title("Agreement", read), [summary_of(read), drift_line(read), _Markup(_text(read))])


def cause_page(cause: Cause, read: Read) -> str:
    """The chain of cause of one token."""
    outliers = [
        [
            str(entry.layer),
            f"{entry.relative:.2%}",
            f"{entry.sqnr_db:.1f}",
            str(entry.outlier_count),
            ", ".join(f"{kind} {channel}: {value:,.4g}" for kind, channel, value in entry.outliers),
        ]
        for entry in cause.layers
    ]
    return page(
        _reading_title("Chain of cause", read),
        [
            cause_line(cause, read),
            layer_error_figure(cause),
            (PATCH_HEADERS, patch_rows(cause, read)),
            (["Layer", "Off by", "SQNR (dB)", "Outliers", "The strongest: input, channel, |x|"], outliers),
            _Markup(_text(read)),
        ],
    )


def experiment_page(result: dict) -> str:
    """One experiment, or a sweep over models."""
    rows, kind = result["results"], result["kind"]
    drawn = [FIGURES[kind](rows)] if kind in FIGURES and rows else []
    if kind == "sweep" and rows:
        drawn = [sweep_figure(rows, by) for by in ("parameters", "perplexity")]
    missing = [f"{name}: not measured: {reason}" for name, reason in result.get("missing", {}).items()]
    text = [f"{result['tokens']:,} tokens of {result['text']}, {result['device']}."] if "tokens" in result else []
    title = f"{kind.capitalize()}: {result.get('model') or ', '.join(row['model'] for row in rows)}"
    return page(title, [finding(result), *text, *missing, *drawn, (HEADERS[kind], rows_of(result))])


class _Markup(str):
    """Text that is HTML already."""


def page(title: str, blocks: Iterable[str | go.Figure | tuple[Sequence[str], Sequence[Sequence[str]]]]) -> str:
    """One file: paragraphs of text, figures, and tables as (headers, rows)."""
    parts, drawn = [], False
    for block in blocks:
        if isinstance(block, go.Figure):
            parts.append(_FIGURE.format(json=block.to_json(), height=block.layout.height))
            drawn = True
        elif isinstance(block, tuple):
            parts.append(_table(*block))
        elif isinstance(block, _Markup):
            parts.append(block)
        elif block:
            parts.append(f"<p>{html.escape(block)}</p>")
    if drawn:
        scripts = get_plotlyjs(), f"const config = {json.dumps(NO_CLOUD)};{PAINT}{_DRAW}"
        parts += [f"<script>{script}</script>" for script in scripts]
    colors = {"light": properties(LIGHT), "dark": properties(DARK)}
    return _PAGE.format(title=html.escape(title), body="\n".join(parts), **colors)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _reading_title(what: str, read: Read) -> str:
    return f"{what}: {read.reading.model}, {read.reading.baseline.label} and {read.reading.contestant.label}"


def _text(read: Read) -> str:
    """The text in spans; a tooltip holds both lists."""
    value = reading_value(read)
    parts = [f"<span>{html.escape(value['opening'])}</span>"]
    for text, kl, rank, *lists in value["tokens"]:
        kl = math.inf if kl is None else kl
        told = [f"KL {kl:.3g} nats, first choice of {value['labels'][0]} is number {rank} of {value['labels'][1]}"]
        for label, guesses in zip(value["labels"], lists, strict=True):
            told.append(f"{label}: " + ", ".join(f"{guess!r} {probability:.1%}" for guess, probability in guesses))
        level = sum(kl >= edge for edge in KL_EDGES)
        classes = f"k{level}{'' if rank == 1 else ' other'}"
        shown = text.replace("\n", "⏎\n") or "∅"
        parts.append(f'<span class="{classes}" title="{html.escape(chr(10).join(told))}">{html.escape(shown)}</span>')
    return f'<p class="text">{"".join(parts)}</p>'
