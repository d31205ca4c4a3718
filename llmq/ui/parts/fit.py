"""The answer of 'Does it fit?': a sentence, and a table with a bar for every method.

One `gr.HTML` with a static template, drawn by `fit.js` from `props.value`, a value of `fit_view`. The bars repeat what
the cells say, so a screen reader passes them over.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script

TEMPLATE = """
<div class="llmq-fit">
  <p class="llmq-status llmq-headline" role="status" data-part="headline" id="fit-headline"></p>
  <table role="table" data-part="table" aria-label="Memory by method" hidden>
    <thead role="rowgroup"><tr role="row">
      <th role="columnheader" scope="col">Method</th>
      <th role="columnheader" scope="col" class="llmq-fit-scale"><span data-part="scale"></span></th>
      <th role="columnheader" scope="col"><i class="llmq-fit-weights"></i>Weights</th>
      <th role="columnheader" scope="col"><i class="llmq-fit-kv"></i>KV cache</th>
      <th role="columnheader" scope="col"><i class="llmq-fit-workspace"></i>Workspace</th>
      <th role="columnheader" scope="col">Total</th>
      <th role="columnheader" scope="col">Free left</th>
      <th role="columnheader" scope="col">Longest context</th>
      <th role="columnheader" scope="col">Largest batch</th>
    </tr></thead>
    <tbody role="rowgroup" data-part="rows"></tbody>
  </table>
  <p class="llmq-quiet" data-part="note"></p>
</div>
"""


def fit_panel() -> gr.HTML:
    """The component, empty until there is an answer."""
    value = {"headline": "Counting the bytes …", "rows": []}
    return component(TEMPLATE, script("nodes.js", "fit.js"), elem_id="fit", value=value)
