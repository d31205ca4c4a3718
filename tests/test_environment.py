"""What stands beside a figure: the host, and what speaks against measuring here and now."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from llmq import environment, telemetry
from llmq.environment import describe, doubts, host


@pytest.fixture
def quiet(monkeypatch):
    """A clean checkout on an idle machine with nobody else on its GPU."""
    monkeypatch.setenv("LLMQ_COMMIT", "abc123")
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 9.0, 9.0))
    monkeypatch.setattr(telemetry, "other_processes", lambda device: 0)


def test_a_quiet_machine_raises_no_doubt(quiet):
    assert list(doubts("cuda:0")) == [] == list(doubts("cpu"))


def test_changed_files_are_told(quiet, monkeypatch):
    monkeypatch.setenv("LLMQ_COMMIT", "abc123-dirty")
    assert list(doubts("cpu")) == ["files differed from commit abc123, so nobody can repeat this; commit first"]


def test_others_at_work_are_told(quiet, monkeypatch):
    monkeypatch.setattr(telemetry, "other_processes", lambda device: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (2.1, 0.0, 0.0))
    busy = "the processors were busy before: load 2.1 on 4 cores"
    assert list(doubts("cuda:0")) == ["other processes on the GPU: 2", busy]
    assert list(doubts("cpu")) == [busy], "a CPU has no GPU to ask about"
    monkeypatch.setattr(telemetry, "other_processes", lambda device: None)
    assert list(doubts("cuda:0")) == [busy], "what the driver does not tell is no doubt"


@pytest.mark.parametrize(
    ("clock", "highest"), [(SimpleNamespace(max=3500.0), 3500.0), (SimpleNamespace(max=0.0), None)]
)
def test_the_host_has_its_name_and_what_the_system_tells_of_its_clock(clock, highest, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_freq", lambda: clock)
    found = host()
    assert found["highest_mhz"] == highest and found["cpu"] == environment._cpu_name() and found["cores"] >= 1
    assert describe("cpu")["host"] == found


def test_a_system_that_has_no_clock_to_read_is_no_failure(monkeypatch):
    def fail():
        raise NotImplementedError("can't find current frequency file")

    monkeypatch.setattr(psutil, "cpu_freq", fail)
    assert host()["highest_mhz"] is None
