"""A lent GPU: what runs in the host's fork and what stays outside, with a host that forks and lends the CPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tiny_runs import comparison, light, reasons, sampler_threads, token_ids, without_memory

from llmq.contestant import Contestant
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.events import Loaded, Memory, Prefilled, Progress, Waiting
from llmq.labs import lab_classes
from llmq.labs.base import Lab
from llmq.machine import lent
from llmq.machine.door import Machine
from llmq.machine.lent import LAB_SECONDS, MOST_SECONDS, LentMachine, seconds_for

SOON = 20.0  # seconds a busy machine may need for what takes milliseconds


class Host:
    """Forks for every question, as ZeroGPU does: arguments, items and nothing else are pickled. `asked`: the seconds
    of every loan; `over`: a loan has ended."""

    def __init__(self):
        self.asked: list[int] = []
        self.over = threading.Event()

    def lend(self, function, seconds):
        def borrow(*arguments) -> Iterator:
            self.asked.append(seconds(*arguments))
            context, sent = multiprocessing.get_context("fork"), pickle.dumps(arguments)
            items = context.SimpleQueue()

            def work() -> None:
                try:
                    for item in function(*pickle.loads(sent)):
                        items.put((item,))
                finally:
                    items.put(())

            fork = context.Process(target=work, daemon=True)
            fork.start()
            try:
                while answer := items.get():
                    yield answer[0]
            finally:  # the real one, too, waits for the end of the fork
                while not items.empty():
                    items.get()
                fork.join(SOON)
                assert fork.exitcode == 0
                self.over.set()

        return borrow


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():  # a fork that asks threads of this process to help it would wait for ever
        yield


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def machine(host) -> LentMachine:
    return LentMachine(host.lend)


@dataclass(frozen=True, kw_only=True)
class Asked(Lab):
    """Says where it is answered, then goes on until it is stopped, or refuses."""

    refusal: str = ""

    def run(self, lease) -> Iterator[Progress]:
        yield lease.progress(str(os.getpid()))
        if self.refusal:
            raise BadChoice(self.refusal)
        ends_at = time.monotonic() + SOON
        while time.monotonic() < ends_at:
            lease.check()
            time.sleep(0.001)
        raise TimeoutError("nobody stopped it")


def test_a_run_and_its_memory_are_of_the_fork_and_its_events_those_of_any_run(machine, host, tiny_folder):
    asked = comparison(tiny_folder)
    events, samplers = [], []
    for event in machine.run(asked):
        events.append(event)
        samplers += sampler_threads()
    assert samplers == [] and any(event.process_bytes for event in events if isinstance(event, Memory))
    expected = list(Machine().run(asked))
    names = [contestant.label for contestant in asked.contestants]
    assert [token_ids(events, name) for name in names] == [token_ids(expected, name) for name in names]
    kinds = [[type(event) for event in without_memory(found)] for found in (events, expected)]
    assert kinds[0] == kinds[1]
    assert [p.prompt_tokens for p in events if isinstance(p, Prefilled)] == [11, 11]
    assert [type(key) for key in machine.pool] == [], "nothing is loaded outside the fork"
    assert host.asked == [seconds_for(asked)]


def test_stop_reaches_the_fork(machine, host, tiny_folder):
    stop, found = threading.Event(), []
    for item in machine.run(Asked(model=str(tiny_folder)), stop):
        if isinstance(item, Progress):
            found.append(item.message)
            stop.set()
    assert host.over.is_set() and found != [str(os.getpid())]


def test_closing_the_stream_ends_the_fork(machine, host, tiny_folder):
    items = machine.run(Asked(model=str(tiny_folder)))
    next(item for item in items if isinstance(item, Progress))
    items.close()
    assert host.over.is_set()


def test_one_stop_is_not_anothers(machine, tiny_folder):
    stop, other = threading.Event(), threading.Event()
    first, second = (machine.run(Asked(model=str(tiny_folder)), each) for each in (stop, other))
    for items in (first, second):
        next(item for item in items if isinstance(item, Progress))
    stop.set()
    assert list(first) == []
    assert not other.is_set()
    second.close()


def test_who_stops_before_the_gpu_is_there_does_not_ask_for_it(machine, host, tiny_folder):
    stop = threading.Event()
    items = machine.run(comparison(tiny_folder), stop)
    assert isinstance(next(items), Waiting)
    stop.set()
    assert (list(items), host.asked) == ([], [])


def test_a_refusal_in_the_fork_is_raised_outside_as_it_was(machine, tiny_folder):
    with pytest.raises(BadChoice, match="^not this one; choose that$"):
        list(machine.run(Asked(model=str(tiny_folder), refusal="not this one; choose that")))


def test_a_model_is_fetched_before_the_gpu_is_asked_for(machine, host, monkeypatch):
    def prepare(model):
        yield Progress("fetching", 0.5)
        raise ModelUnavailable("nobody there")

    monkeypatch.setattr("llmq.models.opening.Model.prepare", prepare)
    items = machine.run(comparison("owner/model"))
    assert [getattr(next(items), "message", "") for _ in range(2)] == ["", "fetching · 50%"]
    with pytest.raises(ModelUnavailable):
        next(items)
    assert host.asked == []


def test_when_the_loan_is_nearly_over_the_run_ends_with_what_it_has(machine, tiny_folder, monkeypatch):
    monkeypatch.setattr(lent, "MARGIN_SECONDS", 10_000)
    events = []
    with pytest.raises(UserError, match="the 29 seconds for which the GPU was lent are over; ask for fewer"):
        for event in machine.run(comparison(tiny_folder)):
            events.append(event)
    assert not any(isinstance(event, Loaded) for event in events) and reasons(events) == {}


def test_more_tokens_and_more_methods_take_longer_and_no_loan_is_longer_than_a_day_has(tiny_folder):
    def asked(methods, tokens):
        return seconds_for(comparison(tiny_folder, methods, max_new_tokens=tokens), 0)

    assert asked("fp16", 64) < asked("fp16,llm-int8", 64) < asked("fp16,llm-int8", 256) < MOST_SECONDS
    assert asked("fp16,llm-int8", 4096) == MOST_SECONDS
    assert seconds_for(Asked(), 0) == LAB_SECONDS


FEW = {"windows": 1, "factors": (8.0,), "thresholds": (6.0,), "new_tokens": 2, "tokens": 1024, "layers": (0,)}
FEW |= {"longest": 64}
WRITTEN = {"decoding": {"tokens": 4}}  # tokens that are written, not read


@pytest.mark.parametrize("kind", [kind for kind in lab_classes() if kind != "server"])  # it needs one to ask
def test_whatever_a_lab_is_asked_and_answers_can_travel(kind, tiny_folder):
    lab = lab_classes()[kind]
    few = FEW | WRITTEN.get(kind, {})
    known = {name: value for name, value in few.items() if name in lab.__dataclass_fields__}
    if "prompt" in lab.__dataclass_fields__:
        known["prompt"] = "Hello LLaMA"
    if "models" in lab.__dataclass_fields__:
        known["models"] = (str(tiny_folder),)
    if "contestant" in lab.__dataclass_fields__:
        known["contestant"] = Contestant.parse("llm-int8")
    if "contestants" in lab.__dataclass_fields__:
        known["contestants"] = Contestant.parse_all("fp16,bnb-int8")
    question = lab(model=str(tiny_folder), **known)
    assert pickle.loads(pickle.dumps(question)) == question
    items = list(Machine().run(question))
    assert len(pickle.loads(pickle.dumps(items))) == len(items) > 1
