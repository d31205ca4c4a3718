"""Decoding in five ways on the tiny model: every figure computed once more, and beam search tied to greedy."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from tiny_runs import engine_of, key_of, light, run_cli
from transformers import LlamaForCausalLM

from llmq.contestant import Contestant
from llmq.engine.base import Interrupted, generate
from llmq.engine.loading import load_engine
from llmq.engine.sampling import SamplingSettings
from llmq.events import Progress
from llmq.figures.pages import page
from llmq.labs import load_answer, save_answer
from llmq.labs.decoding import PARTED, Decoding, distinct, read
from llmq.labs.rows import RowAnswer
from llmq.machine.door import Machine
from llmq.methods import parse_method
from llmq.models.opening import open_model
from llmq.reporting import shown_block

LONG = "the prompt is 200 tokens long, and this model reads 128; "
LONG += "shorten the prompt or choose a model with a longer context"
PROMPT, TOKENS = "Hello LLaMA", 12
NAMES = ["greedy", "beam search, 4", "temperature 0.7", "top-k 5", "top-p 0.9"]


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA that is sure of something, so that what is likely differs from what is not."""
    folder = tmp_path_factory.mktemp("sure-llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.3))
    model.generation_config.update(do_sample=True, temperature=0.5, repetition_penalty=1.5)  # as a hub's may be
    model.half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def asked(folder, **settings) -> Decoding:
    return Decoding(**{"model": folder, "prompt": PROMPT, "tokens": TOKENS, "top_k": 5, "seed": 1} | settings)


@pytest.fixture(scope="module")
def items(folder):
    return list(Machine().run(asked(folder, contestants=Contestant.parse_all("fp16,llm-int8@1"))))


@pytest.fixture(scope="module")
def rows(items) -> dict[tuple, dict]:
    return {(row["method"], row["strategy"]): row for row in items[-1].rows}


@pytest.fixture(scope="module")
def engine(folder):
    return load_engine(key_of(folder, "fp16"))


def ids_of(folder) -> list[int]:
    return open_model(folder).encode(PROMPT)


def test_every_method_writes_under_every_strategy_and_a_text_comes_as_soon_as_it_is_there(items, rows):
    assert list(rows) == [(method, name) for method in ("fp16", "llm-int8@1") for name in NAMES]
    assert [len(item.rows) for item in items if isinstance(item, RowAnswer)] == [*range(1, 11), 10]
    assert items[-1].done and not items[-1].result["stopped"]
    shares = [item.fraction for item in items if isinstance(item, Progress) and item.fraction is not None]
    assert shares == sorted(shares) and shares[-1] < 1


@pytest.mark.parametrize("method", ["fp16", "llm-int8@1"])
def test_a_log_probability_is_the_models_own_before_every_filter(rows, folder, method):
    """Read once more by the library alone: what came before in one call, then a token a call."""
    engine, ids = engine_of(Machine(), folder, method), ids_of(folder)
    engine.under(parse_method(method))
    model = engine.model
    for name in NAMES:
        row, expected = rows[method, name], []
        with torch.inference_mode():
            out = model(torch.tensor([ids]))
            for token in row["token_ids"]:
                expected.append(out.logits[0, -1].double().log_softmax(-1)[token].item())
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        assert row["logprob"] == pytest.approx(sum(expected), abs=1e-3)
        assert row["mean_logprob"] == row["logprob"] / row["tokens"]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("method", ["fp16", "llm-int8"])
def test_a_beam_of_one_is_greedy(folder, method):
    engine, ids = load_engine(key_of(folder, method)), ids_of(folder)
    greedy = list(generate(engine, ids, SamplingSettings(max_new_tokens=TOKENS)))
    assert engine.beam_search(ids, 1, TOKENS) == [token.token_id for token in greedy]
    written = [token.token_id for token in greedy]
    assert read(engine, ids, written) == pytest.approx([token.logprob for token in greedy], abs=1e-4)


def test_beams_find_a_likelier_text_than_greedy(rows):
    greedy, beam = rows["fp16", "greedy"], rows["fp16", "beam search, 4"]
    assert greedy["tokens"] == beam["tokens"] == TOKENS
    assert beam["logprob"] > greedy["logprob"] + 0.1
    assert all(rows["fp16", name]["logprob"] <= beam["logprob"] for name in NAMES)


def test_beams_as_wide_as_the_vocabulary_find_the_likeliest_pair_of_all(engine, folder):
    ids, width = ids_of(folder), engine.model.config.vocab_size
    with torch.inference_mode():
        first = engine.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        second = engine.model(torch.tensor([[*ids, token] for token in range(width)])).logits[:, -1].float()
    both = first[:, None] + second.log_softmax(-1)
    likeliest = divmod(int(both.argmax()), width)
    assert likeliest[0] not in engine.eos_ids and tuple(engine.beam_search(ids, width, 2)) == likeliest


def test_what_is_drawn_stays_inside_its_filter(rows, engine, folder):
    ids = ids_of(folder)
    for name in NAMES[3:]:
        written = rows["fp16", name]["token_ids"]
        logits = engine.logits([*ids, *written])[len(ids) - 1 : -1].float()
        for row, token in zip(logits, written, strict=True):
            above = row.softmax(-1)[row > row[token] + 1e-2]
            assert len(above) < 5 if name == "top-k 5" else above.sum() < 0.9
    assert rows["fp16", "temperature 0.7"]["token_ids"] != rows["fp16", "greedy"]["token_ids"]


def test_distinct_n_grams():
    assert [distinct([1, 2, 1, 2], n) for n in (1, 2, 3)] == [0.5, pytest.approx(2 / 3), 1.0]
    assert distinct([7] * 10, 2) == pytest.approx(1 / 9) and distinct([1, 2], 3) is None


def test_where_a_text_leaves_that_of_fp16(rows, folder):
    tokenizer, parted = open_model(folder).tokenizer, 0
    for name in NAMES:
        own, other = rows["fp16", name], rows["llm-int8@1", name]
        assert own["parts_at"] is None and own["choices"] == []
        pairs = list(zip(own["token_ids"], other["token_ids"], strict=True))
        at = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        assert other["parts_at"] == at
        assert other["choices"] == ([] if at is None else [tokenizer.decode([token]) for token in pairs[at]])
        parted += at is not None
    assert 0 < parted < 5


def made(method: str, strategy: str, mean: float, text: str, at: int | None = None) -> dict:
    return {
        "method": method, "strategy": strategy, "mean_logprob": mean, "logprob": 4 * mean, "tokens": 4, "text": text,
        "distinct": [0.5, 1.0, None], "seconds": 1.5, "logprobs": [mean] * 4, "token_ids": [1, 2, 3, 4],
        "parts_at": at, "choices": [] if at is None else [" a\n", " b"],
    }  # fmt: skip


MADE = [
    made("fp16", "greedy", -0.6, "one two"), made("fp16", "beam search, 4", -0.5, "one three"),
    made("llm-int8", "greedy", -0.7, "one four", 1), made("llm-int8", "beam search, 4", -0.5, "one three"),
]  # fmt: skip


def test_what_the_lab_says():
    assert Decoding.finding(MADE[:1]) == ""
    assert Decoding.finding(MADE) == (
        "Of FP16's texts the one by **beam search, 4** is the likeliest: -0.50 nats for each token (greedy: -0.60). "
        "int8 · ours writes FP16's text under 1 of 2 strategies; it parts at token 2 under the others."
    )
    assert [row["method"] for row in Decoding.shown(MADE)] == ["fp16", "llm-int8"] * 2
    cells = Decoding.row(MADE[2])
    assert cells[2:] == ["-2.8", "-0.70", "0.50, 1.00, –", "1.50 s, 4 tokens", "token 2: “b” for “a⏎”"]
    (drawing,) = Decoding.figures(MADE)
    assert [list(line.y) for line in drawing.make().data] == [
        pytest.approx([-0.6, -1.2, -1.8, -2.4]), pytest.approx([-0.5, -1.0, -1.5, -2.0])
    ]  # fmt: skip


def test_texts_stand_side_by_side_in_full():
    texts = Decoding.texts(MADE[:3])
    assert texts.rows == [["greedy", "one two", f"one {PARTED}four"], ["beam search, 4", "one three", ""]]
    told = shown_block(texts)
    assert told.startswith(f"{PARTED}: here") and f"greedy, int8 · ours:\none {PARTED}four" in told
    long = Decoding.texts([made("fp16", "greedy", -1, "<b>" + "x" * 500)])
    assert "x" * 500 in shown_block(long) and "&lt;b&gt;xxx" in page("t", [long]) and Decoding.texts([]) is None


def test_an_answer_is_shown_again_from_its_file(items, tmp_path):
    save_answer(items[-1], tmp_path / "d.json")
    again = load_answer(tmp_path / "d.json")
    assert again.rows == items[-1].rows and again.to_json() == items[-1].to_json()
    assert f"{TOKENS * 10} tokens of what follows “{PROMPT}”, cpu." in list(again.blocks())
    assert again.result["conditions"]["command"].startswith("python -m llmq experiment decoding --model")


def test_at_the_command_line(folder, capsys):
    where = ("--model", folder, "--device", "cpu", "--tokens", 3)
    status, out, _ = run_cli(capsys, "experiment", "decoding", *where, "--methods", "bf16", "--width", 2, "--json")
    found = json.loads(out[-1])
    assert status == 0 and [row["method"] for row in found["results"]] == ["fp16"] * 5 + ["bf16"] * 5
    assert found["conditions"]["prompt"] == Decoding.example and found["results"][1]["strategy"] == "beam search, 2"
    for wrong, told in (
        (("--width", 0), "width is 0; choose a whole number from 1 to 16"),
        (("--top-p", 0), "top p is 0.0; choose a number from 0.01 to 1"),
        (("--temperature", "hot"), "temperature is 'hot'; choose a number from 0.05 to 2"),
        (("--prompt", "x" * 200), LONG),
    ):
        status, out, err = run_cli(capsys, "experiment", "decoding", *where, *wrong)
        assert (status, out, err[-1]) == (2, [], f"llmq: {told}")


def test_a_text_ends_where_the_context_does(folder):
    *_, answer = Machine().run(asked(folder, prompt="x" * 120, contestants=Contestant.parse_all("fp16")))
    assert {row["tokens"] for row in answer.rows} == {128 - len(open_model(folder).encode("x" * 120))}


def test_a_search_is_stopped_inside(engine, folder):
    with pytest.raises(Interrupted):
        engine.beam_search(ids_of(folder), 2, TOKENS, iter([False] * 20 + [True]).__next__)
    stop = threading.Event()
    for answer in Machine().run(asked(folder), stop):
        if isinstance(answer, RowAnswer):
            stop.set()
    assert len(answer.rows) == 1 and answer.result["stopped"] and math.isfinite(answer.rows[0]["logprob"])
