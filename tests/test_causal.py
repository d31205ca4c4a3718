"""No row depends on another where outliers are a row's own, in every loop; where they are pooled, rows do."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from tiny_runs import light
from torch import nn

from llmq.engine.choice import choose_engines
from llmq.errors import BadChoice
from llmq.kernels.primitives import int8_linear, quantize_rows, split_rows
from llmq.methods import mixed, parse_method

OWN = ["llm-int8@outliers=row", "llm-int8@outlier_weights=16:outliers=row", "llm-int8@3:outliers=row"]
LONE = torch.arange(2, 2 + 24)


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def uneven_llama(dtype=torch.float16):
    """A tiny LLaMA whose outliers lie in other columns for every token."""
    model = tiny_llama(initializer_range=0.2)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data *= 2.5
    return model.to(dtype)


def rows_with_outliers(rows: int = 9, width: int = 64) -> torch.Tensor:
    """N(0, 1) in FP16, each row with outliers in columns of its own, one also in another's column."""
    x = torch.randn(rows, width)
    for row in range(rows):
        x[row, [row, (7 * row + 20) % width]] = 8.0 + row
    return x.half()


@pytest.mark.parametrize("threshold", [6.0, 2.5, 0.0])
def test_a_row_is_split_as_if_it_were_alone(threshold):
    x = rows_with_outliers()
    made, pooled = split_rows(x, threshold, by_row=True), split_rows(x, threshold)
    alone = [split_rows(row[None], threshold) for row in x]
    assert torch.equal(made.codes, torch.cat([one.codes for one in alone]))
    assert torch.equal(made.absmax, torch.cat([one.absmax for one in alone]))
    assert (
        made.columns.tolist() == pooled.columns.tolist() == sorted({c for one in alone for c in one.columns.tolist()})
    )
    assert torch.equal(made.codes, pooled.codes) == (threshold == 0), "a pooled column takes codes of other rows"


@pytest.mark.parametrize("typed", OWN)
def test_a_layer_gives_a_row_what_it_gives_it_alone(typed):
    layer, x = nn.Linear(64, 24).half(), rows_with_outliers()
    made = quantized(typed, layer)
    whole = made(x)
    assert torch.equal(whole, torch.cat([made(row[None]) for row in x])) and torch.equal(
        whole[[3]], made(x[[3, 3]])[:1]
    )
    assert made.outlier_marks.sum() == 2, "of row 3"
    pooled = quantized(typed.replace("row", "call"), layer)
    assert not torch.equal(pooled(x), torch.cat([pooled(row[None]) for row in x]))
    if "outlier_weights" not in typed:
        weight, threshold = quantize_rows(layer.weight.data), parse_method(typed).threshold
        alone = torch.cat([int8_linear(row[None], weight, threshold) for row in x]) + layer.bias
        torch.testing.assert_close(whole.float(), alone.half().float(), rtol=2e-3, atol=2e-3)


def quantized(typed: str, layer: nn.Linear) -> nn.Module:
    method = parse_method(typed)
    made = nn.Sequential(method.quantize(layer))
    method.apply_(made)
    return made[0]


@pytest.mark.parametrize(("typed", "causal"), [("fp32", True), ("llm-int8", False), *((typed, True) for typed in OWN)])
def test_a_later_token_changes_nothing_before_it(typed, causal):
    model = parse_method(typed).quantize_(uneven_llama(), "cpu")
    with torch.inference_mode():
        told = [model(torch.cat((LONE, torch.tensor([last])))[None]).logits[0, :-1] for last in range(40, 60)]
    assert all(torch.equal(told[0], other) for other in told[1:]) == causal


@pytest.mark.parametrize("typed", ["llm-int8", "llm-int8@outliers=row", "llm-int8@3:outliers=row"])
def test_the_library_reads_a_prompt_causally(typed):
    from llmq.kernels.cpu.library import why_not_native

    if reason := why_not_native():
        pytest.skip(reason)
    from test_llama_cpu import built, difference
    from test_llama_cuda import ModelTensors

    from llmq.models.architecture import architecture_of

    model = uneven_llama(torch.float32)
    engine = built(ModelTensors(model), architecture_of(model.config.to_dict()), typed, packed=True, threads=2)
    ids = LONE.tolist()
    told = [engine.logits([*ids, last])[:-1] for last in range(40, 60)]
    by_row = engine.method.by_row
    assert all(torch.equal(told[0], other) for other in told[1:]) == by_row
    pooled = engine.under(parse_method(typed.replace("row", "call")))
    alone = pooled.decode_logits(ids)  # a call a token: each row is its whole call
    assert (difference(told[0], alone) < 1e-4) == by_row


def test_the_setting_is_the_loops_that_can():
    own, pooled = parse_method("llm-int8@outliers=row"), parse_method("llm-int8")
    config = uneven_llama().config.to_dict()
    assert choose_engines("auto", [pooled], config, "cuda:0") == ["lean"]
    assert (
        choose_engines("auto", [own], config, "cuda:0") == choose_engines("auto", [own, pooled], config, "cuda:0")[:1]
    )
    assert choose_engines("auto", [own], config, "cuda:0") == ["hf"]
    with pytest.raises(BadChoice, match="pools the rows of a call"):
        choose_engines("lean", [own], config, "cuda:0")
    assert own.stored() == pooled.stored() and own.bytes((8, 8)) == pooled.bytes((8, 8))
    assert "each row's outliers" in own.arithmetic("cpu") and "each row's" not in pooled.arithmetic("cpu")
    assert mixed(own, "0").spelled == "llm-int8@outliers=row:keep=0"
    with pytest.raises(BadChoice, match="rows"):
        parse_method("llm-int8@outliers=rows")


def test_every_layer_of_a_model_has_the_setting():
    """Also int8 heads, and by `llmq.quantize`, which saves what pools."""
    from llmq.convert import quantize

    for typed in ("llm-int8-head@outliers=row", "llm-int8@outliers=row"):
        model = quantize(uneven_llama(), typed)
        layers = [module.by_row for module in model.modules() if hasattr(module, "by_row")]
        assert len(layers) == 14 + ("head" in typed) and all(layers)
