"""Models over two GPUs, and two contestants on one each."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config

from llmq.contestant import Contestant
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.events import Memory, Planned
from llmq.labs.compare import Comparison
from llmq.machine.door import Machine
from llmq.methods import parse_method
from llmq.models.opening import open_model
from llmq.models.random_weights import random_llama
from llmq.models.spread import device_map
from llmq.summary import Summary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device"),
]
PAIR, IDS = "cuda:0,cuda:1", [i * 37 % 250 + 3 for i in range(40)]


def written(engine, count: int = 12) -> list[int]:
    generation = engine.start(IDS, SamplingSettings(max_new_tokens=count))
    tokens = [generation.prefill(), *(generation.step() for _ in range(count - 1))]
    generation.close()
    return [token.token_id for token in tokens]


@pytest.mark.parametrize("method", ["fp16", "llm-int8", "int8-weight-only", "bnb-int8", "nf4", "rtn"])
def test_a_model_over_two_gpus_writes_what_it_writes_on_one(method, tiny_folder):
    pool, model = Machine().pool, open_model(str(tiny_folder))
    found = []
    for device in ("cuda:0", PAIR):
        engine, _ = pool.get(Key.of(model, parse_method(method), device, "hf"))
        found.append((written(engine), engine.weight_bytes))
        if device == PAIR:
            assert {str(tensor.device) for tensor in engine.model.parameters()} == set(PAIR.split(","))
    assert found[0] == found[1]
    for key in list(pool):
        engine = None
        freed = pool.drop(key)
        assert freed.verified, key.device


def test_random_weights_are_the_same_wherever_they_lie():
    config = tiny_config()
    one, two = random_llama(config, "cuda:0"), random_llama(config, device_map(config, PAIR))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b.to("cuda:0")), name
    with torch.inference_mode():
        ids = torch.tensor([IDS], device="cuda:0")
        assert torch.equal(one(ids).logits, two(ids).logits)


@pytest.mark.parametrize("engine", ["lean", "hf"])
def test_two_contestants_on_two_gpus_write_what_each_writes_alone(engine, tiny_folder):
    settings = {"prompt": "Hello", "model": str(tiny_folder), "engine": engine}
    settings["sampling"] = SamplingSettings(max_new_tokens=24)
    both = tuple(map(Contestant.parse, ("fp16", "llm-int8")))
    machine = Machine()
    events = list(machine.run(Comparison(contestants=both, device=PAIR, schedule="parallel", **settings)))
    plan = next(event for event in events if isinstance(event, Planned))
    assert plan.devices == {"fp16": "cuda:0", "llm-int8": "cuda:1"}
    found = Summary(events)
    assert not any(outcome.error for outcome in found.outcomes.values())
    for one in both:
        alone = Summary(machine.run(Comparison(contestants=(one,), device=plan.devices[one.label], **settings)))
        assert found.outcomes[one.label].token_ids == alone.outcomes[one.label].token_ids
    assert all(event.by_device.keys() == set(PAIR.split(",")) for event in events if isinstance(event, Memory))
