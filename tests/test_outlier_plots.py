"""Figures say exactly what they were given: numbers, channels, tokens as text, and where the threshold is."""

import base64
import json

import numpy as np
import pytest
from colours import contrast, luminance, painted

from llmq.figures.heatmaps import layer_channel_figure, token_channel_figure
from llmq.figures.palette import DARK, LIGHT
from llmq.figures.style import escape


def numbers(spec):
    """A plotly array as sent to the browser: base64 of a typed array."""
    flat = np.frombuffer(base64.b64decode(spec["bdata"]), dtype=spec["dtype"])
    return flat.reshape([int(n) for n in spec["shape"].split(",")])


def sent(figure):
    return json.loads(figure.to_json())


def pooled(layers, channels, cells=512, seed=0):
    """(values, channels) as `layer_channel_map` makes them."""
    width = channels // cells
    x = np.abs(np.random.default_rng(seed).standard_normal((layers, cells, width))).astype(np.float32) * 3
    best = x.argmax(2)
    return x.max(2), (best + np.arange(cells) * width).astype(np.int32)


@pytest.mark.parametrize("layers", [32, 80])
def test_payload_of_a_large_model_is_small(layers):
    values, channels = pooled(layers, 4096)
    assert len(layer_channel_figure(values, channels, 6.0, "down, prefill").to_json()) <= 150_000


def test_payload_of_the_largest_token_map_is_small():
    values, channels = pooled(128, 11008, cells=256)
    tokens = np.arange(128, dtype=np.int32)[:, None] * 16 + np.zeros_like(channels)
    texts = ["<token>"] * 2048
    figure = token_channel_figure(values, channels, tokens, texts, 6.0, "layer 3", width=43, height=16)
    assert len(figure.to_json()) <= 150_000


def test_hover_shows_the_exact_channel_and_value_of_each_cell():
    values, channels = pooled(32, 4096)
    values[5, 316] = 22547.0
    heatmap = sent(layer_channel_figure(values, channels, 6.0, "t", layers=list(range(31)) + [None], width=8))["data"][
        0
    ]
    assert np.array_equal(numbers(heatmap["z"]), values)
    assert np.array_equal(numbers(heatmap["customdata"]), channels)
    assert "channel %{customdata}<" in heatmap["hovertemplate"] and "|x| %{z:" in heatmap["hovertemplate"]
    assert heatmap["y"] == [str(n) for n in range(31)] + ["head"]
    assert (heatmap["x0"], heatmap["dx"]) == (3.5, 8)


def test_cells_merged_for_size_keep_maximum_channel_and_token():
    values, channels = pooled(80, 4100, cells=410)
    tokens = np.random.default_rng(1).integers(0, 3, values.shape).astype(np.int32) + np.arange(80)[:, None] * 3
    figure = token_channel_figure(values, channels, tokens, ["a"] * 240, 6.0, "t", width=10, height=3)
    heatmap = sent(figure)["data"][0]
    z, where, at = (numbers(heatmap[key]) for key in ("z", "customdata", "text"))
    factor = heatmap["dx"] // 10
    assert factor > 1 and z.shape == (80, -(-410 // factor))
    for cell in range(z.shape[1]):
        part = slice(cell * factor, (cell + 1) * factor)
        best = values[:, part].argmax(1)[:, None]
        for merged, whole in ((z, values), (where, channels), (at, tokens)):
            assert np.array_equal(merged[:, cell], np.take_along_axis(whole[:, part], best, 1)[:, 0])


def test_width_is_found_from_the_channels_when_it_is_not_given():
    values, channels = pooled(8, 1024, cells=64)
    assert sent(layer_channel_figure(values, channels, 6.0, "t"))["data"][0]["dx"] == 16


def test_channels_beyond_int16_survive():
    heatmap = sent(layer_channel_figure(np.ones((1, 1)), np.array([[40_000]]), 6.0, "t", width=50_000))["data"][0]
    assert numbers(heatmap["customdata"]).tolist() == [[40_000]]


def test_layers_that_did_not_run_are_gaps_and_infinity_is_clipped():
    values = np.array([[np.nan, np.nan], [np.inf, 3.0]], np.float32)
    heatmap = sent(layer_channel_figure(values, np.array([[0, 1], [0, 1]]), 6.0, "t"))["data"][0]
    z = numbers(heatmap["z"])
    assert np.isnan(z[0]).all() and np.isfinite(z[1]).all() and z[1, 0] > 1e38
    assert heatmap["zmax"] == 60


def test_tokens_and_titles_are_text_and_not_markup():
    texts = ["<b>", "</b>", "<a href='javascript:x'>", "&lt;", "$x$", "\n", "\u202e"]
    cells = np.ones((7, 1), np.float32)
    zero = np.zeros((7, 1), np.int32)
    rows = np.arange(7, dtype=np.int32)[:, None]
    figure = sent(token_channel_figure(cells, zero, rows, texts, 6.0, "<i>T</i>"))
    labels = figure["data"][0]["y"]
    assert labels[0] == "0 &lt;b&gt;" and labels[3] == "3 &amp;lt;" and labels[4] == "4 &#36;x&#36;"
    assert labels[5] == "5 ⏎" and "\u202e" not in labels[6]
    assert not any(c in "".join(labels) for c in "<>$\n")
    assert figure["layout"]["title"]["text"] == "&lt;i&gt;T&lt;/i&gt;"


def test_equal_tokens_keep_their_own_rows():
    values, channels, tokens = (np.ones((4, 1)), np.zeros((4, 1), int), np.arange(4)[:, None] * 2)
    heatmap = sent(token_channel_figure(values, channels, tokens + 3, [" the"] * 10, 6.0, "t", height=2, first_token=3))
    assert heatmap["data"][0]["y"] == ["3–4  the the", "5–6  the the", "7–8  the the", "9  the"]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("threshold", [0.5, 2.0, 6.0, 6.1, 20.0])
@pytest.mark.parametrize("peak", [0.05, 6.0, 22547.0])
def test_the_scale_breaks_at_the_threshold_and_lightness_runs_one_way(threshold, peak, palette):
    values = np.array([[0.0, peak]], np.float32)
    heatmap, bar = painted(layer_channel_figure(values, np.array([[0, 1]]), threshold, "t"), palette)["data"]
    stops = [(position * heatmap["zmax"], color) for position, color in heatmap["colorscale"]]
    positions = [position for position, _ in heatmap["colorscale"]]
    assert positions[0] == 0 and positions[-1] == 1 and positions == sorted(positions)
    under = [color for value, color in stops if value < threshold * (1 - 1e-9)]
    assert any(threshold * 0.99999 < value < threshold * (1 - 1e-9) for value, _ in stops), "no sharp break"
    over = [color for value, color in stops if value >= threshold * (1 - 1e-9)]
    light = [luminance(color) for color in under + over]
    assert light == sorted(light, reverse=palette is LIGHT)
    assert contrast(under[-1], over[0]) > 1.6, "the break must show without colour"
    blue, orange = (tuple(int(c[i : i + 2], 16) for i in (1, 5)) for c in (under[-1], over[0]))
    assert blue[1] > blue[0] and orange[0] > orange[1]
    scale = bar["marker"]["colorscale"]
    assert [color for _, color in scale] == under[1:] + over, "the colour bar must show the heatmap's colours"
    assert [p for p, _ in scale] == sorted(p for p, _ in scale) and (scale[0][0], scale[-1][0]) == (0, 1)


def test_the_color_bar_names_the_threshold_and_powers_of_ten():
    values = np.array([[0.0, 300.0]], np.float32)
    bar = sent(layer_channel_figure(values, np.array([[0, 1]]), 6.0, "t"))["data"][1]["marker"]["colorbar"]
    assert bar["ticktext"] == ["0.1", "1", "<b>6 threshold</b>", "10", "100"]
    assert np.allclose(bar["tickvals"], np.log10([0.1, 1, 6, 10, 100]))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_light_and_dark_pages(palette):
    layout = painted(layer_channel_figure(np.ones((1, 1)), np.zeros((1, 1), int), 6.0, "t"), palette)["layout"]
    assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert all(contrast(layout["font"]["color"], palette[under]) >= 4.5 for under in ("page", "surface"))
    assert contrast(layout["hoverlabel"]["font"]["color"], layout["hoverlabel"]["bgcolor"]) >= 4.5


def test_escape_leaves_ordinary_text_alone():
    assert escape('Paris, 4½ «jours» "là" it\'s 日本') == 'Paris, 4½ «jours» "là" it\'s 日本'
