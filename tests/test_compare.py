"""A comparison as its stream of events: what comes, in which order, and that every figure in it is exact."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import byte_tokenizer
from tiny_runs import (
    KV_BYTES_A_TOKEN,
    PROMPT,
    comparison,
    engine_of,
    light,
    outline,
    reasons,
    source_of,
    token_ids,
)

from llmq.contestant import Contestant
from llmq.engine.hf import HFEngine
from llmq.engine.loading import load_engine
from llmq.errors import BadChoice
from llmq.events import Finished, Loaded, Loading, Memory, Planned, Prefilled, Reading, Step, Waiting
from llmq.kernels.cpu.build import why_not_native
from llmq.labs import lanes
from llmq.labs.compare import Comparison
from llmq.machine.door import Machine
from llmq.methods import METHODS
from llmq.models.presets import PRESETS
from llmq.summary import Summary

STEPS = 6


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine()


def opening(*names: str) -> list[tuple[str, str]]:
    return [(kind, name) for name in names for kind in ("Loading", "Loaded")]


def prefill(name: str) -> list[tuple[str, str]]:
    return [("Prefilled", name), ("Step", name)]


def test_it_is_told_how_much_of_a_prompt_is_read_and_nothing_else_changes(tiny_folder, machine, monkeypatch):
    asked = comparison(tiny_folder, "fp32,bnb-int8")
    usual = list(machine.run(asked))
    monkeypatch.setattr(lanes, "TOLD_SECONDS", 0.0)
    events = list(machine.run(asked))
    for name in ("fp32", "bnb-int8"):
        shares = [event.fraction for event in events if isinstance(event, Reading) and event.contestant == name]
        assert len(shares) > 5 and shares == sorted(shares) and shares[-1] == 1.0
        kinds = [type(event) for event in events if getattr(event, "contestant", "") == name]
        assert kinds.index(Loaded) < kinds.index(Reading) and kinds[kinds.index(Prefilled) - 1] is Reading
    assert not any(isinstance(event, Reading) for event in usual), "a short prompt is read before one could say so"
    assert all(token_ids(events, name) == token_ids(usual, name) for name in ("fp32", "bnb-int8"))


@pytest.mark.parametrize("methods", ["fp32,bf16", "fp16,bnb-int8", "bf16,fp32,fp16"])
def test_interleave_loads_then_prefills_then_alternates_steps(methods, tiny_folder, machine):
    events = list(machine.run(comparison(tiny_folder, methods)))
    names = methods.split(",")
    expected = [("Waiting", ""), ("Planned", ""), *opening(*names)]
    expected += [pair for name in names for pair in prefill(name)]
    expected += [("Step", name) for _ in range(STEPS - 2) for name in names]
    expected += [(kind, name) for name in names for kind in ("Step", "Finished")]
    assert outline(events) == expected


def test_every_step_knows_the_likeliest_tokens(tiny_folder, machine):
    events = list(machine.run(comparison(tiny_folder, "fp32,bf16", temperature=1.0, seed=3)))
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 2 * STEPS and all(len(step.best) == 5 for step in steps)
    for step in steps:
        shares = list(step.best.values())
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1
        assert math.exp(step.logprob) == pytest.approx(step.best.get(str(step.token_id), math.exp(step.logprob)), 1e-3)
    assert any(str(step.token_id) in step.best for step in steps)


def test_in_turn_finishes_one_before_the_next_is_loaded(tiny_folder, machine):
    events = list(machine.run(comparison(tiny_folder, "fp32,bf16", schedule="in-turn")))
    expected = [("Waiting", ""), ("Planned", "")]
    for name in ("fp32", "bf16"):
        expected += [*opening(name), *prefill(name), *[("Step", name)] * (STEPS - 1), ("Finished", name)]
    assert outline(events) == expected


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seed": 8, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_both_schedules_generate_the_same(sampling, tiny_folder, machine):
    steps = []
    for schedule in ("interleave", "in-turn"):
        outcomes = Summary(machine.run(comparison(tiny_folder, schedule=schedule, **sampling))).outcomes
        steps.append({name: (o.token_ids, o.logprobs, o.text) for name, o in outcomes.items()})
    assert steps[0] == steps[1]
    assert [len(ids) for ids, _, _ in steps[0].values()] == [STEPS, STEPS]


def test_every_figure_of_a_run_is_exact(tiny_folder, machine):
    events = list(machine.run(comparison(tiny_folder, "fp32,bnb-int8")))
    for method in ("fp32", "bnb-int8"):
        engine = engine_of(machine, tiny_folder, method)
        mine = [event for event in events if getattr(event, "contestant", "") == method]
        kv = KV_BYTES_A_TOKEN[method] * (len(PROMPT) + STEPS - 1)
        peak = engine.weight_bytes + engine.scale_bytes + kv
        assert mine[-1] == Finished(
            contestant=method, reason="length", kv_bytes=kv, peak_bytes=peak, text=mine[-1].text
        )
        assert [e.weight_bytes for e in mine if isinstance(e, Loaded)] == [engine.weight_bytes]
        assert [e.prompt_tokens for e in mine if isinstance(e, Prefilled)] == [len(PROMPT)]
        steps = [e for e in mine if isinstance(e, Step)]
        assert [e.index for e in steps] == list(range(STEPS))
        assert steps[0].seconds == 0 < min(e.seconds for e in steps[1:])
        text = "".join(e.text for e in steps) + mine[-1].text
        assert text == byte_tokenizer().decode([e.token_id for e in steps], skip_special_tokens=True)


def test_memory_samples_carry_the_ledger_of_the_moment(tiny_folder, machine):
    events = list(machine.run(comparison(tiny_folder, "fp32,bnb-int8", max_new_tokens=60)))
    samples = [event for event in events if isinstance(event, Memory)]
    assert samples and all(sample.process_bytes > 0 for sample in samples)
    weights = {name: engine_of(machine, tiny_folder, name).weight_bytes for name in ("fp32", "bnb-int8")}
    for sample in samples:
        assert sample.ledger.keys() == weights.keys()
        for name, ledger in sample.ledger.items():
            assert ledger["weights"] in (0, weights[name])
            assert ledger["kv"] % KV_BYTES_A_TOKEN[name] == 0
    assert [sample.at for sample in samples] == sorted(sample.at for sample in samples)


def test_a_second_run_finds_the_models_loaded(tiny_folder):
    machine, loads = Machine(), []
    for _ in range(2):
        events = list(machine.run(comparison(tiny_folder, "bf16", max_new_tokens=1)))
        loads.append([(e.resident, e.seconds > 0) for e in events if isinstance(e, Loaded)])
    assert loads == [[(False, True)], [(True, False)]]


@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8"])
def test_two_thresholds_of_one_method_share_the_weights_and_keep_their_own(method, tiny_folder):
    """One load, and in turn at every step each computes what it computes alone."""
    loads, pair = [], (method, f"{method}@0.01")
    machine = Machine(lambda key: loads.append(key) or load_engine(key))
    together = list(machine.run(comparison(tiny_folder, ",".join(pair))))
    assert reasons(together) == dict.fromkeys(pair, "length")
    steps = {name: [(e.token_id, e.logprob) for e in together if steps_of(e, name)] for name in pair}
    for name in pair:
        alone = list(Machine().run(comparison(tiny_folder, name)))
        loop = next(e.engine for e in alone if isinstance(e, Loaded))
        assert loop == next(e.engine for e in together if isinstance(e, Loaded))
        assert [(e.token_id, e.logprob) for e in alone if steps_of(e, name)] == steps[name]
    assert steps[pair[0]] != steps[pair[1]]
    assert len(loads) == 1 and [e.resident for e in together if isinstance(e, Loaded)] == [False, True]


def steps_of(event, name: str) -> bool:
    return isinstance(event, Step) and event.contestant == name


@pytest.mark.parametrize("schedule", ["interleave", "in-turn"])
def test_a_full_context_ends_the_answer(schedule, tiny_folder, machine):
    prompt = "x" * 120  # of 128
    events = list(machine.run(comparison(tiny_folder, prompt=prompt, schedule=schedule, max_new_tokens=99)))
    assert reasons(events) == {"fp32": "context", "bf16": "context"}
    assert [len(token_ids(events, name)) for name in ("fp32", "bf16")] == [8, 8]


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("engine", ["hf", "lean"])
def test_the_last_positions_of_the_context_are_written_to(engine, left, tiny_folder, machine):
    """Greedy tokens to the very end, those of transformers; and none beyond it."""
    if engine == "lean" and why_not_native():
        pytest.skip(why_not_native())
    prompt = ("Hello LLaMA, how are you? " * 5)[: 128 - left]
    ids = byte_tokenizer()(prompt)["input_ids"]
    asked = comparison(tiny_folder, "fp16", prompt=prompt, max_new_tokens=99)
    events = list(machine.run(replace(asked, engine=engine)))
    model = engine_of(machine, tiny_folder, "fp32").model
    made = model.generate(torch.tensor([ids]), max_new_tokens=left, do_sample=False, eos_token_id=None)
    assert reasons(events) == {"fp16": "context"}
    assert token_ids(events, "fp16") == made[0, len(ids) :].tolist()


@pytest.mark.parametrize("engine", ["hf", "lean"])
def test_settings_that_are_not_followed_are_said(engine, tiny_folder, tmp_path, machine):
    if engine == "lean" and why_not_native():
        pytest.skip(why_not_native())
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05, "suppress_tokens": [3]}')
    events = machine.run(replace(comparison(tmp_path, "fp16,bf16"), engine=engine))
    said = [event.message for event in events if isinstance(event, Loading) and event.contestant]
    assert said == ["ignored, of the model's own generation settings: repetition_penalty 1.05, suppress_tokens [3]"] * 2


@pytest.mark.parametrize("schedule", ["interleave", "in-turn"])
def test_the_time_limit_counts_from_each_contestants_prefill(schedule, tiny_folder, machine):
    """The clock moves one second with every step that is shown, whoever made it."""
    now, events = [50.0], []
    asked = comparison(tiny_folder, schedule=schedule, max_new_tokens=50, max_seconds=4)
    for event in Machine(clock=lambda: now[0]).run(asked):
        events.append(event)
        now[0] += isinstance(event, Step)
    assert reasons(events) == {"fp32": "time", "bf16": "time"}
    expected = {"interleave": [3, 3], "in-turn": [4, 4]}[schedule]
    assert [len(token_ids(events, name)) for name in ("fp32", "bf16")] == expected


def test_an_end_of_text_token_ends_only_its_contestant(tiny_folder, machine, monkeypatch):
    ordinary = list(machine.run(comparison(tiny_folder)))
    end = token_ids(ordinary, "fp32")[0]
    monkeypatch.setattr(
        HFEngine, "eos_ids", property(lambda self: {end} if self.method.dtype == "float32" else frozenset())
    )
    events = list(machine.run(comparison(tiny_folder)))
    assert reasons(events) == {"fp32": "eos", "bf16": "length"}
    assert token_ids(events, "fp32") == [end]
    assert token_ids(events, "bf16") == token_ids(ordinary, "bf16")


def test_html_in_a_prompt_is_text_like_any_other(tiny_folder, machine):
    prompt = '<script>alert("1")</script> &amp; <b>'
    asked = comparison(tiny_folder, "fp32", prompt=prompt)
    planned = next(event for event in machine.run(asked) if isinstance(event, Planned))
    assert planned.prompt_tokens == len(prompt.encode())
    assert asked.settings()["prompt"] == prompt


def test_the_first_event_comes_before_anything_is_opened(tmp_path, machine):
    events = machine.run(comparison(tmp_path / "nowhere"))
    assert next(events) == Waiting(seconds=0.0, position=0)
    with pytest.raises(BadChoice, match="unknown model .*nowhere"):
        next(events)


def test_an_unknown_model_names_the_choices(machine):
    with pytest.raises(BadChoice) as caught:
        list(machine.run(Comparison(prompt="Hi", model="nope")))
    assert "'nope'" in str(caught.value)
    assert all(choice in str(caught.value) for choice in [*PRESETS, "hub id", "local folder"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": "sideways"}, ["'sideways'", "interleave", "in-turn"]),
        ({"contestants": ()}, ["0 methods", *METHODS]),
        ({"contestants": Contestant.parse_all("fp32,bf16,fp16,fp32")}, ["4 methods", *METHODS]),
        ({"contestants": (Contestant.parse("fp16"), Contestant.parse("fp16"))}, ["fp16, fp16", "repeat"]),
        (
            {"contestants": (Contestant.parse("bnb-int8@3"), Contestant.parse("bnb-int8@3.0"))},
            ["bnb-int8@3, bnb-int8@3"],
        ),
    ],
)
def test_what_cannot_be_compared_names_value_and_choices(changes, words):
    with pytest.raises(BadChoice) as caught:
        Comparison(prompt="Hi", **changes)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("text", ["int3", "", "FP16", "bnb-int8 @3", "fp16;rm"])
def test_an_unknown_method_names_the_choices(text):
    with pytest.raises(BadChoice) as caught:
        Contestant.parse(text)
    assert all(choice in str(caught.value) for choice in METHODS)


@pytest.mark.parametrize("text", ["bnb-int8@", "bnb-int8@x", "bnb-int8@-1", "bnb-int8@nan", "bnb-int8@65505", "fp16@6"])
def test_an_impossible_threshold_is_named(text):
    value = text.partition("@")[2]
    with pytest.raises(
        BadChoice, match=f"(threshold is .*{value}|fp16 cannot be set to '{value}'; it has no settings)"
    ):
        Contestant.parse(text)


@pytest.mark.parametrize(
    ("text", "label"),
    [("bnb-int8@6", "bnb-int8"), (" fp16 ", "fp16"), ("bnb-int8@0", "bnb-int8@0"), ("bnb-int8@3.50", "bnb-int8@3.5")],
)
def test_labels_name_the_method_and_an_unusual_threshold(text, label):
    assert Contestant.parse(text).label == label
    assert Contestant.parse(label) == Contestant.parse(text)


def test_the_folder_is_the_source(tiny_folder):
    assert source_of(tiny_folder).kind == "folder"


def test_every_contestant_states_what_its_method_converted(tiny_folder, machine):
    """The share of the linear weights, and of all weights, counted from the loaded tensors."""
    events = list(machine.run(comparison(tiny_folder, "fp32,llm-int8,llm-int8-head")))
    found = {event.contestant: event.coverage for event in events if isinstance(event, Loaded)}
    head, rest = 259 * 32, 259 * 32 + 5 * 32
    linear = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 64 * 32)
    assert found["fp32"] == {"linear": 0, "all": 0}
    assert found["llm-int8"]["linear"] == pytest.approx(linear / (linear + head))
    assert found["llm-int8"]["all"] == pytest.approx(linear / (linear + head + rest))
    assert found["llm-int8-head"]["linear"] == 1 > found["llm-int8-head"]["all"] > 0.9
