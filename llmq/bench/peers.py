"""Our CPU loop against llama.cpp on the same weights, in turn within one run.

llama.cpp's own tool makes F16 and Q8_0 files of the demo model's weights. Both sides choose greedily and are timed by
one clock around decoding and choosing; threads, prompts and tokens are the same. Needs `llama-cpp-python`.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from llmq.bench.bandwidth import bandwidth_share, read_bandwidth
from llmq.bench.rounds import ratio, spread, turns
from llmq.bench.setup import DecodingBench, notes_of
from llmq.engine.base import Engine
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, UserError
from llmq.events import Event, Progress
from llmq.machine.door import Lease
from llmq.models.demo import fetch_gguf, gguf_path

LONG_PROMPT = 512
PEERS = {"F16": 1, "Q8_0": 7}  # llama.cpp's names and numbers of file types
SAME_PRECISION = {"fp16": "F16", "bf16": "F16"}  # every other method: Q8_0


@dataclass(frozen=True, kw_only=True)
class PeersBench(DecodingBench):
    """In every round everybody decodes once and reads a long prompt once. With `busy` another
    process computes without end meanwhile."""

    kind = "peers"
    columns = ("method", "tokens_per_second", "prefill_tokens_per_second", "against", "decode_ratio", "prefill_ratio")
    columns += ("bandwidth_fraction", "weight_bytes")
    new_tokens: int = 128
    busy: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.device != "cpu" or self.model != "demo":
            raise BadChoice("peers are compared on the demo model and the CPU: --model demo --device cpu")

    @property
    def positions(self) -> int:
        return max(LONG_PROMPT, self.prompt_tokens) + self.new_tokens

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Everybody in turn, round by round; last comes the result, llama.cpp's rows beside ours."""
        llama = _llama_cpp()
        setup = yield from self.prepare(lease)
        readings: list[float] = []
        long_prompt = (setup.prompt_ids * LONG_PROMPT)[:LONG_PROMPT]
        with tempfile.TemporaryDirectory(prefix="llmq-peers-") as folder:
            sides = [
                _Side(c.label, lease.get(key, c.method), SAME_PRECISION.get(c.method.name, "Q8_0"))
                for c, key in setup.entries
            ]
            for progress in fetch_gguf():
                yield lease.progress(progress.message)
            peers = {name: _Peer(llama, file, self.positions) for name, file in _files(llama, Path(folder))}
            sides += [_Side(f"llama.cpp {name}", peer, name) for name, peer in peers.items()]
            with _another_process() if self.busy else nullcontext():
                for number in range(self.repeats + 1):  # the first is not counted
                    for side in turns(sides, number):
                        decode = _decode(side.engine, setup.prompt_ids, self.new_tokens)
                        prefill = LONG_PROMPT / _read(side.engine, long_prompt)
                        if number:
                            side.decode.append(decode)
                            side.prefill.append(prefill)
                    readings += [read_bandwidth("cpu")] if number else []
                    setup.note_clock("cpu")
                    yield lease.progress(f"round {number} of {self.repeats}")
            results = [row | {"notes": list(notes_of(row))} for row in _rows(sides, readings)]
            for peer in peers.values():
                peer.free()
        conditions = {"new_tokens": self.new_tokens, "long_prompt_tokens": LONG_PROMPT, "busy_process": self.busy}
        conditions |= {"llama_cpp_python": llama.__version__}
        yield self.result(setup, results, conditions, spread("read_bandwidth_bytes_per_second", readings))


@dataclass(frozen=True)
class _Side:
    """Who takes part, against which of llama.cpp's file types, and the tokens per second of every round."""

    label: str
    engine: Engine | _Peer
    rival: str
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


def _rows(sides: list[_Side], readings: list[float]) -> Iterator[dict]:
    named = {side.label: side for side in sides}
    for side in sides:
        peer, fp16, engine = named[f"llama.cpp {side.rival}"], named.get("fp16"), side.engine
        yield {
            "method": side.label,
            "engine": engine.name,
            **spread("tokens_per_second", side.decode),
            **spread("prefill_tokens_per_second", side.prefill),
            "against": peer.label,
            **ratio("decode_ratio", side.decode, peer.decode),
            **ratio("prefill_ratio", side.prefill, peer.prefill),
            **ratio("over_fp16", side.decode, fp16 and fp16.decode),
            "weight_bytes": engine.weight_bytes + engine.scale_bytes,
            **bandwidth_share(engine.read_bytes_per_token, side.decode, readings),
        }


def _decode(engine: Engine | _Peer, prompt_ids: list[int], tokens: int) -> float:
    """Tokens per second of `tokens` greedy ones after the prompt."""
    with closing(engine.start(prompt_ids, SamplingSettings(max_new_tokens=tokens))) as generation:
        generation.prefill()
        started = time.perf_counter()
        for _ in range(tokens - 1):
            generation.step()
        return (tokens - 1) / (time.perf_counter() - started)


def _read(engine: Engine | _Peer, ids: list[int]) -> float:
    """Seconds until the token after a prompt is chosen."""
    with closing(engine.start(ids, SamplingSettings(max_new_tokens=1))) as generation:
        started = time.perf_counter()
        generation.prefill()
        return time.perf_counter() - started


class _Peer:
    """llama.cpp with one file, through its C functions, with the face of an engine and of its generation: a step is a
    decode, then its own greedy sampler."""

    name, scale_bytes = "llama.cpp", 0

    def __init__(self, llama, file: Path, context: int):
        import torch

        self.weight_bytes = self.read_bytes_per_token = file.stat().st_size
        self._llama = llama
        self._model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        settings = llama.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = LONG_PROMPT
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = llama.llama_init_from_model(self._model, settings)
        self._greedy = llama.llama_sampler_init_greedy()

    def start(self, ids: list[int], settings: SamplingSettings) -> _Peer:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._ids = ids
        return self

    def step(self) -> None:
        llama = self._llama
        tokens = (llama.llama_token * len(self._ids))(*self._ids)
        if failure := llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(self._ids))):
            raise UserError(f"llama.cpp could not decode (its code {failure})")
        self._ids = [llama.llama_sampler_sample(self._greedy, self._context, -1)]

    prefill = step

    def close(self) -> None:
        """The next `start` clears what a generation leaves."""

    def free(self) -> None:
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
