"""A saved run is the run: every record, every time, whole or not at all; and a bad file says where it is bad."""

from __future__ import annotations

import json
import math
import os

import pytest

from llmq.errors import UserError
from llmq.events import (
    EVENT_TYPES,
    LONGEST_PAUSE,
    Failed,
    Finished,
    Freed,
    Loaded,
    Loading,
    Memory,
    Planned,
    Prefilled,
    Reading,
    Run,
    Step,
    TimedEvent,
    Waiting,
)

EXAMPLES = (
    Waiting(seconds=0.4, position=2),
    Planned(
        schedule="in-turn", reason="too big", prompt_tokens=9, predicted_bytes={"fp16": 5}, free_bytes=7, device="cpu"
    ),
    Loading(contestant="fp16", message="reading <b>weights</b>"),
    Loaded(contestant="fp16", weight_bytes=269_000_000, seconds=1.25, resident=True),
    Prefilled(contestant="fp16", prompt_tokens=9, seconds=0.2),
    Step(contestant="fp16", index=0, token_id=17, text="é 日 👩‍👧", seconds=0.0, logprob=-0.25),
    Memory(at=1.5, process_bytes=1, device_bytes=2, device_process_bytes=3, allocated_bytes=4, peak_allocated_bytes=5),
    Memory(at=1.5, ledger={"fp16": {"weights": 1, "scales": 0, "kv": 2, "workspace": 0}}),
    Freed(contestant="fp16", expected_bytes=10, freed_bytes=9, verified=True),
    Finished(contestant="fp16", reason="length", text="\ufffd", kv_bytes=6, peak_bytes=11),
    Failed(contestant="fp16", message="out of memory"),
    Reading(contestant="fp16", fraction=0.5),
    Step(contestant="fp16", index=1, token_id=17, text="", seconds=0.1, logprob=-0.25, best={"17": 0.7788, "3": 1e-9}),
)
SETTINGS, ENVIRONMENT = {"prompt": "naïve", "sampling": {"seed": 3}}, {"device": "cpu", "commit": None}


def saved_and_loaded(events, folder) -> Run:
    run = Run(dict(SETTINGS), dict(ENVIRONMENT), [TimedEvent(1.5, event) for event in events])
    return Run.load(run.save(folder / "run.jsonl"))


def lines_of(*events) -> list[str]:
    return list(Run({}, {}, [TimedEvent(1.0, event) for event in events]).to_lines())


def test_the_examples_hold_every_type():
    assert {type(event) for event in EXAMPLES} == set(EVENT_TYPES.values())


def test_a_run_comes_back_equal(tmp_path):
    assert saved_and_loaded(EXAMPLES, tmp_path) == Run(SETTINGS, ENVIRONMENT, [TimedEvent(1.5, e) for e in EXAMPLES])


@pytest.mark.parametrize("logprob", [-math.inf, -1e-12, 0.0, -87.5])
def test_log_probabilities_come_back_equal(logprob, tmp_path):
    step = Step(contestant="a", index=3, token_id=1, text="", seconds=1e-7, logprob=logprob)
    assert saved_and_loaded([step], tmp_path).events == [TimedEvent(1.5, step)]


@pytest.mark.parametrize("text", ["a\nb\r\nc", "\x85", "\u2028\u2029", "\x0b\x0c\x1c\x1e", '"\\', "\x00", "\ufeff"])
def test_text_that_looks_like_a_line_end_comes_back_equal(text, tmp_path):
    step = Step(contestant="a", index=0, token_id=1, text=text, seconds=0.0, logprob=0.0)
    assert saved_and_loaded([step], tmp_path).events == [TimedEvent(1.5, step)]


def test_a_memory_sample_keeps_both_its_times(tmp_path):
    """The sampler's clock starts after the run's: when it was taken is one time, when it was yielded another."""
    run = Run({}, {}, [TimedEvent(10.25, Memory(at=0.5))])
    assert Run.load(run.save(tmp_path / "run.jsonl")).events == run.events


def test_save_makes_folders_and_leaves_only_the_run(tmp_path):
    path = tmp_path / "a" / "b" / "run.jsonl"
    assert Run(SETTINGS, ENVIRONMENT).save(path) == path
    assert os.listdir(path.parent) == ["run.jsonl"]


@pytest.mark.parametrize("settings", [{"prompt": object()}, {"temperature": math.nan}])
def test_a_failed_save_leaves_the_old_run_and_no_partial_file(settings, tmp_path):
    old = Run(SETTINGS, ENVIRONMENT)
    path = old.save(tmp_path / "run.jsonl")
    with pytest.raises((TypeError, ValueError)):
        Run(settings, {}).save(path)
    assert os.listdir(tmp_path) == ["run.jsonl"]
    assert Run.load(path) == old


def test_a_disk_that_fails_at_the_last_moment_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write .*run.jsonl: No space left on device"):
        Run(SETTINGS, ENVIRONMENT).save(tmp_path / "run.jsonl")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/run.jsonl"):
        Run({}, {}).save(tmp_path / "file" / "run.jsonl")


def recorded(times) -> Run:
    """A run whose events were yielded at these times, on a clock that began at 100."""
    clock = iter([100.0, *(100.0 + at for at in times)])
    run = Run({}, {})
    assert list(run.record(EXAMPLES[: len(times)], lambda: next(clock))) == list(EXAMPLES[: len(times)])
    return run


def test_record_keeps_every_event_with_its_time():
    assert recorded([0.0, 0.5, 2.25]).events == [
        TimedEvent(at, event) for at, event in zip([0.0, 0.5, 2.25], EXAMPLES, strict=False)
    ]


class FakeTime:
    """A clock that only sleeping, and a slow listener, move."""

    def __init__(self):
        self.now, self.slept = 50.0, []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_replay_keeps_the_recorded_pace():
    time = FakeTime()
    assert list(recorded([0.0, 0.5, 0.5, 1.75]).replay(time.sleep, time.clock)) == list(EXAMPLES[:4])
    assert time.slept == [0.5, 1.25]


def test_replay_sleeps_before_each_event_not_after():
    time, seen = FakeTime(), []
    for _ in recorded([1.0, 2.0]).replay(time.sleep, time.clock):
        seen.append(time.now - 50.0)
    assert seen == [1.0, 2.0]


def test_replay_cuts_long_pauses():
    time = FakeTime()
    assert list(recorded([0.0, 600.0, 600.5]).replay(time.sleep, time.clock)) == list(EXAMPLES[:3])
    assert time.slept == [LONGEST_PAUSE, 0.5]


def test_a_slow_listener_makes_the_pace_up_again():
    time = FakeTime()
    for _ in recorded([0.0, 1.0, 2.0, 3.0]).replay(time.sleep, time.clock):
        time.now += 0.75
    assert time.slept == [0.25, 0.25, 0.25]


def test_replay_without_a_sleep_never_pauses():
    assert list(recorded([0.0, 9e9]).replay()) == list(EXAMPLES[:2])


def test_a_saved_run_with_memory_samples_replays_in_its_own_time(tmp_path):
    """The sampler's clock is behind the run's by the whole load; a replay must not wait for that again and again."""
    times = [10.0, 10.1, 10.2, 10.3, 10.4]
    events = [EXAMPLES[5], Memory(at=0.1), EXAMPLES[5], Memory(at=0.3), EXAMPLES[5]]
    run = Run({}, {}, [TimedEvent(at, event) for at, event in zip(times, events, strict=True)])
    time = FakeTime()
    for _ in Run.load(run.save(tmp_path / "run.jsonl")).replay(time.sleep, time.clock):
        pass
    assert sum(time.slept) == pytest.approx(LONGEST_PAUSE + 0.4)


def test_blank_lines_and_fields_of_later_versions_are_passed_over():
    header, step = lines_of(EXAMPLES[5])
    later = json.dumps(json.loads(step) | {"colour": "blue"})
    assert Run.from_lines([header, "", later, "  "]).events == [TimedEvent(1.0, EXAMPLES[5])]


HEADER, STEP = lines_of(EXAMPLES[5])


def changed(line: str, **changes) -> str:
    return json.dumps({k: v for k, v in (json.loads(line) | changes).items() if v != "REMOVED"})


BAD_HEADERS = {
    "empty": ([], "header"),
    "blank": (["", "   "], "header"),
    "not JSON": (["not json", STEP], "line 1: not JSON"),
    "a list": (["[1]", STEP], "line 1: expected an object"),
    "another format": ([changed(HEADER, format="other"), STEP], "header"),
    "no header": ([STEP], "header"),
    "a later version": ([changed(HEADER, version=2)], "version 2; .* version 1"),
    "no version": ([changed(HEADER, version=None)], "version None"),
    "settings a list": ([changed(HEADER, settings=[])], "'settings' and 'environment'"),
    "no environment": ([changed(HEADER, environment="REMOVED")], "'settings' and 'environment'"),
}
BAD_EVENTS = {
    "not JSON": "{oops",
    "cut off": STEP[: len(STEP) // 2],
    "no object": "3",
    "unknown event": changed(STEP, event="Explosion"),
    "no event": changed(STEP, event="REMOVED"),
    "event a list": changed(STEP, event=["Step"]),
    "a field missing": changed(STEP, token_id="REMOVED"),
    "time missing": changed(STEP, time="REMOVED"),
    "time a text": changed(STEP, time="1.0"),
    "time true": changed(STEP, time=True),
    "time not a number": STEP.replace('"time": 1.0', '"time": NaN'),
    "time infinite": STEP.replace('"time": 1.0', '"time": Infinity'),
    "time beyond floats": changed(STEP, time=10**400),
    "text a dict": changed(STEP, text={"html": "<script>"}),
    "text null": changed(STEP, text=None),
    "contestant a number": changed(STEP, contestant=5),
    "contestant a list": changed(STEP, contestant=["fp16"]),
    "index a text": changed(STEP, index="0"),
    "token id a float": changed(STEP, token_id=1.5),
    "seconds a text": changed(STEP, seconds="fast"),
    "logprob a list": changed(STEP, logprob=[0]),
    "best a list": changed(STEP, best=[0.5]),
    "a likeliest token without a number": changed(STEP, best={"17": None}),
    "seconds minus infinite": STEP.replace('"seconds": 0.0', '"seconds": -Infinity'),
    "token id minus infinite": STEP.replace('"token_id": 17', '"token_id": -Infinity'),
    "text minus infinite": changed(STEP, text=-math.inf),
    "logprob not a number": STEP.replace('"logprob": -0.25', '"logprob": NaN'),
    "verified a text": changed(lines_of(EXAMPLES[8])[1], verified="yes"),
    "predicted bytes a list": changed(lines_of(EXAMPLES[1])[1], predicted_bytes=[5]),
    "predicted bytes of texts": changed(lines_of(EXAMPLES[1])[1], predicted_bytes={"fp16": "5"}),
    "ledger of numbers": changed(lines_of(EXAMPLES[7])[1], ledger={"fp16": 5}),
}


@pytest.mark.parametrize(("lines", "words"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_names_the_file(lines, words):
    with pytest.raises(UserError, match=f"bad.jsonl.*{words}"):
        Run.from_lines(lines, name="bad.jsonl")


@pytest.mark.parametrize("line", BAD_EVENTS.values(), ids=BAD_EVENTS)
def test_a_bad_event_names_the_file_and_the_line(line):
    with pytest.raises(UserError, match="bad.jsonl, line 3: "):
        Run.from_lines([HEADER, STEP, line, STEP], name="bad.jsonl")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"\x1f\x8b\x08compressed"])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="bad.jsonl"):
        Run.load(path)
