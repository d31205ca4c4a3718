"""The line in front of the device: in the order of asking, fair to addresses; whoever leaves, however they leave."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import ExitStack

import pytest
from scripted import Clock

from llmq.machine.queue import HALF_LIFE, DeviceQueue

SOON = 60  # seconds, at the most: what is waited for comes at once, on a busy machine a little later


def test_an_empty_line_is_passed_at_once():
    with DeviceQueue().turn() as turn:
        assert (turn.position, turn.wait(0)) == (0, True)


def test_positions_count_those_in_front():
    queue = DeviceQueue()
    with queue.turn() as first, queue.turn() as second, queue.turn() as third:
        assert [turn.position for turn in (first, second, third)] == [0, 1, 2]
        assert [turn.wait(0) for turn in (first, second, third)] == [True, False, False]
        assert queue.waiting == 3
    assert queue.waiting == 0


def test_leaving_while_waiting_moves_those_behind_up():
    queue = DeviceQueue()
    with queue.turn() as first, ExitStack() as middle:
        middle.enter_context(queue.turn())
        with queue.turn() as third:
            middle.close()
            assert (first.position, third.position) == (0, 1)
            assert not third.wait(0)


def test_the_first_may_leave_before_the_second():
    queue = DeviceQueue()
    with ExitStack() as first:
        first.enter_context(queue.turn())
        with queue.turn() as second:
            first.close()
            assert (second.position, second.wait(0)) == (0, True)
    with queue.turn() as later:
        assert later.wait(0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside_leaves_the_line_and_goes_on(error):
    queue = DeviceQueue()
    with pytest.raises(error), queue.turn() as turn:
        assert turn.wait(0)
        raise error
    with queue.turn() as following:
        assert following.wait(0)


def test_waiting_ends_after_its_timeout():
    queue = DeviceQueue()
    with queue.turn(), queue.turn() as second:
        started = time.monotonic()
        assert second.wait(0.05) is False
        assert 0.05 <= time.monotonic() - started < SOON


def test_waiting_ends_when_the_turn_comes():
    """Woken by the one who leaves, long before the timeout."""
    queue, outcome, asked = DeviceQueue(), [], threading.Event()

    def follow():
        with queue.turn() as turn:
            asked.set()
            outcome.append(turn.wait(60))

    follower = threading.Thread(target=follow, daemon=True)
    with queue.turn():
        follower.start()
        assert asked.wait(SOON)
        follower.join(0.05)
        assert outcome == []
    follower.join(SOON)
    assert outcome == [True]


def test_many_threads_pass_in_order_and_one_at_a_time():
    queue, order, inside, most = DeviceQueue(), [], [], []
    asked = [threading.Event() for _ in range(6)]

    def visit(number: int):
        if number:
            asked[number - 1].wait(SOON)
        with queue.turn() as turn:
            asked[number].set()
            if number == 0:
                asked[-1].wait(SOON)  # hold the device until everybody stands in line
            assert turn.wait(SOON)
            inside.append(number)
            most.append(len(inside))
            order.append(number)
            time.sleep(0.002)
            inside.remove(number)

    threads = [threading.Thread(target=visit, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert order == [0, 1, 2, 3, 4, 5]
    assert most == [1] * 6


@pytest.fixture
def clock() -> Clock:
    return Clock()


def use(queue: DeviceQueue, clock: Clock, address: str, seconds: float) -> None:
    with queue.turn(address):
        clock.take(seconds)


def order(queue: DeviceQueue, *addresses: str) -> list[str]:
    """Who has the device when, of those who stand in line behind somebody."""
    with ExitStack() as first:
        first.enter_context(queue.turn("somebody"))
        waiting = [(turn := queue.turn(address), turn.__enter__(), address) for address in addresses]
    found = []
    while waiting:
        (now,) = (each for each in waiting if each[1].position == 0)
        found.append(now[2])
        now[0].__exit__(None, None, None)
        waiting.remove(now)
    return found


def test_who_used_the_device_least_comes_first(clock):
    queue = DeviceQueue(clock)
    use(queue, clock, "greedy", 60.0)
    use(queue, clock, "modest", 2.0)
    assert order(queue, "greedy", "greedy", "modest", "new") == ["new", "modest", "greedy", "greedy"]


def test_turns_of_one_address_come_as_they_were_asked_for_while_time_passes():
    """Old use counts less from one look at the clock to the next, and is that of one moment for all."""
    queue = DeviceQueue(itertools.count().__next__)
    with queue.turn("a"):
        pass
    with queue.turn("somebody"), ExitStack() as line:
        turns = [line.enter_context(queue.turn("a")) for _ in range(3)]
        assert [turn.position for turn in turns] == [1, 2, 3]


def test_whoever_has_the_device_keeps_it(clock):
    queue = DeviceQueue(clock)
    use(queue, clock, "greedy", 60.0)
    with queue.turn("greedy") as first, queue.turn("new") as second:
        assert (first.position, second.position, first.wait(0), second.wait(0)) == (0, 1, True, False)


def test_what_was_used_long_ago_counts_less(clock):
    queue = DeviceQueue(clock)
    use(queue, clock, "then", 60.0)
    clock.take(HALF_LIFE)
    use(queue, clock, "now", 31.0)
    assert order(queue, "now", "then") == ["then", "now"]
    clock.take(40 * HALF_LIFE)
    use(queue, clock, "now", 0.0)
    assert queue._used == {}, "an address of long ago takes no memory"


def test_one_who_waits_looks_again_when_it_is_woken():
    queue, stop = DeviceQueue(), threading.Event()
    with queue.turn(), queue.turn() as second:
        waiter = threading.Thread(target=second.wait, args=(60, stop.is_set), daemon=True)
        waiter.start()
        stop.set()
        queue.wake()
        waiter.join(SOON)
        assert not waiter.is_alive()
