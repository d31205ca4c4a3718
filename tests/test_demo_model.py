"""The real thing: the demo model through the comparison, held against transformers' own generate.

Runs on the GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import json
import statistics
import threading
from dataclasses import replace

import pytest
import torch
from tiny_runs import CONTESTANT_KEYS, RUN_KEYS, key_of

from llmq import telemetry
from llmq.contestant import Contestant
from llmq.engine.sampling import SamplingSettings
from llmq.environment import default_device
from llmq.labs.compare import Comparison
from llmq.machine.door import Machine
from llmq.methods.swap import stored_tensors
from llmq.models.loading import load_tokenizer
from llmq.models.skeleton import meta_model
from llmq.models.text import encode_prompt
from llmq.summary import Summary

pytestmark = pytest.mark.demo
PARIS = "Plan a 3-day itinerary in Paris."
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def machine():
    return Machine()


@pytest.fixture(scope="module")
def summary(demo, machine):
    comparison = Comparison(prompt=PARIS, sampling=SamplingSettings(max_new_tokens=NEW_TOKENS), device=default_device())
    return Summary(machine.run(comparison))


def engine_of(demo, machine, method):
    label = Contestant.parse(method).label
    return machine.pool.get(key_of(demo, label, default_device()))[0]


@pytest.mark.parametrize("method", ["fp16", "bnb-int8"])
def test_greedy_tokens_equal_generate(demo, machine, summary, method):
    engine, tokenizer = engine_of(demo, machine, method), load_tokenizer(demo)
    prompt = torch.tensor([encode_prompt(tokenizer, PARIS, context=8192)], device=default_device())
    with torch.inference_mode():
        expected = engine.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, prompt.shape[1] :]
    outcome = summary.outcomes[method]
    assert outcome.token_ids == expected.tolist()
    assert outcome.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("method", ["fp16", "bnb-int8"])
def test_ledger_counts_every_stored_byte(demo, machine, summary, method):
    engine = engine_of(demo, machine, method)
    assert engine.weight_bytes == sum(t.nbytes for t in stored_tensors(engine.model))
    assert summary.outcomes[method].weight_bytes == engine.weight_bytes
    assert summary.outcomes[method].kv_bytes == 2 * 30 * 3 * 64 * 2 * (41 + NEW_TOKENS - 1)


def test_prediction_is_exact_for_weights(demo, machine, summary):
    from llmq import memory
    from llmq.methods import METHODS
    from llmq.models.loading import load_config

    shape = meta_model(load_config(demo))
    for method in ("fp16", "bnb-int8"):
        engine = engine_of(demo, machine, method)
        predicted = memory.predict(shape, METHODS[method], tokens=41 + NEW_TOKENS - 1)
        assert (predicted.weights, predicted.scales) == (engine.weight_bytes, engine.scale_bytes)
        assert predicted.kv == summary.outcomes[method].kv_bytes


def test_int8_runs_the_decomposition_not_the_training_path(demo, machine, summary):
    from llmq.methods.bnb_int8 import int8_linears

    found = [m.state.idx for m in int8_linears(engine_of(demo, machine, "bnb-int8").model)]
    assert len(found) == 210
    assert any(idx is not None and idx.numel() for idx in found)


def test_threshold_zero_changes_the_result(demo, machine):
    """The threshold reaches the kernels: at 0 nothing is decomposed, and the logits move."""
    engine = engine_of(demo, machine, "bnb-int8")
    ids = encode_prompt(load_tokenizer(demo), PARIS, context=8192)
    logprobs = []
    for threshold in (6.0, 0.0, 6.0):
        view = engine.under(replace(engine.method, threshold=threshold))
        logprobs.append(view.start(ids, SamplingSettings()).prefill().logprob)
    assert logprobs[0] == logprobs[2] != logprobs[1]


def test_cli_prints_the_stable_keys(demo, capsys):
    from llmq.cli import main

    assert main(["compare", PARIS, "--max-new-tokens", "2", "--methods", "fp16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() >= RUN_KEYS
    assert all(contestant.keys() >= CONTESTANT_KEYS for contestant in result["contestants"])
    assert result["agreement"].keys() == {"first_divergence", "matching_prefix_tokens"}


def test_stop_and_restart_leaves_nothing_behind(demo, machine):
    """Stop in six different places, start again: no thread left, memory where it was, and the next run is whole."""
    comparison = Comparison(prompt=PARIS, sampling=SamplingSettings(max_new_tokens=8), device=default_device())
    levels = []
    for cycle in range(6):
        stop = threading.Event()
        for number, _ in enumerate(machine.run(comparison, stop=stop)):
            if number == cycle:
                stop.set()
        levels.append(telemetry.MemoryReader(default_device())()["process_bytes"])
        assert not any(thread.name == "llmq-sampler" for thread in threading.enumerate())
    assert levels[-1] <= 1.02 * statistics.median(levels[:3])
    outcomes = Summary(machine.run(comparison)).outcomes
    assert [outcome.reason for outcome in outcomes.values()] == ["length", "length"]
