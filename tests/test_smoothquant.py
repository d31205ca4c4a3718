"""SmoothQuant and calibration: equation 4 computed once more, what the statistics are, and that they are kept."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from planted import planted_llama
from tiny_runs import key_of, light, run_cli
from torch import nn

from llmq.engine.base import Interrupted
from llmq.engine.loading import statistics_file
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.hooks import linear_modules
from llmq.machine.door import Lease, Machine
from llmq.methods import METHODS, parse_method
from llmq.methods.calibrate import FOLDER, Calibration, ChannelMaximum, save_statistics
from llmq.methods.layers.naive_linear import NaiveLinear
from llmq.methods.smoothquant import SmoothQuant, factors


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    return tmp_path


def with_outlier() -> tuple[nn.Linear, torch.Tensor]:
    linear, x = nn.Linear(64, 32), torch.randn(48, 64)
    x[:, 5] *= 80
    return linear, x


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_layer_is_the_paper_in_float64(alpha):
    linear, x = with_outlier()
    found = SmoothQuant(alpha).quantize(linear, x.abs().amax(0))(x)
    w, inputs = linear.weight.data.double(), x.double()
    s = inputs.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
    inputs, w = inputs / s, w * s
    cx, cw = inputs.abs().amax(1, keepdim=True), w.abs().amax(1, keepdim=True)
    integers = torch.round(127 * inputs / cx) @ torch.round(127 * w / cw).T
    expected = integers * cx * cw.T / 127**2 + linear.bias.double()
    off = (found.double() - expected).abs()
    assert off.median() < 1e-5 and off.max() < 0.01  # a code that float32 rounds the other way is one step


def test_smoothing_beats_the_same_codes_without_it():
    linear, x = with_outlier()
    truth = linear(x)
    smooth = SmoothQuant().quantize(linear, x.abs().amax(0))(x)
    plain = NaiveLinear.over(linear, METHODS["vectorwise"])(x)
    assert (smooth - truth).norm() < (plain - truth).norm() / 3


def test_a_channel_nobody_uses_and_one_without_weights_are_left_alone():
    linear, x = with_outlier()
    x[:, 3] = 0
    linear.weight.data[:, 7] = 0
    found = factors(x.abs().amax(0), linear.weight.data, 0.5)
    assert found[3] == found[7] == 1 and found.isfinite().all() and (found > 0).all()


def test_a_calibration_sees_every_input_and_leaves_no_hook():
    model, method = planted_llama(torch.float32), METHODS["smoothquant"]
    ids = [torch.randint(0, 20, (1, length)) for length in (9, 4)]
    seen = {}

    def keep(name):
        def hook(module, args):
            peak = args[0].abs().amax((0, 1))
            seen[name] = torch.maximum(seen.get(name, peak), peak)

        return hook

    handles = [m.register_forward_pre_hook(keep(n)) for n, m in linear_modules(model).items() if n != "lm_head"]
    with Calibration(model, method) as found:
        for tokens in ids:
            model(tokens)
    for handle in handles:
        handle.remove()
    assert found.statistics.keys() == seen.keys() and len(seen) == 3 * 7
    assert all(torch.equal(value, seen[name]) for name, value in found.statistics.items())
    with pytest.raises(RuntimeError, match="stop"), Calibration(model, method):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_was_never_run_has_no_statistics():
    with pytest.raises(AssertionError, match="never run"):
        ChannelMaximum().result()


def lease(machine: Machine, stop=None) -> Lease:
    return Lease(machine, "cpu", stop or threading.Event())


def test_statistics_are_collected_once_and_shared_by_every_alpha(tiny_folder, cache):
    machine, key = Machine(), key_of(tiny_folder, "smoothquant")
    events = list(lease(machine).calibrate(key))
    assert [e.fraction for e in events] == sorted(e.fraction for e in events) and isinstance(events[0], Progress)
    assert statistics_file(key).is_relative_to(cache) and statistics_file(key).is_file()
    assert list(machine.pool) == [], "the model that was read with is gone"
    other = key_of(tiny_folder, "smoothquant@0.8")
    assert statistics_file(other) == statistics_file(key) and list(lease(Machine()).calibrate(other)) == []
    assert list(lease(machine).calibrate(key_of(tiny_folder, "llm-int8"))) == []


def test_another_checkpoint_in_the_same_folder_is_calibrated_anew(tmp_path, cache):
    from conftest import byte_tokenizer

    folder, files = tmp_path / "model", []
    byte_tokenizer().save_pretrained(folder)
    for spread in (0.02, 0.3):
        tiny_llama(initializer_range=spread).save_pretrained(folder)
        files.append(statistics_file(key_of(folder, "smoothquant")))
    assert files[0] != files[1]


def test_a_stop_keeps_no_half_of_the_statistics(tiny_folder, cache):
    stop, machine, key = threading.Event(), Machine(), key_of(tiny_folder, "smoothquant")
    events = lease(machine, stop).calibrate(key)
    next(events)
    next(events)
    stop.set()
    with pytest.raises(Interrupted):
        list(events)
    assert not statistics_file(key).exists() and list(machine.pool) == []


def test_statistics_that_travel_with_a_checkpoint_are_used(tmp_path, tiny_folder, cache):
    import shutil

    folder = tmp_path / "carried"
    shutil.copytree(tiny_folder, folder)
    key = key_of(folder, "smoothquant")
    with Calibration(tiny_llama(), key.method) as found:
        pass
    brought = {name: torch.full((layer.in_features,), 3.0) for name, layer in found._watched._modules.items()}
    save_statistics(brought, folder / FOLDER / "channel-maximum.safetensors")
    assert list(lease(Machine()).calibrate(key)) == []
    layer = Machine().pool.get(key)[0].model.model.layers[0].mlp.up_proj
    weight = tiny_llama().half().float().model.layers[0].mlp.up_proj.weight
    expected = factors(torch.full((32,), 3.0), weight, 0.5)
    assert torch.allclose(layer.factors, expected, rtol=1e-3)


def test_the_commands_take_it_like_any_other(tiny_folder, cache, capsys):
    arguments = ["--model", tiny_folder, "--device", "cpu", "--methods", "fp32,smoothquant@0.7,vectorwise"]
    status, out, err = run_cli(capsys, "compare", "Hi", *arguments, "--max-new-tokens", 3, "--json")
    assert status == 0 and any("calibrating smoothquant" in line for line in err)
    rows = {row["method"]: row for row in json.loads(out[-1])["contestants"]}
    assert list(rows) == ["fp32", "smoothquant@0.7", "vectorwise"] and not any(row["error"] for row in rows.values())
    engine = Machine().pool.get(key_of(tiny_folder, "smoothquant@0.7"))[0]
    predicted = engine.method.predict(tiny_llama().to("meta"))
    assert (engine.weight_bytes, engine.scale_bytes) == (predicted.weights, predicted.scales)


@pytest.mark.parametrize("settings", ["1.5", "-0.1", "x", "alpha=2", "beta=0.5", "nan"])
def test_a_wrong_setting_names_the_value_and_the_range(settings):
    with pytest.raises(BadChoice, match="alpha is .*0 to 1|cannot be set to 'beta=0.5'; its settings are alpha"):
        parse_method(f"smoothquant@{settings}")
    assert parse_method("smoothquant@alpha=0.50") == SmoothQuant() == replace(SmoothQuant(0.8), alpha=0.5)
    assert SmoothQuant(0.8).spelled == "smoothquant@0.8" and SmoothQuant(0.8).stored() == SmoothQuant(0.8)
