"""The comparison with llama.cpp, from known times: a scripted engine of ours beside a scripted library."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import Clock, Script, ScriptedEngine, in_order
from tiny_runs import key_of

from llmq.bench import peers
from llmq.bench.peers import LONG_PROMPT, PEERS, PeersBench
from llmq.bench.setup import Setup
from llmq.contestant import Contestant
from llmq.errors import UserError
from llmq.machine.door import Machine
from llmq.models.opening import open_model

ROUNDS, TOKENS, PROMPT = 3, 5, [1, 2, 3]
SIZES = {"F16": 400, "Q8_0": 200}
BANDWIDTH = 1000.0
# Seconds a token and of the long prompt; the first round, in which everything is slow, is not counted.
OURS = {
    "fp16": ([90.0, 0.25, 0.5, 2.0], [90.0, 64.0, 32.0, 4.0]),
    "llm-int8": ([90.0, 0.125, 0.5, 0.25], [90.0, 16.0, 8.0, 16.0]),
}
THEIRS = {
    "F16": ([70.0, 0.5, 4.0, 1.0], [70.0, 128.0, 8.0, 32.0]),
    "Q8_0": ([70.0, 1.0, 0.25, 0.75], [70.0, 64.0, 16.0, 64.0]),
}


class FakeLlama:
    """llama.cpp's functions: a file of a type, a context with its times, and a clock that they take."""

    __version__ = "1.2.3"
    llama_token = ctypes.c_int32

    def __init__(self, clock: Clock, failing: str = ""):
        self.clock, self.failing, self.freed, self.asked = clock, failing, [], []

    def llama_log_callback(self, function):
        return function

    def llama_log_set(self, callback, data):
        pass

    def llama_model_quantize_default_params(self):
        return SimpleNamespace()

    def llama_model_quantize(self, source, target, settings):
        name = next(name for name, number in PEERS.items() if number == settings.ftype)
        Path(target.decode()).write_bytes(bytes(SIZES[name]))
        return self.failing == "quantize"

    def llama_model_default_params(self):
        return SimpleNamespace()

    llama_context_default_params = llama_model_default_params

    def llama_model_load_from_file(self, path, settings):
        return Path(path.decode()).stem

    def llama_init_from_model(self, model, settings):
        return SimpleNamespace(name=model, cleared=0, calls=0, capacity=settings.n_ctx)

    def llama_sampler_init_greedy(self):
        return "greedy"

    def llama_get_memory(self, context):
        return context

    def llama_memory_clear(self, context, data):
        context.cleared, context.calls = context.cleared + 1, 0

    def llama_batch_get_one(self, tokens, count):
        return list(tokens)

    def llama_decode(self, context, batch):
        self.asked.append((context.name, len(batch)))
        context.calls += 1
        seconds_a_token, seconds_a_prompt = THEIRS[context.name]
        number = (context.cleared - 1) // 2  # a round clears twice: to decode, to read
        if context.cleared % 2 == 0:
            self.clock.take(seconds_a_prompt[number] - 0.0625)
        else:
            self.clock.take(33.0 if context.calls == 1 else seconds_a_token[number] - 0.0625)
        return 7 if self.failing == "decode" else 0

    def llama_sampler_sample(self, sampler, context, place):
        self.clock.take(0.0625)  # choosing a token counts, for both sides
        return 5

    def llama_sampler_free(self, sampler):
        self.freed.append(sampler)

    def llama_free(self, context):
        self.freed.append(context.name)

    def llama_model_free(self, model):
        self.freed.append(model)


class OnTheTinyModel(PeersBench):
    """The demo model is not fetched: its place is taken by the tiny one."""

    def prepare(self, lease):
        yield from ()
        entries = [(contestant, key_of(self.folder, contestant.method.name)) for contestant in self.contestants]
        return Setup(open_model(str(self.folder)), PROMPT, entries)


@pytest.fixture
def compared(tiny_folder, monkeypatch, tmp_path):
    """Runs the benchmark of some methods; returns its result and the library that it talked to."""
    clock = Clock()
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=clock, sleep=clock.take))
    monkeypatch.setattr(peers, "read_bandwidth", lambda device: BANDWIDTH)
    monkeypatch.setattr(peers, "fetch_gguf", lambda: iter(()))
    monkeypatch.setattr(peers, "gguf_path", lambda: tmp_path / "demo.gguf")
    monkeypatch.setattr(OnTheTinyModel, "folder", tiny_folder, raising=False)

    def load(key):
        scripts = []
        for a_token, a_prompt in zip(*OURS[key.method.name], strict=True):
            scripts += [Script(44.0, (a_token,) * (TOKENS - 1)), Script(a_prompt)]
        sizes = {"weight_bytes": 90, "scale_bytes": 10, "read_bytes_per_token": 150}
        return ScriptedEngine(clock, in_order(scripts), key.method, **sizes)

    def run(*methods: str, failing: str = ""):
        llama = FakeLlama(clock, failing)
        monkeypatch.setitem(sys.modules, "llama_cpp", llama)
        contestants = tuple(Contestant.parse(name) for name in methods)
        bench = OnTheTinyModel(contestants=contestants, repeats=ROUNDS, new_tokens=TOKENS)
        *_, result = Machine(load, clock=clock).run(bench)
        return result, llama

    return run


def test_every_row_is_the_median_of_its_rounds_and_of_their_ratios(compared):
    result, llama = compared("fp16", "llm-int8")
    rows = {row["method"]: row for row in result["results"]}
    assert list(rows) == ["fp16", "llm-int8", "llama.cpp F16", "llama.cpp Q8_0"]
    # Tokens a second of the rounds: fp16 4, 2, 0.5; llm-int8 8, 2, 4; F16 2, 0.25, 1; Q8_0 1, 4, 4/3.
    assert [row["tokens_per_second"] for row in rows.values()] == pytest.approx([2, 4, 1, 4 / 3])
    assert [row["tokens_per_second_min"] for row in rows.values()] == pytest.approx([0.5, 2, 0.25, 1])
    assert [row["tokens_per_second_max"] for row in rows.values()] == pytest.approx([4, 8, 2, 4])
    # Prompts: fp16 8, 16, 128; llm-int8 32, 64, 32; F16 4, 64, 16; Q8_0 8, 32, 8.
    assert [row["prefill_tokens_per_second"] for row in rows.values()] == pytest.approx([16, 32, 16, 8])
    assert [row["prefill_tokens_per_second_min"] for row in rows.values()] == pytest.approx([8, 32, 4, 8])
    assert [row["prefill_tokens_per_second_max"] for row in rows.values()] == pytest.approx([128, 64, 64, 32])
    assert [row["against"] for row in rows.values()] == [f"llama.cpp {name}" for name in ("F16", "Q8_0", "F16", "Q8_0")]
    # Within the rounds: fp16 2, 8, 0.5 times F16; llm-int8 8, 0.5, 3 times Q8_0, and 2, 1, 8 times fp16.
    assert [row["decode_ratio"] for row in rows.values()] == pytest.approx([2, 3, 1, 1])
    assert [row["prefill_ratio"] for row in rows.values()] == pytest.approx([2, 4, 1, 1])
    assert [row["over_fp16"] for row in rows.values()] == pytest.approx([1, 2, 0.5, 2])
    assert [row["engine"] for row in rows.values()] == ["scripted", "scripted", "llama.cpp", "llama.cpp"]
    assert [row["weight_bytes"] for row in rows.values()] == [100, 100, 400, 200]
    assert rows["fp16"]["decode_ratio_min"] == pytest.approx(0.5) and rows["fp16"]["decode_ratio_max"] == 8
    fractions = [150 * 2 / BANDWIDTH, 150 * 4 / BANDWIDTH, 400 * 1 / BANDWIDTH, 200 * 4 / 3 / BANDWIDTH]
    assert [row["bandwidth_fraction"] for row in rows.values()] == pytest.approx(fractions)
    assert result["conditions"]["llama_cpp_python"] == "1.2.3" and result["kind"] == "peers"


def test_both_sides_are_given_the_same_work_round_by_round(compared):
    _, llama = compared("fp16")
    turn = {name: [(name, n) for n in (len(PROMPT), *[1] * (TOKENS - 1), LONG_PROMPT)] for name in SIZES}
    # Of three sides fp16 comes first in rounds 0 and 3, F16 in round 1, Q8_0 in round 2.
    f16, q8 = turn.values()
    assert llama.asked == [*f16, *q8, *f16, *q8, *q8, *f16, *f16, *q8]
    assert llama.freed == ["greedy", "F16", "F16", "greedy", "Q8_0", "Q8_0"]


def test_without_fp16_there_is_no_ratio_to_it(compared):
    result, _ = compared("llm-int8")
    assert [row["over_fp16"] for row in result["results"]] == [None] * 3


@pytest.mark.parametrize(("failing", "said"), [("quantize", "could not make a F16 file"), ("decode", "its code 7")])
def test_what_llama_cpp_refuses_is_said(compared, failing, said):
    with pytest.raises(UserError, match=said):
        compared("fp16", failing=failing)
