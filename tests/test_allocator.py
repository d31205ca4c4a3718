"""What torch is asked of its allocator, and whether it does it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from llmq.machine import allocator

SEEN = """
import json
from llmq.machine.door import Machine
import torch
Machine()
held = torch.zeros(1_000_000, device="cuda:0")
print(json.dumps([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()]))
"""


def test_segments_grow_unless_somebody_said_otherwise(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    environment = {}
    allocator.let_segments_grow(environment)
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": allocator.GROWING}
    for name in allocator.NAMES:
        theirs = {name: "max_split_size_mb:64"}
        allocator.let_segments_grow(theirs)
        assert theirs == {name: "max_split_size_mb:64"}
    monkeypatch.setattr(sys, "platform", "win32")
    allocator.let_segments_grow(other := {})
    assert other == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_s_segments_grow_once_there_is_a_machine():
    """Also where torch was imported before."""
    environment = {name: value for name, value in os.environ.items() if name not in allocator.NAMES}
    done = subprocess.run([sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [True]
