"""The labs of the KV cache: both ways give the same token, counted operations are the formulas', bytes are exact."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_runs import light
from transformers.cache_utils import Cache, DynamicLayer

from llmq.engine.hf import HFEngine
from llmq.inspect.caching import Operations, Place, bytes_of, counted, twin_of
from llmq.inspect.rounded_cache import RoundedLayer, bytes_kept, read_with
from llmq.labs import load_answer, save_answer
from llmq.labs.caching import Caching
from llmq.labs.rounded_cache import RoundedCache
from llmq.machine.door import Machine
from llmq.methods import METHODS

BODY = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of 2 layers: q and o, k and v, the feed-forward part
HEAD = 32 * 259


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    *_, last = Machine().run(Caching(model=str(folder), longest=128))
    return last


@pytest.fixture
def engine() -> HFEngine:
    return HFEngine(tiny_llama(initializer_range=0.2), METHODS["fp32"], "cpu")


@pytest.mark.parametrize(("tokens", "cached"), [(2, True), (2, False), (65, True), (65, False)])
def test_counted_operations_are_those_of_the_formula(engine, tokens, cached):
    rows = 1 if cached else tokens
    expected = 2 * (BODY * rows + HEAD) + 4 * 2 * 4 * 8 * rows * tokens
    assert counted(twin_of(engine.model), tokens, cached=cached) == expected
    assert Operations.of(engine.model, 4, 8).of_token(tokens, rows) == expected


def test_both_ways_give_the_same_token(engine):
    ids = list(range(3, 43))
    place = Place.after(engine, ids)
    (own, _, kept), (again, _, none) = (place.call(cached=cached) for cached in (True, False))
    torch.testing.assert_close(own, again, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own, engine.logits(ids)[-1], rtol=1e-5, atol=1e-5)
    assert (bytes_of(place.kept), bytes_of(kept), none) == (39 * 256, 40 * 256, None), (
        "a call leaves the place as it was"
    )
    other = Place.after(engine, [9, *ids[1:]]).call(cached=True)[0]
    assert (other - own).abs().max() > 1e-3, "what is kept plays a part"


def test_the_lab_says_what_the_cache_saves_and_costs(answer, tmp_path):
    assert [row["tokens"] for row in answer.rows] == [4, 8, 16, 32, 64, 128] and not answer.result["stopped"]
    for row in answer.rows:
        assert row["kv_bytes"] == row["kv_formula"] == 2 * 2 * 2 * 8 * 2 * row["tokens"] and row["sharing"] == 2
        assert row["cached_operations"] == row["cached_formula"] < row["whole_operations"] == row["whole_formula"]
        assert row["largest_logit_difference"] < 0.01 and row["same_choice"]
        assert 0 < row["cached_seconds_min"] <= row["cached_seconds"] <= row["cached_seconds_max"]
    said = answer.lab.finding(answer.rows)
    assert "The cache holds 16.4 kB, 2 times less" in said and "are those of the formulas exactly" in said
    assert "the time of a token is not constant" in answer.lab.explained
    save_answer(answer, tmp_path / "a.json")
    assert [*load_answer(tmp_path / "a.json").blocks()][0] == said


def test_the_figure_has_both_ways_and_the_formulas(answer):
    (drawn,) = (drawing.make() for drawing in answer.lab.figures(answer.rows))
    assert [(trace.name, trace.yaxis) for trace in drawn.data] == [
        ("with the cache", "y"), ("without", "y"), ("with the cache", "y2"), ("without", "y2"), ("formula", "y2"),
        ("formula", "y2"),
    ]  # fmt: skip
    assert drawn.data[2].y == drawn.data[4].y and [trace.showlegend for trace in drawn.data[2:]] == [False] * 2 + [
        True,
        False,
    ]


def test_a_rounded_cache_gives_back_what_its_codes_stand_for():
    layer, x = RoundedLayer(), torch.randn(2, 1, 3, 7, 16).half()
    keys, values = layer.update(x[0], x[1])
    for given, kept in ((x[0], keys), (x[1], values)):
        most = given.abs().amax(-1, keepdim=True).float() / 127 / 2 + given.abs().float() * 2**-10
        assert ((kept - given).abs().float() <= most).all() and kept.dtype == torch.float16
        assert not torch.equal(kept, given)
    more, _ = layer.update(x[0, :, :, :1] * 9, x[1, :, :, :1])
    assert torch.equal(more[:, :, :7], keys) and layer.get_seq_length() == 8, "no token changes the scale of another"
    assert layer.keys.dtype == torch.int8 and bytes_kept(Cache(layers=[layer])) == 2 * 3 * 8 * (16 + 2)


def test_half_of_the_memory_and_what_it_costs(answer):
    *_, last = Machine().run(RoundedCache(model=answer.result["model"]))
    full, small = last.rows
    assert (full["kv_bytes_per_token"], small["kv_bytes_per_token"]) == (2 * 2 * 2 * 8 * 2, 2 * 2 * 2 * (8 + 2))
    assert full["kl_to_fp16"] == 0 < small["kl_to_fp16"] < 0.01 and small["top1_agreement"] > 0.9
    assert "**62%**" in last.lab.finding(last.rows) and last.lab.finding(last.rows[:1]) == ""


def test_a_text_in_one_call_is_as_a_token_at_a_time(engine):
    ids = list(range(3, 23))
    whole, _ = read_with(engine, ids, RoundedLayer)
    cache, rows = Cache(layer_class_to_replicate=RoundedLayer), []
    with torch.inference_mode():
        for token in ids:
            rows.append(engine.model(torch.tensor([[token]]), cache=cache, use_cache=True).logits[0, -1])
    torch.testing.assert_close(torch.stack(rows), whole, rtol=1e-3, atol=1e-3)
    assert (whole - read_with(engine, ids, DynamicLayer)[0]).abs().max() > 2e-3
