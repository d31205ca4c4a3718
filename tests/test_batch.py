"""Sequences decoded together: each is what it is alone, bit for bit where kernels are ours."""

from __future__ import annotations

import pytest
import torch
from test_llama_cuda import KINDS, pair

from llmq.engine.sampling import SamplingSettings
from llmq.kernels import reference
from llmq.kernels.buffers import COUNTERS, Cache, Noting, Partials, Rows, SplitVector
from llmq.kernels.primitives import Int8Weight, quantize_rows

PROMPTS = [list(b"Hello LLaMA, how are you?"), list(b"One"), list(b"A llama is a camelid of the Andes.")]
THRESHOLDS = [6.0, 0.5, 0.0]


def alone(engine, prompt: list[int], tokens: int, **sampling) -> list[tuple[int, float]]:
    generation = engine.start(prompt, SamplingSettings(max_new_tokens=tokens, **sampling))
    found = [generation.step() if place else generation.prefill() for place in range(tokens)]
    generation.close()
    return [(token.token_id, token.logprob) for token in found]


def together(engine, prompts: list[list[int]], tokens: int, **sampling) -> list[list[tuple[int, float]]]:
    generation = engine.start_several(prompts, SamplingSettings(max_new_tokens=tokens, **sampling))
    found = [generation.step() if place else generation.prefill() for place in range(tokens)]
    generation.close()
    return [[(token.token_id, token.logprob) for token in row] for row in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["fp32", "llm-int8", "int8-weight-only", "llm-int8-head"])
def test_every_sequence_is_what_it_is_alone(kind, method):
    _, lean = pair(method, **KINDS[kind])
    for prompt, row in zip(PROMPTS, together(lean, PROMPTS, 6), strict=True):
        expected = alone(lean, prompt, 6)
        assert [token for token, _ in row] == [token for token, _ in expected]
        assert [logprob for _, logprob in row] == pytest.approx([logprob for _, logprob in expected], abs=2e-3)


def test_a_batch_is_drawn_again_by_its_seed_and_its_memory_is_used_again():
    _, lean = pair()
    first = together(lean, PROMPTS, 5, temperature=0.9, seed=3)
    batch_and_reader = set(lean.spare)
    assert first == together(lean, PROMPTS, 5, temperature=0.9, seed=3) and set(lean.spare) == batch_and_reader
    assert first != together(lean, PROMPTS, 5, temperature=0.9, seed=4)
    twins = together(lean, [PROMPTS[0]] * 8, 5, temperature=1.5)
    assert len({tuple(row) for row in twins}) > 1, "each sequence has noise of its own"


def test_a_batch_ends_where_its_positions_end():
    _, lean = pair()
    generation = lean.start_several(PROMPTS, SamplingSettings(max_new_tokens=2))
    with pytest.raises(AssertionError, match="before prefill"):
        generation.step()
    generation.prefill()
    assert generation.kv_bytes > 0
    generation.step()
    generation.step()
    with pytest.raises(AssertionError, match="ends"):
        generation.step()
    generation.close()
    assert generation.kv_bytes == 0
    with pytest.raises(AssertionError, match="longer than the context"):
        lean.start_several([[1] * (lean.context + 1)], SamplingSettings())


def test_attention_is_cut_for_each_sequence_as_for_it_alone():
    """Whoever has a longer neighbour sums in the order in which it sums alone."""
    _, lean = pair(max_position_embeddings=1024)
    prompts = [PROMPTS[0], PROMPTS[0] * 24]
    generation = lean.start_several(prompts, SamplingSettings(max_new_tokens=20))
    generation.prefill()
    cut = generation._graph.decoder._scratch.sequence_parts.tolist()
    for prompt, part in zip(prompts, cut, strict=True):
        lone = lean.start(prompt, SamplingSettings(max_new_tokens=20))
        lone.prefill()
        assert lone._workspace.decoder._scratch.part == part
    assert cut == [32, 64]


@pytest.mark.parametrize("width", [12, 40])
def test_what_stays_in_16_bit_beside_int8_is_gated_in_16_bit(width):
    x, weight = torch.randn(3, width).half(), torch.randn(2 * 10, width).half()
    found = reference.gated_rows(Rows(x, by_row=True), weight, Noting())
    assert found.x.dtype == torch.float16
    assert torch.equal(found.x, reference.gated_rows(Rows(x), weight, Noting()).x)


@pytest.fixture(scope="module")
def fast():
    """Triton's kernels, run by its interpreter."""
    return pytest.importorskip("test_kernels").fast


def rows_of(rows: int, width: int) -> torch.Tensor:
    """Activations with outliers in columns that some rows share."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).half()
    x[:, width // 3] *= 20
    x[0, width - 1], x[-1, 1] = 60000.0, -8.0
    return x


def marks(width: int) -> torch.Tensor:
    return torch.zeros(width + COUNTERS, dtype=torch.int32)


def split_of(fast, x: torch.Tensor, threshold: float) -> SplitVector:
    made = SplitVector.empty(len(x), "cpu")
    fast.split(x, threshold, made)
    return made


def weight_of(outputs: int, width: int) -> Int8Weight:
    return quantize_rows(torch.randn(outputs, width, generator=torch.Generator().manual_seed(outputs)))


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("rows", "width"), [(2, 64), (5, 577)])
def test_rows_are_decomposed_as_each_alone(fast, rows, width, threshold):
    x, gain = rows_of(rows, width), torch.rand(width).half()
    plain = fast.plain_rows(x, Noting(threshold, marks(width), by_row=True))
    normed = fast.norm_rows(x, gain, 1e-5, Noting(threshold, marks(width), by_row=True))
    for row, alone in enumerate(x):
        made = SplitVector.empty(width, "cpu")
        fast.norm_split(alone, gain, 1e-5, threshold, made)
        for found, expected in ((plain, split_of(fast, alone, threshold)), (normed, made)):
            assert torch.equal(found.codes[row], expected.codes) and found.absmax[row] == expected.absmax
    outliers = (plain.x.abs() >= threshold).any(0) & (threshold > 0)
    count = int(plain.outlier_marks[-COUNTERS])
    assert sorted(plain.columns[:count].tolist()) == outliers.nonzero().view(-1).tolist()
    assert torch.equal(plain.outlier_marks[:width] != 0, outliers)


@pytest.mark.parametrize("extra", ["", "bias", "residual", "gated", "scores"])
@pytest.mark.parametrize(("rows", "width", "outputs", "threshold"), [(2, 64, 32, 6.0), (17, 97, 18, 0.5)])
def test_a_rows_product_is_that_of_the_row_alone(fast, rows, width, outputs, threshold, extra):
    x, weight = rows_of(rows, width), weight_of(outputs, width)
    split = fast.plain_rows(x, Noting(threshold, marks(width), by_row=True))
    bias = torch.randn(outputs).half() if extra == "bias" else None
    residual = torch.randn(rows, outputs).half() if extra == "residual" else None
    before = None if residual is None else residual.clone()
    found = torch.empty(rows, outputs)
    if extra == "gated":
        found = fast.gated_rows(split, weight, Noting()).x
    elif extra == "scores":
        fast.scores(split, weight, found)
    else:
        found = fast.linear_rows(split, weight, bias=bias, residual=residual)
    if not extra:
        assert torch.equal(found, fast.linear_rows(split, weight))  # once more, of the same notes
    for row, alone in enumerate(x):
        expected = torch.empty(found.shape[1], dtype=found.dtype)
        given = {"bias": bias, "residual": None if before is None else before[row], "gated": extra == "gated"}
        fast.product(split_of(fast, alone, threshold), weight, expected, **given)
        assert torch.equal(found[row], expected)


def test_attention_and_choice_of_several_are_those_of_each(fast):
    heads, groups, width, capacity, rows = 4, 2, 16, 96, 3
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, (heads + 2 * groups) * width, generator=generator).half()
    cache = Cache(*torch.randn(2, rows, groups, capacity, width, generator=generator).half())
    rope, position = torch.randn(capacity, width, generator=generator), torch.tensor([0, 70, 95])
    parts = [32, 64, 32]  # as long as suits each
    copies = [Cache(cache.keys[row].clone(), cache.values[row].clone()) for row in range(rows)]
    out, expected = torch.empty(2, rows, heads * width).half()
    scratch = Partials.empty(heads, width, capacity, "cpu", part=32, sequences=rows)
    scratch.sequence_parts.copy_(torch.tensor(parts))
    fast.attend(qkv, cache, rope, position, out, scratch)
    for row, (own, part) in enumerate(zip(copies, parts, strict=True)):
        scratch = Partials.empty(heads, width, capacity, "cpu", part=part)
        fast.attend(qkv[row], own, rope, position[row : row + 1], expected[row], scratch)
        assert torch.equal(cache.keys[row], own.keys) and torch.equal(cache.values[row], own.values)
    assert torch.equal(out, expected)
    for kernels in (fast, reference):
        logits = torch.randn(rows, 1500, generator=generator)
        token, chosen = torch.empty(rows, dtype=torch.int64), torch.empty(rows, 2, dtype=torch.float64)
        kernels.likeliest(logits, token, chosen)
        for row in range(rows):
            own, found = torch.empty(1, dtype=torch.int64), torch.empty(2, dtype=torch.float64)
            kernels.likeliest(logits[row], own, found)
            assert own == token[row] and torch.equal(found, chosen[row])


def test_a_model_of_our_kernels_computes_for_several_what_it_computes_for_one(fast):
    """All logits bit for bit where the head is int8, too."""
    from llmq.engine.llama_cuda import CudaLlama

    _, lean = pair("llm-int8-head", num_hidden_layers=1)
    names = {name: getattr(fast, name) for name in fast.__all__}
    own = CudaLlama(
        lean.model,
        lean.method,
        "cpu",
        kernels=type(
            "Kernels", (), {**vars(reference), **{name: staticmethod(function) for name, function in names.items()}}
        ),
    )
    expected = [alone(own, prompt, 3) for prompt in PROMPTS[:2]]
    assert together(own, PROMPTS[:2], 3) == expected
