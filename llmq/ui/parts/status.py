"""One line that says what is going on, announced to screen readers; whatever it says is text, not markup.

A long job's line has a bar below it and, where there is a way to end it, a button: the value is then
`working(text, fraction)`, and a plain text takes both away. The button triggers `stop`.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script

_TEMPLATE = (
    '<div class="llmq-doing"><p class="llmq-status" role="status"></p>'
    '<button type="button" class="llmq-button" data-part="stop" hidden>Stop</button></div>'
    '<progress class="llmq-progress" max="1" aria-label="Progress" hidden></progress>'
)
_SCRIPT = """
const line = element.querySelector(".llmq-status");
const bar = element.querySelector(".llmq-progress");
const stop = element.querySelector("button");
const place = element.closest(".llmq-part");
let running = 0; // changes of a line that has a bar
const show = (value) => {
  const [text, fraction] = typeof value === "string" ? [value, undefined] : [value.text, value.fraction];
  running = fraction === undefined ? 0 : running + 1;
  line.setAttribute("aria-live", fraction === undefined ? "polite" : "off"); // a count is seen, not heard
  line.textContent = text;
  bar.hidden = stop.hidden = fraction === undefined;
  if (place) place.dataset.state = fraction === undefined ? "idle" : "running";
  if (fraction === null) bar.removeAttribute("value");
  else if (fraction !== undefined) bar.value = fraction;
};
stop.addEventListener("click", () => trigger("stop"));
const changed = () => show(props.value || "");
watch("value", changed);
whenLost(() => running, () => show(LOST));
changed();
"""


def status_line(text: str, *, elem_id: str) -> gr.HTML:
    """The component; its value is the text, or `working(...)`."""
    return component(_TEMPLATE, script("ended.js") + _SCRIPT, elem_id=elem_id, value=text)


def working(text: str, fraction: float | None = None) -> dict:
    """A line with a bar; a fraction of None for a bar without an end."""
    return {"text": text, "fraction": fraction}
