"""Who is let in, for how long, and who still listens: admission apart from whatever computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from scripted import Clock

from llmq.engine.loading import Key
from llmq.errors import Ended
from llmq.events import Progress, Waiting
from llmq.machine.door import Lease, Machine
from llmq.machine.jobs import BY_END, BY_OWNER, UNHEARD, Busy, Jobs, Limits, Visitor
from llmq.machine.thread import ComputeThread, Stuck
from llmq.methods import METHODS

SOON = 20.0  # seconds a busy machine may need
LIMITS = Limits(pending=5, pending_an_address=2, seconds=100.0, least_seconds=40.0)


class Asked:
    """A question that goes on until it is stopped, or as long as it is told."""

    device, patient, model = "cpu", True, "demo"

    def __init__(self, items: int = 10**9):
        self.items, self.begun = items, False

    def run(self, lease: Lease) -> Iterator[object]:
        self.begun = True
        for number in range(self.items):
            yield Progress(str(number))
            if lease.stop.is_set():
                return


class Ahead(Asked):
    patient = False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(clock) -> Iterator[Jobs]:
    found = Jobs(limits=LIMITS, clock=clock)
    yield found
    found.close()


def begun(jobs: Jobs, who: str, address: str = "") -> Iterator[object]:
    """A job that has been let in."""
    stream = jobs.run(Asked(), Visitor.of(who, address))
    next(stream)
    return stream


def running(jobs: Jobs, who: str, address: str = "") -> Iterator[object]:
    """A job that computes."""
    stream = begun(jobs, who, address)
    while isinstance(next(stream), Waiting):
        pass
    return stream


def rest(stream: Iterator[object]) -> str:
    """Take all that comes; why it ended early, '' where it did not."""
    try:
        for _ in stream:
            pass
    except Ended as ended:
        return str(ended)
    return ""


def test_a_visitor_has_one_question_at_a_time(jobs):
    with ExitStack() as opened:
        opened.callback(begun(jobs, "ann").close)
        with pytest.raises(Busy, match="stop it, or wait"):
            begun(jobs, "ann")
        opened.callback(begun(jobs, "bob").close)
        assert [job.owner for job in jobs] == ["ann", "bob"]
    assert list(jobs) == []


def test_who_has_stopped_may_ask_again_at_once(jobs):
    """The first may still be inside a slow step."""
    first = running(jobs, "ann")
    assert jobs.stop("ann") == 1
    second = begun(jobs, "ann")
    assert rest(first) == ""
    second.close()


def test_loading_ahead_keeps_nobody_from_asking(jobs):
    ahead = jobs.run(Ahead(), "ann")
    next(ahead)
    begun(jobs, "ann").close()
    ahead.close()


def test_an_address_and_the_server_take_so_many(jobs):
    with ExitStack() as opened:
        for who, address in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "2")):
            opened.callback(begun(jobs, who, address).close)
        with pytest.raises(Busy, match="2 questions from your network"):
            begun(jobs, "e", "1")
        opened.callback(begun(jobs, "e", "3").close)
        with pytest.raises(Busy, match="5 questions wait already"):
            begun(jobs, "f", "4")
    begun(jobs, "f", "4").close()


def test_time_is_shorter_while_others_wait(jobs, clock):
    alone = running(jobs, "ann")
    clock.take(99.0)
    jobs.look()
    next(alone)
    other = begun(jobs, "bob")
    waiting = threading.Thread(target=rest, args=(other,), daemon=True)
    waiting.start()
    while jobs.machine.queue.waiting < 2:
        threading.Event().wait(0.01)
    jobs.look()
    assert rest(alone) == "its 50 seconds were over, and others wait"
    jobs.stop("bob")
    waiting.join(SOON)
    assert [LIMITS.seconds_beside(others) for others in (0, 1, 2, 30)] == [100, 50, 40, 40]


def test_a_job_alone_has_its_whole_time(jobs, clock):
    stream = running(jobs, "ann")
    clock.take(101.0)
    jobs.look()
    assert rest(stream) == "its 100 seconds were over"


def test_who_asks_and_does_not_listen_never_has_the_device(jobs, clock):
    jobs.listeners.told = True
    question = Asked(1)
    stream = jobs.run(question, "ann")
    assert isinstance(next(stream), Waiting)
    clock.take(LIMITS.unheard_seconds + 1)
    assert rest(stream).startswith(UNHEARD) and not question.begun


def test_a_job_begins_once_somebody_listens(jobs):
    jobs.listeners.told = True
    question = Asked(1)
    stream = jobs.run(question, "ann")
    next(stream)
    with jobs.listeners.listening("ann"):
        assert rest(stream) == "" and question.begun
    assert not jobs.listeners.hear("ann") and not jobs.listeners._count


def test_a_job_ends_soon_after_its_listener_has_gone(jobs, clock):
    jobs.listeners.told = True
    with jobs.listeners.listening("ann"):
        stream = running(jobs, "ann")
        jobs.look()
    clock.take(LIMITS.left_seconds / 2)
    jobs.look()
    next(stream)
    clock.take(LIMITS.left_seconds)
    jobs.look()
    assert rest(stream) == UNHEARD


def test_the_owner_ends_one_job_by_its_number(jobs):
    ann, bob = running(jobs, "ann"), begun(jobs, "bob")
    number = next(job.number for job in jobs if job.owner == "ann")
    assert (jobs.end(number), jobs.end(10**6)) == (1, 0)
    assert rest(ann) == BY_OWNER
    next(bob)
    bob.close()


def test_a_server_that_ends_tells_whoever_waits_and_lets_nobody_in(jobs):
    streams = [running(jobs, "ann"), begun(jobs, "bob")]
    jobs.close()
    assert [rest(stream) for stream in streams] == [BY_END] * 2
    with pytest.raises(Busy, match=BY_END):
        begun(jobs, "eve")


class Hanging(Asked):
    """Its second step never returns until `released`."""

    def __init__(self):
        self.released = threading.Event()

    def run(self, lease: Lease) -> Iterator[object]:
        lease.pool.get(Key.of("a model", METHODS["fp16"], "cpu"))
        yield Progress("loaded")
        self.released.wait(SOON)
        lease.pool.get(Key.of("another", METHODS["fp16"], "cpu"))
        yield Progress("too late")


def test_a_question_that_hangs_is_given_up_with_what_it_loaded_and_the_next_one_is_answered():
    from scripted import ScriptedEngine, in_order

    machine = Machine(lambda key: ScriptedEngine(Clock(), in_order([])), thread=ComputeThread(patience=0.1))
    question, jobs = Hanging(), Jobs(machine)
    stream = jobs.run(question, "ann")
    with pytest.raises(Stuck, match="starts anew"):
        for _ in stream:
            pass
    assert list(machine.pool) == [] and list(jobs) == [] and machine.queue.waiting == 0
    assert rest(jobs.run(Asked(3), "ann")) == ""
    question.released.set()
    assert rest(jobs.run(Asked(3), "ann")) == "" and list(machine.pool) == [], "what came too late is nowhere"
