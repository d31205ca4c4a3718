"""No row depends on another where outliers are a row's own, in every loop; where they are pooled, rows do."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from planted import columns, hooks_left, raw_inputs
from tiny_runs import key_of, light
from torch import nn

from llmq.engine.choice import choose_engines
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.kernels.primitives import int8_linear, quantize_rows, split_rows
from llmq.labs.causal import CHANGES, FIELD, Causal, a_neighbour, another_last_token, prompts_of
from llmq.machine.door import Machine
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
    from llmq.kernels.cpu.build import why_not_native

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


# The lab


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven-llama")
    uneven_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def answer(folder):
    *events, last = Machine().run(Causal(model=folder, changes=1, windows=4))
    shares = [event.fraction for event in events if isinstance(event, Progress) and event.fraction is not None]
    assert last.done and shares == sorted(shares) and shares[-1] < 1
    return last


def test_the_lab_finds_who_is_causal(answer):
    rows = {(row["method"], row["change"]): row for row in answer.rows}
    assert list(rows) == [(method, change) for method in FIELD.split(",") for change in CHANGES]
    for (method, change), row in rows.items():
        assert row["asked"] == 8 * (63 if change == "another last token" else 64)
        causal = method in ("fp16", "llm-int8@outliers=row")
        assert (row["largest_logit_change"] == 0) == causal and (causal is False or row["flipped"] == 0)
        assert bool(row["joined"]) == (method != "fp16")
        assert row["joined"] >= sum(row["joined_by_layer"]) and len(row["strongest"]) <= 3
    ours, theirs = (rows[method, "a neighbour in the batch"] for method in ("llm-int8", "bnb-int8"))
    assert ours["flipped"] and theirs["flipped"]
    assert ours["strongest"][0]["absmax"] >= 6 and ours["strongest"][0]["layer"] in (0, 1)


def test_flips_and_columns_are_those_of_two_plain_calls(folder, answer):
    """Counted once more, from the model's own inputs."""
    from llmq.engine.loading import load_engine
    from llmq.models.opening import open_model
    from llmq.models.reference_text import windows

    prompts = prompts_of(windows(open_model(folder), 4, "english"))
    assert len(prompts) == 8 and {len(ids) for ids in prompts} == {64}
    model, flipped, joined = load_engine(key_of(folder, "bnb-int8")).model, 0, 0
    for number, ids in enumerate(prompts):
        change = another_last_token(ids, prompts[(number + 1) % 8])
        (own, before), (other, after) = (
            raw_inputs(model, lambda texts=texts: model(torch.tensor(texts))) for texts in (change.before, change.after)
        )
        flipped += int((before.logits[0, :-1].argmax(-1) != after.logits[0, :-1].argmax(-1)).sum())
        for name in own:
            if not name.endswith(("k_proj", "v_proj", "up_proj", "lm_head")):  # the same input, and FP16
                joined += len(set(columns(other[name][0], 6.0)) - set(columns(own[name][0], 6.0)))
    row = next(row for row in answer.rows if row["method"] == "bnb-int8")
    assert (row["flipped"], row["joined"]) == (flipped, joined / 8) and flipped and joined


def test_a_change_changes_only_what_it_says():
    ids, other = [1, 2, 3], [7, 8, 3]
    assert another_last_token(ids, other).after == [[1, 2, 8]] and another_last_token(ids, other).asked == 2
    assert a_neighbour(ids, other).before == [ids, ids] and a_neighbour(ids, other).after == [ids, other]
    assert another_last_token([3, 3], [3, 3]).after == [[3, 3]], "there is no other"


def test_what_the_lab_says(answer):
    said = Causal.finding(answer.rows)
    assert said.startswith("Prompts of 64 tokens, another last token: of 504 first choices flip 0 with fp16, ")
    assert "0 with llm-int8@outliers=row; a neighbour in the batch: of 512" in said and Causal.finding([]) == ""
    again = Causal.restore(answer.stored())
    assert list(map(str, again.blocks())) != [] and again.rows == answer.rows
    (drawing,) = Causal.figures(answer.rows)
    bars = [trace for trace in drawing.make().data if trace.type == "bar"]
    assert [trace.name for trace in bars] == list(CHANGES) and bars[1].y[0] == bars[1].y[3] == 0 < bars[1].y[2]
    lines = [trace for trace in drawing.make().data if trace.type == "scatter"]
    assert len(lines) == 3 and all(max(line.y) > 0 for line in lines)
    assert Causal.row(answer.rows[0])[2] == "0 of 504 (0%)"


def test_no_hooks_stay(folder):
    from llmq.engine.loading import load_engine
    from llmq.inspect.causal import read_call

    engine = load_engine(key_of(folder, "llm-int8"))
    read_call(engine, [[1, 2, 3]], -1)
    assert hooks_left(engine.model) == 0
