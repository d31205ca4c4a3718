"""The race on the tiny model: its quality is the quality lab's, and nothing emulated has a speed."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import pytest
from tiny_runs import light

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.figures.race import _symlog, speeds_figure, trade_off_figure
from llmq.labs import load_answer, save_answer
from llmq.labs.quality import Quality
from llmq.labs.race import FIELD, Race
from llmq.labs.rows import RowAnswer
from llmq.machine.door import Machine
from llmq.methods import METHODS

RUN = "fp16,llm-int8,absmax,gptq"


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def items(tiny_folder, tmp_path_factory):
    race = Race(model=str(tiny_folder), contestants=Contestant.parse_all(RUN), tokens=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMQ_CACHE", str(tmp_path_factory.mktemp("cache")))  # nothing is calibrated yet
        return list(Machine().run(race))


@pytest.fixture(scope="module")
def rows(items) -> dict[str, dict]:
    return {row["method"]: row for row in items[-1].rows}


def test_a_row_comes_as_soon_as_it_is_measured_and_progress_only_grows(items):
    answers = [len(item.rows) for item in items if isinstance(item, RowAnswer)]
    assert answers == [1, 2, 3, 4, 4] and items[-1].done and not items[-1].result["stopped"]
    shares = [item.fraction for item in items if isinstance(item, Progress) and item.fraction is not None]
    assert shares == sorted(shares) and shares[-1] <= 1


def test_an_answer_says_which_command_gives_it(items, tiny_folder):
    said = f"python -m llmq race --model {tiny_folder} --methods {RUN} --tokens 1024 --device cpu"
    assert items[-1].result["conditions"]["command"] == said


def test_quality_is_the_quality_labs_own(rows, tiny_folder):
    asked = Quality(model=str(tiny_folder), contestants=Contestant.parse_all("absmax"), tokens=1024)
    *_, answer = Machine().run(asked)
    (alone,) = (row for row in answer.rows if row["method"] == "absmax")
    names = [name for name in alone if name not in ("engine", "method")]
    assert [rows["absmax"][name] for name in names] == [pytest.approx(alone[name]) for name in names]


def test_bytes_speed_and_calibration(rows, tiny_folder):
    from llmq.models.opening import open_model

    for name, row in rows.items():
        weights = METHODS[name].predict(open_model(str(tiny_folder)).shape, rest="float16")  # fp32 arithmetic or not
        assert row["bytes"] == weights.weights + weights.scales
    assert {name for name, row in rows.items() if row["tokens_per_second"]} == {"fp16", "llm-int8"}
    assert rows["absmax"]["emulated"] and rows["gptq"]["emulated"] and not rows["llm-int8"]["emulated"]
    assert rows["gptq"]["calibration_seconds"] > 0 == rows["absmax"]["calibration_seconds"]
    assert rows["fp16"]["kl_to_fp16"] == 0 == rows["fp16"]["perplexity_change"]
    assert METHODS["fp8"].emulated_on("cpu") and not METHODS["llm-int8"].emulated_on("cpu")


def test_an_answer_is_shown_again_from_its_file(items, tmp_path, rows):
    save_answer(items[-1], tmp_path / "race.json")
    again = load_answer(tmp_path / "race.json")
    assert again.rows == items[-1].rows and list(again.blocks())[0] == Race.finding(items[-1].rows) != ""
    cells = dict(zip(Race.headers(), Race.row(rows["absmax"]), strict=True))
    assert cells["Decode"] == "emulated" and cells["Calibrate"] == "none" and " %" in cells[Race.headers()[1]]
    assert [drawing.make() is not None for drawing in Race.figures(items[-1].rows)] == [True, True]


def test_what_cannot_be_measured_is_missing_and_the_rest_goes_on(tiny_folder, monkeypatch):
    def refuse(self, linear, statistics=None):
        raise BadChoice("it does not suit this layer")

    monkeypatch.setattr(type(METHODS["absmax"]), "quantize", refuse)
    race = Race(model=str(tiny_folder), contestants=Contestant.parse_all("absmax,fp16"), tokens=1024)
    *_, answer = Machine().run(race)
    assert [row["method"] for row in answer.rows] == ["fp16"]
    assert "absmax: not measured: it does not suit this layer" in list(answer.blocks())


def test_a_stopped_race_keeps_its_rows(tiny_folder):
    stop = threading.Event()
    answer = None
    for answer in Machine().run(Race(model=str(tiny_folder), tokens=1024), stop):
        if isinstance(answer, RowAnswer):
            stop.set()
    assert isinstance(answer, RowAnswer) and len(answer.rows) == 1 and answer.result["stopped"]


def measured(name: str, change: float, size: int, *, emulated: bool = False) -> dict:
    return {
        "name": name, "method": name, "engine": "hf", "bytes": size, "perplexity_change": change, "kl_to_fp16": 0.1,
        "perplexity_change_interval": [change - 0.01, change + 0.01], "emulated": emulated,
        "tokens_per_second": None if emulated else 30.0, "fp16_tokens_per_second": 20.0,
    }  # fmt: skip


def test_the_axis_is_logarithmic_only_where_one_method_would_squash_the_rest():
    few = [measured("a", 0.02, 100), measured("b", 0.05, 60, emulated=True)]
    axis = trade_off_figure(few).layout.yaxis
    assert "logarithmic" not in axis.title.text and axis.tickvals is None
    figure = trade_off_figure([*few, measured("absmax", 90.0, 60, emulated=True)])
    assert "logarithmic" in figure.layout.yaxis.title.text and "10,000" in figure.layout.yaxis.ticktext
    real, emulated = figure.data
    assert list(real.y) == [_symlog(2.0)] and list(emulated.y) == [_symlog(5.0), _symlog(9000.0)]
    assert emulated.y[1] + emulated.error_y.array[1] == pytest.approx(_symlog(9001.0))
    assert emulated.y[1] - emulated.error_y.arrayminus[1] == pytest.approx(_symlog(8999.0))
    assert _symlog(-9) == -_symlog(9) == -1 and json.loads(figure.to_json())
    assert list(speeds_figure([measured("a", 0.0, 1)]).data[0].x) == [1.5] and math.isfinite(_symlog(0))


def test_names_stand_where_they_cover_nothing_and_inside():
    rows = [measured("a long name", 0.30, 100), measured("another", 0.31, 100), measured("at the right end", 0.0, 300)]
    (points,) = (series for series in trade_off_figure(rows).data if len(series.x))
    assert dict(zip(points.text, points.textposition, strict=True)) == {
        "a long name": "middle right", "another": "middle left", "at the right end": "middle left",
    }  # fmt: skip
    left, right = trade_off_figure(rows[:1]).layout.xaxis.range
    assert left < 100 / 1e6 < right


def test_the_finding_names_the_smallest_that_is_sure_to_be_near():
    rows = [measured("fp16", 0.0, 200), measured("vectorwise", -0.005, 100), measured("rtn", 0.4, 50)]
    assert Race.finding(rows[:2]) == ""
    said = Race.finding(rows)
    assert said.startswith(
        "The smallest that is sure to cost under 1 % of perplexity is **int8, a scale a row**, 100 B"
    )
    assert "The most costs **rounded to nearest**: +40 %" in said
    assert Race.finding([rows[0], rows[2], replace_change(rows[1], 0.02)]).startswith("None of them is sure")


def replace_change(row: dict, change: float) -> dict:
    return row | {"perplexity_change": change, "perplexity_change_interval": [change - 0.01, change + 0.01]}


def test_the_field_is_of_methods_that_there_are():
    assert len(Contestant.parse_all(FIELD)) == 15 and replace(Race(), tokens=1024).tokens == 1024
    with pytest.raises(BadChoice, match="tokens is 512"):
        Race(tokens=512)
