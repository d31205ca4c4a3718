"""Bits as boxes in a real Chromium: every code of every format is the number that torch reads in it."""

from __future__ import annotations

import math

import pytest
import torch
from browser_support import new_tab

from llmq.ui.shell.assets import script

pytestmark = pytest.mark.browser
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.fixture(scope="module")
def tab(browser):
    page = new_tab(browser)
    yield page
    page.close()


def decoded(tab, function: str, codes: int) -> list[str]:
    """What the script makes of the codes from 0 on."""
    many = f"Array.from({{ length: {codes} }}, (_, code) => code).map((code) => {function})"
    return tab.evaluate(
        f"() => {{ {script('bits_values.js')}\nreturn {many}.map((x) => Object.is(x, -0) ? '-0' : String(x)); }}"
    )


def exact(x: float) -> str:
    """A number of which any two that differ, by the sign of 0 too, differ."""
    return "nan" if math.isnan(x) else x.hex()


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_of_a_floating_point_format_is_torchs_number(tab, name):
    dtype = FLOATS[name]
    size = 2 ** (8 * dtype.itemsize)
    bits = torch.arange(size).to(torch.uint8 if size == 256 else torch.int32)
    values = (bits if size == 256 else bits.to(torch.int16)).view(dtype).double().tolist()
    found = decoded(tab, f"decodeFloat('{name}', code)", size)
    assert [exact(float(text)) for text in found] == [exact(value) for value in values]


def test_every_int8_code_is_its_number(tab):
    values = torch.arange(256).to(torch.uint8).view(torch.int8).tolist()
    assert [int(text) for text in decoded(tab, "decodeInteger(code)", 256)] == values
