"""What was watched and what came out: the folded form's line, the sentence, and the state of the Outliers tab.

A value says `state` ('running', 'done' or 'opened'), `asked` (`story.asked_of`), `text` (what came out), `doing` and
`fraction` (while it runs), `note`, `banner`; one with `text` alone changes the sentence. `refused(...)` says what was
not done: the form opens again below it. Like the result of a comparison it writes the state into its tab's column, and
triggers `stop` when a run is to end.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script

_TEMPLATE = """
<div class="llmq-result">
  <div class="llmq-asked">
    <p class="llmq-banner" data-part="banner" hidden></p>
    <p data-part="asked"><q data-part="prompt" dir="auto"></q> <span data-part="settings"></span></p>
    <button type="button" class="llmq-button" data-part="stop" id="outlier-stop">Stop</button>
    <button type="button" class="llmq-button" data-part="change" id="outlier-change">Change</button>
    <button type="button" class="llmq-button llmq-primary llmq-for-watching" data-part="again"
      id="watch-again">Watch again</button>
  </div>
  <p class="llmq-status llmq-headline llmq-for-watching" role="status" data-part="text"></p>
  <p class="llmq-quiet llmq-watched llmq-for-watching" data-part="note"></p>
  <progress class="llmq-progress" max="1" aria-label="Progress" data-part="bar" data-empty="true"></progress>
</div>
"""


def watched_view(text: str, *, elem_id: str) -> gr.HTML:
    """The component; `text` until something was watched."""
    return component(
        _TEMPLATE, script("nodes.js", "ended.js", "watched.js"), elem_id=elem_id, value={"state": "idle", "text": text}
    )


def refused(text: str, number: str) -> dict:
    """Why nothing is shown; another `number` each time, since a browser is not told of a value that it has."""
    return {"state": "refused", "text": text, "number": number}
