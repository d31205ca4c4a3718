"""Findings as HTML that needs nothing else, every text escaped: files with plotly.js inside, and cells of a notebook,
whose figures plotly shows. No gradio."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable

from llmq.figures.blocks import Block, Drawing, Markup, Table, Texts, Verbatim
from llmq.figures.palette import DARK, KL_EDGES, LIGHT, PAINT, properties
from llmq.figures.style import new_figure

_BOLD = re.compile(r"\*\*(.+?)\*\*")
# plotly.js 4 offers a button that uploads the chart; a local file has no business with another host.
NO_CLOUD = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False, "responsive": True}
_RULES = """p { white-space: pre-wrap; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--llmq-grid);
  vertical-align: top; }
.text { border: 1px solid var(--llmq-grid); border-radius: 6px; padding: .8rem 1rem; line-height: 2;
  overflow-wrap: anywhere; }
.text span { border-radius: 3px; padding: 1px 2px; white-space: pre-wrap; }
.llmq-texts p { margin: .4rem 0; overflow-wrap: anywhere; }
.llmq-texts div { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 0 1.5rem; }
.k1 { background: var(--llmq-kl-1); } .k2 { background: var(--llmq-kl-2); }
.k3 { background: var(--llmq-kl-3); } .k4 { background: var(--llmq-kl-4); }
.other { text-decoration: underline 3px var(--llmq-text-1); text-underline-offset: 4px; font-weight: 650; }"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ font-family: system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5;
  color: var(--llmq-ink); background: var(--llmq-surface); }}
{rules}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
# A notebook has rules of its own for tables, and may be dark where the system is light: rows get both colours.
_CELL = """<div class="llmq"><style>
.llmq {{ color-scheme: light dark; {light} line-height: 1.5; padding: .5rem 1rem;
  &, tr, th, td {{ color: var(--llmq-ink); background: var(--llmq-surface); }}
{rules} }}
@media (prefers-color-scheme: dark) {{ .llmq {{ {dark} }} }}
</style><h4>{title}</h4>
{body}
</div>"""
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


def page(title: str, blocks: Iterable[Block]) -> str:
    """One file of paragraphs, drawings and tables."""
    blocks = list(blocks)
    parts = [_markup(block) for block in blocks]
    if any(isinstance(block, Drawing) for block in blocks):
        from plotly.offline import get_plotlyjs

        scripts = get_plotlyjs(), f"const config = {json.dumps(NO_CLOUD)};{PAINT}{_DRAW}"
        parts += [f"<script>{script}</script>" for script in scripts]
    return _filled(_PAGE, title, parts)


def markup(blocks: Iterable[Block]) -> str:
    """Blocks without drawings as HTML for the inside of a page."""
    return "\n".join(filter(None, map(_markup, blocks)))


def cell(title: str, blocks: Iterable[Block]) -> str:
    """Paragraphs and tables inside somebody else's page, such as a notebook's; drawings are left out."""
    return _filled(_CELL, title, [_markup(block) for block in blocks if not isinstance(block, Drawing)])


def painted(figure):
    """A copy in the light palette's colours and on its ground, for where no style sheet says what their names mean."""
    ground = {"paper_bgcolor": LIGHT["surface"], "plot_bgcolor": LIGHT["surface"]}
    colors = re.sub(r"var\(--llmq-([\w-]+)\)", lambda name: LIGHT[name[1]], figure.to_json())
    plain = json.loads(colors)
    return new_figure(*plain["data"]).update_layout(plain["layout"] | ground)


def _filled(frame: str, title: str, parts: list[str]) -> str:
    colors = {"light": properties(LIGHT), "dark": properties(DARK)}
    return frame.format(title=html.escape(title), body="\n".join(filter(None, parts)), rules=_RULES, **colors)


def _markup(block: Block) -> str:
    if isinstance(block, Drawing):
        figure = block.make()
        return _FIGURE.format(json=figure.to_json(), height=figure.layout.height)
    if isinstance(block, Texts):
        return texts_markup(block)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Markup) or not block:
        return block
    return f"<p>{html.escape(block) if isinstance(block, Verbatim) else _bold(html.escape(block))}</p>"


def _bold(text: str) -> str:
    return _BOLD.sub(r"<b>\1</b>", text)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def texts_markup(texts: Texts) -> str:
    """Each row's texts side by side where there is room, below one another where there is none."""
    parts = [f"<p>{html.escape(texts.label)}</p>"]
    for name, *cells in texts.rows:
        parts.append(f"<p><b>{html.escape(name)}</b></p>")
        told = (f"<p><i>{html.escape(head)}</i>\n{html.escape(cell)}</p>"
                for head, cell in zip(texts.headers[1:], cells, strict=True))  # fmt: skip
        parts.append(f"<div>{''.join(told)}</div>")
    return f'<div class="llmq-texts">{"".join(parts)}</div>'


def text_markup(value: dict) -> Markup:
    """A text that two methods read (`agreement.Read.value`), in spans; a tooltip holds both lists."""
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
    return Markup(f'<p class="text">{"".join(parts)}</p>')
