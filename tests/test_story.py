"""What the Outliers tab says of a watched run in words, and the words that it explains."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from test_observatory_views import SILENCED, module, report

from llmq.ui.parts.figure import sent
from llmq.ui.parts.glossary import KINDS, TERMS, explained, kinds_explained, spoken_in, term
from llmq.ui.parts.story import asked_of, headline, loudest_line, silenced, watched_line
from llmq.ui.parts.words import words_script


def streamed(peak: float = 31.6):
    """A report with a stream of 16 channels, number 3 loudest."""
    absmax = np.full(16, 0.5)
    absmax[3] = peak
    modules = tuple(module(layer, kind, 16, absmax, []) for layer in range(2) for kind in ("q/k/v", "gate/up"))
    return replace(report(), modules=modules)


def test_the_sentence_says_how_many_how_large_and_what_is_kept():
    assert headline(streamed(), 6.0) == (
        "1 of the 16 channels that run through the model reaches 6. The largest number is 31.6, in channel 3; in a "
        "typical channel it is 0.5. "
        "int8 · bitsandbytes keeps 4 of 64 columns (6.2%) in 16 bit, the orange ones."
    )
    assert "0 of the 16 channels that run through the model reach 32" in headline(streamed(), 32)
    assert loudest_line(streamed()) == "The strongest channel here is 3: up to 63.2 times a typical one."


def test_a_method_without_columns_apart_is_not_said_to_keep_any():
    plain = replace(streamed(), method="absmax")
    plain = replace(plain, modules=tuple(replace(m, outlier_columns=None) for m in plain.modules))
    assert "keeps no column in 16 bit; LLM.int8() would keep 4 of 64 columns" in headline(plain, 6.0)


def test_without_a_stream_there_is_still_a_sentence():
    assert headline(replace(report(), modules=()), 6.0).endswith("keep 0 of 0 columns (0%), the orange ones.")
    assert loudest_line(replace(report(), modules=())) == ""


@pytest.mark.parametrize(("method", "settings"), [
    ("fp16", "SmolLM2-135M (demo) · FP16"), ("bnb-int8@3", "SmolLM2-135M (demo) · int8 · bitsandbytes, threshold 3"),
    ("int9", "SmolLM2-135M (demo) · int9"),
])  # fmt: skip
def test_what_was_asked_in_one_line(method, settings):
    assert asked_of("demo", method, "Hello") == {"prompt": "Hello", "settings": settings}
    assert watched_line(replace(report(), stopped=True)).startswith("Stopped early: 1 prompt tokens")


def test_silencing_is_told_before_and_after():
    rows = [SILENCED[0], SILENCED[1] | {"perplexity": 12618.8, "text": "4-a"}]
    assert silenced(rows) == {
        "change": ["10", "12,619"],
        "texts": [["With every channel", "a"], ["Without channel 5", "4-a"]],
    }
    assert silenced(SILENCED[:1]) == {}
    assert silenced([rows[0], rows[1] | {"perplexity": math.inf, "text": ""}]) == {
        "change": ["10", "beyond measure"],
        "texts": [["With every channel", "a"]],
    }


def test_text_is_text_but_for_what_is_strong_or_code():
    assert explained("<b>a</b> & **b** of `c=1`") == (
        '<p class="llmq-explained">&lt;b&gt;a&lt;/b&gt; &amp; <strong>b</strong> of <code>c=1</code></p>'
    )
    assert term("o", 'a "b"') in kinds_explained().replace(KINDS["o"], "a &quot;b&quot;")


def test_every_word_has_a_short_line_and_is_found_by_itself():
    """Two lines of a tooltip: nobody reads more while pointing at a word."""
    for name, says in TERMS.items():
        assert len(says) <= 150 and says.endswith("."), name
        assert spoken_in([f"a {name}, here"], "") == [name], name


def test_a_part_of_a_name_is_no_word():
    assert spoken_in(["Tokens (KL, in nats)", "LLM.int8() is bnb-int8", "abnormal first-token"], "") == [
        "token",
        "KL",
        "nat",
    ]


def test_what_a_picture_alone_says_stands_under_its_title():
    axes = {f"{axis}axis": {"title": {"text": text}} for axis, text in (("x", "tok/s"), ("y", "KL"))}
    layout = {"title": {"text": "KL by layer"}, "margin": {"t": 9}, **axes}
    picture = go.Figure([{"name": "int8 · ours"}, {"name": "a weight", "showlegend": False}], layout)
    assert sent(picture)["words"] == "int8 · tok/s"


def test_the_script_knows_every_word():
    script = words_script()
    assert "__" not in script and all(f'"{name.lower()}": ' in script for name in ("KL", "tok/s", "input of down"))
