"""The chart of README: a bar a row, on one scale, and stale when a stored result is another."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from test_tables import CONDITIONS, result, speed

from llmq.bench import chart, tables
from llmq.figures.palette import DARK, LIGHT


def test_a_chart_has_a_bar_a_row_on_one_scale_and_says_how_it_was_measured():
    slow = result("decode", speed("bnb-int8@0", 80, 100, 120), speed("fp16", 100, 100, 100))
    fast = result("decode", speed("llm-int8", 300, 300, 400))
    fast |= {"conditions": CONDITIONS | {"new_tokens": 200}}
    light, dark = (chart.speed_chart(side, {"theirs": slow, "ours <7B>": fast}) for side in chart.SIDES)
    assert re.findall(r'width="([\d.]+)" height="17" fill="(.*?)"', light) == [
        ("47.5", LIGHT["line-1"]),
        ("47.5", LIGHT["line-0"]),
        ("142.5", LIGHT["line-1"]),
    ]
    said = [element.text for element in ElementTree.fromstring(light).iter("{http://www.w3.org/2000/svg}text")]
    assert said[:4] == ["theirs", "int8 · bitsandbytes, threshold 0", "100 tok/s · 1.50 MB, spread 40 %", "FP16"]
    assert said[5:8] == ["ours <7B>", "int8 · ours", "300 tok/s · 1.50 MB, spread 33 %"]
    assert said[8].startswith("Abacus, 2026-11-22.")
    assert said[9].startswith("Decode, batch 1: 64 prompt tokens, then 32, 200 new,")
    assert DARK["ink"] in dark and LIGHT["ink"] not in dark


def test_the_notes_of_the_stored_chart_fit_its_width():
    texts = ElementTree.parse(tables.ROOT / next(iter(tables.CHARTS))).iter("{http://www.w3.org/2000/svg}text")
    notes = [text.text for text in texts if text.get("font-size") == "12"]
    letter = 6.2  # pixels, in the widest of its fonts
    assert len(notes) == 3 and max(map(len, notes)) * letter < chart.WIDTH


def test_a_chart_that_a_document_names_is_drawn_and_found_stale(tmp_path, monkeypatch):
    drawn, *_ = tables.CHARTS
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "_speeds_of_7b", lambda: {"a": result("decode", speed("fp16", 1, 2, 3))})
    (tmp_path / drawn).parent.mkdir()
    assert list(tables.outdated({"README.md": "no chart"})) == []
    texts = {"README.md": f"![speed]({drawn})"}
    ((name, svg),) = tables.outdated(texts)
    assert name == drawn
    (tmp_path / drawn).write_text(svg)
    assert list(tables.outdated(texts)) == []
    (tmp_path / drawn).write_text(svg.replace("2.00 tok/s", "2.01 tok/s"))
    assert f"out of date: {drawn}" in tables.faults(texts)
