"""The paged cache beside one padded batch: the same texts, every page accounted for, and Stop."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_runs import light
from transformers import MistralConfig, MistralForCausalLM

from llmq.engine.base import Interrupted
from llmq.engine.hf import HFEngine
from llmq.errors import BadChoice
from llmq.inspect.paging import Request, in_one_batch, in_pages, requests_of
from llmq.labs import load_answer, save_answer
from llmq.labs.paging import Paging
from llmq.machine.door import Machine
from llmq.methods import METHODS

PAGE = 16


def never() -> bool:
    return False


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(torch.float16, initializer_range=0.2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def engine() -> HFEngine:
    return HFEngine(tiny_llama(initializer_range=0.2), METHODS["fp32"], "cpu")


@pytest.fixture
def requests() -> list[Request]:
    return [Request(list(range(3, 3 + prompt)), tokens) for prompt, tokens in ((40, 3), (2, 9), (17, 17), (16, 1))]


def test_lengths_are_spread_and_always_the_same():
    found = requests_of(range(3, 103), 64, 256)
    assert [request.kept for request in found] == [request.kept for request in requests_of(range(3, 103), 64, 256)]
    prompts, answers = sorted(len(r.ids) for r in found), sorted(r.tokens for r in found)
    assert 16 <= prompts[0] < 30 and 150 < prompts[-1] <= 192 and 16 <= answers[0] < 20 and 50 < answers[-1] <= 64


def test_both_ways_write_what_each_request_gets_alone(engine, requests):
    alone = [in_one_batch(engine, [request], never).written[0] for request in requests]
    assert [len(tokens) for tokens in alone] == [3, 9, 17, 1]
    assert in_one_batch(engine, requests, never).written == alone
    assert in_pages(engine, requests, PAGE, never).written == alone
    assert engine.model.config._attn_implementation == "sdpa", "the model is as it was"


def test_a_batch_reserves_the_longest_prompt_and_answer_for_everybody(engine, requests):
    served = in_one_batch(engine, requests, never)
    assert (served.reserved, served.filled) == (4 * (40 + 17 - 1), [42, 10, 33, 16])


def test_a_request_has_the_pages_of_its_tokens_and_shares_none(engine, requests):
    served = in_pages(engine, requests, PAGE, never)
    taken = [page for pages in served.table for page in pages]
    assert len(taken) == len(set(taken)) == served.reserved // PAGE
    for tokens, pages in zip(served.filled, served.table, strict=True):
        assert len(pages) == -(-tokens // PAGE)
    assert served.filled[0] == 40 and served.used == sum(served.filled) <= served.reserved
    shorter = in_pages(engine, requests, 4, never)
    assert shorter.reserved - shorter.used < served.reserved - served.used


def test_stop_ends_both_ways_and_leaves_a_model_that_works(engine, requests):
    for way in (
        lambda: in_one_batch(engine, requests, lambda: True),
        lambda: in_pages(engine, requests, PAGE, lambda: True),
    ):
        with pytest.raises(Interrupted):
            way()
    assert in_pages(engine, requests[:1], PAGE, never).written == in_one_batch(engine, requests[:1], never).written


def test_the_lab_tells_memory_speed_and_the_table(folder, tmp_path):
    *_, answer = Machine().run(Paging(model=folder, requests=3, longest=64))
    assert [row["requests"] for row in answer.rows] == [1, 2, 3] and not answer.result["stopped"]
    row = answer.rows[-1]
    assert row["same"] == 3 and 0 <= row["paged_unused"] < row["batch_unused"] < 1
    assert row["batch_bytes"] % (3 * 128) == 0 and row["paged_bytes"] % (128 * 16) == 0
    assert (
        0 < row["paged_tokens_per_second_min"] <= row["paged_tokens_per_second"] <= row["paged_tokens_per_second_max"]
    )
    said = answer.lab.finding(answer.rows)
    assert said.startswith("3 requests hold ") and "in pages of 16 tokens" in said
    save_answer(answer, tmp_path / "a.json")
    again = load_answer(tmp_path / "a.json")
    table, speed = (drawing.make() for drawing in again.lab.figures(again.rows))
    assert [trace.name for trace in speed.data] == ["one batch", "pages"]
    assert len(table.data[0].z) == 3 and table.data[0].text[0][0] == str(row["block_table"][0][0])


def test_more_tokens_than_the_model_reads_are_refused(folder):
    with pytest.raises(BadChoice, match="longest is 8,192 and .* reads"):
        list(Machine().run(Paging(model=folder, longest=8192)))


def test_a_model_that_forgets_old_tokens_is_refused(tmp_path):
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, max_position_embeddings=512,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BadChoice, match="does not keep the keys and values of every token"):
        list(Machine().run(Paging(model=str(tmp_path))))
