"""A method that takes its time with every layer: whoever waits hears of it, and a stop is heard between two layers."""

from __future__ import annotations

import itertools
import threading

import pytest
from tiny_runs import key_of

from llmq.contestant import Contestant
from llmq.engine.base import Interrupted
from llmq.events import Loaded, Loading
from llmq.machine.door import Lease, Machine
from llmq.methods.rtn import Rtn

LAYERS = 14  # linear layers of the tiny model


def slow_lease(stop: threading.Event | None = None) -> Lease:
    """A clock that is a second later at every look."""
    return Lease(Machine(clock=itertools.count().__next__), "cpu", stop or threading.Event())


def quantizing(lease: Lease) -> list[str]:
    events = [lease.aside.get() for _ in range(lease.aside.qsize())]
    assert all(isinstance(event, Loading) and event.contestant == "rtn" for event in events)
    return [event.message for event in events]


def test_progress_is_told_by_layers_while_a_model_loads(tiny_folder):
    lease = slow_lease()
    *_, loaded = lease.load(key_of(tiny_folder, "rtn"), Contestant.parse("rtn"))
    assert isinstance(loaded, Loaded)
    assert quantizing(lease) == [f"quantizing · {number / LAYERS:.0%}" for number in range(LAYERS)]


@pytest.mark.parametrize("way", ["load", "get"])
def test_a_stop_is_heard_between_two_layers(monkeypatch, tiny_folder, way):
    stop, done = threading.Event(), []
    lease, key = slow_lease(stop), key_of(tiny_folder, "rtn")
    quantize = Rtn.quantize

    def third_is_stopped(self, linear, statistics=None):
        done.append(linear)
        if len(done) == 3:
            stop.set()
        return quantize(self, linear, statistics)

    monkeypatch.setattr(Rtn, "quantize", third_is_stopped)
    with pytest.raises(Interrupted):
        list(lease.load(key, Contestant.parse("rtn"))) if way == "load" else lease.get(key, key.method)
    assert len(done) == 3 and list(lease.pool) == []
    monkeypatch.undo()
    stop.clear()
    assert lease.get(key, key.method).weight_bytes > 0, "the next question loads it whole"


def test_what_loads_at_once_is_not_told_of(tiny_folder):
    lease = Lease(Machine(clock=lambda: 0.0), "cpu", threading.Event())
    list(lease.load(key_of(tiny_folder, "rtn"), Contestant.parse("rtn")))
    assert quantizing(lease) == []
