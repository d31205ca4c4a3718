"""What one module costs: a dense model reads a text with that module alone, or one layer's modules, quantized.

Everything before the change is as it was, so the module's input is the dense model's, and layers before it are not run
again. Divergence is KL(dense || changed), in nats, the mean over the scored tokens. SQNR is of the output of the module
or layer on its dense input, 10 log10(sum of y² / sum of (y - y')²) dB over all tokens. At most one module, or the
modules of one layer, is there twice; afterwards the model's own modules are back in their places.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from llmq.hooks import Watched, decoder_blocks
from llmq.inspect.patching import replaced, rereader, sqnr_db
from llmq.kernels.backend import current
from llmq.methods import Method
from llmq.methods.swap import as_linear, require_layers, shape_of
from llmq.scores import kl_divergence, pairs


@dataclass
class Error:
    """Sums over what an output should be and what it lacks."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, truth: torch.Tensor, found: torch.Tensor) -> None:
        self.signal += float(truth.double().square().sum())
        self.noise += float((found.double() - truth.double()).square().sum())

    @property
    def sqnr_db(self) -> float:
        """Infinite without an error, minus infinite where the output is no number."""
        return sqnr_db(math.sqrt(self.signal), math.sqrt(self.noise)) if math.isfinite(self.noise) else -math.inf


@dataclass(frozen=True)
class Part:
    """A module, or a layer with the modules in it. `name`: the module's or the block's; `layer`: its number, None
    outside the stack."""

    name: str
    layer: int | None
    modules: tuple[str, ...]

    @property
    def single(self) -> bool:
        return self.modules == (self.name,)


class PartByPart:
    """A dense transformers model that reads windows of token ids while parts of it are quantized by `method`.

    `statistics`: of a layer's input, by the layer's name, for a calibrated method. Raises BadChoice where the method
    finds no linear layer.
    """

    def __init__(self, model: nn.Module, method: Method, statistics: Callable[[str], torch.Tensor | None], device: str):
        self.model, self.method, self.device, self._statistics = model, method, device, statistics
        self._layers = dict(method.layers(model))
        require_layers(model, list(self._layers))
        self._blocks = list(decoder_blocks(model))
        self._inside = {name: tuple(n for n in self._layers if n.startswith(f"{name}.")) for name in self._blocks}
        self._dtype = getattr(torch, method.dtype)
        self.windows: list[Window] = []

    def read(self, ids: list[int]) -> None:
        """Read one more window as the dense model, to compare with."""
        inputs, ends = {}, {}
        blocks = {name: self.model.get_submodule(name) for name in self._blocks}
        watched = Watched(blocks, lambda n, m, x: inputs.update({n: x}), lambda n, m, y: ends.update({n: y}))
        with torch.inference_mode(), watched:
            logits = self.model(torch.tensor([ids], device=self.device), use_cache=False).logits[0].float()
        stream = [inputs[name] for name in self._blocks] + [ends[name] for name in self._blocks[-1:]]
        self.windows.append(Window(ids, logits, stream, rereader(self.model, ids, stream[:-1], logits)))

    @property
    def modules(self) -> list[Part]:
        """Every module that is quantized, in the model's order."""
        numbers = {name: number for number, block in enumerate(self._blocks) for name in self._inside[block]}
        return [Part(name, numbers.get(name), (name,)) for name in self._layers]

    @property
    def layers(self) -> list[Part]:
        """Every block with the modules that are quantized in it."""
        inside = self._inside
        return [Part(name, number, inside[name]) for number, name in enumerate(self._blocks) if inside[name]]

    def bytes_saved(self, part: Part) -> int:
        """What the part takes in the type of what is not quantized, less what it takes under the method."""
        shapes = [shape_of(self._layers[name]) for name in part.modules]
        stored = (self.method.bytes(shape) for shape in shapes)
        dense = sum(rows * columns for rows, columns in shapes) * self._dtype.itemsize
        return dense - sum(found.weights + found.scales for found in stored)

    def measure(self, part: Part) -> Iterator[dict]:
        """Quantize `part`, and only that, and read the windows again: `kl_to_fp16` and `sqnr_db` over the windows so
        far, after every one of them. The part's own modules are back when the iterator ends or is closed."""
        error, divergences = Error(), []
        with self._quantized(part, error):
            for window in self.windows:
                with self._compared(part, window, error):
                    logits = window.again(part.layer)
                divergences.append(divergence(logits, window.logits, window.ids))
                yield {"kl_to_fp16": math.fsum(divergences) / len(divergences), "sqnr_db": error.sqnr_db}

    @contextmanager
    def _quantized(self, part: Part, error: Error) -> Iterator[None]:
        """Put the quantized modules of `part` in place inside the `with` block; a single one fills `error` itself."""
        with ExitStack() as places:
            for name in part.modules:
                parent, _, child = name.rpartition(".")
                probe = Probe(self._layers[name], self._made(name), self._dtype, error if part.single else None)
                places.enter_context(replaced(self.model.get_submodule(parent), child, probe))
            yield

    def _compared(self, part: Part, window: Window, error: Error) -> AbstractContextManager:
        """A `with` block in which a layer's output is held against the dense one's."""
        if part.single:
            return nullcontext()
        block = {part.name: self.model.get_submodule(part.name)}
        return Watched(block, on_output=lambda name, module, y: error.add(window.stream[part.layer + 1], y))

    def _made(self, name: str) -> nn.Module:
        """The quantized module, out of a copy: a method may change what it is given."""
        linear = as_linear(copy.deepcopy(self._layers[name])).to(self._dtype)
        with torch.inference_mode(), current(self.device):
            return self.method.quantize(linear, self._statistics(name)).eval()


@dataclass(frozen=True)
class Window:
    """One window as the dense model reads it. `logits`: (tokens, vocabulary) float32; `stream`: what each block is
    given, and what the last one gives; `again(layer)`: its logits when something changed from that layer on."""

    ids: list[int]
    logits: torch.Tensor
    stream: list[torch.Tensor] = field(repr=False)
    again: Callable[[int | None], torch.Tensor]


class Probe(nn.Module):
    """A quantized module in the place of its original, with input in the type it is made for and output in the type of
    the other. With `error` it also runs the original and adds the difference up."""

    def __init__(self, original: nn.Module, quantized: nn.Module, dtype: torch.dtype, error: Error | None):
        super().__init__()
        self._both, self._dtype, self._error = (original, quantized), dtype, error  # in a tuple: not registered
        self.weight = original.weight  # some attention code reads its projections' dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        original, quantized = self._both
        given = x.to(self._dtype)
        found = quantized(given).to(x.dtype)
        if self._error is not None:
            self._error.add(original(given.to(x.dtype)), found)
        return found


def divergence(own: torch.Tensor, dense: torch.Tensor, ids: list[int]) -> float:
    """Mean of KL(dense || own) over the scored tokens of `ids`, in nats, from (tokens, vocabulary) logits; infinite
    where `own` is no number."""
    found = [kl_divergence(p, q) for p, q, _ in pairs(dense, own, ids, allow_overflow=True)]
    return float(torch.cat(found).mean())
