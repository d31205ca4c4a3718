"""Every Triton kernel, run by Triton's interpreter, against the reference: ugly shapes included.

DP4A, the fast division and programmatic launch exist on a GPU only; `test_gpu_llama` runs those.
"""

from __future__ import annotations

import numpy
import pytest
import torch

from llmq.kernels import reference
from llmq.kernels.buffers import PEAKS, TALLY, Cache, NotedVector, Noting, Partials, SplitVector
from llmq.kernels.primitives import Int8Weight, int8_linear, quantize_rows, split_rows

triton = pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
InterpreterError = pytest.importorskip("triton.runtime.errors").InterpreterError
fast = pytest.importorskip("llmq.kernels.triton", reason="triton is not installed", exc_type=ImportError)
if not fast.norm.__globals__["INTERPRETED"]:
    pytest.skip("Triton was imported to compile, not to interpret", allow_module_level=True)
try:
    fast.quantize_rows(torch.ones(2, 16).half(), quantize_rows(torch.ones(2, 16)))
except InterpreterError as error:  # Triton 3.6 with numpy 2.4, which torch 2.11 for CUDA has
    versions = f"Triton {triton.__version__}'s interpreter with numpy {numpy.__version__}"
    pytest.skip(f"{versions}: {error}; numpy<2.4 or triton>=3.7 run them", allow_module_level=True)

WIDTHS = [16, 96, 577, 1600]


def vector(width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(width, generator=torch.Generator().manual_seed(seed)).half()
    x[width // 3], x[width - 1] = 50.0, -8.0
    return x


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()


def contents(split: SplitVector) -> tuple:
    """A split as plain values: its list of outliers is in no particular order."""
    count = int(split.count)
    outliers = sorted(zip(split.index[:count].tolist(), split.value[:count].tolist(), strict=True))
    return split.codes.tolist(), split.absmax.item(), outliers


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width):
    x, gain = vector(width), vector(width, seed=1).abs()
    made, expected = torch.empty_like(x), torch.empty_like(x)
    for kernels, out in ((fast, made), (reference, expected)):
        tally = torch.ones(TALLY, dtype=torch.int32)
        kernels.norm(x, gain, 1e-5, out, empty=tally)
        assert not tally.any()
    assert difference(made, expected) < 1e-3
    rows = torch.stack((3 * x, x))
    assert difference(fast.norm_rows(rows, gain, 1e-5, Noting()).x[1], expected) < 1e-3


def noted(x: torch.Tensor, threshold: float) -> NotedVector:
    return NotedVector.empty(x, threshold, torch.zeros(TALLY, dtype=torch.int32))


def notes(made: NotedVector) -> tuple[float, list]:
    """What was noted: the largest peak and the list of outliers."""
    listed = zip(made.index[: made.count].tolist(), made.value[: made.count].tolist(), strict=True)
    return made.tally[:PEAKS].view(torch.float32).max().item(), sorted(listed)


def expected_notes(x: torch.Tensor, threshold: float) -> tuple[float, list]:
    split = SplitVector.empty(len(x), "cpu")
    reference.split(x, threshold, split)
    return contents(split)[1:]


@pytest.mark.parametrize("threshold", [6.0, 1.0, 0.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_split_and_split(width, threshold):
    x, gain, tallies = vector(width), torch.ones(width).half(), torch.ones(2, TALLY, dtype=torch.int32)
    made, expected = (SplitVector.empty(width, "cpu") for _ in range(2))
    made.count.fill_(3)
    made.value.fill_(1)  # of the token before
    fast.norm_split(x, gain, 1e-5, threshold, made, empty=tallies)
    reference.norm_split(x, gain, 1e-5, threshold, expected)
    assert contents(made) == contents(expected) and not tallies.any()
    assert made.index[: made.count].tolist() == sorted(made.index[: made.count].tolist())
    fast.split(x, threshold, made)
    reference.split(x, threshold, expected)
    assert contents(made) == contents(expected)


def test_a_wide_vector_may_be_nothing_but_outliers():
    x = torch.full((33000,), 7.0).half()
    made = SplitVector.empty(len(x), "cpu")
    fast.split(x, 6.0, made)
    assert made.count.item() == len(x) and made.index.tolist() == list(range(len(x))) and not made.codes.any()


def test_a_value_that_is_no_number_shows_in_the_product():
    for bad in (float("nan"), float("inf")):
        x, weight = vector(64), quantize_rows(torch.ones(8, 64))
        x[5] = bad
        split, out = SplitVector.empty(64, "cpu"), torch.zeros(8)
        fast.split(x, 6.0, split)
        fast.product(split, weight, out)
        assert not out.isfinite().any()
        inner = noted(torch.zeros(32).half(), 6.0)  # a value that is none, noted by the one who wrote it
        fast.product(x, quantize_rows(torch.ones(64, 64)), inner, gated=True)
        fast.product(inner, quantize_rows(torch.ones(8, 32)), out)
        assert not out.isfinite().any()


@pytest.mark.parametrize("threshold", [6.0, 0.5, 0.0])
@pytest.mark.parametrize("width", [16, 577])
@pytest.mark.parametrize("kind", ["dense", "split"])
def test_who_writes_activations_notes_what_the_next_product_needs(kind, width, threshold):
    x = vector(width)
    weight = torch.randn(2 * 40, width, generator=torch.Generator().manual_seed(3)).half() / width**0.5
    weight = weight if kind == "dense" else quantize_rows(weight)
    given = SplitVector.empty(width, "cpu")
    reference.split(x, 6.0, given)
    inner = noted(torch.zeros(40).half(), threshold)
    fast.product(x if kind == "dense" else given, weight, inner, gated=True)
    assert notes(inner) == expected_notes(inner.x, threshold)
    after, made, expected = quantize_rows(torch.randn(24, 40).half()), torch.zeros(24), torch.zeros(24)
    fast.product(inner, after, made)
    reference.product(inner, after, expected)
    assert difference(made, expected) < 1e-5


@pytest.mark.parametrize("extra", ["", "bias", "residual", "gated"])
@pytest.mark.parametrize("kind", ["dense", "weight-only", "split"])
@pytest.mark.parametrize(("rows", "width"), [(6, 16), (38, 577), (64, 1600)])
def test_product(rows, width, kind, extra):
    x = vector(width)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(3)).half()
    weight = weight if kind == "dense" else quantize_rows(weight)
    if kind == "split":
        split = SplitVector.empty(width, "cpu")
        reference.split(x, 0.5 if width == 577 else 6.0, split)  # at 0.5 more outliers than one gather takes
        assert (int(split.count) > 32) == (width == 577)
        x = split
    size = rows // 2 if extra == "gated" else rows
    options = {"gated": True} if extra == "gated" else {extra: torch.randn(size)} if extra else {}
    made, expected = torch.empty(size), torch.empty(size)
    fast.product(x, weight, made, **options)
    reference.product(x, weight, expected, **options)
    assert difference(made, expected) < 1e-5


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(6,), (38, 5), (8, 3, 12), (2, 4, 6, 8)])
def test_products(sizes, biased):
    width, generator = 96, torch.Generator().manual_seed(3)
    split = SplitVector.empty(width, "cpu")
    reference.split(vector(width), 6.0, split)
    weights = [quantize_rows(torch.randn(size, width, generator=generator).half()) for size in sizes]
    biases = [torch.randn(size) for size in sizes] if biased else []
    made, expected = ([torch.zeros(size) for size in sizes] for _ in range(2))
    fast.products(split, weights, made, biases=biases)
    reference.products(split, weights, expected, biases=biases)
    assert all(difference(a, b) < 1e-5 for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("capacity", [200, 600])
@pytest.mark.parametrize("position", [0, 1, 63, 64, 127, 128, 198])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 16), (3, 3, 24), (4, 1, 6)])
def test_attend(heads, groups, width, position, capacity):
    generator = torch.Generator().manual_seed(position)
    caches = [Cache(*torch.randn(2, groups, capacity, width, generator=generator).half())]
    caches.append(Cache(caches[0].keys.clone(), caches[0].values.clone()))
    rope = torch.randn(capacity, width, generator=generator)
    qkv = torch.randn((heads + 2 * groups) * width, generator=generator).half()
    outs = [torch.empty(heads * width).half() for _ in range(2)]
    scratch = Partials.empty(heads, width, capacity, "cpu")
    for at in (position, position + 1):  # what the first leaves behind is no part of the second
        for kernels, cache, out in zip((fast, reference), caches, outs, strict=True):
            kernels.attend(qkv, cache, rope, torch.tensor([at]), out, scratch)
        assert difference(*outs) < 1e-3
    assert not scratch.arrived.any()
    out = noted(torch.zeros(heads * width).half(), 1.0)
    fast.attend(qkv, caches[0], rope, torch.tensor([position + 1]), out, scratch)
    assert torch.equal(out.x, outs[0]) and notes(out) == expected_notes(out.x, 1.0)
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)


def test_embed():
    ids, made = torch.tensor([3, 0, 3, 8]), torch.empty(4, 1100).half()
    table = quantize_rows(torch.randn(9, 1100, generator=torch.Generator().manual_seed(0)).half())
    for weight, expected in ((table, table.dequantized()), (table.codes.half(), table.codes.half())):
        fast.embed(weight, ids, made)
        assert torch.equal(made, expected[ids].half())


def test_likeliest():
    logits = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    results = []
    for kernels in (fast, reference):
        token, chosen = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
        kernels.likeliest(logits, token, chosen)
        assert token.item() == chosen[0].item() == logits.argmax()
        results.append(chosen[1].item())
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    fast.likeliest(torch.where(torch.arange(5000) == 9, torch.nan, logits), token, chosen)
    assert chosen[1].isnan()


@pytest.mark.parametrize("threshold", [6.0, 0.3, 0.0])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 64, 32), (7, 96, 50), (33, 160, 40)])
def test_linear_rows(rows, width, outputs, threshold):
    x = torch.stack([vector(width, seed) for seed in range(rows)])
    weight, bias = quantize_rows(torch.randn(outputs, width).half()), torch.randn(outputs).half()
    exact = int8_linear(x, weight, threshold)
    sum_before = torch.randn(rows, outputs).half()
    for kernels in (fast, reference):
        noted = kernels.plain_rows(x, Noting(threshold, torch.zeros(width + 3, dtype=torch.int8)))
        assert difference(kernels.linear_rows(noted, weight), exact) < 1e-3
        assert difference(kernels.linear_rows(noted, weight, bias=bias), exact + bias) < 1e-3
        total = sum_before.clone()
        assert kernels.linear_rows(noted, weight, residual=total) is total
        assert difference(total, exact + sum_before) < 1e-3


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 64, 32), (7, 97, 50), (33, 160, 40)])
def test_linear_rows_of_weights_alone(rows, width, outputs):
    x = torch.stack([vector(width, seed) for seed in range(rows)])
    weight, bias = quantize_rows(torch.randn(outputs, width).half()), torch.randn(outputs).half()
    exact, before = x.float() @ weight.dequantized().T, torch.randn(rows, outputs).half()
    for kernels in (fast, reference):
        given = kernels.plain_rows(x, Noting())
        assert difference(kernels.linear_rows(given, weight), exact) < 1e-3
        assert difference(kernels.linear_rows(given, weight, bias=bias), exact + bias) < 1e-3
        total = before.clone()
        assert kernels.linear_rows(given, weight, residual=total) is total
        assert difference(total, exact + before) < 1e-3


@pytest.mark.parametrize("threshold", [6.0, 0.3, 0.0])
def test_rows_note_their_outliers_while_they_are_written(threshold):
    x = torch.stack([vector(576, seed) for seed in range(5)])
    gain, gate_up = vector(576).abs(), torch.cat((x, 4 * x), 1)
    weight = quantize_rows(torch.randn(32, 576).half())
    noted, plain = lambda: Noting(threshold, marks()), Noting(threshold)
    for made, expected in (
        (fast.norm_rows(x, gain, 1e-5, noted()), reference.norm_rows(x, gain, 1e-5, plain)),
        (fast.gate_rows(gate_up, noted()), reference.gate_rows(gate_up, plain)),
    ):
        assert difference(made.x, expected.x) < 1e-3
        split = split_rows(made.x, threshold)
        assert made.outlier_marks.nonzero().view(-1).tolist() == split.columns.tolist()
        assert torch.equal(made.absmax, split.absmax)
        assert difference(fast.linear_rows(made, weight), int8_linear(made.x, weight, threshold)) < 1e-3


def marks() -> torch.Tensor:
    return torch.zeros(600, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(3, 16), (50, 96), (7, 2049)])
def test_quantize_rows(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    weight[0] = 0
    out = Int8Weight(torch.empty(shape, dtype=torch.int8), torch.empty(shape[0]))
    fast.quantize_rows(weight, out)
    expected = quantize_rows(weight)
    assert torch.equal(out.codes, expected.codes) and torch.equal(out.absmax, expected.absmax)


def test_rows_rotate_into_the_cache_and_gate():
    heads, groups, width, rope = 4, 2, 6, torch.randn(50, 6)
    qkv = torch.randn(7, (heads + 2 * groups) * width).half()
    caches = [Cache(*torch.zeros(2, groups, 50, width).half()) for _ in range(2)]
    results = [k.append_rows(qkv, cache, rope, 3) for k, cache in zip((fast, reference), caches, strict=True)]
    for made, expected in zip(*results, strict=True):
        assert made.shape == expected.shape and difference(made, expected) < 1e-3
    gated, expected = (k.gate_rows(qkv, Noting()).x for k in (fast, reference))
    assert difference(gated, expected) < 1e-3


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_rows_beyond_a_prompt_hold_no_outliers(threshold):
    x, used = torch.stack([vector(96, seed) for seed in range(5)]), torch.tensor([3], dtype=torch.int32)
    x[3:, 7] = 99.0
    gate_up = torch.cat((10 * x, x), 1)
    for kernels in (fast, reference):
        marks = torch.zeros(3, 96, dtype=torch.int8)
        made = [
            kernels.plain_rows(x, Noting(threshold, marks[0], used)),
            kernels.norm_rows(x, torch.ones(96).half() * 10, 1e-5, Noting(threshold, marks[1], used)),
            kernels.gate_rows(gate_up, Noting(threshold, marks[2], used)),
        ]
        if kernels is fast:
            found = [set(mark.nonzero().view(-1).tolist()) for mark in marks]
            products = [rows.x for rows in made]
        else:
            expected = [set(split_rows(rows.x, threshold).columns.tolist()) for rows in made]
            assert all(difference(a[:3], rows.x[:3]) < 1e-3 for a, rows in zip(products, made, strict=True))
    assert found == expected and (threshold == 0.0 or 7 not in found[0])
