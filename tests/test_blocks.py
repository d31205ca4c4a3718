"""What an answer is shown as, in a terminal and in a written page: every text as it is, nothing of it obeyed."""

from __future__ import annotations

import html

from llmq.events import Finished, Planned, Run, Step
from llmq.figures.pages import page
from llmq.labs.run_answer import RunAnswer
from llmq.reporting import shown_block
from llmq.summary import Summary

WRITTEN = "2**3**4 is not **bold**, nor is <b>this</b>; both end in **"


def answer_of(*texts: str) -> RunAnswer:
    """A comparison in which each contestant wrote one token."""
    names = [f"m{number}" for number in range(len(texts))]
    events = [Planned(schedule="interleave", reason="", prompt_tokens=3, free_bytes=1, device="cpu",
                      predicted_bytes=dict.fromkeys(names, 1))]  # fmt: skip
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        events += [Step(contestant=name, index=0, token_id=number, text=text, seconds=0.0, logprob=0.0)]
        events += [Finished(contestant=name, reason="eos")]
    run = Run({"model": "tiny"}, {})
    return RunAnswer(run, Summary(run.record(iter(events), lambda: 0.0)))


def test_what_a_model_wrote_is_shown_sign_by_sign():
    answer = answer_of(WRITTEN, "x")
    assert f"--- m0\n{WRITTEN}" in [shown_block(block) for block in answer.blocks()]
    assert f"<p>--- m0\n{html.escape(WRITTEN)}</p>" in page(answer.title, answer.blocks())


def test_a_finding_is_bold_in_a_page_and_plain_in_a_terminal():
    said = "**7** of <8>"
    assert shown_block(said) == "7 of <8>" and "<p><b>7</b> of &lt;8&gt;</p>" in page("t", [said])
