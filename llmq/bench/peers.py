"""Our CPU loop against llama.cpp on the same weights, in turn within one run.

llama.cpp's own tool makes F16 and Q8_0 files of the demo model's weights. Both sides choose greedily and are timed by
one clock around decoding and choosing; threads, prompts and tokens are the same. Needs `llama-cpp-python`.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from llmq.bench.setup import Bench, bandwidth_fraction, read_bandwidth, require_whole
from llmq.engine.base import Engine
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, UserError
from llmq.events import Event, Progress
from llmq.machine.door import Lease
from llmq.models.demo import fetch_gguf, gguf_path

LONG_PROMPT = 512
PEERS = {"F16": 1, "Q8_0": 7}  # llama.cpp's names and numbers of file types
SAME_PRECISION = {"fp16": "F16", "bf16": "F16"}  # every other method: Q8_0


@dataclass(frozen=True, kw_only=True)
class PeersBench(Bench):
    """`repeats` rounds, in each of which everybody decodes once and reads a long prompt once. With `busy` another
    process computes without end meanwhile."""

    kind = "peers"
    columns = ("method", "tokens_per_second", "prefill_tokens_per_second", "against", "decode_ratio", "prefill_ratio")
    columns += ("bandwidth_fraction", "weight_bytes")
    new_tokens: int = 128
    busy: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_whole("new_tokens", self.new_tokens, 2)
        if self.device != "cpu" or self.model != "demo":
            raise BadChoice("peers are compared on the demo model and the CPU: --model demo --device cpu")

    @property
    def positions(self) -> int:
        return max(LONG_PROMPT, self.prompt_tokens) + self.new_tokens

    def facts(self) -> dict:
        return {"read_bandwidth_bytes_per_second": read_bandwidth("cpu")}

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Everybody in turn, round by round; last comes the result, llama.cpp's rows beside ours."""
        llama = _llama_cpp()
        setup = yield from self.prepare(lease)
        long_prompt = (setup.prompt_ids * LONG_PROMPT)[:LONG_PROMPT]
        with tempfile.TemporaryDirectory(prefix="llmq-peers-") as folder:
            runners = [_ours(lease, contestant, key) for contestant, key in setup.entries]
            for progress in fetch_gguf():
                yield lease.progress(progress.message)
            for name, file in _files(llama, Path(folder)):
                runners.append(_Peer(llama, f"llama.cpp {name}", file, LONG_PROMPT + self.new_tokens))
            times = {runner.label: _Times([], []) for runner in runners}
            with _another_process() if self.busy else nullcontext():
                for number in range(self.repeats + 1):  # the first is not counted
                    for runner in runners:
                        decode = runner.decode(setup.prompt_ids, self.new_tokens)
                        prefill = LONG_PROMPT / runner.read(long_prompt)
                        if number:
                            times[runner.label].add(decode, prefill)
                    yield lease.progress(f"round {number} of {self.repeats}")
            bandwidth = setup.facts["read_bandwidth_bytes_per_second"]
            results = [_row(runner, times, bandwidth) for runner in runners]
            for runner in runners:
                runner.close()
        conditions = {"new_tokens": self.new_tokens, "long_prompt_tokens": LONG_PROMPT, "busy_process": self.busy}
        conditions |= {"schedule": "everybody in turn, round by round", "llama_cpp_python": llama.__version__}
        yield self.result(setup, results, conditions)


@dataclass(frozen=True)
class _Times:
    """Tokens per second of every round."""

    decode: list[float]
    prefill: list[float]

    def add(self, decode: float, prefill: float) -> None:
        self.decode.append(decode)
        self.prefill.append(prefill)


def _row(runner, times: dict[str, _Times], bandwidth: float) -> dict:
    own, peer = times[runner.label], times[f"llama.cpp {runner.same}"]
    decode, prefill = statistics.median(own.decode), statistics.median(own.prefill)
    return {
        "method": runner.label,
        "engine": runner.engine_name,
        "tokens_per_second": decode,
        "tokens_per_second_min": min(own.decode),
        "tokens_per_second_max": max(own.decode),
        "prefill_tokens_per_second": prefill,
        "prefill_tokens_per_second_min": min(own.prefill),
        "prefill_tokens_per_second_max": max(own.prefill),
        "against": f"llama.cpp {runner.same}",
        "decode_ratio": _ratio(own.decode, peer.decode),
        "prefill_ratio": _ratio(own.prefill, peer.prefill),
        "over_fp16": _ratio(own.decode, times["fp16"].decode) if "fp16" in times else None,
        "weight_bytes": runner.weight_bytes,
        "bandwidth_fraction": bandwidth_fraction(runner.read_bytes, decode, bandwidth),
    }


def _ratio(own: list[float], peer: list[float]) -> float:
    """The median of the rounds' ratios: both sides of a round saw the same machine."""
    return statistics.median(a / b for a, b in zip(own, peer, strict=True))


def _ours(lease: Lease, contestant, key: Key) -> _Ours:
    engine = lease.get(key, contestant.method)
    return _Ours(contestant.label, engine, SAME_PRECISION.get(contestant.method.name, "Q8_0"))


@dataclass(frozen=True)
class _Ours:
    label: str
    engine: Engine
    same: str

    @property
    def engine_name(self) -> str:
        return self.engine.name

    @property
    def weight_bytes(self) -> int:
        return self.engine.weight_bytes + self.engine.scale_bytes

    @property
    def read_bytes(self) -> int:
        return self.engine.read_bytes_per_token

    def decode(self, prompt_ids: list[int], tokens: int) -> float:
        """Tokens per second of `tokens` greedy ones after the prompt."""
        generation = self.engine.start(prompt_ids, SamplingSettings(max_new_tokens=tokens))
        generation.prefill()
        started = time.perf_counter()
        for _ in range(tokens - 1):
            generation.step()
        seconds = time.perf_counter() - started
        generation.close()
        return (tokens - 1) / seconds

    def read(self, ids: list[int]) -> float:
        """Seconds until the token after a prompt is chosen."""
        generation = self.engine.start(ids, SamplingSettings(max_new_tokens=1))
        started = time.perf_counter()
        generation.prefill()
        seconds = time.perf_counter() - started
        generation.close()
        return seconds

    def close(self) -> None:
        """The engine goes with the pool."""


class _Peer:
    """llama.cpp with one file, through its C functions: a decode, then its own greedy sampler."""

    engine_name = "llama.cpp"

    def __init__(self, llama, label: str, file: Path, context: int):
        import torch

        self.label, self.same, self.weight_bytes = label, label.split()[-1], file.stat().st_size
        self.read_bytes = self.weight_bytes
        self._llama = llama
        self._model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        settings = llama.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = LONG_PROMPT
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = llama.llama_init_from_model(self._model, settings)
        self._greedy = llama.llama_sampler_init_greedy()

    def _next(self, ids: list[int]) -> int:
        llama = self._llama
        tokens = (llama.llama_token * len(ids))(*ids)
        if failure := llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(ids))):
            raise UserError(f"llama.cpp could not decode (its code {failure})")
        return llama.llama_sampler_sample(self._greedy, self._context, -1)

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def decode(self, prompt_ids: list[int], tokens: int) -> float:
        self._clear()
        token = self._next(prompt_ids)
        started = time.perf_counter()
        for _ in range(tokens - 1):
            token = self._next([token])
        return (tokens - 1) / (time.perf_counter() - started)

    def read(self, ids: list[int]) -> float:
        self._clear()
        started = time.perf_counter()
        self._next(ids)
        return time.perf_counter() - started

    def close(self) -> None:
        self._llama.llama_sampler_free(self._greedy)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def _llama_cpp():
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError("peers need llama.cpp's Python package: pip install llama-cpp-python") from error
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp._llmq_quiet = quiet  # the library keeps the pointer
    return llama_cpp


def _files(llama, folder: Path) -> Iterator[tuple[str, Path]]:
    """The demo model's weights as llama.cpp stores each type: made from one file by its own tool."""
    for name, kind in PEERS.items():
        file = folder / f"{name}.gguf"
        settings = llama.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = kind, True
        if llama.llama_model_quantize(str(gguf_path()).encode(), str(file).encode(), settings):
            raise UserError(f"llama.cpp could not make a {name} file of {gguf_path()}")
        yield name, file


@contextmanager
def _another_process() -> Iterator[None]:
    """One core's worth of somebody else's computing."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        other.kill()
        other.wait()
