"""Stopping, closing and waiting: wherever a run ends, the device is free again and what was generated stays."""

from __future__ import annotations

import threading

import pytest
from test_engine import hooks_left
from tiny_runs import comparison, engine_of, light, outline, reasons, sampler_threads, stopped_when, token_ids

from llmq.engine.hf import Generation
from llmq.events import Finished, Loaded, Loading, Planned, Prefilled, Step, Waiting
from llmq.machine.door import Machine

SOON = 20.0  # seconds a busy machine may need for a tiny run
NAMES = ("fp32", "bf16")


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def machine(tiny_folder) -> Machine:
    machine = Machine()
    list(machine.run(comparison(tiny_folder)))
    return machine


@pytest.fixture(scope="module")
def whole(tiny_folder, machine) -> dict[str, list[int]]:
    """The tokens of a run that nobody stops."""
    events = list(machine.run(comparison(tiny_folder)))
    return {name: token_ids(events, name) for name in NAMES}


def assert_free(tiny_folder, machine, whole):
    """The device is free at once, no sampler runs, no hook is left, and the next run is whole."""
    assert sampler_threads() == []
    assert [hooks_left(engine_of(machine, tiny_folder, name).model) for name in NAMES] == [0, 0]
    events = list(machine.run(comparison(tiny_folder)))
    assert [event for event in events if isinstance(event, Waiting)] == [Waiting(seconds=0.0, position=0)]
    assert {name: token_ids(events, name) for name in NAMES} == whole


@pytest.mark.parametrize("schedule", ["interleave", "in-turn"])
@pytest.mark.parametrize(
    ("condition", "tokens"),
    [
        (lambda e: isinstance(e, Planned), {"interleave": [0, 0], "in-turn": [0, 0]}),
        (lambda e: isinstance(e, Loading), {"interleave": [0, 0], "in-turn": [0, 0]}),
        (lambda e: isinstance(e, Loaded), {"interleave": [0, 0], "in-turn": [0, 0]}),
        (lambda e: isinstance(e, Prefilled), {"interleave": [1, 0], "in-turn": [1, 0]}),
        (lambda e: isinstance(e, Step) and e.index == 0, {"interleave": [1, 0], "in-turn": [1, 0]}),
        (lambda e: isinstance(e, Step) and e.index == 3, {"interleave": [4, 3], "in-turn": [4, 0]}),
        (lambda e: isinstance(e, Step) and e.contestant == "bf16", {"interleave": [1, 1], "in-turn": [6, 1]}),
    ],
    ids=["planned", "loading", "loaded", "prefilled", "first token", "fourth token", "the second's first token"],
)
def test_a_stop_ends_every_contestant_and_keeps_its_tokens(condition, tokens, schedule, tiny_folder, machine, whole):
    events = stopped_when(comparison(tiny_folder, schedule=schedule), machine, condition)
    counts = tokens[schedule]
    assert {name: token_ids(events, name) for name in NAMES} == {
        name: whole[name][:count] for name, count in zip(NAMES, counts, strict=True)
    }
    ended = ["length" if count == len(whole["fp32"]) else "stopped" for count in counts]
    assert list(reasons(events).values()) == ended
    assert isinstance(events[-1], Finished) or outline(events)[-1][0] == "Finished"
    assert_free(tiny_folder, machine, whole)


def test_a_stop_while_standing_in_line_ends_quietly(tiny_folder, machine, whole):
    with machine.queue.turn():
        events = stopped_when(comparison(tiny_folder), machine, lambda event: isinstance(event, Waiting))
    assert events == [Waiting(seconds=0.0, position=1)]
    assert_free(tiny_folder, machine, whole)


def test_a_run_stopped_before_it_begins_opens_nothing(tiny_folder, machine, whole):
    stop = threading.Event()
    stop.set()
    assert outline(machine.run(comparison(tiny_folder), stop=stop)) == [("Waiting", "")]
    assert_free(tiny_folder, machine, whole)


@pytest.mark.parametrize("schedule", ["interleave", "in-turn"])
def test_a_stop_inside_the_prefill_ends_without_a_token(schedule, tiny_folder, machine, whole):
    """Set from inside the forward pass of the second layer: the next linear layer sees it."""
    stop, events = threading.Event(), []
    layer = engine_of(machine, tiny_folder, "bf16").model.model.layers[0]
    hook = layer.register_forward_hook(lambda *_: stop.set() if events and isinstance(events[-1], armed) else None)
    armed = {"interleave": Step, "in-turn": Loaded}[schedule]  # what comes right before this prefill
    try:
        for event in machine.run(comparison(tiny_folder, schedule=schedule), stop=stop):
            if outline([event]):
                events.append(event)
    finally:
        hook.remove()
    kinds = [kind for kind, name in outline(events) if name == "bf16"]
    assert kinds == ["Loading", "Loaded", "Finished"]
    assert reasons(events)["bf16"] == "stopped"
    assert_free(tiny_folder, machine, whole)


@pytest.mark.parametrize("events_taken", [1, 2, 3, 5, 8, 12])
def test_closing_the_stream_early_gives_the_device_back(events_taken, tiny_folder, machine, whole):
    stream = machine.run(comparison(tiny_folder))
    for _ in range(events_taken):
        next(stream)
    assert machine.queue.waiting == 1
    stream.close()
    assert_free(tiny_folder, machine, whole)


def test_a_keyboard_interrupt_passes_and_gives_the_device_back(tiny_folder, machine, whole, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Generation, "step", interrupted)
        list(machine.run(comparison(tiny_folder)))
    assert_free(tiny_folder, machine, whole)


def test_twenty_stops_and_restarts_leave_no_thread(tiny_folder, machine, whole):
    before = threading.active_count()
    for cycle in range(20):
        taken = []
        stopped_when(comparison(tiny_folder), machine, lambda e, at=cycle, t=taken: t.append(e) or len(t) > at)
        assert threading.active_count() == before
    assert_free(tiny_folder, machine, whole)


def test_two_runs_at_once_never_overlap(tiny_folder, machine):
    """The first holds the device until the second stands in line; then each runs to its end alone."""
    log, lock, second_waits = [], threading.Lock(), threading.Event()

    def run(owner: str):
        for event in machine.run(comparison(tiny_folder)):
            with lock:
                log.append((owner, event))
            if owner == "second" and isinstance(event, Waiting) and event.position:
                second_waits.set()
            if owner == "first" and isinstance(event, Planned):
                second.start()
                assert second_waits.wait(SOON)

    first, second = (threading.Thread(target=run, args=(name,), daemon=True) for name in ("first", "second"))
    first.start()
    for thread in (first, second):
        thread.join(SOON)
    working = [owner for owner, event in log if not isinstance(event, Waiting)]
    switches = [pair for pair in zip(working, working[1:], strict=False) if pair[0] != pair[1]]
    assert switches == [("first", "second")]
    waited = [event for owner, event in log if owner == "second" and isinstance(event, Waiting)]
    assert {event.position for event in waited} == {1}
    assert [event.seconds for event in waited] == sorted(event.seconds for event in waited)
    assert waited[0].seconds == 0.0
    for owner in ("first", "second"):
        assert reasons(event for name, event in log if name == owner) == dict.fromkeys(NAMES, "length")


def test_positions_in_line_are_told_as_they_change(tiny_folder):
    """Two in front; the nearer leaves."""
    machine = Machine()
    queue = machine.queue
    with queue.turn():
        nearer = queue.turn()
        nearer.__enter__()
        machine.clock = iter(range(100)).__next__
        stream = machine.run(comparison(tiny_folder))
        seen = [next(stream)]
        nearer.__exit__(None, None, None)
        seen.append(next(stream))
        stream.close()
    assert seen == [Waiting(seconds=0.0, position=2), Waiting(seconds=1, position=1)]
    assert queue.waiting == 0
