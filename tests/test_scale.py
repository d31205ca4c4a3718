"""The queue of docs/scale.md: right where queueing theory knows the answer, and near to a crowd that was measured."""

from __future__ import annotations

import json
import random
from statistics import mean

import pytest
from simulate_server import (
    AN_ADDRESS,
    CROWD,
    HALF_LIFE,
    LEFT_SECONDS,
    PAGE,
    PENDING,
    Seen,
    Server,
    Service,
    arrivals,
    crowd,
    filled_page,
    together,
)  # fmt: skip

from llmq.machine import queue
from llmq.machine.jobs import Limits

NEAR = 0.15


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_random_arrivals_wait_as_pollaczek_and_khinchine_say(load, monkeypatch):
    """One server, Poisson arrivals, equal services: the mean wait is load * service / (2 (1 - load))."""
    waits, service = [], 2.0
    monkeypatch.setattr(Seen, "told", lambda seen, seconds: waits.append(mean(seen.starts)))
    for seed in range(6):
        arrivals(lambda hour: 3600 * load / service, 12, 1, Service.same(service, 0), seed)
    assert mean(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_a_crowd_that_is_always_there_keeps_the_device_busy(monkeypatch):
    monkeypatch.setattr("simulate_server.WEIGHTS", (1, 0, 0, 0))
    told = crowd(30, 600, 0.1, Service.same(0.5))
    assert told["utilisation"] == pytest.approx(1, abs=0.01) and told["runs"] == pytest.approx(1200, abs=3)


def test_the_last_of_a_course_waits_for_all_before():
    told = together(500, 60, Service.same(1.0), most=500)
    assert (told["runs"], told["refused"]) == (500, 0) and 500 <= told["last_seconds"] <= 502


def test_whoever_finds_the_line_full_is_refused():
    told = together(500, 1, Service.same(10.0))
    assert (told["runs"], told["refused"]) == (PENDING, 500 - PENDING)


def test_whoever_has_used_the_device_least_comes_first():
    server, order = Server(random.Random(0), Service.same(1.0)), []

    def ask(address: int):
        yield from server.run(address)
        order.append(address)

    def come():
        server.env.process(ask(1))
        yield server.env.timeout(1.5)
        for address in (1, 1, 2):
            server.env.process(ask(address))

    server.env.process(ask(1))
    server.env.process(come())
    server.env.run()
    assert order == [1, 1, 2, 1, 1], "before the two that asked at the same moment, in front of it"


def test_the_models_constants_are_the_servers():
    limits = Limits()
    assert (HALF_LIFE, LEFT_SECONDS) == (queue.HALF_LIFE, limits.left_seconds)
    assert (PENDING, AN_ADDRESS) == (limits.pending, limits.pending_an_address)
    assert f"from {Limits().pending} in line on, {Limits().pending_an_address} from one" in " ".join(
        PAGE.read_text().split()
    )


def test_the_page_is_what_the_simulation_says():
    assert PAGE.read_text() == filled_page(PAGE.read_text())


def test_the_stored_crowd_is_simulated_as_the_page_says():
    """The simulation made anew of the actions that were measured, beside what thirty visitors saw: within 15 %."""
    stored = json.loads(CROWD.read_text())
    service = Service(**stored["actions"])
    told = [crowd(stored["clients"], stored["seconds"], stored["pause"], service, seed) for seed in range(9)]
    assert stored["clients"] == 30 and stored["measured"]["errors"] == stored["measured"]["mixed"] == 0
    for name, ratio in stored["simulated_over_measured"].items():
        again = mean(one[name] for one in told)
        assert again / stored["measured"][name] == pytest.approx(ratio, abs=0.001)
        assert again == pytest.approx(stored["measured"][name], rel=NEAR), name
