"""How methods work: one screen each, in a component that a disclosure holds where methods are chosen."""

from __future__ import annotations

from collections.abc import Iterable

import gradio as gr

from llmq.methods import METHODS


def how_it_works(*names: str, elem_id: str) -> gr.Markdown:
    """The component, with the explanations of these methods."""
    return gr.Markdown(explained_methods(names), elem_id=elem_id, elem_classes=["llmq-how"])


def explained_methods(names: Iterable[object]) -> str:
    """Markdown: the methods by their labels, settings left aside; other names are passed over."""
    found = dict.fromkeys(str(name or "").partition("@")[0] for name in names)
    chosen = [METHODS[name] for name in found if name in METHODS]
    return "\n\n".join(f"**{method.label}** (`{method.name}`)\n\n{method.explanation()}" for method in chosen)
