"""What an answer is shown as, in a terminal, a written page and a notebook: every text as it is, nothing obeyed."""

from __future__ import annotations

import html
import json

import pytest
from browser_support import new_tab
from colours import contrast

from llmq.events import Failed, Finished, Planned, Run, Step
from llmq.figures.blocks import Drawing, Table
from llmq.figures.lines import Line, line_figure
from llmq.figures.pages import cell, page, painted
from llmq.figures.palette import LIGHT
from llmq.reporting import shown_block
from llmq.summary import RunAnswer, Summary

WRITTEN = "2**3**4 is not **bold**, nor is <b>this</b>; both end in **"


def answer_of(*texts: str, failing: tuple[int, ...] = ()) -> RunAnswer:
    """A comparison in which each contestant wrote one token of its own, unless it is `failing`."""
    names = [f"m{number}" for number in range(len(texts))]
    events = [Planned(schedule="interleave", reason="", prompt_tokens=3, free_bytes=1, device="cpu",
                      predicted_bytes=dict.fromkeys(names, 1))]  # fmt: skip
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        if number in failing:
            events += [Failed(contestant=name, message="too large")]
            continue
        events += [Step(contestant=name, index=0, token_id=number, text=text, seconds=0.0, logprob=0.0)]
        events += [Finished(contestant=name, reason="eos")]
    run = Run({"model": "tiny"}, {})
    return RunAnswer(run, Summary(run.record(iter(events), lambda: 0.0)))


def test_what_a_model_wrote_is_shown_sign_by_sign():
    answer = answer_of(WRITTEN, "x")
    assert f"--- m0\n{WRITTEN}" in [shown_block(block) for block in answer.blocks()]
    assert f"<p>--- m0\n{html.escape(WRITTEN)}</p>" in page(answer.title, answer.blocks())


@pytest.mark.parametrize(
    ("failing", "said"), [((), "token is number 1"), ((2,), "token is number 1"), ((0,), ""), ((1,), ""), ((0, 1), "")]
)
def test_texts_are_compared_where_there_are_two(failing, said):
    """Nothing is no text that agrees with another's beginning."""
    *_, last = answer_of("a", "b", "c", failing=failing).blocks()
    assert said in last and bool(last) == bool(said)


def test_a_finding_is_bold_in_a_page_and_plain_in_a_terminal():
    said = "**7** of <8>"
    assert shown_block(said) == "7 of <8>" and "<p><b>7</b> of &lt;8&gt;</p>" in page("t", [said])


def figure():
    return line_figure("A <b>title</b>", [Line("fp16", [(1, 2), (2, 3)], 0)], "%{x}", x={}, y={})


def test_a_figure_is_painted_whole_and_its_original_left_alone():
    """A notebook has no style sheet that says what the names of colours mean."""
    original = figure()
    before, copy = original.to_json(), painted(original)
    assert "var(--llmq-" in before and original.to_json() == before and "var(" not in copy.to_json()
    assert {copy.layout.paper_bgcolor, copy.layout.plot_bgcolor} == {LIGHT["surface"]}
    assert contrast(copy.layout.font.color, copy.layout.paper_bgcolor) >= 4.5
    assert [list(trace.x) for trace in copy.data] == [list(trace.x) for trace in original.data]


def test_a_cell_is_a_part_of_a_page_and_draws_nothing():
    drawing = Drawing(lambda: pytest.fail("nobody looks at it"))
    shown = cell("<i>t</i>", ["**7** of 8", drawing, Table(["<a>"], [["<b>"]]), ""])
    assert "<h4>&lt;i&gt;t&lt;/i&gt;</h4>" in shown and "<b>7</b> of 8" in shown
    assert "<td>&lt;b&gt;</td>" in shown and '<th scope="col">&lt;a&gt;</th>' in shown
    assert not any(word in shown for word in ("<script", "<html", "<body", ":root"))


HOST = """<!doctype html><meta charset="utf-8"><style>
body { background: #fff; color: #000; } tbody tr:nth-child(odd) { background: #f5f5f5; } td { text-align: right; }
</style><table><tbody><tr><td id="theirs">1</td></tr></tbody></table>"""
SEEN = """() => [...document.querySelectorAll(".llmq :is(h4, p, th, td)")].map((e) => {
  let ground = e;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  return [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
})"""


def hexadecimal(colour: str) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour[4:-1].split(","))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_cell_can_be_read_in_a_notebook_and_changes_nothing_around_it(browser, scheme):
    tab = new_tab(browser, color_scheme=scheme)
    look = "() => JSON.stringify(['color', 'textAlign', 'backgroundColor', 'borderBottomWidth', 'padding'].map(" \
        "(name) => getComputedStyle(document.getElementById('theirs'))[name]))"  # fmt: skip
    tab.set_content(HOST)
    before = json.loads(tab.evaluate(look))
    tab.set_content(HOST + cell("Title", ["Text", Table(["One"], [["1"], ["2"]])]))
    seen = tab.evaluate(SEEN)
    assert len(seen) == 5 and json.loads(tab.evaluate(look)) == before
    assert all(contrast(hexadecimal(ink), hexadecimal(ground)) >= 4.5 for ink, ground in seen)
    assert len({ground for _, ground in seen}) == 1
    tab.close()
