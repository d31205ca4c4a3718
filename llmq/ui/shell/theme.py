"""Colours, theme and CSS of the page. In Gradio 6 they go to `launch(theme=build_theme(), css=build_css())`.

System fonts only. Every text colour has a contrast of at least 4.5:1 with the surfaces it stands on, and every line
of a plot at least 3:1, in light and in dark; a test computes them. The contestants' colours follow Okabe and Ito
(2008), and no meaning rests on colour alone: curves also differ in their dashes.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from llmq.figures.palette import DARK, LIGHT, properties

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

CONTESTANT_CLASSES = ("llmq-c0", "llmq-c1", "llmq-c2")  # on a pane or a card: its accent colours


def build_css() -> str:
    """The page's style sheet: the palettes as custom properties, then its files in order."""
    sheets = (Path(__file__).with_name(f"{name}.css") for name in ("theme", "page", "outliers", "fit", "lab"))
    rules = [sheet.read_text(encoding="utf-8") for sheet in sheets]
    return "\n".join((f":root {{ {properties(LIGHT)} }}", f".dark {{ {properties(DARK)} }}", *rules))


# Gradio's theme variable -> name in the palettes: surfaces, texts, accents.
COLORS = {
    "body_background_fill": "page",
    "background_fill_primary": "surface",
    "background_fill_secondary": "page",
    "block_background_fill": "surface",
    "block_label_background_fill": "surface",
    "panel_background_fill": "page",
    "input_background_fill": "surface",
    "code_background_fill": "page",
    "checkbox_background_color": "surface",
    "checkbox_label_background_fill": "surface",
    "checkbox_label_background_fill_hover": "page",
    "checkbox_label_background_fill_selected": "page",
    "button_secondary_background_fill": "surface",
    "button_secondary_background_fill_hover": "page",
    "table_even_background_fill": "surface",
    "table_odd_background_fill": "page",
    "border_color_primary": "grid",
    "button_secondary_border_color": "ink-soft",
    "button_secondary_border_color_hover": "ink",
    "checkbox_border_color": "ink-soft",
    "input_border_color": "ink-soft",
    "input_border_color_focus": "accent",
    "body_text_color": "ink",
    "body_text_color_subdued": "ink-soft",
    "block_label_text_color": "ink-soft",
    "block_title_text_color": "ink",
    "block_info_text_color": "ink-soft",
    "input_placeholder_color": "ink-soft",
    "button_primary_text_color": "on-accent",
    "button_secondary_text_color": "ink",
    "button_cancel_text_color": "danger",
    "error_text_color": "danger",
    "error_icon_color": "danger",
    "error_border_color": "danger",
    "link_text_color": "link",
    "link_text_color_active": "link",
    "link_text_color_hover": "ink",
    "link_text_color_visited": "link",
    "button_primary_background_fill": "accent",
    "button_primary_background_fill_hover": "accent-strong",
    "button_primary_border_color": "accent",
    "button_primary_border_color_hover": "accent-strong",
    "button_cancel_border_color": "danger",
    "checkbox_background_color_selected": "accent",
    "checkbox_border_color_selected": "accent",
    "slider_color": "accent",
    "stat_background_fill": "accent",
    "loader_color": "accent",
}


def build_theme() -> gr.themes.Base:
    """A quiet theme on Gradio's base: light and dark, flat surfaces, visible borders."""
    theme = gr.themes.Base(primary_hue="slate", secondary_hue="slate", neutral_hue="slate", font=SANS, font_mono=MONO)
    theme.name = "llmq"
    sides = ("", LIGHT), ("_dark", DARK)
    colors = {f"{variable}{side}": palette[name] for variable, name in COLORS.items() for side, palette in sides}
    return theme.set(
        **colors,
        color_accent="var(--llmq-accent)",
        color_accent_soft="var(--llmq-page)",
        input_border_width="1px",
        button_border_width="1px",
        block_title_text_weight="600",
        block_label_text_weight="600",
        checkbox_check=_check_mark(LIGHT["on-accent"]),
    )


def _check_mark(colour: str) -> str:
    path = "M12.2 4.8a1 1 0 010 1.4l-5 5a1 1 0 01-1.4 0l-2-2a1 1 0 011.4-1.4l1.3 1.3 4.3-4.3a1 1 0 011.4 0z"
    picture = f"<svg viewBox='0 0 16 16' fill='{colour}' xmlns='http://www.w3.org/2000/svg'><path d='{path}'/></svg>"
    return 'url("data:image/svg+xml,' + picture.replace("#", "%23").replace("<", "%3c").replace(">", "%3e") + '")'
