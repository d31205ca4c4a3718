"""A control for every kind of annotated field, and its value read back as the field's kind reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING

import gradio as gr

from llmq.contestant import Contestants, OneContestant, shown_name
from llmq.errors import BadChoice
from llmq.fields import Choice, Field, Number, Numbers, Switch
from llmq.methods import METHODS
from llmq.models.presets import PRESETS, model_title

METHOD_CHOICES = [(method.label, name) for name, method in METHODS.items()]


def model_field(value: str, *, elem_id: str, names: Iterable[str] = PRESETS, **look) -> gr.Dropdown:
    """The field for a model: `names` by their titles, or whatever else names one."""
    choices = [(model_title(name), name) for name in names]
    return gr.Dropdown(choices, value=value, label="Model", allow_custom_value=True, elem_id=elem_id, **look)


def control(field: Field, elem_id: str):
    """The Gradio component of a field; None for a field that no control is for."""
    kind, default = field.kind, None if field.default is MISSING else field.default
    if not kind.label:
        return None
    look = {"label": kind.label, "elem_id": elem_id, "min_width": 200}
    if isinstance(kind, Choice):
        choices = list(zip(kind.labels or kind.choices, kind.choices, strict=True))
        wide = {"min_width": 600} if sum(len(label) for label, _ in choices) > 60 else {}
        return gr.Radio(choices, value=default, **(look | wide))
    if isinstance(kind, Switch):
        return gr.Checkbox(default, **look)
    if isinstance(kind, OneContestant):
        return gr.Dropdown(METHOD_CHOICES, value=kind.spell(default), allow_custom_value=True, **look)
    if isinstance(kind, Contestants):
        names = [contestant.label for contestant in default]
        choices = dict.fromkeys((*METHOD_CHOICES, *((shown_name(name), name) for name in names)))
        return gr.Dropdown(list(choices), value=names, multiselect=True, allow_custom_value=True, **look)
    if isinstance(kind, Numbers) and kind.start is not None:
        return gr.Slider(kind.each.low, kind.each.shown, kind.start, step=kind.each.step, **look)
    if isinstance(kind, Number) and kind.shown is not None:
        return gr.Slider(kind.low, kind.shown, default, step=kind.step, **look)
    info = "Numbers such as 7,19, or empty." if isinstance(kind, Numbers) and kind.empty else None
    return gr.Textbox("", placeholder=getattr(kind, "empty", None) or kind.help, info=info, **look)


def value_of(field: Field, given):
    """What a control gave, as the field holds it. Raises BadChoice naming the field."""
    kind = field.kind
    if isinstance(kind, Switch):
        return bool(given)
    if isinstance(kind, Contestants):
        return kind.read(field.named, ",".join(map(str, given or ())), {})
    if isinstance(kind, Numbers) and kind.start is not None:
        number = whole(field.named, given) if kind.each.whole else given
        return kind.check(field.named, (number,))
    return kind.read(field.named, str(given if given is not None else "").strip(), {})


def linked(field: Field, text: str):
    """What the control of a field shows of a text in a link. Raises BadChoice naming the field."""
    kind, found = field.kind, field.kind.read(field.named, text, {})
    if isinstance(kind, Contestants):
        return [contestant.label for contestant in found]
    if isinstance(kind, Numbers) and kind.start is not None:
        return found[0]
    if isinstance(kind, Number) and kind.shown is not None:
        return min(found, kind.shown)
    return found if isinstance(kind, Choice | Switch) else text


def whole(name: str, value) -> int:
    """A slider's number; anything else that is not whole is refused by name."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise BadChoice(f"{name} is {value!r}; choose a whole number")
    return int(value)
