"""Links of README, REPORT and docs that lead to a file, to a folder, or to a heading: there is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("llmq/texts/*.md")])


def prose(page: Path) -> str:
    """A page without code and comments."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    found: list[str] = []
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return set(found)


def links(text: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def broken(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    to = (page.parent / path).resolve() if path else page
    return not to.exists() or bool(anchor) and anchor not in anchors(to)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    assert [target for target in links(prose(page)) if broken(page, target)] == []


def test_report_is_walked_by_its_contents():
    """Every section is in the list of contents, and every source that is cited is listed."""
    report = ROOT / "REPORT.md"
    contents, _, rest = prose(report).partition("\n## 1. ")
    sections = {name for name in anchors(report) if re.match(r"\d+-", name)}
    assert len(sections) == 10 and sections <= {target[1:] for target in links(contents)}
    listed = set(re.findall(r"^(\d+)\. ", rest.partition("\n## 10. ")[2], re.MULTILINE))
    cited = re.findall(r"(?<!\w)\[(\d[^\]]*)\](?!\()", rest.partition("\n## 10. ")[0])
    assert {number for text in cited for number in re.findall(r"(?:^|, )(\d+)(?=,|$)", text)} <= listed


COVERED = r"""
*query* · \mathrm{MultiHead} · cross-attention · residual connection · \mathrm{LN} · \mathrm{PE} · \mathcal{L} · RLHF
RMSNorm before · SwiGLU · RoPE · Grouped-query · how it was prepared · A100-80GB hours · xformers · | PIQA | 79.8
wins 36 % · | greedy | · | beam search | · top-k [ · nucleus [ · (RTN) · zero-point · = 98 · **Clipping** · summed in
group-wise · [1, Table 4] · zero-shot accuracy · [1, Table 1] · \arg\min · SmoothQuant · **OBD.** · **OBS.** · Cholesky
`awq` · E4M3 · bytes against launches · G \cdot d_h · | $4 s d$ | · block table · **Version 2** · activations and logits
BERT-base · One T4 · Trafalgar Square · find the perplexities **equal** · **floor**
"""


def test_report_covers_what_was_asked():
    """By words of each item; who shortens the report keeps the item."""
    report = " ".join((ROOT / "REPORT.md").read_text(encoding="utf-8").split())
    assert [told for told in re.split(r" · |\n", COVERED.strip()) if told not in report] == []


@pytest.mark.parametrize("target", ["no-such.md", "REPORT.md#no-such-heading", "#no-such-heading"])
def test_a_link_to_nothing_is_found(target):
    assert broken(ROOT / "README.md", target) and not broken(ROOT / "README.md", "REPORT.md#10-sources")
