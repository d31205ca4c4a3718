"""The result of a comparison: what was asked, the difference in three figures, the texts side by side, the plots.

One `gr.HTML` with a static template. Its scripts (`plotly.js`, `live_plot.js`, `result*.js`) run once when it is
mounted, then draw from `props.value` whenever that changes, at most four times a second: a value of
`compare_view.CompareView`, or one with `frames`, which is a recording that the browser plays by itself, or `{"notice":
text}`, which is said above whatever is shown. The template never changes, so Gradio never touches the nodes below it.

The component is the one place that knows whether the tab is idle, running or replaying: it writes that into
`data-state` of the tab's column, and the style sheet shows what belongs to it. It triggers `stop` when a live run is to
end. Give its events `show_progress="hidden"`: otherwise Gradio fades the panel while a run is going.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script, serve_plotly

TEMPLATE = """
<div class="llmq-result">
  <div class="llmq-asked">
    <p data-part="asked" hidden><q data-part="prompt" dir="auto"></q> <span data-part="settings"></span></p>
    <button type="button" class="llmq-button" data-part="stop" id="stop">Stop</button>
    <button type="button" class="llmq-button" data-part="skip">Skip to the end</button>
    <button type="button" class="llmq-button" data-part="change" id="change">Change</button>
    <button type="button" class="llmq-button llmq-primary" data-part="again" id="again">Generate again</button>
  </div>
  <p class="llmq-banner" data-part="banner" hidden></p>
  <div class="llmq-verdict" data-part="verdict">
    <p class="llmq-status llmq-headline" role="status" data-part="status" id="status"></p>
    <details class="llmq-details" data-part="why" id="why"><summary>Why, and every figure</summary>
      <div data-part="details"></div></details>
    <progress class="llmq-progress" max="1" aria-label="Progress" data-part="bar"></progress>
  </div>
  <div data-part="shown" hidden>
    <div class="llmq-strip" data-part="strip" role="group" aria-label="The difference in three figures"></div>
    <div class="llmq-panes" data-part="panes"></div>
    <p class="llmq-quiet" data-part="plot-error" hidden>
      The plot could not be loaded. The table below holds its figures.</p>
    <div class="llmq-plot" data-part="plot" role="group" aria-label="Memory and decode speed over time, by method.
      The table below holds the figures."></div>
    <details class="llmq-figures llmq-details" data-part="figures">
      <summary>Show figures as a table</summary>
      <div class="llmq-scroll" role="region" tabindex="0" aria-label="Figures of the plots"><table>
        <thead><tr><th scope="col">Series</th><th scope="col">Unit</th>
          <th scope="col">Lowest</th><th scope="col">Highest</th><th scope="col">Latest</th></tr></thead>
        <tbody data-part="rows"></tbody>
      </table></div>
    </details>
  </div>
</div>
"""


def result_view(example: dict) -> gr.HTML:
    """The component; `example`: the recording that plays until somebody generates, or `{}`."""
    names = ("plotly.js", "nodes.js", "ended.js", "result_nodes.js", "result_table.js", "live_plot.js")
    js = script(*names, "result_player.js", "result.js")
    return component(TEMPLATE, js, elem_id="result", value=example, plotly_path=serve_plotly())
