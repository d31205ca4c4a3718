"""One thread computes: the same one for every run, and nothing of an iterator is lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from queue import SimpleQueue
from weakref import WeakKeyDictionary

import pytest

from llmq.machine import thread as machine_thread
from llmq.machine.thread import ComputeThread, Stuck


def where(count: int):
    for _ in range(count):
        yield threading.get_ident()


def test_every_item_of_every_run_comes_from_one_thread():
    thread, seen = ComputeThread(), []
    for _ in range(3):
        consumer = threading.Thread(target=lambda: seen.extend(thread.run(where(4))))
        consumer.start()
        consumer.join()
    assert len(seen) == 12 and len(set(seen)) == 1 and seen[0] != threading.get_ident()


def test_items_come_when_they_are_asked_for():
    made = []
    stream = ComputeThread().run(made.append(i) or i for i in range(5))
    assert next(stream) == 0 and made == [0]


def test_what_is_put_aside_is_heard_while_an_item_is_made():
    aside, heard = SimpleQueue(), threading.Event()

    def slow():
        aside.put("on the way")
        assert heard.wait(60), "it came with the item, not before"
        aside.put("at the last moment")
        yield "there"

    stream = ComputeThread().run(slow(), aside)
    assert next(stream) == "on the way"
    heard.set()
    assert list(stream) == ["at the last moment", "there"]


def test_closing_while_an_item_is_made_closes_after_it():
    aside, heard, ended = SimpleQueue(), threading.Event(), []

    def slow():
        try:
            aside.put("on the way")
            assert heard.wait(60)
            yield "there"
        finally:
            ended.append(threading.get_ident())

    stream = ComputeThread().run(slow(), aside)
    assert next(stream) == "on the way"
    threading.Timer(0.1, heard.set).start()
    stream.close()
    assert len(ended) == 1 and ended[0] != threading.get_ident()


def test_an_error_arrives_where_the_items_do():
    def failing():
        yield 1
        raise KeyError("lost")

    stream = ComputeThread().run(failing())
    assert next(stream) == 1
    with pytest.raises(KeyError, match="lost"):
        next(stream)


def test_closing_closes_the_iterator_in_its_thread_before_it_returns():
    ended = []

    def held():
        try:
            yield threading.get_ident()
            yield None
        finally:
            ended.append(threading.get_ident())

    stream = ComputeThread().run(held())
    first = next(stream)
    stream.close()
    assert ended == [first]


def test_a_generator_collected_with_its_thread_is_closed_and_nobody_waits():
    """The thread ends when its object goes; what is still open then is closed where it is collected."""
    ended = []

    def held():
        try:
            yield 1
        finally:
            ended.append(threading.get_ident())

    thread = ComputeThread()
    stream = thread.run(held())
    next(stream)
    thread._tasks.put(None)  # as its finalizer does
    thread._worker.join(20)
    stream.close()
    assert ended == [threading.get_ident()]


def test_the_thread_ends_with_its_object():
    thread = ComputeThread()
    assert list(thread.run(iter(where(1)))) != []
    worker = thread._worker
    del thread
    worker.join(20)
    assert not worker.is_alive()


@pytest.fixture
def hang():
    """An iterator that never returns from its second item, until the test is over."""
    released = threading.Event()

    def items():
        yield threading.get_ident()
        released.wait(60)
        yield None

    yield items
    released.set()


def test_a_step_that_never_returns_is_given_up_and_the_next_run_has_another_thread(hang):
    thread = ComputeThread(patience=0.1)
    stream = thread.run(hang())
    first = next(stream)
    with pytest.raises(Stuck, match="did not come back"):
        next(stream)
    (second,) = thread.run(where(1))
    assert second != first and thread.given_up == 1 and thread.silent_seconds == 0.0


def test_signs_of_life_keep_a_long_step_going():
    """As a prefill gives them, which asks at every layer whether to stop."""
    thread = ComputeThread(patience=0.3)

    def slow():
        for _ in range(8):
            threading.Event().wait(0.1)
            thread.alive()
        yield "done"

    assert list(thread.run(slow())) == ["done"]


def test_a_thread_that_was_given_up_ends_when_its_step_returns(hang):
    thread = ComputeThread(patience=0.1)
    stream, worker = thread.run(hang()), thread._worker
    next(stream)
    with pytest.raises(Stuck):
        next(stream)
    hang.__closure__[0].cell_contents.set()
    worker.join(20)
    assert not worker.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux only")
def test_what_computes_stands_back_and_nobody_else_does():
    def own() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def niceness():
        found = []
        child = threading.Thread(
            target=lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        )
        child.start()
        child.join()
        yield own(), *found

    mine = own()
    assert list(ComputeThread(niceness=mine + 3).run(niceness())) == [(mine + 3, mine + 3)]
    assert list(ComputeThread().run(niceness())) == [(mine, mine)]
    assert own() == mine


def test_the_thread_is_gone_before_the_interpreter_is():
    code = """
import sys, threading
from llmq.machine.thread import ComputeThread

class Kept:
    def __del__(self):
        print("finalizing" if sys.is_finalizing() else "in time", flush=True)

def work():
    local.kept = Kept()
    yield

local, thread = threading.local(), ComputeThread()
list(thread.run(work()))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split("\n")[0]) == (0, "in time"), ended.stderr


def test_at_the_end_threads_are_told_and_waited_for_whose_owner_still_is(monkeypatch):
    """Whoever uses weak references before us has their own end of the process after ours, and with it our owners'."""
    monkeypatch.setattr(machine_thread, "_workers", WeakKeyDictionary())
    thread = ComputeThread()
    assert len(list(thread.run(where(1)))) == 1
    (worker,) = machine_thread._workers
    machine_thread._see_them_out()
    assert not worker.is_alive()
