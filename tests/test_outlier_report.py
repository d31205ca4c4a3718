"""What a report answers, and that its thresholds decide as torch and bitsandbytes do."""

import json

import numpy as np
import pytest
import torch
from planted import PROMPT, StopAfter, columns, planted_llama, raw_inputs

from llmq.errors import BadChoice
from llmq.inspect.outliers import OutlierRecorder, observe
from llmq.inspect.report import cutoff
from llmq.inspect.views import layer_channel_map, strongest_channels


@pytest.fixture(scope="module")
def tiny():
    return planted_llama()


@pytest.fixture(scope="module")
def seen(tiny):
    return raw_inputs(tiny, lambda: observe(tiny, PROMPT, new_tokens=4, name="tiny", method="fp16"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cutoff_decides_as_torch_does(dtype):
    """All 16-bit numbers around every threshold, and for fp16 the float32 numbers around its ties."""
    kind = getattr(torch, dtype)
    positive = torch.arange(0x7C00 if dtype == "float16" else 0x7F80, dtype=torch.int16)
    x = positive.view(torch.float16 if dtype == "float16" else torch.bfloat16).float()
    between = (x[:-1] + x[1:]) / 2
    x = torch.cat([x, between, between.nextafter(x[1:]), between.nextafter(x[:-1])])
    # 6.00195312501 lies over the middle of two fp16 numbers, but not after rounding to float32, as torch does first.
    for threshold in (0.5, 2.1, 5.9, 6.0, 6.0007, 6.001953125, 6.00195312501, 6.1, 19.9, 1000.4, 1e-9, 65504.0):
        expected = (x.to(kind) >= threshold).numpy()
        assert np.array_equal(x.numpy() >= cutoff(threshold, dtype), expected), threshold


def test_thresholds_that_are_no_fp16_number_round_as_the_comparison_does():
    """fp16(5.9) is 5.8984: it passes `>= 5.9` in torch although it is smaller; 6.1 rounds up to 6.1016."""
    x = torch.tensor([5.9, 6.1], dtype=torch.float16)
    assert x.double()[0] < 5.9 and x[:1] >= 5.9 and x[1:] >= 6.1
    assert np.array_equal(x.float().numpy() >= cutoff(np.array([5.9, 6.1]), "float16"), (True, True))
    below = torch.nextafter(x, torch.zeros_like(x)).float().numpy()
    assert not (below >= cutoff(np.array([5.9, 6.1]), "float16")).any()


def test_shares(seen):
    calls, report = seen
    module = report.module("model.layers.0.mlp.gate_proj")
    prompt, *tokens = calls[module.name]
    assert module.share_of_values(6.0, "prefill") == int((prompt.abs() >= 6).sum()) / prompt.numel() > 0
    assert module.share_of_values(0.1 + 5.9 + 1e-9, "prefill") == module.share_of_values(6.0, "prefill")
    assert module.share_of_channels(6.0, "prefill") == 2 / 72
    per_token = [len(columns(token, 6.0)) / 72 for token in tokens]
    assert module.share_of_channels(6.0, "decode") == pytest.approx(np.mean(per_token))
    assert module.absmax == max(float(x.abs().max()) for x in calls[module.name])


@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_token_map_cells_equal_brute_force(tiny, tokens):
    prompt = torch.randint(2, 96, (1, tokens), generator=torch.Generator().manual_seed(1))
    calls, report = raw_inputs(tiny, lambda: observe(tiny, prompt))
    for module in report.modules:
        x, found = calls[module.name][0].abs().float().numpy(), module.token_map
        assert found.values.shape[0] <= 128 and found.values.shape[1] <= 256
        for row in range(found.values.shape[0]):
            for cell in range(found.values.shape[1]):
                rows = slice(row * found.height, (row + 1) * found.height)
                part = x[rows, cell * found.width : (cell + 1) * found.width]
                assert found.values[row, cell] == part.max()
        at = found.tokens - found.first_token, found.channels
        assert np.array_equal(x[at], found.values)
        assert np.array_equal(at[0] // found.height, np.indices(found.values.shape)[0])
        assert np.array_equal(at[1] // found.width, np.indices(found.values.shape)[1])
        assert found.end == tokens == report.prompt_tokens
    assert report.module("lm_head").token_map.first_token == tokens - 1


def test_moving_the_threshold_equals_recording_at_it(tiny, seen):
    for threshold in (3.3, 6.1, 9.0):
        again = observe(tiny, PROMPT, new_tokens=4, threshold=threshold, lowest_threshold=threshold)
        assert again.to_json()["modules"] == seen[1].to_json(threshold)["modules"]


def test_report_as_json(seen):
    report = json.loads(json.dumps(seen[1].to_json(), allow_nan=False))
    assert (report["model"], report["method"], report["threshold"]) == ("tiny", "fp16", 6.0)
    assert (report["prompt_tokens"], report["generated_tokens"], report["stopped"]) == (37, 4, False)
    assert [m["name"] for m in report["modules"]] == list(seen[0]), "one entry a linear layer, in the model's order"
    head = report["modules"][-1]
    assert (head["name"], head["kind"], head["quantized"], head["in_features"]) == ("lm_head", "lm_head", False, 72)
    assert all(len(m["decode_columns"]) == 4 for m in report["modules"])
    assert len(seen[1].token_texts) == 37 + 4


def test_layer_channel_map_keeps_every_maximum(seen):
    calls, report = seen
    found = layer_channel_map(report, "down", "prefill", columns=100)
    assert found.values.shape == (3, 77) and (found.width, found.layers) == (4, [0, 1, 2])
    for layer in range(3):
        x = calls[f"model.layers.{layer}.mlp.down_proj"][0].abs().amax(0).float().numpy()
        assert np.array_equal(found.values[layer], x.reshape(77, 4).max(1))
        assert np.array_equal(x[found.channels[layer]], found.values[layer])
    uneven = layer_channel_map(report, "q/k/v", "decode", columns=50)
    assert uneven.values.shape == (3, 36) and not np.isnan(uneven.values).any()
    assert uneven.channels.max() < 72
    assert layer_channel_map(report, "lm_head", "prefill").layers == [None]


def test_layers_that_did_not_run_are_missing_from_the_map(tiny):
    report = observe(tiny, PROMPT, stop=StopAfter(7 + 1))
    found = layer_channel_map(report, "q/k/v", "prefill").values
    assert np.isnan(found).all(axis=1).tolist() == [False, False, True]
    assert np.isnan(layer_channel_map(report, "o", "decode").values).all()


def test_strongest_channels(seen):
    report = seen[1]
    rows = strongest_channels(report, 6.0)
    expected = {("q/k/v", 5): (1,), ("gate/up", 3): (0,), ("gate/up", 60): (0, 2), ("down", 301): (1,)}
    assert {(row.kind, row.channel): row.layers for row in rows} == expected
    assert [row.absmax for row in rows] == sorted((row.absmax for row in rows), reverse=True)
    for row in rows:
        modules = [m for m in report.modules if m.kind == row.kind]
        peaks = {
            (m.layer, p): float(m.statistics(p).absmax[row.channel]) for m in modules for p in ("prefill", "decode")
        }
        assert peaks[row.layer, row.phase] == row.absmax == max(peaks.values())
    assert strongest_channels(report, 6.0, n=2) == rows[:2]
    assert strongest_channels(report, 1000.0) == []


def test_a_channel_strong_only_in_a_generated_token_is_found_there():
    layer = torch.nn.Linear(3, 3)
    with OutlierRecorder(layer) as recorder:
        for phase, x in (("prefill", [1.0, 7.0, 0.0]), ("decode", [8.0, 0.0, 0.0]), ("decode", [0.0, 0.0, 2.5])):
            recorder.phase(phase)
            layer(torch.tensor([[x]]))
    rows = strongest_channels(recorder.report(model="", method=""), 2.0)
    assert [(row.channel, row.absmax, row.phase) for row in rows] == [
        (0, 8.0, "decode"),
        (1, 7.0, "prefill"),
        (2, 2.5, "decode"),
    ]


def test_wrong_values_name_themselves_and_the_choices(tiny, seen):
    report = seen[1]
    module = report.modules[0]
    for wrong in (
        lambda: module.decode_columns(1.9),
        lambda: module.prefill_columns(0.0),
        lambda: module.prefill_columns(float("nan")),
        lambda: module.share_of_values(20.5, "prefill"),
        lambda: module.share_of_values(6.0, "warm-up"),
        lambda: layer_channel_map(report, "mlp", "prefill"),
        lambda: report.module("model.layers.9"),
        lambda: observe(tiny, PROMPT, threshold=-1.0),
        lambda: observe(tiny, PROMPT[:, :0]),
        lambda: OutlierRecorder(tiny, lowest_threshold=0),
    ):
        with pytest.raises(BadChoice, match=r"-1.0|0\.0|0 must|nan|1\.9|20\.5|warm-up|'mlp'|layers\.9|\(1, 0\)"):
            wrong()
