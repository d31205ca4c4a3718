"""Two methods read one text: what is read, where their own texts part, and how the job ends."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from planted import StopAfter, hooks_left
from tiny_runs import engine_of, light

from llmq.contestant import Contestant
from llmq.engine.hf import HFEngine
from llmq.errors import BadChoice, OutOfMemory
from llmq.events import Loaded, Progress, Waiting
from llmq.inspect.agreement import Agreement, compare_logits
from llmq.labs.agreement import Read, Reading
from llmq.machine.door import Machine

PROMPT = "The quick fox"
NEW = 24
TOKENIZED = byte_tokenizer()(f"<{PROMPT}>")["input_ids"]


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA whose blocks matter, so that 8 bit is seen within a few tokens; with a chat template."""
    folder = tmp_path_factory.mktemp("loud-llama")
    tiny_llama(torch.float16, initializer_range=0.3).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine()


def reading(folder, contestant: str = "bnb-int8", baseline: str = "fp16", **changes) -> Reading:
    pair = {"baseline": Contestant.parse(baseline), "contestant": Contestant.parse(contestant)}
    return Reading(**({"prompt": PROMPT, "model": str(folder), "new_tokens": NEW} | pair | changes))


def models_of(machine, folder, asked: Reading) -> list:
    return [engine_of(machine, folder, c.label).model for c in (asked.baseline, asked.contestant)]


def logits_of(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("contestant", ["bnb-int8", "llm-int8", "vectorwise", "absmax", "bf16", "fp32"])
def test_a_continuation_is_what_the_library_generates_and_parts_where_it_does(folder, machine, contestant):
    asked = reading(folder, contestant)
    *events, found = machine.run(asked)
    ids, tables = [], []
    for model in models_of(machine, folder, asked):
        made = model.generate(
            torch.tensor([TOKENIZED]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids.append(made.sequences[0, len(TOKENIZED) :].tolist())
        tables.append([row[0].float() for row in made.logits])
    drift = found.agreement.drift
    assert [list(drift.baseline_ids), list(drift.other_ids)] == ids and len(ids[0]) == NEW
    at = next((i for i in range(NEW) if ids[0][i] != ids[1][i]), None)
    assert drift.position == at
    if at is not None:
        mine, yours = ids[0][at], ids[1][at]
        expected = (tables[0][at][mine] - tables[0][at][yours], tables[1][at][yours] - tables[1][at][mine])
        assert drift.margins == pytest.approx([float(margin) for margin in expected], abs=1e-6)
        assert min(drift.margins) >= 0
    else:
        assert drift.margins is None
    text = [*TOKENIZED, *ids[0]]
    assert (found.agreement.token_ids, found.agreement.continuation) == (tuple(text), len(TOKENIZED))
    tables = [logits_of(model, text).float() for model in models_of(machine, folder, asked)]
    assert found.agreement.tokens == tuple(compare_logits(*tables, text))
    assert found.texts == tuple(found.names[token] for token in text)
    shares = [event.fraction for event in events if isinstance(event, Progress)]
    assert shares == sorted(shares) and len(shares) == 2 * NEW + 1 and 0 < shares[0] and shares[-1] < 1


def test_some_of_these_methods_part(folder, machine):
    """Or the test above would compare nothing."""
    ends = [list(machine.run(reading(folder, method)))[-1].agreement for method in ("absmax", "bnb-int8")]
    assert all(end.drift.position is not None for end in ends) and all(end.mean_kl > 1e-5 for end in ends)


@pytest.mark.parametrize(("kind", "expected"), [("prompt", f"<{PROMPT}>"), ("text", PROMPT)])
def test_a_prompt_is_read_in_its_template_and_a_text_as_it_is(folder, machine, kind, expected):
    asked = reading(folder, "llm-int8", text=kind)
    found = list(machine.run(asked))[-1]
    ids = byte_tokenizer()(expected)["input_ids"]
    tables = [logits_of(model, ids).float() for model in models_of(machine, folder, asked)]
    assert found.agreement == Agreement(tuple(ids), tuple(compare_logits(*tables, ids)))
    assert "".join(found.texts) == expected


def test_nearer_methods_agree_more(folder, machine):
    """Two that compute the same agree to the last bit; BF16 is nearer to FP32 than naive 8 bit is."""
    ends = {}
    for pair in (("llm-int8@inf", "llm-int8@0"), ("bf16", "fp32"), ("absmax", "fp32")):
        ends[pair] = list(machine.run(reading(folder, *pair)))[-1].agreement
    same, near, far = ends.values()
    assert (same.mean_kl, same.top1_agreement, same.drift.position) == (0.0, 1.0, None)
    assert 0 < near.mean_kl < far.mean_kl / 3 and near.top1_agreement >= far.top1_agreement
    assert math.isclose(*near.perplexities, rel_tol=0.05) and near.perplexities[0] != near.perplexities[1]


def greedy(machine, folder, count: int) -> list[int]:
    model = engine_of(machine, folder, "fp16").model
    return model.generate(torch.tensor([TOKENIZED]), max_new_tokens=count, do_sample=False, eos_token_id=None)[
        0, -count:
    ].tolist()


def test_an_end_of_text_ends_a_continuation_and_is_no_part_of_it(folder, machine, monkeypatch):
    asked, written = reading(folder, "fp32"), greedy(machine, folder, 6)
    assert written[3] not in written[:3]
    list(machine.run(asked))
    settings = [model.generation_config for model in models_of(machine, folder, asked)]
    monkeypatch.setattr(settings[1], "eos_token_id", written[3])
    agreement = list(machine.run(asked))[-1].agreement
    assert agreement.drift.other_ids == tuple(written[:3]) and len(agreement.drift.baseline_ids) == NEW
    assert (agreement.drift.position, agreement.drift.margins) == (None, None)
    monkeypatch.setattr(settings[0], "eos_token_id", written[3])
    agreement = list(machine.run(asked))[-1].agreement
    assert agreement.drift.baseline_ids == agreement.token_ids[agreement.continuation :] == tuple(written[:3])
    asked = reading(folder, "fp16", "fp32")
    monkeypatch.setattr(settings[1], "eos_token_id", written[0])
    with pytest.raises(BadChoice, match="FP32 ends the text at once"):
        list(machine.run(asked))


def test_stopped_before_it_began_nothing_is_read(folder):
    stop, fresh = threading.Event(), Machine()
    stop.set()
    assert [type(event) for event in fresh.run(reading(folder), stop=stop)] == [Waiting]
    assert fresh.pool.bytes_on("cpu") == 0


@pytest.mark.parametrize("when", ["first loaded", "first token", "last token of the other", "reading"])
def test_a_stop_ends_it_without_a_result_and_the_next_one_runs(folder, machine, when):
    stop, seen = threading.Event(), []
    asked = reading(folder)
    for event in machine.run(asked, stop=stop):
        seen.append(event)
        written = sum(isinstance(entry, Progress) for entry in seen)
        if (when, isinstance(event, Loaded), written) in {
            ("first loaded", True, 0),
            ("first token", False, 1),
            ("last token of the other", False, 2 * NEW),
            ("reading", False, 2 * NEW + 1),
        }:
            stop.set()
    assert stop.is_set() and not isinstance(seen[-1], Read)
    assert [hooks_left(model) for model in models_of(machine, folder, asked)] == [0, 0]
    assert isinstance(list(machine.run(asked))[-1], Read)


def test_a_stop_ends_a_long_text_within_one_layer(folder, machine):
    list(machine.run(reading(folder, text="prompt")))
    stop = StopAfter(12)
    events = list(machine.run(reading(folder, text="prompt"), stop=stop))
    assert isinstance(events[-1], Progress) and stop.calls == -1, "it was not asked again"


def test_memory_that_runs_out_is_said(folder, machine, monkeypatch):
    asked = reading(folder, text="prompt")
    list(machine.run(asked))

    def too_much(*_):
        raise MemoryError

    monkeypatch.setattr(HFEngine, "logits", too_much)
    with pytest.raises(OutOfMemory, match="shorter"):
        list(machine.run(asked))
    monkeypatch.undo()
    assert isinstance(list(machine.run(asked))[-1], Read)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": "novel"}, "'novel'.*continuation, prompt, text"),
        ({"baseline": Contestant.parse("bf16"), "contestant": Contestant.parse("bf16")}, "both methods are bf16"),
        *(
            ({"new_tokens": value}, f"new tokens is {value!r}.*1 to 128")
            for value in (0, -1, 129, True, "3", 2.0, None)
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, reason):
    with pytest.raises(BadChoice, match=reason):
        Reading(**({"prompt": PROMPT} | changes))


@pytest.mark.parametrize(
    ("kind", "prompt", "reason"),
    [
        *((kind, prompt, "empty") for kind in ("continuation", "prompt", "text") for prompt in ("", " \n", None)),
        *((kind, "half \ud83d", "half a character") for kind in ("continuation", "prompt", "text")),
        ("text", "a", "1 token; at least 2"),
        ("text", "a" * 129, "129 tokens long; give at most 128"),
        ("prompt", "a" * 126, "128 tokens long"),
        ("continuation", "a" * 103, "105 tokens long; give at most 104"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(folder, machine, kind, prompt, reason):
    with pytest.raises(BadChoice, match=reason):
        list(machine.run(reading(folder, text=kind, prompt=prompt)))


@pytest.mark.parametrize(("kind", "prompt"), [("text", "a" * 128), ("text", "ab"), ("continuation", "a" * 102)])
def test_the_longest_and_the_shortest_texts_can_be_read(folder, machine, kind, prompt):
    found = list(machine.run(reading(folder, "bf16", text=kind, prompt=prompt)))[-1]
    assert len(found.agreement.token_ids) == len(prompt) + (2 + NEW if kind == "continuation" else 0)
    assert len(found.agreement.tokens) == len(found.agreement.token_ids) - 1
