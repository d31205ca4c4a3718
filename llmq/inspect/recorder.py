"""Record the activation outliers at the input of every linear layer while a prompt and its continuation run.

The reductions run where the activations are, and only statistics leave the device: once after the prefill, once for
every generated token. LLM.int8() keeps a column in 16 bit when any |x| in it reaches the threshold in that call
(Dettmers et al. 2022, section 3.2), so the prompt pools all its tokens and a generated token stands alone.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from llmq.engine.base import Interrupted
from llmq.hooks import Watched, decoder_blocks, is_quantized, kind_and_layer, linear_modules
from llmq.inspect import reductions
from llmq.inspect.reductions import Layout, PromptParts, PromptStatistics, StepTotals, fetch
from llmq.inspect.report import ModuleOutliers, OutlierReport, PhaseStatistics, StreamPeak, check_phase, cutoff

OutlierColumns = Callable[[nn.Module], torch.Tensor | None]  # `methods.Method.outlier_columns`


@dataclass(eq=False)
class _Input:
    """One tensor that one or several linear layers read.

    `kept`, on its device: in prefill what it was reduced to, in decode |x| as (tokens, in_features): of one token its
    own maxima.
    """

    kept: torch.Tensor | PromptStatistics
    compared_as: str
    names: list[str]


class OutlierRecorder:
    """Record every linear layer of `model` inside a `with` block; no hook is left after it.

        with OutlierRecorder(model) as recorder:
            recorder.phase("prefill")
            model(prompt)                # exactly one call, all tokens of the prompt
            recorder.phase("decode")
            model(token)                 # one call for every generated token
        report = recorder.report(...)

    Before the first `phase` nothing is recorded (warm-up). Decode keeps single channels from `lowest_threshold` up.
    Layers that read the same tensor (q, k, v) are reduced once. With `stop` set, the next layer raises `Interrupted`.
    `outlier_columns` is asked after each layer ran: which columns did it multiply in 16 bit? The output of each decoder
    block is watched in the prefill too. Activations are fp16, bf16 or fp32. RuntimeError when the prefill runs twice.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lowest_threshold: float = 2.0,
        stop: threading.Event | None = None,
        outlier_columns: OutlierColumns | None = None,
    ) -> None:
        cutoff(lowest_threshold, "float32")
        self.lowest_threshold = lowest_threshold
        self._modules = linear_modules(model)
        self._quantized = {name: is_quantized(module) for name, module in self._modules.items()}
        self._hooks = ExitStack()
        self._watched = (
            Watched(self._modules, self._on_input, self._on_output if outlier_columns else None),
            Watched(decoder_blocks(model), on_output=self._on_block),
        )
        self._columns_of = outlier_columns
        self._stop = stop
        self._phase: str | None = None
        self._dtypes: dict[str, str] = {}
        self._last: tuple[tuple, StorageWeakRef, _Input] | None = None  # while its memory lives, its address is its own
        self._inputs: list[_Input] = []  # of the call under way
        self._prompt_of: dict[str, PromptParts] = {}
        self._stream: dict[int, tuple[torch.Tensor, torch.dtype]] = {}
        self._peaks: tuple[StreamPeak, ...] = ()
        self._outlier_columns: dict[str, torch.Tensor] = {}  # of the call under way
        self._outlier_calls: list[dict[str, np.ndarray]] = []  # the prefill's, then each step's
        self._seen: set[str] = set()
        self._totals: dict[Layout, StepTotals] = {}
        self._steps: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []

    def __enter__(self) -> OutlierRecorder:
        for hooks in self._watched:
            self._hooks.enter_context(hooks)
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self._hooks.close()
        if kind is not None:  # let go of what is on the device
            for kept in (self._inputs, self._stream, self._outlier_columns):
                kept.clear()
        self._close()

    def phase(self, name: str) -> None:
        """Say what the next calls of the model are: 'prefill', or 'decode', where each call is one generated token."""
        check_phase(name)
        self._close()
        if name == "prefill" and self._prompt_of:
            raise RuntimeError("the prefill is recorded already; make a new OutlierRecorder for another prompt")
        self._phase = name

    def report(
        self,
        *,
        model: str,
        method: str,
        threshold: float = 6.0,
        token_texts: Iterable[str] = (),
        stopped: bool = False,
    ) -> OutlierReport:
        """Return everything recorded, as numpy arrays: an entry for every linear layer, in the model's order."""
        cutoff(threshold, "float32")
        self._close()
        decode = self._decode_statistics()
        modules = tuple(self._module(name, decode.get(name)) for name in self._modules)
        prompt_tokens = max((entry.token_map.end for entry in modules if entry.token_map is not None), default=0)
        return OutlierReport(
            model, method, threshold, prompt_tokens, len(self._steps), list(token_texts), modules, self._peaks, stopped
        )

    def _module(self, name: str, decode: PhaseStatistics | None) -> ModuleOutliers:
        in_features = self._modules[name].in_features
        nothing = PhaseStatistics.of_nothing(in_features)
        prefill, token_map, positions = self._prompt_of.get(name, (nothing, None, None))
        quiet = np.empty(0, np.int32), np.empty(0, np.float32)
        known = any(name in call for call in self._outlier_calls)
        return ModuleOutliers(
            name,
            *kind_and_layer(name),
            in_features=in_features,
            quantized=self._quantized[name],
            dtype=self._dtypes.get(name, "float16"),
            lowest_threshold=self.lowest_threshold,
            prefill=prefill,
            decode=decode or nothing,
            decode_steps=tuple(step.get(name, quiet) for step in self._steps),
            token_map=token_map,
            positions=positions,
            outlier_columns=tuple(call.get(name, quiet[0]) for call in self._outlier_calls) if known else None,
        )

    def _decode_statistics(self) -> dict[str, PhaseStatistics]:
        merged: dict[str, PhaseStatistics] = {}
        for totals in self._totals.values():
            for names, found in totals.statistics():
                merged.update({name: found + merged[name] if name in merged else found for name in names})
        return merged

    def _on_input(self, name: str, module: nn.Module, x: torch.Tensor) -> None:
        if name in self._seen:
            if self._phase == "prefill":
                raise RuntimeError(f"{name} ran twice in the prefill; call phase('decode') before the next call")
            self._close()
        if self._stop is not None and self._stop.is_set():
            if self._phase == "decode":  # an unfinished token; an unfinished prompt keeps the layers that it reached
                self._inputs.clear()
                self._outlier_columns.clear()
            raise Interrupted
        if self._phase is None or x.numel() == 0:
            return
        self._seen.add(name)
        self._dtypes[name] = str(x.dtype).removeprefix("torch.")
        self._input(x, "float16" if self._quantized[name] else self._dtypes[name]).names.append(name)

    def _on_output(self, name: str, module: nn.Module, y: torch.Tensor) -> None:
        if self._phase is None:
            return
        if (columns := self._columns_of(module)) is None:
            self._watched[0].skip_output(name)  # asked once: it keeps none in later calls either
        else:
            self._outlier_columns[name] = columns

    def _on_block(self, name: str, block: nn.Module, y: torch.Tensor) -> None:
        if self._phase == "prefill" and y.numel():
            self._stream[int(name.rpartition(".")[2])] = reductions.reduce_stream(y)

    def _input(self, x: torch.Tensor, compared_as: str) -> _Input:
        """The input that `x` is: the last one when `x` is the same memory, unchanged; else a new one.

        Under `inference_mode` torch keeps no version of a tensor: a change in place between two layers goes unseen.
        """
        version = None if x.is_inference() else x._version
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, compared_as, version)
        if self._last is not None and self._last[0] == key and not self._last[1].expired():
            return self._last[2]
        absolute = x.abs().reshape(-1, x.shape[-1])
        kept = reductions.reduce_prompt(absolute, compared_as) if self._phase == "prefill" else absolute
        found = _Input(kept, compared_as, [])
        self._inputs.append(found)
        self._last = key, StorageWeakRef(x.untyped_storage()), found
        return found

    def _close(self) -> None:
        """Move the finished prefill's or step's statistics off the device."""
        self._last = None
        self._seen.clear()
        if self._outlier_columns:
            arrays = fetch(list(self._outlier_columns.values()))
            found = (columns.astype(np.int32) for columns in arrays)
            self._outlier_calls.append(dict(zip(self._outlier_columns, found, strict=True)))
            self._outlier_columns = {}
        if self._stream:
            self._close_stream()
        if self._inputs:
            self._close_prompt() if self._phase == "prefill" else self._close_step()

    def _close_stream(self) -> None:
        arrays = fetch([peaks for peaks, _ in self._stream.values()])
        found = []
        for (layer, (_, dtype)), peaks in zip(self._stream.items(), arrays, strict=True):
            absmax, tokens = reductions.split_peaks(peaks, dtype)
            found.append(StreamPeak(layer, absmax, tokens.astype(np.int64)))
        self._peaks = tuple(found)
        self._stream = {}

    def _close_prompt(self) -> None:
        arrays = iter(fetch([tensor for entry in self._inputs for tensor in entry.kept.tensors]))
        rows = max(entry.kept.rows for entry in self._inputs)
        for entry in self._inputs:
            parts = [next(arrays) for _ in entry.kept.tensors]
            # lm_head is given the last tokens only: what an input has fewer rows, it begins later in the prompt.
            found = entry.kept.to_numpy(*parts, first_token=rows - entry.kept.rows)
            self._prompt_of.update(dict.fromkeys(entry.names, found))
        self._inputs.clear()

    def _close_step(self) -> None:
        groups: dict[tuple, list[_Input]] = defaultdict(list)
        for entry in self._inputs:
            groups[entry.kept.device, entry.compared_as].append(entry)
        step: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for (device, compared_as), entries in groups.items():
            layout = Layout(device, compared_as, tuple((tuple(e.names), tuple(e.kept.shape)) for e in entries))
            if layout not in self._totals:
                self._totals[layout] = StepTotals(layout)
            strong = self._totals[layout].add([entry.kept for entry in entries], self.lowest_threshold)
            for entry, found in zip(entries, strong, strict=True):
                step.update(dict.fromkeys(entry.names, found))
        self._steps.append(step)
        self._inputs.clear()
