"""Limits of containers, as the kernel writes them down: version 1 and 2, one's own group and those above."""

from __future__ import annotations

import math
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_runs import key_of

from llmq import cgroup, environment, telemetry
from llmq.engine.loading import load_engine

NO_LIMIT = "9223372036854771712"  # version 1's word for none


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write the files of a machine's groups; '/proc/self/cgroup' is the process's own."""

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")

    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    return write


def v1(quota: str, period: str = "100000", folder: str = "cpu") -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "odd"}, math.inf),
        ({"cpu.max": ""}, math.inf),
        (v1("-1"), math.inf),
        (v1("100000"), 1),
        (v1("20000", "50000"), 0.4),
        ({"cpu/cpu.cfs_quota_us": "100000"}, math.inf),
        ({"own": "0::/a/b", "cpu.max": "max 100000", "a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ({"own": "0::/a/b", "a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ({"own": "0::/not/here", "cpu.max": "200000 100000"}, 2),
        ({"own": "4:memory:/m\n3:cpu,cpuacct:/docker/1\n0::/"} | v1("300000", folder="cpu/docker/1"), 3),
        ({"own": "4:memory:/docker/1\n3:cpuset:/docker/1"} | v1("300000", folder="cpu/docker/1"), math.inf),
        ({"own": "0::/x", "unified/x/cpu.max": "100000 100000"}, 1),
    ],
)
def test_the_smallest_quota_on_the_way_up_holds(files, expected, groups):
    groups(files)
    assert cgroup.processors() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "5000", "memory.current": "3000"}, 2000),
        ({"memory.max": "5000", "memory.current": "3000", "memory.stat": "anon 9\ninactive_file 700"}, 2700),
        ({"memory.max": "max", "memory.current": "3000"}, 10**6),
        ({"memory.max": "5000"}, 10**6),
        ({}, 10**6),
        ({"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "3000"}, 2000),
        ({"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": "3000"}, 10**6),
        (
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "3000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 700",
            },
            2700,
        ),
        ({"own": "0::/a", "memory.max": "max", "a/memory.max": "50", "a/memory.current": "9"}, 41),
        ({"own": "4:memory:/d", "memory/d/memory.limit_in_bytes": "50", "memory/d/memory.usage_in_bytes": "9"}, 41),
    ],
)
def test_free_bytes_stay_under_the_smallest_limit_on_the_way_up(files, expected, groups, monkeypatch):
    groups(files)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert telemetry.free_bytes("cpu") == expected


def test_the_page_says_how_many_processors_are_granted(groups, monkeypatch):
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 4)
    assert environment.device_label("cpu").endswith(", 4 cores")
    groups(v1("150000"))
    assert environment.device_label("cpu").endswith(", 4 cores, 1.5 of them granted")


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("150000", 2), ("20000", 1), ("odd", 8), ("1600000", 8)])
def test_a_container_gets_no_more_threads_than_processors(quota, expected, groups, monkeypatch):
    from llmq.engine.llama_cpu import usable_threads

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    groups(v1(quota))
    assert usable_threads() == expected


def test_transformers_gets_no_more_threads_either(groups, tiny_folder):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    groups(v1("100000"))
    try:
        load_engine(key_of(tiny_folder, "fp16"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
