"""Recorded outliers against brute force and against bitsandbytes' own choice of columns."""

import json
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from planted import PLANTED, PROMPT, StopAfter, columns, hooks_left, planted_llama, raw_inputs
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmq.engine.base import Interrupted
from llmq.inspect import reductions
from llmq.inspect.outliers import OutlierRecorder, observe
from llmq.inspect.report import THRESHOLDS


@pytest.fixture(scope="module")
def tiny():
    return planted_llama()


@pytest.fixture(scope="module")
def seen(tiny):
    return raw_inputs(tiny, lambda: observe(tiny, PROMPT, new_tokens=4, name="tiny", method="fp16"))


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def quantized(request, tmp_path_factory):
    """The tiny model through bitsandbytes on the CPU, in eval mode, at threshold 2.1 (no fp16 number)."""
    folder = tmp_path_factory.mktemp("tiny")
    planted_llama(torch.float32).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.1)
    dtype = getattr(torch, request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=dtype)
    return model.eval()


def test_planted_channels_are_found_and_no_others(seen):
    report = seen[1]
    found = {(m.kind, m.layer): m.prefill_columns(6.0) for m in report.modules if m.prefill_columns(6.0)}
    assert found == PLANTED
    decoded = {(m.kind, m.layer): sorted(set(sum(m.decode_columns(6.0), []))) for m in report.modules}
    assert {key: value for key, value in decoded.items() if value} == PLANTED


@pytest.mark.parametrize("threshold", [2.0, 2.1, 6.0, 6.1, 7.77])
def test_columns_equal_brute_force_in_fp16(seen, threshold):
    calls, report = seen
    for module in report.modules:
        prompt, *tokens = calls[module.name]
        assert module.prefill_columns(threshold) == columns(prompt, threshold), module.name
        assert module.decode_columns(threshold) == [columns(token, threshold) for token in tokens], module.name


def test_columns_equal_what_bitsandbytes_chose(quantized):
    import bitsandbytes as bnb

    chosen, handles = defaultdict(list), []
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            keep = lambda module, args, out, name=name: chosen[name].append(module.state.idx.tolist())  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    report = observe(quantized, PROMPT, new_tokens=4, threshold=2.1)
    for handle in handles:
        handle.remove()
    ours = {m.name: [m.prefill_columns(2.1), *m.decode_columns(2.1)] for m in report.modules if m.quantized}
    assert len(ours) == 3 * 7 and ours == chosen
    assert sum(len(step) for steps in chosen.values() for step in steps) > 500, "too few outliers to prove anything"


def test_counts_at_every_stop_of_the_slider_equal_brute_force(seen):
    calls, report = seen
    for module in report.modules:
        prompt, *tokens = calls[module.name]
        for phase, x in (("prefill", prompt), ("decode", torch.cat(tokens))):
            found = module.statistics(phase)
            assert found.counts.tolist() == [int((x.abs() >= t).sum()) for t in THRESHOLDS.tolist()], module.name
            assert found.values == x.numel() and found.nan == 0
            assert np.array_equal(found.absmax, x.abs().amax(0).float().numpy())


def test_counts_do_not_depend_on_how_they_are_chunked(tiny, seen, monkeypatch):
    monkeypatch.setattr(reductions, "CHUNK", 1000)
    again = observe(tiny, PROMPT, new_tokens=4)
    for one, other in zip(seen[1].modules, again.modules, strict=True):
        assert one.prefill.counts.tolist() == other.prefill.counts.tolist()
        assert one.decode.counts.tolist() == other.decode.counts.tolist()


def record(layer, *calls):
    """The one module of a report about a lone layer: the first call is its prefill, every other one a token."""
    with OutlierRecorder(layer) as recorder, torch.no_grad():
        for phase, x in zip(["prefill"] + ["decode"] * len(calls), calls, strict=False):
            recorder.phase(phase)
            layer(x)
    return recorder.report(model="", method="")


def test_infinity_counts_and_nan_hides_nothing_and_both_are_json():
    x = torch.zeros(1, 2, 4)
    x[0, 0, 1], x[0, 0, 2], x[0, 1, 2], x[0, 1, 3] = float("-inf"), 9.0, float("nan"), 7.0
    report = record(nn.Linear(4, 2), x, x)
    module = report.modules[0]
    assert module.prefill_columns(6.0) == [1, 2, 3]
    assert np.array_equal(module.token_map.values > 6, [[False, True, True, False], [False, False, False, True]])
    assert module.prefill.nan == 1 and module.prefill.counts[0] == 3
    json.dumps(report.to_json(), allow_nan=False)
    token = record(nn.Linear(4, 2), x, x[:, 1:], x[:, :1]).modules[0]
    assert token.decode_columns(6.0) == [[3], [1, 2]]
    assert (token.decode.nan, token.decode.counts[0], token.decode.counts[-1]) == (1, 3, 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_value_on_a_threshold_counts(dtype):
    on = torch.from_numpy(THRESHOLDS).to(getattr(torch, dtype))
    module = record(nn.Linear(len(on), 1, dtype=on.dtype), on[None, None], on[None, None]).modules[0]
    expected = [int((on >= threshold).sum()) for threshold in THRESHOLDS.tolist()]
    assert module.prefill.counts.tolist() == module.decode.counts.tolist() == expected
    assert all(module.prefill_columns(t) == columns(on[None], t) for t in THRESHOLDS.tolist())


def test_quantized_layers_compare_in_fp16_whatever_they_are_given():
    """As bitsandbytes casts its input: 5.999 is 6 in fp16, so it stays in 16 bit; an unquantized layer keeps it."""
    x = torch.tensor([[[5.999, 1.9996, -6.0, 0.0]]])
    plain = nn.Linear(4, 2)
    quantized = nn.Linear(4, 2)
    quantized.register_buffer("codes", torch.zeros(1, dtype=torch.int8))
    for layer, expected in ((plain, [2]), (quantized, [0, 2])):
        module = record(layer, x, x).modules[0]
        assert module.prefill_columns(6.0) == expected and module.decode_columns(6.0) == [expected]
        recorded = module.decode_steps[0][0].tolist()  # from 2.0 up: 1.9996 is 2 in fp16
        assert recorded == ([0, 1, 2] if layer is quantized else [0, 2])
        at_six = int(np.argmin(np.abs(THRESHOLDS - 6.0)))
        assert module.prefill.counts[at_six] == module.decode.counts[at_six] == len(expected)


def test_layers_that_read_one_tensor_are_reduced_once(tiny, seen, monkeypatch):
    reduced = []
    original = reductions.reduce_prompt
    monkeypatch.setattr(reductions, "reduce_prompt", lambda *args: reduced.append(1) or original(*args))
    observe(tiny, PROMPT)
    assert len(reduced) == 3 * 4 + 1  # q/k/v, o, gate/up, down; the head
    q, k, o = (seen[1].module(f"model.layers.0.self_attn.{name}_proj") for name in "qko")
    assert q.prefill is k.prefill and q.prefill is not o.prefill


def test_a_tensor_changed_in_place_between_two_layers_is_not_mistaken_for_itself():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.a(x)
            return self.b(x.mul_(2))

    model = Doubling()
    with torch.no_grad(), OutlierRecorder(model) as recorder:
        recorder.phase("prefill")
        model(torch.full((1, 1, 3), 5.0))
    a, b = recorder.report(model="", method="").modules
    assert (a.absmax, b.absmax) == (5.0, 10.0)


def test_nothing_is_recorded_before_the_first_phase_and_each_decode_call_is_a_token(tiny):
    with OutlierRecorder(tiny) as recorder:  # opened outside, the model inside inference_mode: both must do
        with torch.inference_mode():
            tiny(PROMPT)
            recorder.phase("prefill")
            tiny(PROMPT)
            recorder.phase("decode")
            tiny(PROMPT[:, :1])
            tiny(PROMPT[:, 1:3])
        tiny(PROMPT[:, 3:4])
    report = recorder.report(model="", method="")
    assert (report.prompt_tokens, report.generated_tokens) == (37, 3)
    assert report.modules[0].decode.values == 72 * (1 + 2 + 1)
    assert hooks_left(tiny) == 0


def test_a_second_prefill_is_refused(tiny):
    with torch.inference_mode(), OutlierRecorder(tiny) as recorder:
        recorder.phase("prefill")
        tiny(PROMPT)
        with pytest.raises(RuntimeError, match="ran twice"):
            tiny(PROMPT)
        with pytest.raises(RuntimeError, match="already"):
            recorder.phase("prefill")
    assert hooks_left(tiny) == 0


@pytest.mark.parametrize(
    ("layers_run", "layers_known", "tokens"), [(0, 0, 0), (5, 5, 0), (22 + 10, 22, 0), (22 * 3, 22, 2)]
)
def test_stop_ends_within_one_layer_and_says_so(tiny, seen, layers_run, layers_known, tokens):
    report = observe(tiny, PROMPT, new_tokens=4, stop=StopAfter(layers_run))
    assert report.stopped and report.generated_tokens == tokens
    assert sum(module.prefill.values > 0 for module in report.modules) == layers_known
    whole = {module.name: module.decode_columns(6.0)[:tokens] for module in seen[1].modules}
    assert {module.name: module.decode_columns(6.0) for module in report.modules} == whole
    assert hooks_left(tiny) == 0


def test_stop_reaches_the_caller_of_a_bare_recorder(tiny):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted), OutlierRecorder(tiny, stop=stop) as recorder:
        recorder.phase("prefill")
        tiny(PROMPT)
    assert hooks_left(tiny) == 0


def test_observe_generates_greedily_in_eval_mode_and_ends_at_the_end_token(tiny):
    greedy = tiny.generate(PROMPT, max_new_tokens=4, do_sample=False)[0, 37:].tolist()
    tiny.model.layers[1].train()
    modes = []
    handle = tiny.model.layers[1].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    report = observe(tiny, PROMPT, new_tokens=4)
    handle.remove()
    assert modes == [False] * 5
    assert [m.training for m in tiny.model.layers] == [False, True, False], "the mode must be put back"
    tiny.eval()
    assert [int(text) for text in report.token_texts[37:]] == greedy
    tiny.generation_config.eos_token_id = [1, greedy[0]]
    try:
        ended = observe(tiny, PROMPT, new_tokens=4)
    finally:
        tiny.generation_config.eos_token_id = None
    assert (ended.generated_tokens, ended.stopped) == (0, False)
