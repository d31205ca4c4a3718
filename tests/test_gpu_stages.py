"""The steps of a bitsandbytes layer on a real GPU: its host waits, ours and FP16's does not, and the steps add up.

Run with LLMQ_TEST_GPU=1, so that Triton compiles instead of interpreting.
"""

from __future__ import annotations

import os

import pytest
import torch

from llmq.bench.marks import Marks, clock_of, counted
from llmq.bench.stages import TOLERANCE, Case, Side, layer_of, one_pass
from llmq.contestant import Contestant
from llmq.methods.bnb_steps import STEPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not os.environ.get("LLMQ_TEST_GPU"), reason="Triton interprets without LLMQ_TEST_GPU=1"),
]
GPU, SHAPE = "cuda:0", (4096, 4096)


def side_of(method: str, rows: int, outliers: int, layers: int = 1) -> Side:
    """After a call, so that nothing is compiled any more."""
    contestant = Contestant.parse(method)
    side = Side(contestant, [layer_of(contestant, SHAPE, GPU) for _ in range(layers)])
    side.begin(Case(SHAPE, rows, outliers).input(GPU))
    side.call()
    return side


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("outliers", [0, 4])
@torch.inference_mode()
def test_only_bitsandbytes_waits_for_the_gpu(rows, outliers):
    found = {name: counted(GPU, side_of(name, rows, outliers).call) for name in ("fp16", "bnb-int8", "llm-int8")}
    waits = {name: counts["host_syncs"] for name, counts in found.items()}
    launches = {name: counts["kernel_launches"] for name, counts in found.items()}
    assert waits["fp16"] == waits["llm-int8"] == 0 and waits["bnb-int8"] >= (2 if outliers else 1)
    assert max(launches["fp16"], launches["llm-int8"]) < launches["bnb-int8"]


@pytest.mark.parametrize("rows", [1, 64])
@torch.inference_mode()
def test_the_steps_add_up_to_the_whole_layer(rows):
    side, marks = side_of("bnb-int8", rows, 4, layers=8), Marks(clock_of(GPU))
    marks.reprice(lambda: one_pass(side, marks, True, GPU), 20)
    rounds = [[one_pass(side, marks, told, GPU) for told in (False, True)] for _ in range(50)]
    whole, steps = (min(sum(found.values()) for found in passes) for passes in zip(*rounds, strict=True))
    assert steps == pytest.approx(whole, rel=TOLERANCE)
    assert all(found.keys() == STEPS.keys() for _, found in rounds)
