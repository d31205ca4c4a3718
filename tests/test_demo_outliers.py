"""The Outliers tab's columns on the demo model, held against the list bitsandbytes itself made at every layer."""

from __future__ import annotations

import pytest
import torch

from llmq.contestants import Contestant
from llmq.engine.residents import Key, Residents
from llmq.environment import default_device
from llmq.inspect.outliers import observe
from llmq.inspect.run import Inspection, inspect_outliers
from llmq.quant.bnb_int8 import int8_linears

pytestmark = pytest.mark.demo
NEW_TOKENS = 3
THRESHOLD = 6.0


@pytest.fixture(scope="module")
def residents():
    return Residents()


def test_columns_equal_bitsandbytes_at_every_layer(demo, residents):
    inspection = Inspection(prompt="Plan a 3-day itinerary in Paris.", new_tokens=NEW_TOKENS, device=default_device())
    contestant = inspection.contestant
    engine, _ = residents.get(Key(demo, contestant.label, contestant.method, default_device()))
    names = {id(module): name for name, module in engine.model.named_modules()}
    seen: dict[str, list[list[int]]] = {}

    def note(module, args, output):
        columns = module.state.idx
        seen.setdefault(names[id(module)], []).append([] if columns is None else sorted(columns.tolist()))

    hooks = [module.register_forward_hook(note) for module in int8_linears(engine.model)]
    try:
        *_, report = inspect_outliers(inspection, residents)
    finally:
        for hook in hooks:
            hook.remove()
    ours = {m.name: [m.prefill_columns(THRESHOLD), *m.decode_columns(THRESHOLD)] for m in report.modules if m.quantized}
    assert len(ours) == 210
    assert ours == seen
    assert sum(len(columns) for phases in ours.values() for columns in phases) > 100


def test_watching_changes_nothing(demo, residents):
    """The same logits with and without hooks, and no hook left."""
    contestant = Contestant.parse("bnb-int8")
    engine, _ = residents.get(Key(demo, contestant.label, contestant.method, default_device()))
    ids = torch.tensor([[1, 4093, 198, 504, 1194]], device=default_device())
    with torch.inference_mode():
        before = engine.model(ids).logits
        observe(engine.model, ids, new_tokens=2)
        after = engine.model(ids).logits
    assert torch.equal(before, after)
    assert not any(module._forward_pre_hooks for module in engine.model.modules())
