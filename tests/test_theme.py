"""Contrast in light and in dark, no other host, and no data in the page except as text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from colours import contrast

from llmq import ui
from llmq.figures.palette import DARK, KL_EDGES, LIGHT, PAINT
from llmq.ui.shell.theme import build_css, build_theme

UI = Path(ui.__file__).parent
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in UI.rglob("*.js")} | {"PAINT": PAINT}
STYLES = {path.name: path.read_text(encoding="utf-8") for path in UI.rglob("*.css")}
AS_MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|createContextualFragment|DOMParser|setHTML"
    r"|\beval\(|new Function|setTimeout\(\s*['\"`]|javascript:"
)


def test_every_script_and_style_is_looked_at():
    assert {
        "fit.js",
        "nodes.js",
        "result.js",
        "result_nodes.js",
        "result_player.js",
        "live_plot.js",
        "watched.js",
        "silence.js",
        "reading.js",
        "figure.js",
    } <= SCRIPTS.keys()
    assert {"page.css", "theme.css", "fit.css", "outliers.css"} <= STYLES.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_put_data_into_the_page_as_text_only(name):
    assert AS_MARKUP.findall(SCRIPTS[name]) == []


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_curves_stand_out_from_their_surfaces(palette):
    for surface in ("page", "surface"):
        for text in ("ink", "ink-soft", "link", "danger", "accent", "text-0", "text-1", "text-2"):
            assert contrast(palette[text], palette[surface]) >= 4.5, (text, surface)
        for line in ("line-0", "line-1", "line-2"):
            assert contrast(palette[line], palette[surface]) >= 3, (line, surface)
    assert contrast(palette["on-accent"], palette["accent"]) >= 4.5
    assert contrast(palette["on-accent"], palette["accent-strong"]) >= 4.5
    shades = [palette["surface"], *(palette[f"kl-{level}"] for level in range(1, len(KL_EDGES) + 1))]
    assert all(contrast(palette["ink"], shade) >= 4.5 for shade in shades)
    steps = [contrast(shade, shades[0]) for shade in shades]
    assert steps == sorted(set(steps)), "each shade is further from the surface than the one before"


@pytest.mark.parametrize("dark", ["", "_dark"], ids=["light", "dark"])
@pytest.mark.parametrize("text, surface", [
    ("button_primary_text_color", "button_primary_background_fill"),
    ("button_primary_text_color_hover", "button_primary_background_fill_hover"),
    ("button_secondary_text_color", "button_secondary_background_fill_hover"),
    ("button_cancel_text_color", "button_cancel_background_fill"),
    ("block_label_text_color", "block_label_background_fill"),
    ("block_info_text_color", "block_background_fill"),
    ("body_text_color_subdued", "body_background_fill"),
    ("input_placeholder_color", "input_background_fill"),
    ("link_text_color_visited", "body_background_fill"),
    ("error_text_color", "error_background_fill"),
    ("checkbox_label_text_color_selected", "checkbox_label_background_fill_selected"),
])  # fmt: skip
def test_gradios_own_parts_have_contrast_too(text, surface, dark):
    theme = build_theme()
    colours = [theme._get_computed_value(name + dark) for name in (text, surface)]
    named = {"white": "#ffffff", "black": "#000000"}
    assert contrast(*(named.get(colour, colour) for colour in colours)) >= 4.5, colours


def test_the_page_asks_no_other_host():
    theme = build_theme()
    assert theme._stylesheets == [] and theme._font_css == []
    for source in (build_css(), theme._get_theme_css(), *SCRIPTS.values(), *STYLES.values()):
        assert not re.search(r"(?<!xmlns=')https?://", source)
        assert "@import" not in source
