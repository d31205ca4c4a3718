"""The Compare tab's updates over a scripted run and a clock of our own: few, small, in the end complete."""

from __future__ import annotations

import pytest

from llmq.errors import UserError
from llmq.events import Failed, Finished, Freed, Loaded, Loading, Planned, Prefilled, Step, Waiting
from llmq.ui.parts.progress import event_line
from llmq.ui.tabs.compare_view import UPDATE_SECONDS, CompareView, arithmetic, labels_of

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


def shown(found: list[dict]) -> dict:
    """What is on the page after these updates."""
    page: dict = {}
    for update in found:
        page |= update
    return page


@pytest.mark.parametrize("seconds", [0.0, UPDATE_SECONDS / 10, 1.0])
def test_the_last_update_leaves_the_page_complete(seconds):
    page = shown(updates(script(), seconds))
    assert (page["text_0"], page["text_1"]) == ("a" * 20 + "!", "a" * 20 + "!")
    assert page["status"] == "Finished."
    assert "agree on all 20 tokens" in page["verdict"]
    assert page["diff"]["labels"] == NAMES and page["diff"]["first_divergence"] is None
    assert [card["state"] for card in page["live"]["cards"]] == ["finished", "finished"]


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


def test_the_first_update_empties_the_page_before_anything_happens():
    def never():
        pytest.fail("the first update must not wait for the run")
        yield

    first = next(CompareView(NAMES, "run-1", "cpu").updates(never()))
    assert (first["text_0"], first["text_1"], first["status"]) == ("", "", "Starting")
    assert [card["state"] for card in first["live"]["cards"]] == ["waiting", "waiting"]


def test_an_update_holds_only_what_changed_and_is_never_empty():
    found = updates([step("fp16", index) for index in range(5)], 1.0)
    assert all(found) and "text_1" in found[0]
    assert not any("text_1" in update for update in found[1:])
    texts = [update["text_0"] for update in found if "text_0" in update]
    assert texts == ["", "a", "aa", "aaa", "aaaa", "aaaaa"]


def test_text_is_passed_on_untouched():
    """The page shows it in a text box and a component that escapes; escaping here would show twice."""
    page = shown(updates(script(2, HTML)))
    assert page["text_0"] == HTML * 2 + "!"
    assert page["diff"]["tokens_a"] == [[HTML, "prefix"], [HTML, "prefix"]]


def test_texts_that_part_are_marked_where_they_part():
    events = [PLAN]
    for name, ids in zip(NAMES, ([1, 2, 3], [1, 9, 3]), strict=True):
        events += [step(name, index, f"t{token}", token) for index, token in enumerate(ids)]
    diff = shown(updates(events))["diff"]
    assert diff["first_divergence"] == 1
    assert diff["tokens_b"] == [["t1", "prefix"], ["t9", "diff"], ["t3", "same"]]


def failing(events, message: str):
    yield from events
    raise UserError(message)


@pytest.mark.parametrize(
    ("before", "status"),
    [(script()[:4], "Not started: no <b>room</b>"), (script()[:12], "Ended early: no <b>room</b>")],
)
def test_a_failure_keeps_what_was_shown_and_says_why(before, status):
    found = updates(failing(before, "no <b>room</b>"))
    assert found[-1]["error"] == "no <b>room</b>" and shown(found)["status"] == status
    assert "verdict" not in shown(found)
    assert shown(found)["text_0"] == "a" * sum(isinstance(e, Step) and e.contestant == "fp16" for e in before)


def test_a_failure_that_is_no_users_is_not_hidden():
    def broken():
        yield PLAN
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        updates(broken())


def test_an_event_of_an_unknown_contestant_is_an_error_in_words():
    assert "'fp8'" in updates([PLAN, step("fp8", 0)])[-1]["error"]


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([Waiting(seconds=0.0)], "Stopped before anything ran."),
        ([PLAN, *[Finished(contestant=name, reason="stopped") for name in NAMES]], "Stopped."),
        ([PLAN, Failed(contestant="fp16", message="boom")], "Finished, with a failure: see the card."),
        (script(), "Finished."),
    ],
)
def test_the_closing_line_says_how_it_ended(events, status):
    page = shown(updates(events))
    assert page["status"] == status
    if not any(isinstance(event, Step) for event in events):
        assert page["diff"] == {}


def test_a_recording_says_so_in_every_line():
    found = updates(script(), 1.0, opening="Recording: NVIDIA L4")
    assert all(update["status"].startswith("Recording: NVIDIA L4 · ") for update in found if "status" in update)


def test_a_recording_with_an_unknown_method_is_shown():
    names = ["fp16", "mystery-int4"]
    loaded = [Loaded(contestant=name, weight_bytes=100, seconds=0.1) for name in names]
    found = list(CompareView(names, "run-1", "cpu").updates([*loaded, *(step(name, 0) for name in names)]))
    assert shown(found)["text_1"] == "a" and shown(found)["status"] == "Finished."


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Waiting(seconds=0.0), ""),
        (Waiting(seconds=1.0, position=1), "Waiting: 1 run is in front of yours"),
        (Waiting(seconds=1.0, position=2), "Waiting: 2 runs are in front of yours"),
        (PLAN, "Running (interleave)"),
        (Planned(**(vars(PLAN) | {"reason": "too big", "schedule": "in-turn"})), "Running in-turn: too big"),
        (Loading(contestant="", message="fetching x · 5%"), "Fetching x · 5%"),
        (Loading(contestant="fp16"), "Loading fp16"),
        (step("fp16", 0), "Generating"),
        (step("fp16", 1), ""),
        (Failed(contestant="fp16", message="m"), "fp16 failed; the others go on"),
        (Freed(contestant="fp16", expected_bytes=1, freed_bytes=1, verified=True), "fp16 freed"),
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
