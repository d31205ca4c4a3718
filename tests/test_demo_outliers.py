"""The Outliers tab's columns on the demo model, held against the list bitsandbytes itself made at every layer."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import key_of

from llmq.contestant import Contestant
from llmq.environment import default_device
from llmq.inspect.outliers import observe
from llmq.inspect.report import agreement_with_kernel
from llmq.labs.outliers import Inspection
from llmq.machine.door import Machine
from llmq.methods.bnb_int8 import int8_linears

pytestmark = pytest.mark.demo
NEW_TOKENS = 3
PROMPTS = {
    "a request": "Plan a 3-day itinerary in Paris.",
    "code": "def area(r):\n    return 3.14159 * r ** 2  # πr²\n\nprint([area(x) for x in range(4)])\n",
    "one letter": "a",
}


@pytest.fixture(scope="module")
def machine():
    return Machine()


@pytest.mark.parametrize("threshold", [6.0, 3.0])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_columns_equal_bitsandbytes_at_every_layer(demo, machine, prompt, threshold):
    """And the layers' own account, as the report has it, is the same list once more."""
    contestant = Contestant.parse(f"bnb-int8@{threshold}")
    inspection = Inspection(prompt=prompt, contestant=contestant, new_tokens=NEW_TOKENS, device=default_device())
    engine, _ = machine.pool.get(key_of(demo, contestant.label, default_device()), contestant.method)
    names = {id(module): name for name, module in engine.model.named_modules()}
    seen: dict[str, list[list[int]]] = {}

    def note(module, args, output):
        columns = module.state.idx
        seen.setdefault(names[id(module)], []).append([] if columns is None else sorted(columns.tolist()))

    hooks = [module.register_forward_hook(note) for module in int8_linears(engine.model)]
    try:
        *_, answer = machine.run(inspection)
        report = answer.report
    finally:
        for hook in hooks:
            hook.remove()
    quantized = [module for module in report.modules if module.quantized]
    ours = {m.name: [m.prefill_columns(threshold), *m.decode_columns(threshold)] for m in quantized}
    assert len(ours) == 210 and {len(phases) for phases in ours.values()} == {1 + NEW_TOKENS}
    assert ours == seen
    assert {module.name: [sent.tolist() for sent in module.outlier_columns] for module in quantized} == seen
    assert agreement_with_kernel(report) == (210 * (1 + NEW_TOKENS),) * 2
    assert {module.outlier_columns for module in report.modules if not module.quantized} == {None}
    assert sum(len(columns) for phases in ours.values() for columns in phases) > 100


def test_watching_changes_nothing(demo, machine):
    """The same logits with and without hooks, and no hook left."""
    contestant = Contestant.parse("bnb-int8")
    engine, _ = machine.pool.get(key_of(demo, contestant.label, default_device()), contestant.method)
    ids = torch.tensor([[1, 4093, 198, 504, 1194]], device=default_device())
    with torch.inference_mode():
        before = engine.model(ids).logits
        observe(engine.model, ids, new_tokens=2)
        after = engine.model(ids).logits
    assert torch.equal(before, after)
    assert not any(module._forward_pre_hooks for module in engine.model.modules())
