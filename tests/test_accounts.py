"""What layers sent to 16 bit by their own account, where the criterion is met, and the peaks of the stream."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import PROMPT, StopAfter, planted_llama, raw_inputs
from torch import nn

from llmq.inspect.outliers import OutlierRecorder, observe
from llmq.inspect.report import CRITERION, agreement_with_kernel, columns_at
from llmq.methods import METHODS


def converted(method):
    """(the tiny model under a method, the method)"""
    method = METHODS[method]
    return method.quantize_(planted_llama(getattr(torch, method.dtype)), "cpu").eval(), method


def lists(module):
    return [columns.tolist() for columns in module.outlier_columns]


@pytest.mark.parametrize("threshold", [2.1, 6.0])
@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8"])
def test_the_layers_own_account_is_what_the_hooks_found(method, threshold):
    """Of the prompt and of every generated token, layer by layer."""
    model, method = converted(method)
    replace(method, threshold=threshold).apply_(model)
    report = observe(model, PROMPT, new_tokens=4, threshold=threshold, outlier_columns=method.outlier_columns)
    *layers, head = report.modules
    for module in layers:
        assert lists(module) == [columns_at(module, moment, threshold) for moment in range(5)]
    assert (len(layers), head.outlier_columns) == (3 * 7, None)
    assert agreement_with_kernel(report) == (21 * 5, 21 * 5)
    assert sum(len(found) for module in layers for found in lists(module)) >= 45, "too few outliers to prove anything"
    plain = report.to_json()
    assert plain["kernel_agrees"] == (21 * 5, 21 * 5) and plain["modules"][-1]["kernel_columns"] is None
    assert plain["modules"][0]["kernel_columns"] == [layers[0].prefill_columns(threshold)] + layers[0].decode_columns(
        threshold
    )
    assert report.to_json(threshold + 1)["kernel_agrees"] is None, "the account was kept at another threshold"


@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8"])
def test_the_account_is_of_the_last_call_and_empty_with_the_decomposition_off(method):
    """Also in a model that had outliers a moment ago; and it disagrees with the hooks, which see them."""
    model, method = converted(method)
    observe(model, PROMPT)
    replace(method, threshold=0).apply_(model)
    report = observe(model, PROMPT, new_tokens=2, outlier_columns=method.outlier_columns)
    assert {len(found) for module in report.modules[:-1] for found in lists(module)} == {0}
    quiet = sum(not columns_at(module, moment, 6.0) for module in report.modules[:-1] for moment in range(3))
    assert agreement_with_kernel(report) == (quiet, 21 * 3) and quiet < 21 * 3


@pytest.mark.parametrize("method", ["fp16", "int8-weight-only", "vectorwise"])
def test_a_layer_without_a_decomposition_keeps_no_account(method):
    model, method = converted(method)
    report = observe(model, PROMPT, new_tokens=1, outlier_columns=method.outlier_columns)
    assert {module.outlier_columns for module in report.modules} == {None} and agreement_with_kernel(report) is None


@pytest.mark.parametrize(("layers_run", "accounts"), [(0, []), (5, [1] * 5), (22 + 10, [1] * 21), (22 * 3, [3] * 21)])
def test_a_stop_keeps_the_account_of_whole_calls_and_of_the_prompt_as_far_as_it_came(layers_run, accounts):
    model, method = converted("llm-int8")
    stop, account = StopAfter(layers_run), method.outlier_columns
    report = observe(model, PROMPT, new_tokens=4, stop=stop, outlier_columns=account)
    assert [len(lists(module)) for module in report.modules if module.outlier_columns is not None] == accounts
    assert agreement_with_kernel(report) == ((sum(accounts), sum(accounts)) if accounts else None)


def test_an_account_stays_with_its_call_where_a_layer_is_left_out_of_some():
    """As an expert is that no token of a call was sent to."""

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.one(x) if self.calls == 2 else self.other(x)

    model, x = Choosing(), torch.zeros(1, 1, 3)
    x[..., 1] = 9.0
    with torch.no_grad(), OutlierRecorder(model, outlier_columns=lambda module: torch.tensor([1])) as recorder:
        for phase in ("prefill", "decode", "decode"):
            recorder.phase(phase)
            model(x)
    report = recorder.report(model="", method="")
    one, other = report.modules
    assert lists(one) == [columns_at(one, moment, 6.0) for moment in range(3)] == [[], [1], []]
    assert lists(other) == [[1], [], [1]] and agreement_with_kernel(report) == (6, 6)


@pytest.mark.parametrize("method", ["fp16", "bnb-int8", "vectorwise"])
def test_positions_that_meet_the_criterion_equal_brute_force(method):
    """A quantized layer's in fp16, as bitsandbytes compares, also where it is given fp32; another's in its own type."""
    model, _ = converted(method)
    calls, report = raw_inputs(model, lambda: observe(model, PROMPT))
    for module in report.modules:
        x = calls[module.name][0]
        strong = (x.half() if module.quantized else x).abs() >= CRITERION
        assert np.array_equal(module.positions.counts, strong.sum(0).numpy()), module.name
        assert np.array_equal(module.positions.touched, strong.any(1).numpy()), module.name
    assert sum(module.positions.touched.sum() for module in report.modules) > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_peaks_of_the_stream_equal_brute_force(dtype):
    """Of the prompt alone, and of equal magnitudes the first token's."""
    model, outputs, handles = planted_llama(dtype), [], []
    for block in model.model.layers:
        handles.append(block.register_forward_hook(lambda m, args, y: outputs.append(y[0].float().abs().numpy())))
    prompt = torch.cat((PROMPT[:, :9], PROMPT[:, :9]), 1)
    report = observe(model, prompt, new_tokens=3)
    for handle in handles:
        handle.remove()
    assert [peak.layer for peak in report.stream] == [0, 1, 2]
    for peak, y in zip(report.stream, outputs, strict=False):
        assert np.array_equal(peak.absmax, y.max(0)) and np.array_equal(peak.tokens, y.argmax(0))
        order = np.argsort(-y.max(0), kind="stable")[:5]
        assert peak.strongest(5) == [(int(c), int(y[:, c].argmax()), float(y[:, c].max())) for c in order]


def test_the_stream_survives_what_is_no_number_and_ties_go_to_the_first_token():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    nan, inf = float("nan"), float("-inf")
    model, x = Blocks(), torch.tensor([[[2.0, nan, 1.0, 0.0], [-2.0, 3.0, inf, 0.0], [1.0, -3.0, nan, 0.0]]])
    with torch.no_grad(), OutlierRecorder(model) as recorder:
        recorder.phase("prefill")
        model(x)
    for peak in recorder.report(model="", method="").stream:
        assert (peak.absmax.tolist(), peak.tokens.tolist()) == ([2.0, 3.0, float("inf"), 0.0], [0, 1, 1, 0])
