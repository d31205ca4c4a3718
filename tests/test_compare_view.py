"""The Compare tab's updates over a scripted run and a clock of our own: few, small, in the end complete."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llmq.errors import UserError
from llmq.events import Failed, Finished, Freed, Loaded, Loading, Planned, Prefilled, Reading, Run, Step, Waiting
from llmq.ui.parts.difference import UNKNOWN
from llmq.ui.parts.progress import event_line
from llmq.ui.tabs.compare_view import (
    UPDATE_SECONDS,
    CompareView,
    arithmetic,
    asked_of,
    labels_of,
    recording_of,
    recording_title,
)

NAMES = ["fp16", "bnb-int8"]
HTML = '<script>alert("1")</script>&amp;'
PLAN = Planned(
    schedule="interleave",
    reason="",
    prompt_tokens=2,
    predicted_bytes=dict.fromkeys(NAMES, 9),
    free_bytes=99,
    device="cpu",
)


def step(name: str, index: int, text: str = "a", token_id: int | None = None) -> Step:
    token_id = index if token_id is None else token_id
    return Step(contestant=name, index=index, token_id=token_id, text=text, seconds=0.01, logprob=-0.5)


def script(steps: int = 20, text: str = "a") -> list:
    events = [Waiting(seconds=0.0), PLAN]
    for name in NAMES:
        events += [Loading(contestant=name), Loaded(contestant=name, weight_bytes=100, seconds=0.1)]
        events += [Prefilled(contestant=name, prompt_tokens=2, seconds=0.1)]
    events += [step(name, index, text) for index in range(steps) for name in NAMES]
    return events + [Finished(contestant=name, reason="length", text="!", peak_bytes=7) for name in NAMES]


class Clock:
    """Moves on by so many seconds with every event that is taken."""

    def __init__(self, seconds: float = 0.0):
        self.now, self.seconds = 100.0, seconds

    def __call__(self) -> float:
        return self.now

    def through(self, events):
        for event in events:
            self.now += self.seconds
            yield event


def updates(events, seconds: float = 0.0, **changes) -> list[dict]:
    clock = Clock(seconds)
    view = CompareView(NAMES, "run-1", "cpu", clock=clock, **changes)
    return list(view.updates(clock.through(events)))


def test_a_prefill_says_how_far_it_is():
    view = CompareView(NAMES, "run-1", "cpu")
    said = []
    whole = Prefilled(contestant=NAMES[0], prompt_tokens=3012, seconds=9.0)
    loaded = Loaded(contestant=NAMES[0], weight_bytes=1, seconds=0.1)
    read = Reading(contestant=NAMES[0], fraction=0.4523)
    for event in (replace(PLAN, prompt_tokens=3012), loaded, read, whole, step(NAMES[0], 0)):
        view._take(event)
        said.append((view.value()["status"], view.value()["fraction"]))
    line = "FP16 reads the prompt: 3,012 tokens"
    assert said[1:3] == [(line, None), (f"{line}, 45%", 0.4523)]
    assert said[-1] == ("Generating", None) and view._final()["fraction"] is None


@pytest.mark.parametrize("seconds", [0.0, UPDATE_SECONDS / 10, 1.0])
def test_the_last_update_is_complete(seconds):
    last = updates(script(), seconds)[-1]
    assert last["texts"] == ["a" * 20 + "!", "a" * 20 + "!"]
    assert (last["status"], last["state"]) == ("Finished.", "done")
    assert last["headline"].endswith("the texts are the same.") and "agree on all 20 tokens" in last["details"][-1]
    assert last["pieces"] == [[["a" * 20, "prefix"], ["!", "same"]]] * 2 and last["first"] is None
    assert [card["state"] for card in last["cards"]] == ["finished", "finished"]


@pytest.mark.parametrize(("seconds", "fewest", "most"), [(0.0, 2, 2), (UPDATE_SECONDS / 10, 6, 7), (1.0, 45, 52)])
def test_events_are_collected_until_an_update_is_due(seconds, fewest, most):
    """Of fifty events: none, every tenth or nearly every one brings an update, besides the first and the last."""
    events = script()
    assert len(events) == 50
    assert fewest <= len(updates(events, seconds)) <= most


def test_updates_are_never_closer_than_their_period():
    clock, times = Clock(0.03), []
    view = CompareView(NAMES, "run-1", "cpu", clock=clock)
    for _ in view.updates(clock.through(script(60))):
        times.append(clock.now)
    gaps = [b - a for a, b in zip(times[:-1], times[1:-1], strict=False)]
    assert len(gaps) > 10 and min(gaps) >= UPDATE_SECONDS - 1e-9


def test_a_place_in_line_is_told_at_once():
    """After it nothing may come for minutes."""
    events = [Waiting(seconds=0.0, position=3), Waiting(seconds=0.1, position=3), Waiting(seconds=0.2, position=2)]
    updates = CompareView(NAMES, "run-1", "cpu", clock=Clock(0.0)).updates(iter(events))
    said = [update["status"] for update in updates][:-1]
    assert said == ["Starting", "Waiting: 3 runs are in front of yours", "Waiting: 2 runs are in front of yours"]


def test_the_first_update_empties_the_page_before_anything_happens():
    def never():
        pytest.fail("the first update must not wait for the run")
        yield

    first = next(CompareView(NAMES, "run-1", "cpu", {"prompt": "p", "settings": "s"}).updates(never()))
    assert (first["texts"], first["status"], first["state"]) == (["", ""], "Starting", "running")
    assert [card["state"] for card in first["cards"]] == ["waiting", "waiting"]
    assert first["asked"] == {"prompt": "p", "settings": "s"}, "a result says what it answers"


def test_values_that_were_given_out_do_not_change():
    found = updates(script(), 1.0)
    texts = [value["texts"][0] for value in found]
    assert texts[0] == "" and texts[-1] == "a" * 20 + "!" and len(set(texts)) == 22


def test_text_is_passed_on_untouched():
    """The page makes text nodes of it; escaping here would show."""
    last = updates(script(2, HTML))[-1]
    assert last["texts"][0] == HTML * 2 + "!" and last["pieces"][0][0] == [HTML * 2, "prefix"]


def test_texts_that_part_are_marked_where_they_part():
    events = [PLAN]
    for name, ids in zip(NAMES, ([1, 2, 3], [1, 9, 3]), strict=True):
        events += [step(name, index, f"t{token}", token) for index, token in enumerate(ids)]
    last = updates(events)[-1]
    assert last["first"] == 1 and last["pieces"][1] == [["t1", "prefix"], ["t9", "diff"], ["t3", "same"]]


def test_a_third_text_is_shown_whole():
    names = [*NAMES, "llm-int8"]
    events = [step(name, index) for index in range(3) for name in names]
    last = list(CompareView(names, "run-1", "cpu").updates(events))[-1]
    assert last["texts"] == ["aaa"] * 3 and last["pieces"][2] is None


def test_the_difference_is_there_while_a_run_goes():
    strips = [value["strip"] for value in updates(script(), 1.0)]
    assert strips[0] == {"memory": UNKNOWN, "speed": UNKNOWN, "same": "", "parted": ""}
    assert strips[-2]["memory"] == {"shares": [1, 1], "changes": ["", "the same"]}
    assert (strips[-2]["same"], strips[-2]["parted"]) == ("20 tokens", "so far")


def test_who_reads_the_prompt_is_said():
    """Nothing else is heard of a prefill until it is over, and that may take a minute."""
    said = list(dict.fromkeys(value["status"] for value in updates(script(), 1.0)))
    assert said == [
        "Starting", "Running (interleave)", "Loading FP16", "FP16 reads the prompt: 2 tokens",
        "Loading int8 · bitsandbytes", "int8 · bitsandbytes reads the prompt: 2 tokens", "Generating", "Finished.",
    ]  # fmt: skip


def failing(events, message: str):
    yield from events
    raise UserError(message)


def test_a_failure_keeps_what_was_shown_and_says_why():
    last = updates(failing(script()[:12], "no <b>room</b>"))[-1]
    assert (last["status"], last["state"]) == ("Ended early: no <b>room</b>", "done")
    assert last["texts"] == ["aa", "aa"]


def test_a_run_that_never_began_leaves_what_was_there():
    last = updates(failing(script()[:4], "no <b>room</b>"))[-1]
    assert last == {"notice": "Not started: no <b>room</b>", "run": "run-1"}


def test_a_failure_that_is_no_users_is_not_hidden():
    def broken():
        yield PLAN
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        updates(broken())


def test_an_event_of_an_unknown_contestant_is_an_error_in_words():
    assert "'fp8'" in updates([PLAN, step("fp8", 0)])[-1]["notice"]


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([Waiting(seconds=0.0)], "Stopped before anything ran."),
        ([PLAN, *[Finished(contestant=name, reason="stopped") for name in NAMES]], "Stopped."),
        ([PLAN, Failed(contestant="fp16", message="boom")], "Finished, with a failure: see its text."),
        (script(), "Finished."),
    ],
)
def test_the_closing_line_says_how_it_ended(events, status):
    last = updates(events)[-1]
    assert (last["status"], last["state"]) == (status, "done")
    if not any(isinstance(event, Step) for event in events):
        assert last["pieces"] is None


def test_a_recording_with_an_unknown_method_is_shown():
    names = ["fp16", "mystery-int4"]
    loaded = [Loaded(contestant=name, weight_bytes=100, seconds=0.1) for name in names]
    written = [step(name, 0) for name in names]
    ended = [Finished(contestant=name, reason="length") for name in names]
    found = list(CompareView(names, "run-1", "cpu").updates([*loaded, *written, *ended]))
    assert found[-1]["texts"] == ["a", "a"] and found[-1]["status"] == "Finished."


def saved(events: list) -> Run:
    settings = {"contestants": NAMES, "prompt": HTML, "model": "demo", "device": "cpu",
                "sampling": {"max_new_tokens": 20, "temperature": 0.5}}  # fmt: skip
    run = Run(settings, {"device_name": "NVIDIA L4", "date": "2026-11-22T10:00:00"})
    clock = Clock(0.1)
    list(run.record(clock.through(events), clock))
    return run


def played(recording: dict) -> dict:
    """What the browser makes of it: the frames one after the other."""
    value = {key: entry for key, entry in recording.items() if key != "frames"}
    for frame in recording["frames"]:
        texts = [old + new for old, new in zip(value["texts"], frame["texts"], strict=True)]
        value = value | frame["set"] | {"texts": texts, "samples": value["samples"] + frame["samples"]}
    return value


def test_a_recording_is_frames_that_come_to_what_was_live():
    recording = recording_of(saved(script()), "run-1")
    live, shown = updates(script(), 0.1)[-1], played(recording)
    different = {key for key in live if live[key] != shown[key]}
    assert different == {"recording", "asked"}
    assert shown["recording"] == "Recording, made on NVIDIA L4 on 2026-11-22"
    assert shown["asked"]["prompt"] == HTML
    times = [frame["at"] for frame in recording["frames"]]
    assert times == sorted(times) and times[-1] == pytest.approx(0.1 * 49, abs=0.11) and len(times) > 10
    assert json.loads(json.dumps(recording)) == recording


def test_a_recordings_long_pauses_are_cut():
    run = saved(script())
    run.events[3:] = [replace(timed, at=timed.at + 600) for timed in run.events[3:]]
    assert recording_of(run, "run-1")["frames"][-1]["at"] < 10


def test_a_recording_is_listed_by_its_methods_and_its_machine(tmp_path):
    assert recording_title(saved(script()).save(tmp_path / "a.jsonl")) == "FP16 and int8 · bitsandbytes, on NVIDIA L4"


def test_what_was_asked_is_said_in_words():
    settings = {"model": "demo", "contestants": ["fp16", "llm-int8@3"], "prompt": "Hi"}
    assert asked_of(settings) == {
        "prompt": "Hi", "settings": "SmolLM2-135M (demo) · FP16 and int8 · ours, threshold 3",
    }  # fmt: skip
    drawn = settings | {"sampling": {"max_new_tokens": 9, "temperature": 0.7}}
    assert asked_of(drawn)["settings"].endswith(" · up to 9 tokens · temperature 0.7")


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Waiting(seconds=0.0), ""),
        (Waiting(seconds=1.0, position=1), "Waiting: 1 run is in front of yours"),
        (Waiting(seconds=1.0, position=2), "Waiting: 2 runs are in front of yours"),
        (PLAN, "Running (interleave)"),
        (Planned(**(vars(PLAN) | {"reason": "too big", "schedule": "in-turn"})), "Running in-turn: too big"),
        (Loading(contestant="", message="fetching x · 5%"), "Fetching x · 5%"),
        (Loading(contestant="fp16"), "Loading FP16"),
        (step("fp16", 0), "Generating"),
        (step("fp16", 1), ""),
        (Failed(contestant="fp16", message="m"), "FP16 failed; the others go on"),
        (Freed(contestant="fp16", expected_bytes=1, freed_bytes=1, verified=True), "FP16 freed"),
    ],
)
def test_a_screen_reader_hears_what_matters(event, line):
    assert event_line(event) == line


def test_what_did_not_come_back_is_said():
    assert "not seen to come back" in event_line(Freed(contestant="a", expected_bytes=1, freed_bytes=0, verified=False))


@pytest.mark.parametrize("label", NAMES)
def test_every_method_says_what_it_multiplies_in(label):
    assert "FP16" in arithmetic(label, "cpu") and "FP16" in arithmetic(label, "cuda:0")
    assert arithmetic("mystery-int4", "cpu") == arithmetic("bnb-int8@hot", "cpu") == ""


@pytest.mark.parametrize("labels", [None, [], "fp16", ["a", "b", "c", "d"], [1, 2], {"fp16": 1}, ["fp16", "fp16"]])
def test_a_recording_without_contestants_is_refused(labels):
    with pytest.raises(UserError, match="one to three contestants|repeat"):
        labels_of({"contestants": labels})
    with pytest.raises(UserError):
        labels_of({})


def test_a_recordings_labels_are_its_contestants():
    assert labels_of({"contestants": NAMES}) == NAMES
