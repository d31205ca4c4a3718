"""What watching costs in time and memory: the benchmark's keys, and that a capture holds statistics only."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from torch import nn

from llmq.bench.hooks import HooksBench, held_bytes
from llmq.cli import main
from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.inspect import reductions
from llmq.inspect.outliers import OutlierRecorder, observe
from llmq.inspect.report import THRESHOLDS, OutlierReport, cutoff

LAYERS, HIDDEN, INNER, PROMPT_TOKENS, STEPS = 32, 4096, 11008, 2048, 64  # LLaMA-7B, a long prompt, the longest answer
BOUND = 300e6
WATCHED_LAYERS = 2  # of the 32; every layer holds the same


def test_the_benchmark_has_its_stable_keys(tiny_folder, capsys, tmp_path):
    saved = tmp_path / "hooks.json"
    arguments = ["--model", tiny_folder, "--methods", "fp16,llm-int8", "--device", "cpu", "--prompt-tokens", 5]
    arguments += ["--new-tokens", 4, "--repeats", 3, "--json", "--save", saved]
    assert main(["bench", "hooks", *map(str, arguments)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    assert result["kind"] == "hooks" and result["conditions"]["new_tokens"] == 4
    assert [(row["method"], row["engine"]) for row in result["results"]] == [("fp16", "hf"), ("llm-int8", "hf")]
    for row in result["results"]:
        for phase, seconds in (("prefill", "prefill_seconds"), ("decode", "decode_seconds_per_token")):
            assert 0 < row[f"{phase}_ratio_min"] <= row[f"{phase}_ratio"] <= row[f"{phase}_ratio_max"]
            assert row[seconds] > 0 and row[f"{seconds}_watched"] > 0
        assert row["held_bytes"] > 0 and row["memory_freed"]


def test_a_table_for_people(tiny_folder, capsys):
    arguments = ["--model", tiny_folder, "--methods", "fp16", "--prompt-tokens", 5, "--new-tokens", 2, "--repeats", 1]
    assert main(["bench", "hooks", "--device", "cpu", *map(str, arguments)]) == 0
    head, row, *notes = capsys.readouterr().out.splitlines()
    assert all(note.startswith(("fp16: ", "files differed", "the processors were")) for note in notes)
    assert {"prefill_ratio", "decode_ratio", "held_bytes"} < set(head.split()) and row.split()[0] == "fp16"


def test_only_the_library_s_loop_can_be_watched():
    with pytest.raises(BadChoice, match="'lean'.*auto or hf"):
        HooksBench(contestants=(Contestant.parse("fp16"),), engine="lean")


def owned(array: np.ndarray) -> tuple[int, int]:
    """Address and bytes of the memory behind an array."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.__array_interface__["data"][0], array.nbytes


def test_held_bytes_are_those_of_every_array_once():
    report = observe(tiny_llama(torch.float16), torch.arange(9)[None], new_tokens=3)
    arrays = [array for peak in report.stream for array in (peak.absmax, peak.tokens)]
    for module in report.modules:
        for phase in (module.prefill, module.decode):
            arrays += [phase.absmax, phase.counts]
        arrays += [array for step in module.decode_steps for array in step]
        arrays += [module.token_map.values, module.token_map.channels, module.token_map.tokens]
        arrays += [module.positions.counts, module.positions.touched]
    assert held_bytes(report) == sum(dict(map(owned, arrays)).values())
    one, shared = np.zeros(5), np.zeros((2, 3))
    assert held_bytes([one, {"a": shared[0], "b": (shared[1], one)}, "text", 3, None]) == one.nbytes + shared.nbytes


class Reader(nn.Module):
    """A linear layer to whoever watches, without its weights."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x):
        return x[..., :1]


class Block(nn.Module):
    """A decoder block's linear layers with LLaMA-7B's widths, each fed random numbers that nobody else keeps."""

    def __init__(self, look):
        super().__init__()
        self.look = look
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, Reader(HIDDEN, HIDDEN))
        self.gate_proj, self.up_proj, self.down_proj = (
            Reader(HIDDEN, INNER),
            Reader(HIDDEN, INNER),
            Reader(INNER, HIDDEN),
        )

    def forward(self, tokens: int):
        for readers in ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",):
            layers = [getattr(self, name) for name in readers]
            x = torch.randn(1, tokens, layers[0].in_features).half()
            for layer in layers:
                layer(x)
            activation = weakref.ref(x), weakref.ref(x.untyped_storage())
            del x
            self.look(activation)
        return torch.randn(1, tokens, HIDDEN).half()


class Blocks(nn.Module):
    def __init__(self, look):
        super().__init__()
        self.layers = nn.ModuleList(Block(look) for _ in range(WATCHED_LAYERS))

    def forward(self, tokens: int):
        for block in self.layers:
            block(tokens)


def tensors_of(value, seen: set[int]) -> list[torch.Tensor]:
    """Every tensor that is reached from an object's attributes and containers."""
    if id(value) in seen or isinstance(value, nn.Module):
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return [found for part in (*inside, *getattr(value, "__dict__", {}).values()) for found in tensors_of(part, seen)]


def memory_of(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture(scope="module")
def capture() -> tuple[OutlierReport, list[int], list[int]]:
    """The report, and the bytes of the recorder's tensors after every layer of the prompt, and of every token."""
    held: dict[int, list[int]] = {PROMPT_TOKENS: [], 1: []}
    call = [0]

    def look(activation):
        assert all(part() is None for part in activation), "an activation outlived its layer"
        held[call[0]].append(memory_of(tensors_of(recorder, set())))

    model = Blocks(look)
    with torch.inference_mode(), OutlierRecorder(model) as recorder:
        for phase, tokens, calls in (("prefill", PROMPT_TOKENS, 1), ("decode", 1, STEPS)):
            for _ in range(calls):
                recorder.phase(phase)
                call[0] = tokens
                model(tokens)
    return recorder.report(model="7B", method="fp16"), held[PROMPT_TOKENS], held[1]


def test_a_7b_model_s_report_stays_under_its_bound(capture):
    report, _, _ = capture
    assert (report.prompt_tokens, report.generated_tokens, len(report.modules)) == (
        PROMPT_TOKENS,
        STEPS,
        7 * WATCHED_LAYERS,
    )
    # A standard normal has 1 number of 22 over 2.0: far more than a model's quiet channels give, and than most layers'.
    assert 0.04 < sum(len(values) for _, values in report.modules[0].decode_steps) / STEPS / HIDDEN < 0.05
    assert held_bytes(report) * LAYERS / WATCHED_LAYERS < BOUND


def test_what_stays_on_the_device_is_statistics(capture):
    """No tensor of the recorder is as long as the prompt is wide, and all of a 7B model's are tens of megabytes."""
    _, prefill, decode = capture
    assert len(prefill) == 4 * WATCHED_LAYERS and len(decode) == 4 * WATCHED_LAYERS * STEPS
    added = np.diff(prefill, prepend=0)
    assert max(added) < PROMPT_TOKENS * HIDDEN * 2 / 50, "an input's statistics are a small part of the input"
    assert max(prefill) * LAYERS / WATCHED_LAYERS < 100e6
    assert max(decode) * LAYERS / WATCHED_LAYERS < 100e6


@pytest.mark.parametrize("compared_as", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counting_by_bits_equals_looking_for_every_bin(dtype, compared_as):
    """All 16-bit magnitudes, infinity and NaN among them, and many of them several times.

    Of 16-bit numbers the bits are counted; of 32-bit ones the bin of each is looked for.
    """
    every = torch.arange(1 << 15, dtype=torch.int16)
    x = torch.cat([every, every[torch.randint(1 << 15, (5000,))]]).view(dtype)
    by_bits = reductions.count_bins(x, compared_as)
    assert torch.equal(by_bits, reductions.count_bins(x.float(), compared_as))
    found = reductions.phase_statistics(np.zeros(1, np.float32), by_bits[0].numpy(), len(x))
    numbers = x.float().numpy()
    expected = [int((numbers >= cutoff(threshold, compared_as)).sum()) for threshold in THRESHOLDS]
    assert found.counts.tolist() == expected and found.nan == int(x.isnan().sum()) > 0
    owner = (torch.arange(len(x)) % 3 * reductions.BINS).int()
    shared = reductions.count_bins(x, compared_as, owner, 3)
    assert torch.equal(shared, reductions.count_bins(x.float(), compared_as, owner, 3))


def test_values_are_counted_the_same_in_pieces(monkeypatch):
    x = torch.randn(5000).abs() * 4
    whole = reductions.count_bins(x, "float32")
    monkeypatch.setattr(reductions, "CHUNK", 1000)
    assert torch.equal(reductions.count_bins(x, "float32"), whole) and int(whole.sum()) == 5000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (40, 576), (300, 700), (1, 258)])
def test_peaks_equal_pooling_and_the_first_of_equals_wins(dtype, rows, columns):
    """As `max_pool2d` scans a cell: whole numbers from 0 to 3, so nearly every cell has its maximum several times."""
    x = torch.randint(0, 4, (rows, columns)).to(dtype)
    height, width = -(-rows // 16), -(-columns // 64)
    bits = x.view(reductions.INTEGERS[dtype])
    values, place = reductions.split_peaks(reductions.first_peaks(bits, height, width).numpy(), dtype)
    pooled, position = nn.functional.max_pool2d(
        x.float()[None, None], (height, width), ceil_mode=True, return_indices=True
    )
    assert np.array_equal(values, pooled[0, 0].numpy())
    down, across = np.divmod(place, width)
    cells = np.indices(place.shape)
    assert np.array_equal((cells[0] * height + down) * columns + cells[1] * width + across, position[0, 0].numpy())


def test_peaks_of_more_places_than_sixteen_bits_count():
    x = torch.zeros(70_000, 2, dtype=torch.float16)
    x[66_000, 0], x[69_000, 0], x[3, 1] = 5.0, 5.0, 2.0
    peaks, dtype = reductions.reduce_stream(x[None])
    values, tokens = reductions.split_peaks(peaks.numpy(), dtype)
    assert (values.tolist(), tokens.tolist()) == ([5.0, 2.0], [66_000, 3])


def test_a_layer_without_an_account_is_asked_once():
    """And watched as before: its hook on the output is gone after the first call, the others' stay."""
    asked = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    account = lambda module: asked.append(module) or (torch.tensor([2]) if module is model[1] else None)  # noqa: E731
    with torch.inference_mode(), OutlierRecorder(model, outlier_columns=account) as recorder:
        model(torch.ones(1, 1, 3))  # before the first phase nobody is asked
        for phase in ("prefill", "decode", "decode"):
            recorder.phase(phase)
            model(torch.ones(1, 1, 3))
        assert [len(layer._forward_hooks) for layer in model] == [0, 1]
    without, with_account = recorder.report(model="", method="").modules
    assert asked == [model[0], *[model[1]] * 3]
    assert without.outlier_columns is None
    assert [columns.tolist() for columns in with_account.outlier_columns] == [[2]] * 3
    assert len(without.decode_steps) == 2 and not any(layer._forward_hooks for layer in model)
