"""The paper's figures and massive activations, against loops over what a test's own hooks saw."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from planted import PROMPT, StopAfter, planted_llama, raw_inputs
from torch import nn

from llmq.inspect.emergence import Emergence, emergence, massive_activations, stream_inputs
from llmq.inspect.outliers import OutlierRecorder, observe
from llmq.inspect.report import (
    THRESHOLDS,
    ModuleOutliers,
    OutlierReport,
    PhaseStatistics,
    PromptPositions,
    StreamPeak,
)


@pytest.fixture(scope="module")
def tiny():
    return planted_llama()


def watched(model, prompt=PROMPT):
    """(inputs by name, outputs of the blocks, report): what hooks of the test saw, and what the recorder made of it."""
    outputs, handles = [], []
    for block in model.model.layers:
        handles.append(block.register_forward_hook(lambda m, args, y: outputs.append(y.clone()[0].float().abs())))
    calls, report = raw_inputs(model, lambda: observe(model, prompt))
    for handle in handles:
        handle.remove()
    return {name: found[0].float().abs().numpy() for name, found in calls.items()}, outputs, report


def by_hand(inputs, layers: int, positions: int) -> dict:
    """channel -> (layers that it reaches 6 in, share of layers, mean share of positions, largest |x|)."""
    reached = defaultdict(dict)
    for layer in range(layers):
        for name in ("self_attn.q_proj", "mlp.gate_proj"):
            x = inputs[f"model.layers.{layer}.{name}"]
            for channel in range(x.shape[1]):
                strong = sum(value >= 6 for value in x[:, channel])
                if strong:
                    reached[channel][layer] = max(strong, reached[channel].get(layer, 0))
    readers = [x.max(0) for name, x in inputs.items() if name.endswith(("q_proj", "gate_proj"))]
    largest = np.max(readers, axis=0)
    return {
        channel: (
            tuple(sorted(counts)),
            len(counts) / layers,
            sum(counts.values()) / len(counts) / positions,
            float(largest[channel]),
        )
        for channel, counts in reached.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_figures_of_a_planted_model_are_those_of_a_loop_over_its_inputs(dtype):
    inputs, _, report = watched(planted_llama(dtype))
    found = emergence(report)
    assert (found.layers, found.positions) == (3, 37)
    expected = by_hand(inputs, 3, 37)
    assert {f.channel for f in found.features} == set(expected) == {3, 5, 60}
    for feature in found.features:
        layers, layer_share, position_share, absmax = expected[feature.channel]
        assert (feature.layers, feature.absmax) == (layers, absmax)
        assert (feature.layer_share, feature.position_share) == pytest.approx((layer_share, position_share))
        assert feature.meets_criterion == (layer_share >= 0.25 and position_share >= 0.06)
    assert [f.absmax for f in found.features] == sorted((f.absmax for f in found.features), reverse=True)
    assert found.layers_touched == 1.0 and found.positions_touched == max(f.position_share for f in found.features)
    assert found.median_magnitude == np.median([entry[3] for entry in expected.values()])
    peaks = [max(inputs[f"model.layers.{i}.{n}"].max() for n in ("self_attn.q_proj", "mlp.up_proj")) for i in range(3)]
    assert found.peaks == pytest.approx(peaks)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["dimensions_reaching_magnitude"] == 3 and plain["criterion"]["magnitude"] == 6.0
    assert [feature["channel"] for feature in plain["outlier_features"]] == [f.channel for f in found.features]


def module(layer: int, kind: str, counts: list[int], positions: int, width: int = 4) -> ModuleOutliers:
    """A layer's input in which channel i reaches 6 at counts[i] positions."""
    counts = np.array(counts + [0] * (width - len(counts)), np.int32)
    touched = np.arange(positions) < counts.max()
    absmax = np.where(counts > 0, 7.0, 1.0).astype(np.float32)
    seen = PhaseStatistics(absmax, np.zeros(len(THRESHOLDS), np.int64), positions * width)
    nothing = PhaseStatistics(np.zeros(width, np.float32), np.zeros(len(THRESHOLDS), np.int64))
    where = PromptPositions(counts, touched)
    return ModuleOutliers(
        f"layers.{layer}.{kind}", kind, layer, width, False, "float16", 2.0, seen, nothing, positions=where
    )


def report_of(modules: list[ModuleOutliers], positions: int, width: int = 4) -> OutlierReport:
    stream = (StreamPeak(0, np.ones(width, np.float32), np.zeros(width, np.int64)),)
    return OutlierReport("", "", 6.0, positions, 0, [], tuple(modules), stream)


@pytest.mark.parametrize(
    ("layers", "counts", "expected"),
    [
        (4, {0: [6]}, True),  # exactly a quarter of the layers, exactly 6 of 100 positions
        (4, {0: [5]}, False),
        (5, {0: [100]}, False),  # one layer of five
        (8, {0: [100]}, False),
        (8, {0: [100], 5: [1]}, True),
        (4, {0: [10], 1: [2]}, True),  # the mean over the layers that count: 6
        (4, {0: [9], 1: [2]}, False),
        (4, {0: [1], 1: [1], 2: [1], 3: [1]}, False),
    ],
)
def test_the_criterion_on_its_edges(layers, counts, expected):
    """The attention's input is quiet: the feed-forward layer's alone decides, as it has more."""
    modules = [module(i, "q/k/v", [0], 100) for i in range(layers)]
    modules += [module(i, "gate/up", counts.get(i, [0]), 100) for i in range(layers)]
    found = emergence(report_of(modules, 100))
    assert [feature.meets_criterion for feature in found.features] == [expected]
    assert bool(found.outlier_features) == expected
    touched = len(counts) / layers if expected else 0.0
    assert (found.layers, found.positions, found.layers_touched) == (layers, 100, touched)


def test_the_input_that_has_more_counts_and_layers_touched_are_of_all_features():
    modules = [module(0, "q/k/v", [10, 0], 50), module(0, "gate/up", [4, 0], 50)]
    modules += [module(1, "q/k/v", [0, 3], 50), module(1, "gate/up", [0, 5], 50)]
    modules += [module(2, "q/k/v", [0, 0, 1], 50), module(2, "gate/up", [0, 0, 1], 50)]
    modules += [module(3, "q/k/v", [0], 50), module(3, "down", [50], 50), module(3, "o", [50], 50)]
    found = emergence(report_of(modules, 50))
    shares = {f.channel: (f.layers, f.position_share) for f in found.features}
    assert shares == {0: ((0,), 0.2), 1: ((1,), 0.1), 2: ((2,), 0.02)}
    assert {f.channel for f in found.outlier_features} == {0, 1}
    assert (found.layers_touched, found.positions_touched, found.median_magnitude) == (0.5, 0.2, 7.0)


def test_no_outlier_and_no_layer():
    found = emergence(report_of([module(i, "q/k/v", [0], 9) for i in range(2)], 9))
    assert found.features == () and found.peaks == (1.0, 1.0)
    assert (found.layers_touched, found.positions_touched, found.median_magnitude) == (0.0, 0.0, 0.0)
    early = observe(planted_llama(), PROMPT, stop=StopAfter(0))
    assert emergence(early) == Emergence(0, 0, (), ()) and massive_activations(early) == []
    assert emergence(early).to_json()["layers_touched"] == 0.0


def strangers():
    """Models with other names: (the model, the ends of the names of what reads the stream)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=64, max_position_embeddings=64))
    opt = OPTForCausalLM(OPTConfig(**shape, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32))
    yield neox, ("query_key_value", "dense_h_to_4h"), "attention.dense"
    yield opt, ("q_proj", "k_proj", "v_proj", "fc1"), "self_attn.out_proj"


@pytest.mark.parametrize("number", [0, 1], ids=["GPT-NeoX", "OPT"])
def test_other_names_than_a_llamas(number):
    """What the attention's output layer reads is as wide as the stream, but it is not the stream."""
    model, readers, other = list(strangers())[number]
    norms = [m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and "layers." in name]
    with torch.no_grad():
        for norm in norms:
            norm.weight[9] = 40.0
        for name, linear in model.named_modules():
            if name.endswith(other):  # of this channel a planted outlier that is none of the stream's
                linear.register_forward_pre_hook(lambda m, args: (args[0].index_fill(-1, torch.tensor([4]), 99.0),))
    report = observe(model.eval(), PROMPT)
    read = {m.name for modules in stream_inputs(report).values() for m in modules}
    assert read == {name for name, m in model.named_modules() if name.endswith(readers) and "layers." in name}
    found = emergence(report)
    assert found.layers == 4 and [f.channel for f in found.outlier_features] == [9]


def test_a_model_without_a_stack_is_measured_by_the_first_layers_width():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Linear(5, 7))
            self.add_module("1", nn.Linear(7, 5))
            self.add_module("2", nn.Linear(5, 2))

        def forward(self, x):
            return self.get_submodule("2")(self.get_submodule("1")(self.get_submodule("0")(x)))

    x, model = torch.zeros(1, 3, 5), Plain()
    x[0, :, 2] = 8.0
    with torch.no_grad(), OutlierRecorder(model) as recorder:
        recorder.phase("prefill")
        model(x)
    report = recorder.report(model="", method="")
    assert report.stream == () and list(stream_inputs(report)) == [0, 2]
    assert emergence(report).features[0].channel == 2
    assert massive_activations(report)[0].text == "", "no texts were given"


def test_massive_activations_are_the_largest_numbers_of_a_loop_over_all(tiny):
    inputs, outputs, report = watched(tiny)
    entries = massive_activations(report, n=20)
    stream = [entry for entry in entries if entry.where == "residual stream"]
    best = {}
    for layer, y in enumerate(outputs):
        typical = float(np.median(y.amax(0).numpy()))
        for channel in range(y.shape[1]):
            token = int(y[:, channel].argmax())
            value = float(y[token, channel])
            if value > best.get((token, channel), (0,))[0]:
                best[token, channel] = (value, layer, typical)
    ranked = sorted(best.items(), key=lambda entry: -entry[1][0])[:20]
    assert [entry.absmax for entry in stream] == [found[0] for _, found in ranked] and len(stream) == 20
    for entry in stream:
        value, layer, typical = best[entry.token, entry.channel]
        assert (entry.absmax, entry.layer) == (value, layer)
        assert entry.times_typical == pytest.approx(value / typical)
        assert entry.text == report.token_texts[entry.token] == str(int(PROMPT[0, entry.token]))
    read = entries[len(stream) :]
    kinds = {"q/k/v": "self_attn.q_proj", "o": "self_attn.o_proj", "gate/up": "mlp.up_proj", "down": "mlp.down_proj"}
    everything = []
    for kind, name in kinds.items():
        for layer in range(3):
            x = inputs[f"model.layers.{layer}.{name}"]
            cells = x.reshape(37, -1, 2).max(2) if x.shape[1] > 256 else x  # of two neighbours the larger is kept
            everything += [(value, kind, layer) for value in cells.flatten().tolist()]
    everything.sort(key=lambda entry: -entry[0])
    assert [entry.absmax for entry in read] == [value for value, *_ in everything[:20]]
    for entry in read:
        x = inputs[f"model.layers.{entry.layer}.{kinds[entry.where]}"]
        assert x[entry.token, entry.channel] == entry.absmax
        assert entry.times_typical == pytest.approx(entry.absmax / np.median(x.max(0)))
    assert read[0].where == "down" and (read[0].layer, read[0].channel) == (1, 301), "the planted one"
