"""The line in front of the device: in the order of asking, whoever leaves, however they leave."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from llmq.machine.queue import DeviceQueue

SOON = 5.0  # seconds a busy machine may need for what takes microseconds


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
