"""What `tables --check` finds wrong, each broken by hand: results unshown, captions incomplete, figures not stored."""

from __future__ import annotations

import copy
import json

import pytest
from test_tables import CONDITIONS, result, speed

from llmq.bench import checks, speed_tables, tables
from llmq.bench.checks import plain

TABLE = "<!-- table:one -->\n<!-- /table -->\n"
FAST = "<!-- from one: tokens_per_second of fast / fp16 -->"


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Check a README with this text and these results, its tables drawn; returns what is wrong."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()

    def check(text: str, **results: dict) -> list[str]:
        for name, stored in results.items():
            (tmp_path / "results" / f"{name}.json").write_text(json.dumps(stored))
        return list(tables.faults({"README.md": tables.filled(text)}))

    return check


def stored() -> dict:
    rows = speed("fp16", 99, 100, 101, over_fp16=1.0, share=0.174), speed("fast", 168, 170, 172, over_fp16=1.7)
    return result("decode", *rows, speed("wide", 100, 200, 300, over_fp16=2.0), speed("twin", 1, 1, 1, mode="eager"))


def test_what_holds_is_not_found_wrong(documents, tmp_path, monkeypatch, capsys):
    text = f"{TABLE}It runs {FAST}1.70 times as fast."
    assert documents(text, one=stored()) == []
    for name in tables.DOCUMENTS:
        (tmp_path / name).write_text(tables.filled(text))
    assert tables.main(["--check"]) == 0
    (tmp_path / "README.md").write_text(tables.filled(text).replace("1.70", "1.71"))
    assert tables.main(["--check"]) == 1
    assert "README.md: '1.71 times as fast.' after 'from one: tokens_per_second of fast / fp16': stored is 1.70\n" in (
        capsys.readouterr().out
    )


def test_a_result_that_no_table_shows_is_found(documents):
    assert documents(TABLE, one=stored(), two=stored()) == ["no table shows two.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a {FAST}1.70 times", ""),
        (f"a {FAST}1.7 times", ""),
        (f"a {FAST}1.69 times", "stored is 1.70"),
        (f"a {FAST}fast", "write 'from FILE: KEY of ROW' in front of a number"),
        (f"{FAST}1.70 times", "its comment begins a line"),
        (f"- a\n  {FAST}1.70 times", "its comment begins a line"),
        ("a <!-- from one: share of fp16 -->17 % of it", ""),
        ("a <!-- from one: share\nof fp16 -->17.4 % of it", ""),
        ("a <!-- from one: share of fp16 -->18 % of it", "stored is 17 %"),
        ("a <!-- from one: weight_bytes of fp16 -->1,000,000 bytes", ""),
        ("a <!-- from one: weight_bytes of fp16 -->1,000,001 bytes", "stored is 1,000,000"),
        ("a <!-- from one: over_fp16 of wide -->2.00 times", "its rounds lie far apart: say 'spread 100 %' behind it"),
        ("a <!-- from one: over_fp16 of wide -->2.00 times (spread 100 %)", ""),
        ("a <!-- from one: tokens_per_second of wide -->200, spread 99 %", "say 'spread 100 %'"),
        ("a <!-- from one: tokens_per_second of twin,eager -->1", ""),
        ("a <!-- from one: tokens_per_second of twin,compiled -->1", "0 rows are twin,compiled"),
        ("a <!-- from one: tokens_per_second of twin,0.5 -->1", "0 rows are twin,0.5"),
        ("a <!-- from one: share of fp16,0.174 -->17 % of it", ""),
        ("a <!-- from one: joules of fp16 -->1", "nothing of that name is stored ('joules')"),
        ("a <!-- from none: share of fp16 -->1", "nothing of that name is stored"),
        ("a <!-- from one share -->1", "write 'from FILE: KEY of ROW'"),
    ],
)
def test_a_marked_figure_is_the_stored_one(text, said, documents):
    found = documents(TABLE + text, one=stored())
    assert bool(found) == bool(said) and all(said in fault for fault in found)


def test_a_name_that_two_rows_have_is_refused(documents):
    rows = [speed("twin", 1, 1, 1, mode=mode) for mode in ("eager", "compiled")]
    found = documents(f"{TABLE}a <!-- from one: tokens_per_second of twin -->1", one=result("decode", *rows, *fp16()))
    assert len(found) == 1 and "2 rows are twin" in found[0]


def fp16() -> tuple[dict]:
    return (speed("fp16", 1, 1, 1),)


@pytest.mark.parametrize(
    ("drawn", "left_out"),
    [
        ("prompt_tokens", "prompt_tokens 64"),
        ("new_tokens", "new_tokens 32"),
        ("repeats", "repeats 5"),
        ("device_name", "device_name Abacus"),
        ("date", "date 2026-11-22"),
    ],
)
def test_a_caption_that_leaves_something_out_is_found(drawn, left_out):
    said = {"prompt_tokens": "64 prompt tokens", "new_tokens": "32 new tokens", "repeats": "median of 5 runs"}
    said |= {"device_name": "Abacus", "date": "2026-11-22"}
    whole = "| a | b |\n|---|---|\n| 64 | 32 | 5 |\n\n"
    assert list(checks.incomplete_caption("t", whole + ", ".join(said.values()), {"one": stored()})) == []
    rest = ", ".join(text for name, text in said.items() if name != drawn)
    expected = [f"table t: its caption does not say {left_out} of one.json"]
    assert list(checks.incomplete_caption("t", whole + rest, {"one": stored()})) == expected


def test_a_joined_caption_speaks_of_every_file_and_numbers_of_dates_and_versions_are_none():
    other = copy.deepcopy(stored())
    other["conditions"] = CONDITIONS | {"repeats": 9, "new_tokens": 22}
    caption = "| a |\n\nAbacus, 2026-11-22, torch 2.9, commit 9ab22cd, 64 prompt tokens, 32 new tokens, 5 runs"
    found = list(checks.incomplete_caption("t", caption, {"one": stored(), "other": other}))
    assert found == [
        f"table t: its caption does not say {what} of other.json" for what in ("new_tokens 22", "repeats 9")
    ]


def test_every_table_of_the_documents_has_its_caption_looked_at(documents, monkeypatch):
    monkeypatch.setattr(speed_tables, "length", lambda conditions: "64 prompt tokens")
    assert documents(TABLE, one=stored()) == ["table one: its caption does not say new_tokens 32 of one.json"]


def test_a_caption_edited_in_the_document_is_out_of_date(documents):
    assert documents(TABLE, one=stored()) == []
    edited = tables.filled(TABLE).replace("median of 5 runs", "median of 50 runs")
    assert list(tables.faults({"README.md": edited})) == ["out of date: README.md"]


def test_a_reader_sees_no_marks():
    assert plain(f"runs {FAST}1.70 times.\n<!-- table:one -->") == "runs 1.70 times.\n<!-- table:one -->"
