"""The card 'Should I quantize?': the recommendation, a table in which its method stands out, and what that rests on."""

from __future__ import annotations

import html
from collections.abc import Sequence

from llmq.figures.blocks import Table
from llmq.figures.pages import markup
from llmq.labs.advice import Advice


def advice_card(advice: Advice | None) -> str:
    """The card as HTML, '' without an answer. The answer's figure is for pages without the bars of 'Does it fit?'."""
    if advice is None:
        return ""
    table = next(block for block in advice.blocks() if isinstance(block, Table))
    taken = [row["method"] == advice.result["recommendation"]["method"] for row in advice.result["results"]]
    parts = ["<h2>Should I quantize?</h2>", markup([advice.sentence]), _table(table, taken), markup([advice.notes])]
    return f'<section class="llmq-advice">{"".join(parts)}</section>'


def _table(table: Table, taken: Sequence[bool]) -> str:
    """On a narrow page every row is a block, in which each cell has its name."""
    head = "".join(f'<th role="columnheader" scope="col">{html.escape(name)}</th>' for name in table.headers)
    rows = (_row(table.headers, row, marked) for row, marked in zip(table.rows, taken, strict=True))
    return (
        f'<div class="scroll" tabindex="0"><table role="table" aria-label="{html.escape(table.label)}">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table></div>'
    )


def _row(headers: Sequence[str], cells: Sequence[str], taken: bool) -> str:
    (_, name), *others = zip(headers, map(html.escape, cells), strict=True)
    told = (
        f'<td role="cell"><span class="llmq-fit-label">{html.escape(head)}</span><span>{cell}</span></td>'
        for head, cell in others
    )
    head = f'<th role="rowheader" scope="row">{name}</th>'
    return f'<tr role="row" data-taken="{str(taken).lower()}">{head}{"".join(told)}</tr>'
