"""Recordings and saved answers from anybody: refused in one line that names the file and no place, or made harmless."""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from browser_support import ROOT
from test_events import EXAMPLES, HEADER, STEP, changed, lines_of
from test_handlers import Page, report, section_of, words

from llmq.errors import UserError
from llmq.events import Run
from llmq.files import parse_json
from llmq.labs import load_answer, save_answer
from llmq.labs.outliers import ReportAnswer
from llmq.stored import MOST_BYTES, from_stored, to_stored
from llmq.ui.tabs.compare_tab import MOST_TOKENS
from llmq.ui.tabs.compare_view import recording_of

RECORDED = (ROOT / "assets" / "runs" / "demo-paris-cpu-lean.jsonl").read_text(encoding="utf-8").split("\n")
DEEP = "[" * 100_000
MANY = [changed(STEP, index=number) for number in range(MOST_TOKENS + 1)]
LATE = [changed(lines_of(EXAMPLES[0])[1], time=1.5 * number) for number in range(3000)]
HOSTILE = {
    "deep": ([RECORDED[0], DEEP], "line 2: not JSON .*nested too deep"),
    "deep inside a header": ([HEADER.replace("{}", DEEP, 1)], "line 1: not JSON"),
    "a huge integer": ([RECORDED[0], STEP.replace('"index": 0', f'"index": {10**400}')], "line 2: not JSON"),
    "a huge integer in the settings": ([RECORDED[0].replace('"max_new_tokens": ', '"max_new_tokens": 9' + "0" * 400)],
                                       "line 1: not JSON"),
    "not a number": ([RECORDED[0], STEP.replace("1.0", "NaN")], "line 2: not JSON .*NaN is no number"),
    "infinite": ([RECORDED[0], STEP.replace("1.0", "-Infinity")], "line 2: not JSON .*-Infinity is no number"),
    "too large a number": ([RECORDED[0], STEP.replace("1.0", "1e300")], "line 2: 'time' must be a number"),
    "more tokens than a run has": ([RECORDED[0], *MANY], "more text than up to 12,288 tokens"),
    "a long text": ([RECORDED[0], *[changed(STEP, text="x" * 600_000)] * 2], "more text than up to 12,288 tokens"),
    "hours": ([RECORDED[0], *LATE], "plays for 1 hours; up to one hour can be played"),
}  # fmt: skip


def opened(tmp_path, lines: list[str]) -> dict:
    """What the page shows of an upload."""
    path = tmp_path / "gradio" / "bad.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    tab = Page().compare
    shown = tab._replay_upload(str(path))[tab.result]
    assert str(tmp_path) not in json.dumps(shown)
    return shown


@pytest.mark.parametrize(("lines", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recording_is_refused_by_name(lines, said, tmp_path, caplog):
    notice = opened(tmp_path, lines)["notice"]
    assert notice.startswith("Not replayed: bad.jsonl") and caplog.records == []
    assert len(notice) < 300 and "\n" not in notice

    assert re.search(said, notice), notice


def test_a_lone_surrogate_is_a_question_mark_and_a_pair_is_its_letter(tmp_path):
    """A stream of text cannot carry one: the page heard nothing any more."""
    text = json.dumps("a\ud800b 😀")
    assert "\\ud800" in text and parse_json(text) == "a?b 😀"
    lines = [line.replace('"text": "', '"text": "\\ud800', 1) for line in RECORDED]
    shown = opened(tmp_path, [lines[0].replace('"prompt": "', '"prompt": "\\udfff'), *lines[1:]])
    assert json.dumps(shown, ensure_ascii=False).encode() and shown["asked"]["prompt"].startswith("?")


def test_a_recording_that_breaks_off_is_not_finished():
    cut = [line for line in RECORDED if '"Finished"' not in line]
    last = recording_of(Run.from_lines(cut), "run-1")["frames"][-1]["set"]
    assert last["status"] == "Cut short: a text is not finished."
    whole = recording_of(Run.from_lines(RECORDED), "run-1")["frames"][-1]["set"]
    assert whole["status"] == "Finished."


def test_fifteen_megabytes_are_read_in_a_moment():
    """They took 25 s, in which nobody's click was heard."""
    lines = [RECORDED[0], *[line for line in RECORDED[1:] if line] * 140]
    assert sum(map(len, lines)) > 15_000_000
    started = time.process_time()
    Run.from_lines(lines)
    read = time.process_time() - started
    for line in lines:
        json.loads(line)
    assert read < 12 * (time.process_time() - started - read)  # of what JSON alone takes: 3 to 5 times; it was over 50


def answer_file(tmp_path, change=None) -> str:
    path = tmp_path / "gradio" / "bad.json"
    save_answer(ReportAnswer(report(), threshold=6.0), path)
    if change:
        stored = json.loads(path.read_text())
        change(arrays_in(stored)[0])
        path.write_text(json.dumps(stored))
    return str(path)


def arrays_in(value) -> list:
    if isinstance(value, dict):
        found = value.get("arrays")
        return found if found and isinstance(found[0], dict) else sum(map(arrays_in, value.values()), [])
    return []


def bomb(entry) -> None:
    entry["data"] = base64.b64encode(zlib.compress(bytes(1 << 26))).decode()


HOSTILE_ARRAYS = {
    "a bomb": bomb,
    "a bomb that says so": lambda entry: (bomb(entry), entry.update(dtype="|u1", shape=[MOST_BYTES + 1])),
    "objects": lambda entry: entry.update(dtype="|O8"),
    "records": lambda entry: entry.update(dtype=[["a", "<f4"]]),
    "text": lambda entry: entry.update(dtype="<U8"),
    "a wrong shape": lambda entry: entry.update(shape=[7, 7]),
    "a negative shape": lambda entry: entry.update(shape=[-1, -1]),
    "a shape of text": lambda entry: entry.update(shape="33"),
    "other dimensions": lambda entry: entry.update(shape=[*entry["shape"], 1, 1]),
    "no data": lambda entry: entry.pop("data"),
    "damaged": lambda entry: entry.update(data="AAAA"),
    "not base 64": lambda entry: entry.update(data="ü"),
}


@pytest.mark.parametrize("change", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_a_hostile_array_is_refused_by_name(change, tmp_path, caplog):
    page = Page()
    told = words(page.outliers._open(answer_file(tmp_path, change))[page.outliers.status])
    assert told.startswith("Not opened: bad.json ") and str(tmp_path) not in told and len(told) < 300
    assert caplog.records == []


def test_a_whole_answer_opens(tmp_path):
    page = Page()
    assert page.outliers._open(answer_file(tmp_path))[page.outliers.status]["state"] == "opened"


@dataclass
class Single:
    first: np.ndarray


@pytest.mark.parametrize("dtype", ["<U1", "|V4", "|S4", "|O4", "<M8", "f4,f4", "(2,)<f2"])
def test_an_array_holds_plain_numbers(dtype):
    stored = to_stored(Single(np.zeros(2, "<f4")))
    stored["arrays"][0]["dtype"] = dtype
    with pytest.raises(ValueError, match="an array cannot be of"):
        from_stored(Single, stored)


def test_an_array_is_what_was_stored():
    for array in (np.arange(6, dtype="<f4").reshape(2, 3), np.zeros((0, 3), bool), np.array(5, "<i8")):
        again = from_stored(Single, to_stored(Single(array))).first
        assert again.dtype == array.dtype and np.array_equal(again, array)


@pytest.mark.parametrize(
    "stored",
    [DEEP, '{"kind": ["silencing"]}', '{"kind": "silencing", "results": [{}]}', '{"kind": "silencing", "results": 5}',
     '{"kind": "silencing", "results": [{"name": {}}], "tokens": 1e300, "text": 5}', '{"kind": "outliers"}', "[]",
     f'{{"kind": "silencing", "tokens": {10**400}}}', '{"kind": "agreement", "value": null}'],
)  # fmt: skip
def test_a_hostile_answer_is_refused_by_name(stored, tmp_path):
    path = tmp_path / "gradio" / "bad.json"
    path.parent.mkdir()
    path.write_text(stored)
    page = Page()
    section = section_of(page, "silencing")
    told = words(page.outliers.what_if.opener(section)(str(path))[section.status])
    assert told.startswith("Not opened: bad.json ") and str(tmp_path) not in told
    with pytest.raises(UserError, match="bad.json"):
        load_answer(path)
