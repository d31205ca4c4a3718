"""One line that says what is going on, announced to screen readers; whatever it says is text, not markup.

A long job's line has a bar below it: the value is then `working(text, fraction)`, and a plain text takes the bar away.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component

_TEMPLATE = (
    '<p class="llmq-status" role="status"></p>'
    '<progress class="llmq-progress" max="1" aria-label="Progress" hidden></progress>'
)
_SCRIPT = """
const line = element.querySelector(".llmq-status");
const bar = element.querySelector(".llmq-progress");
const show = () => {
  const value = props.value || "";
  const [text, fraction] = typeof value === "string" ? [value, undefined] : [value.text, value.fraction];
  line.textContent = text;
  bar.hidden = fraction === undefined;
  if (fraction === null) bar.removeAttribute("value");
  else if (fraction !== undefined) bar.value = fraction;
};
watch("value", show);
show();
"""


def status_line(text: str, *, elem_id: str) -> gr.HTML:
    """The component; its value is the text, or `working(...)`."""
    return component(_TEMPLATE, _SCRIPT, elem_id=elem_id, value=text)


def working(text: str, fraction: float | None) -> dict:
    """A line with a bar; a fraction of None for a bar without an end."""
    return {"text": text, "fraction": fraction}
