"""Figures, values and files of the observatory: exactly the findings, nothing that runs, nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from colours import rgb

from llmq.errors import UserError
from llmq.figures import bars, heatmaps, lines
from llmq.figures.blocks import Drawing
from llmq.figures.pages import page
from llmq.figures.palette import DARK, LIGHT, STEPS
from llmq.formatting import plain_json
from llmq.inspect.agreement import Agreement, Drift, Guess, TokenAgreement
from llmq.inspect.cause import Cause, LayerError, Patch
from llmq.inspect.emergence import emergence
from llmq.inspect.report import (
    THRESHOLDS,
    ModuleOutliers,
    OutlierReport,
    PhaseStatistics,
    PromptPositions,
    StreamPeak,
    TokenMap,
)
from llmq.labs import lab_classes, load_answer, save_answer
from llmq.labs.agreement import Read, Reading, drift_line
from llmq.labs.cause import CauseAnswer, cause_line, patch_rows
from llmq.labs.outliers import ReportAnswer, account_line

EVIL = '<script>alert(1)</script>&"'
LARGEST_VIEW = 300_000


def module(layer: int, kind: str, width: int, absmax: np.ndarray, steps, *, sent=True) -> ModuleOutliers:
    counts = np.array([(absmax >= t).sum() for t in THRESHOLDS])
    prefill = PhaseStatistics(absmax.astype(np.float32), counts, width * 4)
    found = tuple((np.array(c, np.int32), np.array(v, np.float32)) for c, v in steps)
    own = (np.flatnonzero(absmax >= 6).astype(np.int32), *(c[v >= 6] for c, v in found)) if sent else None
    cells = TokenMap(absmax[None].astype(np.float32), np.arange(width)[None], np.zeros((1, width), int), 1, 1, 0, 1)
    return ModuleOutliers(
        f"model.layers.{layer}.{kind}", kind, layer, width, True, "float16", 2.0, prefill, prefill, found, cells,
        PromptPositions((absmax >= 6).astype(np.int32), np.array([True])), own,
    )  # fmt: skip


def report(layers: int = 3, width: int = 16, steps: int = 2, over: int = 2) -> OutlierReport:
    absmax = np.ones(width)
    absmax[:over] = 10.0
    decoded = [([1, 3], [7.0, 3.0])] * steps
    modules = tuple(module(layer, "down", width, absmax, decoded) for layer in range(layers))
    stream = tuple(StreamPeak(layer, absmax.astype(np.float32), np.zeros(width, int)) for layer in range(layers))
    return OutlierReport("demo", "bnb-int8", 6.0, 1, steps, [EVIL] * (1 + steps), modules, stream)


def read(tokens: int = 4) -> Read:
    guesses = tuple(Guess(number, 0.5 / (number + 1)) for number in range(5))
    rows = tuple(
        TokenAgreement(i, i, 0.05 * i, 1 + i % 2, (-1.0, -2.0), guesses, guesses[::-1]) for i in range(1, tokens)
    )
    found = Agreement(tuple(range(tokens)), rows, 2, Drift((1, 2), (1, 3), 1, (0.5, 0.25)))
    return Read(Reading(prompt="x"), found, {i: f"{EVIL}{i}\n" for i in range(max(tokens, 10))})


def cause(patches=True) -> Cause:
    layers = (LayerError(0, 0.01, 40.0, 2, (("down", 7, 12.5),)), LayerError(1, math.inf, -math.inf, 0, ()))
    tried = (Patch("model.layers.0.a", 5, 0.5, True), Patch("model.layers.1.b", 6, -0.25, False))
    return Cause(2, 5, 6, -0.75, layers, tried if patches else (), False)


def series(figure) -> dict:
    return {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data}


@pytest.mark.parametrize(("moment", "channels"), [(0, [0, 1]), (1, [1]), (2, [1])])
def test_the_columns_of_each_moment_as_layers_and_hooks_have_them(moment, channels):
    found = series(bars.columns_figure(report(), "down", moment, 6.0))
    expected = sorted((channel, str(layer)) for layer in range(3) for channel in channels)
    assert (
        sorted(found["reaches the threshold, as we saw it"]) == sorted(found["kept in 16 bit by the layer"]) == expected
    )
    assert found[None] == [(0, 6), (1, 3), (2, 3)]


def test_another_threshold_moves_the_hooks_and_asks_no_layer():
    found = series(bars.columns_figure(report(), "down", 1, 2.5))
    assert "kept in 16 bit by the layer" not in found
    assert {channel for channel, _ in found["reaches the threshold, as we saw it"]} == {1, 3}
    assert "watch again" in account_line(report(), 2.5)
    assert "All 9 layer calls agree" in account_line(report(), 6.0)


def test_views_of_a_large_model_stay_small():
    """80 layers of 11,008 channels with 1 % outliers, 64 tokens; a text of 512 tokens."""
    large = report(layers=80, width=11008, steps=64, over=110)
    figures = [
        bars.columns_figure(large, "down", 0, 6.0),
        lines.peaks_figure(large),
        lines.features_figure(emergence(large)),
    ]
    assert max(len(figure.to_json()) for figure in figures) < LARGEST_VIEW
    value = read(512).value()
    assert len(json.dumps(value)) < LARGEST_VIEW and len(value["tokens"]) == 511


def test_a_reading_travels_whole():
    value, source = read().value(), read()
    assert [row[0] for row in value["tokens"]] == list(source.texts[1:])
    assert [row[2] for row in value["tokens"]] == [2, 1, 2]
    assert value["tokens"][0][3] == [[f"{EVIL}{n}\n", pytest.approx(0.5 / (n + 1), rel=1e-2)] for n in range(5)]
    assert "token 2" in drift_line(source) and "0.5 and 0.25" in drift_line(source)
    assert json.loads(json.dumps(source.to_json(), allow_nan=False))["tokens"][1]["rank"] == 1


def test_a_cause_names_the_repair_and_what_is_not_finite_is_left_out():
    assert "With only model.layers.0.a in 16 bit" in cause_line(cause(), read())
    assert [row[3] for row in patch_rows(cause(), read())] == ["yes", "no"]
    plain = json.loads(json.dumps(plain_json(CauseAnswer(cause(), read()).to_json()), allow_nan=False))
    assert plain["repairs"] == ["model.layers.0.a"] and plain["layers"][1]["sqnr_db"] is None
    assert series(bars.layer_error_figure(cause()))["SQNR of the output"] == [(0, 40.0), (1, None)]
    assert "nothing to repair" in cause_line(Cause(2, 5, 5, 0.0, ()), read())


def test_an_infinite_divergence_is_shown_and_stored():
    """One method excludes what the other holds possible: nothing to crash on, in the browser, in a file or in JSON."""
    source = read()
    rows = (replace(source.agreement.tokens[0], kl=math.inf), *source.agreement.tokens[1:])
    source = replace(source, agreement=replace(source.agreement, tokens=rows))
    assert [row[1] for row in source.value()["tokens"]] == [None, 0.1, 0.15]
    assert "KL inf nats" in page(source.title, source.blocks())
    assert json.loads(json.dumps(plain_json(source.to_json()), allow_nan=False))["tokens"][0]["kl"] is None


class Page(HTMLParser):
    """What a browser would run or fetch, and the text it would show."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.shown, self.scripts, self._skip = [], [], 0, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value]
        self._skip = tag in ("script", "style")
        self.scripts += tag == "script"

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if not self._skip:
            self.shown.append(data)


SILENCED = [
    {"silenced": "none", "count": 0, "channels": [], "perplexity": 10.0, "kl_to_fp16": 0.0, "text": "a"},
    {"silenced": "strongest", "count": 1, "channels": [5], "perplexity": math.inf, "kl_to_fp16": 9.0, "text": EVIL},
    {"silenced": "random", "count": 1, "channels": [3], "perplexity": 10.5, "kl_to_fp16": 0.1, "text": "b"},
]
RESULT = {
    "kind": "silencing",
    "model": EVIL,
    "device": "cpu",
    "text": "x",
    "tokens": 3,
    "stopped": False,
    "results": SILENCED,
}


answers = pytest.mark.parametrize(("make", "figures"), [
    (lambda: ReportAnswer(report(), 6.0), 5),
    (read, 0),
    (lambda: CauseAnswer(cause(), read()), 1),
    (lambda: lab_classes()["silencing"].restore(RESULT), 1),
], ids=["outliers", "agreement", "cause", "experiment"])  # fmt: skip


@answers
def test_a_page_needs_nothing_else_and_runs_no_ones_text(make, figures):
    text = page(make().title, make().blocks())
    seen = Page(text)
    assert seen.fetched == [], "it fetches nothing"
    assert EVIL not in text
    assert any(EVIL[:20] in shown for shown in seen.shown), "the text is shown as text"
    assert text.count('<script type="application/json">') == figures
    assert bool(figures) == ("plotly.js v" in text), "plotly comes once, where it is needed"


@answers
def test_an_answer_is_read_without_plotly(make, figures, monkeypatch):
    """Figures are drawn for whoever looks at them: a terminal shows and keeps answers on a machine without plotly."""
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    drawings = [block for block in make().blocks() if isinstance(block, Drawing)]
    assert len(drawings) == figures
    for drawing in drawings:
        with pytest.raises(ImportError):
            drawing.make()


def figure_of(kind: str, rows: list[dict]):
    return lab_classes()[kind].figures(rows)[0].make()


def every_figure() -> dict:
    amplified = [{"method": m, "factor": f, "perplexity": 9.0 + f} for m in "abcd" for f in (1, 4)]
    speed = {"tokens_per_second": 5.0, "tokens_per_second_min": 4.0, "tokens_per_second_max": 6.0}
    moved = [{"threshold": name, "perplexity": 9.0, "outlier_share": 0.01, **speed} for name in ("off", "6")]
    shares = {"layers_touched": 0.5, "positions_touched": 0.1}
    swept = [{"model": EVIL, "parameters": n, "perplexity": 9.0, **shares} for n in (10, 100)]
    found = report()
    return {
        "columns": bars.columns_figure(found, "down", 1, 6.0),
        "layer errors": bars.layer_error_figure(cause()),
        "peaks": lines.peaks_figure(found),
        "features": lines.features_figure(emergence(found)),
        "silencing": figure_of("silencing", SILENCED),
        "amplifying": figure_of("amplifying", amplified),
        "thresholds": figure_of("thresholds", moved),
        "sweep": figure_of("sweep", swept),
        "map": heatmaps.map_figure(found, "down", "prefill", 6.0),
        "tokens": heatmaps.token_figure(found, "down", 1, 6.0),
    }


def test_a_figure_names_its_colours_and_both_palettes_know_them():
    assert LIGHT.keys() == DARK.keys()
    for name, figure in every_figure().items():
        drawn = figure.to_json()
        used = set(re.findall(r"var\(--llmq-([\w-]+)\)", drawn))
        assert {"ink", "surface"} <= used <= LIGHT.keys(), name
        assert not re.search(r'"#[0-9a-fA-F]{3,8}"|rgba?\((?!0,0,0,0\))', drawn), f"{name} has a colour of its own"


@pytest.mark.browser
def test_a_written_page_follows_the_readers_theme(browser, tmp_path):
    """Both palettes travel in the file; turning the reader's screen dark paints the figures again."""
    path = tmp_path / "out.html"
    path.write_text(
        page(EVIL, [Drawing(lambda figure=figure: figure) for figure in every_figure().values()]), encoding="utf-8"
    )
    shown = browser.new_page(color_scheme="dark")
    errors = []
    shown.on("pageerror", lambda error: errors.append(error))
    shown.goto(path.as_uri())
    for scheme, palette in (("dark", DARK), ("light", LIGHT)):
        shown.emulate_media(color_scheme=scheme)
        shown.wait_for_function(
            "([count, ink]) => { const axes = [...document.querySelectorAll('.figure .xtitle')];"
            " return axes.length >= count && axes.every(axis => getComputedStyle(axis).fill === ink); }",
            arg=[len(every_figure()), rgb(palette["ink"])],
        )
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(palette["surface"])
        scale = shown.evaluate("[...document.querySelectorAll('.figure')].at(-1).data[0].colorscale.map(s => s[1])")
        assert scale == [palette[f"under-{i}"] for i in (0, *range(STEPS))] + [
            palette[f"over-{i}"] for i in range(STEPS)
        ]
    assert not errors
    shown.close()


def test_rows_and_findings_of_every_kind():
    silencing, ablation = lab_classes()["silencing"], lab_classes()["ablation"]
    cells = [silencing.row(row) for row in SILENCED]
    assert cells[1][2] == "beyond measure" and len(cells[0]) == len(silencing.headers())
    assert plain_json(RESULT)["results"][1]["perplexity"] is None
    finite = [SILENCED[0], SILENCED[1] | {"perplexity": 110.0}, SILENCED[2]]
    assert silencing.finding(finite) == (
        "Without channel 5 perplexity goes from 10 to 110; without a random channel to 10.5 (median of the draws)."
    )
    rows = [
        {"name": n, "method": "m", "perplexity": p, "kl_to_fp16": 0.0, "top1_agreement": 1.0}
        for n, p in (("W32A32", 10.0), ("W8A32", 10.5), ("W32A8", 20.0))
    ]
    assert "the activations that break naive 8 bit, not the weights" in ablation.finding(rows)
    rows[1]["perplexity"], rows[2]["perplexity"] = 20.0, 10.5
    assert "the weights that break naive 8 bit, not the activations" in ablation.finding(rows)


def infinite() -> Read:
    source = read()
    rows = (replace(source.agreement.tokens[0], kl=math.inf), *source.agreement.tokens[1:])
    return replace(source, agreement=replace(source.agreement, tokens=rows))


@pytest.mark.parametrize("make", [
    lambda: ReportAnswer(report(), 6.0),
    read,
    infinite,
    lambda: CauseAnswer(cause(), read()),
    lambda: lab_classes()["silencing"].restore(RESULT),
], ids=["outliers", "agreement", "infinite", "cause", "experiment"])  # fmt: skip
def test_a_saved_answer_is_the_same_answer_again(make, tmp_path):
    """The same page to the byte, every figure and table included, and the same JSON: no model is needed for either."""
    path, answer = tmp_path / "answer.json", make()
    save_answer(answer, path)
    again = load_answer(path)
    assert type(again) is type(answer) and again.kind == answer.kind
    assert page(again.title, again.blocks()) == page(answer.title, answer.blocks())
    assert plain_json(again.to_json()) == plain_json(answer.to_json())


def test_every_number_of_a_saved_report_comes_back():
    source = report(layers=2)
    restored = lab_classes()["outliers"].restore(json.loads(json.dumps(ReportAnswer(source, 6.0).stored()))).report
    for one, other in zip(source.modules, restored.modules, strict=True):
        assert np.array_equal(one.prefill.absmax, other.prefill.absmax) and one.prefill.absmax.dtype == np.float32
        assert [c.tolist() for c in one.outlier_columns] == [c.tolist() for c in other.outlier_columns]
        assert [(c.tolist(), v.tolist()) for c, v in one.decode_steps] == [
            (c.tolist(), v.tolist()) for c, v in other.decode_steps
        ]
    assert restored.token_texts == source.token_texts and restored.stream[1].layer == 1


@pytest.mark.parametrize("content", [
    "", "{", "[]", '{"kind": "nothing"}', '{"kind": "silencing"}', '{"kind": "outliers", "threshold": 6, "report": 5}',
    '{"kind": "outliers", "threshold": 6, "report": {"arrays": [], "value": {"model": 5}}}',
    '{"kind": "outliers", "report": {"arrays": [{"dtype": "<f4", "shape": [1], "data": "AAAA"}], "value": {}}}',
    '{"kind": "agreement", "stored": {"question": {}}}', '{"kind": "cause", "cause": {"arrays": [], "value": []}}',
])  # fmt: skip
def test_a_file_that_is_no_answer_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "answer.json"
    path.write_text(content)
    with pytest.raises(UserError, match="answer.json") as caught:
        load_answer(path)
    assert len(str(caught.value).splitlines()) == 1
