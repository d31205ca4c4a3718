"""The chain of cause on the demo model: the module that is said to repair a token does, in a plain forward pass."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from tiny_runs import key_of

from llmq.contestant import Contestant
from llmq.environment import default_device
from llmq.inspect.cause import Cause
from llmq.labs.agreement import Reading
from llmq.labs.cause import Explanation
from llmq.machine.door import Machine

pytestmark = pytest.mark.demo


def test_the_repairing_module_alone_gives_fp16s_token(demo):
    device, machine = default_device(), Machine()
    *_, read = machine.run(Reading(prompt="Plan a 3-day itinerary in Paris.", text="prompt", device=device))
    diverging = read.agreement.diverging
    assert diverging, "bnb-int8 has another first choice somewhere in the chat template's tokens"
    stop, cause = threading.Event(), None
    wanted = Explanation(token_ids=read.agreement.token_ids, position=diverging[0].position, device=device)
    for item in machine.run(wanted, stop=stop):
        if isinstance(item, Cause):
            cause = item
            if cause.repairs:
                stop.set()  # the first repair is enough; all 210 take a minute on a CPU
    assert cause.diverges and cause.margin < 0 < cause.repairs[0].margin

    labels = ("fp16", Contestant.parse("bnb-int8").label)
    baseline, model = (machine.pool.get(key_of(demo, name, device))[0].model for name in labels)
    ids = torch.tensor([read.agreement.token_ids[: cause.position]], device=device)
    parent, _, child = cause.repairs[0].module.rpartition(".")
    holder, replacement = model.get_submodule(parent), copy.deepcopy(baseline.get_submodule(cause.repairs[0].module))
    original = getattr(holder, child)
    tokens = []
    with torch.inference_mode():
        for module in (original, replacement):
            setattr(holder, child, module)
            tokens.append(int(model(ids).logits[0, -1].argmax()))
        truth = int(baseline(ids).logits[0, -1].argmax())
    setattr(holder, child, original)
    assert tokens == [cause.other_token, truth] and truth == cause.baseline_token
