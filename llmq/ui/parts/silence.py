"""One channel silenced, beside the picture that shows it: a button, and what became of the model.

A value says `lead` (which channel), `recorded` (of what, and of a recording when), `change` (perplexity before and
after), `texts` (name and text of each), `said` (the finding), `running`, `doing` and `fraction`; what it does not name
stays. The component triggers `submit` when a channel is to be silenced, and `stop`.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script

_TEMPLATE = """
<section class="llmq-tile llmq-silence" aria-label="Switch off one channel">
  <div class="llmq-lead">
    <p data-part="lead"></p>
    <button type="button" class="llmq-button" data-part="silence" id="silence">Switch it off</button>
    <button type="button" class="llmq-button" data-part="stop" id="silence-stop" hidden>Stop</button>
  </div>
  <p class="llmq-quiet" role="status" data-part="doing"></p>
  <progress class="llmq-progress" max="1" aria-label="Progress" data-part="bar" hidden></progress>
  <div data-part="outcome" hidden>
    <div class="llmq-columns">
      <dl><dt>Perplexity</dt>
        <dd class="llmq-change"><span data-part="before"></span> → <span data-part="after"></span></dd></dl>
      <dl data-part="texts"></dl>
    </div>
    <p class="llmq-quiet"><span data-part="recorded"></span> <span data-part="said"></span></p>
  </div>
</section>
"""


def silence_view(value: dict, *, elem_id: str) -> gr.HTML:
    """The component."""
    return component(_TEMPLATE, script("nodes.js", "ended.js", "silence.js"), elem_id=elem_id, value=value)
