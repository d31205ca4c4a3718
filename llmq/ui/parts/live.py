"""The live panel: one card per contestant, and memory and decode speed over time in one plot.

One `gr.HTML` with a static template. Its scripts (`plotly.js`, `live*.js`) run once when it is mounted, then draw from
`props.value` (see `live_state.LiveState.value`) whenever it changes, at most four times a second. The
template never changes, so Gradio never touches the nodes below it and the plot survives the whole run.

Give its events `show_progress="hidden"`: otherwise Gradio fades the panel while a run is going.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script, serve_plotly

TEMPLATE = """
<div class="llmq-live">
  <p class="llmq-hidden" role="status" data-part="status"></p>
  <p class="llmq-quiet" data-part="empty">Time, speed and memory of each method appear here when a run starts.</p>
  <div class="llmq-cards" data-part="cards"></div>
  <p class="llmq-quiet" data-part="plot-error" hidden>
    The plot could not be loaded. The table below holds its figures.</p>
  <div class="llmq-plot" data-part="plot" hidden role="group" aria-label="Memory and decode speed over time, by method.
    The table below holds the figures."></div>
  <p class="llmq-quiet" data-part="caption" hidden>Weights and peak memory on the cards, and the coloured memory
    curves, are exact tensor sizes of each method.</p>
  <details class="llmq-figures" data-part="figures" hidden>
    <summary>Show figures as a table</summary>
    <div class="llmq-scroll" role="region" tabindex="0" aria-label="Figures of the plots"><table>
      <thead><tr><th scope="col">Series</th><th scope="col">Unit</th>
        <th scope="col">Lowest</th><th scope="col">Highest</th><th scope="col">Latest</th></tr></thead>
      <tbody data-part="rows"></tbody>
    </table></div>
  </details>
</div>
"""


def live_panel() -> gr.HTML:
    """The component; its value is `LiveState.value()` or `{}`."""
    js = script("plotly.js", "live_cards.js", "live_plot.js", "live.js")
    return component(TEMPLATE, js, elem_id="live-panel", value={}, plotly_path=serve_plotly())
