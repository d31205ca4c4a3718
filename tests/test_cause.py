"""Why a token came out differently: errors and patches against plain forward passes of the test's own."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from planted import StopAfter, hooks_left
from tiny_runs import engine_of, light
from torch import nn

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.events import Loaded, Progress
from llmq.hooks import kind_and_layer, linear_modules
from llmq.inspect.cause import Cause
from llmq.inspect.patching import explain_token, patched, sqnr_db
from llmq.labs.cause import Explanation
from llmq.machine.door import Machine
from llmq.methods import METHODS
from llmq.methods.layers.naive_linear import NaiveLinear
from llmq.methods.naive import Vectorwise

IDS = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0)).tolist()


class Exact(Vectorwise):
    """Rounds neither half: the layer that it stands for."""

    weights = activations = False


EXACT = Exact()
LAYERS = 3
SHAPE = {"num_hidden_layers": LAYERS, "initializer_range": 0.3}  # blocks that matter: methods part within ten tokens


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def replaced(model: nn.Module, damaged: str = "") -> nn.Module:
    """A copy whose linear layers but the head are of another class that computes the same; `damaged` does not."""
    model = copy.deepcopy(model)
    for name, linear in list(linear_modules(model).items())[:-1]:
        parent, _, child = name.rpartition(".")
        weight = linear.weight.data + torch.randn(linear.weight.shape) * 0.5 * (name == damaged)
        setattr(model.get_submodule(parent), child, NaiveLinear(weight, None, linear.bias, EXACT))
    return model


def last_logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].float()


def parting_at(baseline: nn.Module, model: nn.Module) -> int:
    """A position of IDS that both forecast differently."""
    pairs = ((p, last_logits(baseline, IDS[:p]), last_logits(model, IDS[:p])) for p in range(5, len(IDS)))
    return next(position for position, one, other in pairs if one.argmax() != other.argmax())


def swapped(baseline: nn.Module, model: nn.Module, name: str, ids: list[int]) -> torch.Tensor:
    """The forecast of `model` with one module computed by the baseline's, by hand."""
    parent, _, child = name.rpartition(".")
    kept = getattr(model.get_submodule(parent), child)
    theirs = baseline.get_submodule(name)

    class Bridge(nn.Module):
        weight = theirs.weight

        def forward(self, x):
            return theirs(x.to(theirs.weight.dtype)).to(x.dtype)

    setattr(model.get_submodule(parent), child, Bridge())
    try:
        return last_logits(model, ids)
    finally:
        setattr(model.get_submodule(parent), child, kept)


def last(found) -> Cause:
    return [entry for entry in found if isinstance(entry, Cause)][-1]


def untouched(*models: nn.Module):
    """A question to be asked twice: every module in its place, and no hook."""
    return [[(name, id(module)) for name, module in model.named_modules()] for model in models], [
        hooks_left(model) for model in models
    ]


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    return tiny_llama(**SHAPE)


@pytest.fixture(scope="module", params=["vectorwise", "absmax", "bnb-int8", "llm-int8", "bf16"])
def case(request):
    """(baseline, model, position): a real method against FP16, at a token where they part."""
    baseline = tiny_llama(torch.float16, **SHAPE)
    method = METHODS[request.param]
    model = tiny_llama(getattr(torch, method.dtype), **SHAPE)
    model = method.quantize_(model, "cpu").requires_grad_(False).eval()
    return SimpleNamespace(baseline=baseline, model=model, position=parting_at(baseline, model), method=request.param)


@pytest.mark.parametrize("name", [f"model.layers.{end}_proj" for end in ("0.self_attn.v", "1.mlp.down", "2.mlp.up")])
def test_the_one_damaged_module_is_the_one_that_repairs(whole, name):
    model = replaced(whole, name)
    position = parting_at(whole, model)
    found = last(explain_token(whole, model, IDS, position, threshold=6.0))
    truth = last_logits(whole, IDS[:position])
    assert found.diverges and not found.stopped and found.baseline_token == int(truth.argmax())
    assert [patch.module for patch in found.repairs] == [name] == [found.patches[0].module]
    assert {patch.module for patch in found.patches} == set(list(linear_modules(model))[:-1])
    assert found.repairs[0].margin == pytest.approx(float(truth[found.baseline_token] - truth[found.other_token]))
    assert {patch.margin for patch in found.patches[1:]} == {found.margin} and found.margin < 0
    damaged = kind_and_layer(name)[1]
    assert [entry.relative == 0 for entry in found.layers] == [layer < damaged for layer in range(LAYERS)]


def first_order(baseline: nn.Module, model: nn.Module, ids: list[int], pair: tuple[int, int]) -> dict[str, float]:
    """For each linear layer of `model` but the head: how fast the baseline's margin of `pair` grows when the layer's
    output moves towards what the baseline's layer makes of the same input. By differences of plain forward passes."""
    inputs = {}
    for name, linear in linear_modules(model).items():
        linear.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].double()}))
    last_logits(model, ids)
    exact, step = copy.deepcopy(baseline).double(), 1e-2

    def margin(name: str, repair: torch.Tensor, scale: float) -> float:
        hook = exact.get_submodule(name).register_forward_hook(lambda m, args, y: y + scale * repair)
        with torch.inference_mode():
            logits = exact(torch.tensor([ids]), use_cache=False).logits[0, -1]
        hook.remove()
        return float(logits[pair[0]] - logits[pair[1]])

    found = {}
    with torch.inference_mode():
        for name, x in inputs.items():
            repair = exact.get_submodule(name)(x) - model.get_submodule(name)(x.to(next(model.parameters()).dtype))
            found[name] = (margin(name, repair, step) - margin(name, repair, -step)) / (2 * step)
    return found


def tried(found) -> list[str]:
    """The modules in the order in which they were put back."""
    return [entry.message.split()[1] for entry in found if isinstance(entry, Progress) and "in 16 bit" in entry.message]


@pytest.mark.parametrize("method", ["vectorwise", "absmax"])
def test_the_module_that_promises_most_is_tried_first(whole, method):
    """So a stop after a few patches has seen the best; by name or by layer it would have seen the first."""
    model = METHODS[method].quantize_(tiny_llama(**SHAPE), "cpu").requires_grad_(False).eval()
    position = parting_at(whole, model)
    found = list(explain_token(whole, model, IDS, position, threshold=6.0))
    pair, order = (last(found).baseline_token, last(found).other_token), tried(found)
    promise = first_order(whole, model, IDS[:position], pair)
    assert set(order) == set(promise) - {"lm_head"} and len(order) == 7 * LAYERS
    found = [promise[name] for name in order]
    assert all(one > other - 1e-3 for one, other in pairwise(found)), "norms round to float32 in float64 models too"
    assert found[0] > 0.1 and found[-1] < -0.02 and order != sorted(order), "some would make it worse, and come last"


@pytest.mark.parametrize("name", [f"model.layers.{end}_proj" for end in ("0.self_attn.v", "1.mlp.down", "2.mlp.up")])
def test_the_one_damaged_module_is_tried_first(whole, name):
    model = replaced(whole, name)
    assert tried(explain_token(whole, model, IDS, parting_at(whole, model), threshold=6.0))[0] == name


def test_every_patch_is_a_plain_forward_pass_with_that_module_swapped(case):
    """Exactly: so what is saved by entering the stack half-way changes no digit."""
    before = untouched(case.baseline, case.model)
    found = last(explain_token(case.baseline, case.model, IDS, case.position, threshold=6.0))
    wanted, got = found.baseline_token, found.other_token
    read = IDS[: case.position]
    truth, own = last_logits(case.baseline, read), last_logits(case.model, read)
    assert (wanted, got) == (int(truth.argmax()), int(own.argmax())) and wanted != got
    assert found.margin == float(own[wanted] - own[got]) <= 0
    linears = linear_modules(case.model)
    others = set(linears) if METHODS[case.method].dtype != "float16" else set(linears) - {"lm_head"}
    assert {patch.module for patch in found.patches} == others and len(found.patches) == len(others)
    for patch in found.patches:
        logits = swapped(case.baseline, case.model, patch.module, read)
        assert (patch.token_id, patch.margin) == (int(logits.argmax()), float(logits[wanted] - logits[got]))
        assert patch.repaired == (patch.token_id == wanted)
    ranked = sorted(found.patches, key=lambda patch: (not patch.repaired, -patch.margin))
    assert list(found.patches) == ranked
    assert len({patch.margin for patch in found.patches}) > 1, "patches that do nothing would prove nothing"
    assert untouched(case.baseline, case.model) == before


def test_errors_and_outliers_of_a_layer_are_those_of_its_output(case):
    threshold, outputs, inputs, handles = 1.7, {0: [], 1: []}, {}, []
    for side, model in enumerate((case.baseline, case.model)):
        for block in model.model.layers:
            keep = lambda m, args, y, side=side: outputs[side].append(y[0, -1])  # noqa: E731
            handles.append(block.register_forward_hook(keep))
    for name, linear in linear_modules(case.model).items():
        keep = lambda m, args, name=name: inputs.update({kind_and_layer(name): args[0][0, -1]})  # noqa: E731
        handles.append(linear.register_forward_pre_hook(keep))
    for model in (case.baseline, case.model):
        last_logits(model, IDS[: case.position])
    for handle in handles:
        handle.remove()
    found = last(explain_token(case.baseline, case.model, IDS, case.position, threshold=threshold, patch=False))
    assert found.patches == () and not found.stopped and len(found.layers) == LAYERS
    for entry, y16, y in zip(found.layers, *outputs.values(), strict=True):
        y16, y = y16.double().numpy(), y.double().numpy()
        noise, signal = ((y - y16) ** 2).sum(), (y16**2).sum()
        assert entry.relative == pytest.approx(math.sqrt(noise / signal), rel=1e-6) and entry.relative > 0
        assert entry.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
        strong = [
            (kind, channel, abs(float(value)))
            for (kind, layer), x in inputs.items()
            for channel, value in enumerate(x)
            if layer == entry.layer and value.half().abs() >= threshold
        ]
        strongest = sorted(strong, key=lambda outlier: -outlier[2])
        assert entry.outlier_count == len(strong) and set(entry.outliers) <= set(strong)
        assert [o[2] for o in entry.outliers] == [o[2] for o in strongest[:3]]
    assert sum(entry.outlier_count for entry in found.layers) > 5, "too few outliers to prove anything"


def test_layers_in_front_of_a_patch_are_not_run_again(whole):
    """Three layers of seven modules: two readings of the text, then each patch from its layer on."""
    model, runs = replaced(whole, "model.layers.1.mlp.down_proj"), [0] * LAYERS
    position = parting_at(whole, model)
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, args, y, layer=layer: runs.__setitem__(layer, runs[layer] + 1))
    last(explain_token(whole, model, IDS, position, threshold=6.0))
    assert runs == [2 + 7, 2 + 14 + 1, 2 + 21 + 1]  # one more is the trial that the stack can be entered there


def test_a_stack_that_cannot_be_entered_half_way_is_run_whole(whole):
    """Such as one that scales the embeddings it is given: the same patches, only slower."""
    model = replaced(whole, "model.layers.1.mlp.down_proj")
    position = parting_at(whole, model)
    expected = last(explain_token(whole, model, IDS, position, threshold=6.0))

    def scale(module, args, kwargs):
        embedded = kwargs.get("inputs_embeds")
        return args, kwargs if embedded is None else kwargs | {"inputs_embeds": embedded * 2}

    model.model.register_forward_pre_hook(scale, with_kwargs=True)
    assert last(explain_token(whole, model, IDS, position, threshold=6.0)) == expected


def test_a_cause_comes_whenever_a_module_does_better_than_all_before(case):
    found = [
        entry
        for entry in explain_token(case.baseline, case.model, IDS, case.position, threshold=6.0)
        if isinstance(entry, Cause)
    ]
    *partial, final = found
    assert all(entry.stopped for entry in partial) and not final.stopped
    best = [(entry.patches[0].repaired, entry.patches[0].margin) for entry in partial]
    assert best == sorted(set(best)), "each better than the one before"
    assert final.patches[0] == partial[-1].patches[0] and len(partial[0].patches) == 1


def test_a_token_that_both_forecast_has_no_patches(whole):
    found = list(explain_token(whole, replaced(whole), IDS, 20, threshold=6.0))
    assert isinstance(found[-1], Cause) and not found[-1].diverges and found[-1].patches == ()
    assert [(layer.relative, layer.sqnr_db) for layer in found[-1].layers] == [(0.0, math.inf)] * LAYERS


@pytest.mark.parametrize("calls", [0, 1, 30, 2 * (7 * LAYERS + 1), 2 * (7 * LAYERS + 1) + 4])
def test_a_stop_leaves_both_models_as_they_were(case, calls):
    """Before the reading, in it, between the two, at the first patch, after four."""
    before = untouched(case.baseline, case.model)
    stop = StopAfter(calls)
    found = list(explain_token(case.baseline, case.model, IDS, case.position, threshold=6.0, stop=stop))
    causes = [entry for entry in found if isinstance(entry, Cause)]
    tried = calls - 2 * (7 * LAYERS + 1)
    assert bool(causes) == (tried >= 0)
    if causes:
        assert causes[-1].stopped and len(causes[-1].patches) == tried
    assert untouched(case.baseline, case.model) == before


@pytest.mark.parametrize("broken", ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_leaves_both_models_as_they_were(whole, broken, call, monkeypatch):
    """In the reading, in the backward pass, and in the patch itself: the baseline's module runs in all of them."""
    model, calls = replaced(whole, "model.layers.1.mlp.down_proj"), []
    position, module = parting_at(whole, model), whole.get_submodule(broken)
    before, forward = untouched(whole, model), module.forward

    def fails(x):
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError
        return forward(x)

    monkeypatch.setattr(module, "forward", fails)
    with pytest.raises(ZeroDivisionError):
        list(explain_token(whole, model, IDS, position, threshold=6.0))
    assert untouched(whole, model) == before


def test_whoever_stops_listening_leaves_both_models_as_they_were(case):
    before = untouched(case.baseline, case.model)
    for heard in range(1, 12):
        listened = explain_token(case.baseline, case.model, IDS, case.position, threshold=6.0)
        for _ in range(heard):
            next(listened)
        listened.close()
        assert untouched(case.baseline, case.model) == before


@pytest.mark.parametrize("position", [0, -1, len(IDS), True, "3", 2.0, None])
def test_a_position_without_a_forecast_is_refused(whole, position):
    with pytest.raises(BadChoice, match=f"from 1 to {len(IDS) - 1}"):
        next(explain_token(whole, whole, IDS, position, threshold=6.0))


def test_a_module_that_is_not_there_is_refused(whole):
    with pytest.raises(BadChoice, match="layers.0.experts'"), patched(whole, "model.layers.0.experts", nn.Linear(2, 2)):
        pass


def test_decibels():
    assert sqnr_db(10.0, 1.0) == pytest.approx(20.0) and sqnr_db(1.0, 10.0) == pytest.approx(-20.0)
    assert (sqnr_db(1.0, 0.0), sqnr_db(0.0, 1.0), sqnr_db(1.0, math.inf)) == (math.inf, -math.inf, -math.inf)


@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8", "int8-weight-only", "absmax", "absmax-w32a8"])
def test_only_a_dense_baseline_has_modules_to_put_back(method):
    with pytest.raises(BadChoice, match=f"{method} has no 16-bit.*fp16, bf16, fp32$"):
        Explanation(token_ids=(1, 2), position=1, baseline=Contestant.parse(method))


@pytest.mark.parametrize("contestant", ["bnb-int8", "bnb-int8@0", "llm-int8@inf", "vectorwise"])
def test_the_job_is_the_same_question_put_to_loaded_engines(tiny_folder, contestant):
    """Thresholds at which nothing is an outlier included."""
    machine = Machine()
    asked = Explanation(
        token_ids=tuple(IDS), position=30, model=str(tiny_folder), contestant=Contestant.parse(contestant)
    )
    events = list(machine.run(asked))
    assert [event.contestant for event in events if isinstance(event, Loaded)] == ["fp16", asked.contestant.label]
    assert any(isinstance(event, Progress) for event in events)
    models = (engine_of(machine, tiny_folder, name).model for name in ("fp16", contestant))
    assert events[-1] == last(explain_token(*models, IDS, 30, threshold=asked.threshold))
    assert [hooks_left(machine.pool.get(key)[0].model) for key in machine.pool] == [0, 0]
