"""The chain of cause of one token, computed: errors layer by layer, and every module put back to 16 bit in turn.

Every module is tried, and in the order of what a gradient promises, so that the repairs come first: one backward pass
of the baseline tells how the margin moves with each module's output (attribution patching, Nanda 2023; Syed et al.
2023, arXiv 2310.10348), and only the order rests on that estimate.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from llmq.engine.base import Interrupted
from llmq.errors import BadChoice, unknown
from llmq.events import Progress
from llmq.hooks import Watched, decoder_blocks, kind_and_layer, linear_modules
from llmq.inspect.cause import Cause, LayerError, Patch
from llmq.inspect.report import cutoff

STRONGEST = 3  # outliers named a module


def explain_token(
    baseline: nn.Module,
    model: nn.Module,
    ids: list[int],
    position: int,
    *,
    threshold: float,
    patch: bool = True,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Cause]:
    """Yield progress, a Cause whenever a module does better than all before it, and at last the complete Cause.

    Both models are transformers causal LMs of one architecture in eval mode.

    `baseline` is dense. `ids`: the text; the token at `position` is forecast from those before it. Raises BadChoice for
    a position that has none before it or is not in the text.
    """
    stop = stop or threading.Event()
    if isinstance(position, bool) or not isinstance(position, int) or not 1 <= position < len(ids):
        raise BadChoice(f"token is {position!r}; choose a position of the text from 1 to {len(ids) - 1}")
    read = ids[:position]
    yield Progress("both methods read the text up to the token", 0.0)
    try:
        truth, own = _trace(baseline, read, threshold, stop), _trace(model, read, threshold, stop)
    except Interrupted:
        return
    wanted, got = int(truth.logits.argmax()), int(own.logits.argmax())
    layers = tuple(_layer_errors(truth, own))
    found = Cause(position, wanted, got, float(own.logits[wanted] - own.logits[got]), layers)
    if not patch or not found.diverges:
        yield found
        return
    patches: list[Patch] = []
    yield Progress("which modules matter most", 0.05)
    names = _by_promise(baseline, model, read, (wanted, got))
    forecast = _forecaster(model, read, own)
    for number, name in enumerate(names):
        if stop.is_set():
            break
        yield Progress(f"put {name} back in 16 bit ({number + 1} of {len(names)})", 0.1 + 0.9 * number / len(names))
        with patched(model, name, baseline.get_submodule(name)):
            logits = forecast(kind_and_layer(name)[1])
        token, margin = int(logits.argmax()), float(logits[wanted] - logits[got])
        patches.append(Patch(name, token, margin, token == wanted))
        patches.sort(key=lambda entry: (not entry.repaired, -entry.margin))
        if patches[0].module == name:
            yield replace(found, patches=tuple(patches), stopped=True)
    yield replace(found, patches=tuple(patches), stopped=len(patches) < len(names))


@contextmanager
def patched(model: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    """Replace the module called `name` inside the `with` block; inputs and outputs are cast to the types it had."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    if not isinstance(getattr(holder, child, None), nn.Module):
        raise unknown("module", name, linear_modules(model))
    with replaced(holder, child, _InOtherType(replacement)):
        yield


@contextmanager
def replaced(holder: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, replacement)
    try:
        yield
    finally:
        setattr(holder, name, original)


class _InOtherType(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = [module]  # in a list: the module stays the other model's
        self.weight = module.weight  # some attention code reads its projections' dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._module[0](x.to(self.weight.dtype)).to(x.dtype)


def _by_promise(baseline: nn.Module, model: nn.Module, ids: list[int], pair: tuple[int, int]) -> list[str]:
    """The modules that a patch would change, by how much it is expected to add to the margin of `pair`."""
    slopes = _slopes(baseline, ids, pair)
    inputs: dict[str, torch.Tensor] = {}
    promise: dict[str, float] = {}

    def after(name: str, module: nn.Module, y: torch.Tensor) -> None:
        x, other = inputs.pop(name), baseline.get_submodule(name)
        differs = type(module) is not type(other) or module.weight.dtype != other.weight.dtype
        if differs and name in slopes:
            repair = other(x.to(other.weight.dtype)).float() - y.float()
            promise[name] = float((slopes.pop(name).float() * repair).sum())

    with torch.inference_mode(), Watched(linear_modules(model), lambda n, m, x: inputs.update({n: x}), after):
        model(_tokens(model, ids), use_cache=False, logits_to_keep=1)
    return sorted(promise, key=lambda name: -promise[name])


def _slopes(baseline: nn.Module, ids: list[int], pair: tuple[int, int]) -> dict[str, torch.Tensor]:
    """For each linear layer the gradient of logit[pair[0]] - logit[pair[1]] after the last token with respect to its
    output, (1, tokens, out)."""
    outputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
        for name, module in linear_modules(baseline).items():
            keep = partial(lambda name, module, args, y: outputs.update({name: y}), name)  # not detached: no `Watched`
            hooks.enter_context(module.register_forward_hook(keep))
        embedded = baseline.get_input_embeddings()(_tokens(baseline, ids)).detach().requires_grad_()
        logits = _last_logits(baseline(inputs_embeds=embedded, use_cache=False, logits_to_keep=1))
        found = torch.autograd.grad(logits[pair[0]] - logits[pair[1]], list(outputs.values()), allow_unused=True)
    return {name: slope for name, slope in zip(outputs, found, strict=True) if slope is not None}


@dataclass(frozen=True)
class _Trace:
    """One reading: `logits` (vocabulary,) after the last token, float32; `outputs`: each block's output at the last
    token, float32; `inputs`: what each block was given, whole; `outliers`: by block."""

    logits: torch.Tensor
    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    outliers: list[list[tuple[str, int, float]]]


def _trace(model: nn.Module, ids: list[int], threshold: float, stop: threading.Event) -> _Trace:
    blocks = decoder_blocks(model)
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    outliers: dict[int, list[tuple[str, int, float]]] = {}
    seen: set[tuple] = set()

    def on_linear(name: str, module: nn.Module, x: torch.Tensor) -> None:
        if stop.is_set():
            raise Interrupted
        kind, layer = kind_and_layer(name)
        if layer is None or not 0 < threshold < math.inf or (layer, kind) in seen:
            return
        seen.add((layer, kind))
        last = x.reshape(-1, x.shape[-1])[-1].abs().float()  # (in_features,)
        strong = (last >= float(cutoff(threshold, "float16"))).nonzero().view(-1)
        found = zip([kind] * len(strong), strong.tolist(), last[strong].tolist(), strict=True)
        outliers.setdefault(layer, []).extend(found)

    with torch.inference_mode(), Watched(linear_modules(model), on_linear):
        with Watched(blocks, lambda n, m, x: inputs.update({n: x}), lambda n, m, y: outputs.update({n: y})):
            logits = _last_logits(model(_tokens(model, ids), use_cache=False, logits_to_keep=1))
    ends = [outputs[name].reshape(-1, outputs[name].shape[-1])[-1].float().clone() for name in blocks]
    return _Trace(logits, ends, [inputs[name] for name in blocks], [outliers.get(i, []) for i in range(len(blocks))])


def _layer_errors(truth: _Trace, own: _Trace) -> Iterator[LayerError]:
    for layer, (y16, y, outliers) in enumerate(zip(truth.outputs, own.outputs, own.outliers, strict=True)):
        signal, noise = float(y16.double().norm()), float((y.to(y16.device) - y16).double().norm())
        relative = noise / signal if signal else math.inf
        strongest = sorted(outliers, key=lambda entry: -entry[2])[:STRONGEST]
        yield LayerError(layer, relative, sqnr_db(signal, noise), len(outliers), tuple(strongest))


def sqnr_db(signal: float, noise: float) -> float:
    """Compute 10 log10 of the ratio of powers of two norms, in dB; infinite without noise."""
    if not noise or not signal:
        return -math.inf if noise else math.inf
    return 20 * (math.log10(signal) - math.log10(noise))  # an infinite noise has a logarithm, its reciprocal none


def _forecaster(model: nn.Module, ids: list[int], own: _Trace) -> Callable[[int | None], torch.Tensor]:
    """A function from the first layer that a patch touches to (vocabulary,) logits after the last token."""
    again = rereader(model, ids, own.inputs, own.logits[None], kept=1)
    return lambda layer: again(layer)[0]


def rereader(
    model: nn.Module, ids: list[int], inputs: Sequence[torch.Tensor], logits: torch.Tensor, *, kept: int = 0
) -> Callable[[int | None], torch.Tensor]:
    """A function from the first layer that a change touches to the (kept, vocabulary) float32 logits after the last
    `kept` of `ids`, 0 for all of them.

    Layers before it give what they gave when `logits` came out and `inputs` went into the blocks, so they are not run
    again where the model's stack can be entered half-way with the same result; its middle is tried once to see whether
    it can.
    """
    tokens, options = _tokens(model, ids), {"use_cache": False, "logits_to_keep": kept}

    @torch.inference_mode()
    def whole(layer: int | None = None) -> torch.Tensor:
        return model(tokens, **options).logits[0].float()

    @torch.inference_mode()
    def from_layer(layer: int | None) -> torch.Tensor:
        if not layer:
            return whole()
        with replaced(model.model, "layers", model.model.layers[layer:]):
            return model(inputs_embeds=inputs[layer], **options).logits[0].float()

    middle = len(inputs) // 2
    plain = isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList)
    return from_layer if middle and plain and torch.equal(from_layer(middle), logits) else whole


def _tokens(model: nn.Module, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=next(model.parameters()).device)


def _last_logits(output) -> torch.Tensor:
    return output.logits[0, -1].float()
