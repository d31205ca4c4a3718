"""The kernels compile for GPUs that are not here, and hold the instructions they are written for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
PROGRAM = Path(__file__).with_name("compile_kernels.py")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def marks(lines: list[str], kernel: str, capability: int) -> list[set[str]]:
    return [set(line.split()[2:]) for line in lines if line.startswith(f"{kernel} sm_{capability} ")]


def test_every_decode_kernel_compiles_from_turing_to_hopper(lines):
    kernels = {line.split()[0] for line in lines}
    for capability in (75, 80, 90):
        many_rows = {"matrix._int8_linear", "matrix._codes_linear", "by_row._product"}
        assert {k for k in kernels if marks(lines, k, capability)} >= kernels - many_rows
    assert not any("mma" in mark for line in lines if " sm_75 " in line for mark in line.split()[2:])


def test_int8_products_are_integer_instructions(lines):
    found = [mark for c in (75, 80, 90) for mark in marks(lines, "product._split", c)]
    assert all(("dp4a" in mark) != ("unpacked" in mark) for mark in found) and len(found) > 6
    assert marks(lines, "matrix._int8_linear", 80) == [{"mma.sync"}]
    assert marks(lines, "matrix._int8_linear", 90) == [{"wgmma.mma", "griddepcontrol.wait"}]
    assert marks(lines, "by_row._product", 80) == 3 * [{"mma.sync"}]
    assert marks(lines, "by_row._product", 90) == 3 * [{"wgmma.mma"}]


def test_a_norm_of_several_rows_sums_in_the_order_of_one(lines):
    """So many neighbours in each thread, of as many warps: the sums' bits depend on both."""
    for capability in (75, 80, 90):
        one = [mark for found in marks(lines, "norm._vector", capability)[:2] for mark in found if "each" in mark]
        (several,) = [mark for found in marks(lines, "by_row._norm", capability) for mark in found if "each" in mark]
        assert one == 2 * [several]


def test_kernels_wait_for_each_other_where_they_may_overlap(lines):
    apart = {"weights._quantize"}  # which runs while a model is loaded
    apart |= {"by_row._norm", "by_row._plain", "by_row._product"}  # quicker one after the other
    apart |= {"attention._part"}  # of several rows as well
    for kernel in {line.split()[0] for line in lines} - apart:
        assert all("griddepcontrol.wait" in found for found in marks(lines, kernel, 90))
        assert not any("griddepcontrol.wait" in found for c in (75, 80) for found in marks(lines, kernel, c))
