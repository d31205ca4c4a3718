"""The settings of the methods that a form has chosen, a row of fields for each that has any.

The names in the form are the only place where settings are kept (`gptq@bits=3:group=64`): a value says `methods`, the
names; a change of a field spells the name anew and triggers `submit`. Nothing of this asks the server.
"""

from __future__ import annotations

import gradio as gr

from llmq.fields import Choice, Field, Number, Switch, fields_of
from llmq.methods import METHODS
from llmq.ui.shell.assets import component, script

TEMPLATE = '<div class="llmq-method-settings" data-part="rows"></div>'
ELSEWHERE = ("threshold",)  # the form has a slider of its own for these


def method_settings(names: list[str], *, elem_id: str) -> gr.HTML:
    """The component."""
    known = {name: {"label": method.label, "fields": _fields(type(method))} for name, method in METHODS.items()}
    js = script("nodes.js", "method_settings.js")
    return component(TEMPLATE, js, elem_id=elem_id, value={"methods": names}, known=known)


def wire_settings(view: gr.HTML, methods: list[gr.Dropdown], **quiet) -> None:
    """Let the fields follow the names, and the names the fields."""
    gr.on([part.change for part in methods], None, methods, view, js="(...methods) => ({ methods })", **quiet)
    view.submit(None, view, methods, js="({ methods }) => methods", **quiet)


def _fields(method: type) -> list[dict]:
    first = fields_of(method)[:1]
    return [
        {**_control(field), "bare": field in first}
        for field in fields_of(method)
        if field.kind.label and field.name not in ELSEWHERE
    ]


def _control(field: Field) -> dict:
    """What the browser draws a field by: its values are spelled as in a name."""
    kind = field.kind
    told = {"name": field.name, "label": kind.label, "help": kind.help, "usual": kind.spell(field.default)}
    match kind:
        case Switch():
            return told | {"kind": "switch"}
        case Choice():
            return told | {
                "kind": "choice",
                "choices": list(zip(kind.labels or kind.choices, kind.choices, strict=True)),
            }
        case Number() if not kind.none:
            step = 1 if kind.whole else "any"
            return told | {"kind": "number", "low": kind.low, "high": kind.high, "step": step}
    return told | {"kind": "text"}
