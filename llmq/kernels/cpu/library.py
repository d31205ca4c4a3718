"""The compiled library as Python sees it: its structures, its functions, and weights packed for it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch

from llmq.kernels.cpu.build import opened_library
from llmq.kernels.cpu.pages import Pages
from llmq.kernels.primitives import Int8Weight, Tensors

VERSION = 1
LANES = 8
EACH_ROW = 2  # of `Session.decompose`: no row's outliers are another's; 1: they are pooled; 0: none
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.int8: 2}
STOPPED = ctypes.CFUNCTYPE(c_int)


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """A structure's fields in order, from groups of one type: (type, names)."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class Matrix(Structure):
    _fields_ = _fields((c_void_p, "data absmax bias"), (c_int32, "rows width kind paired"))


class Layer(Structure):
    _fields_ = _fields((c_void_p, "attention_norm mlp_norm"), (Matrix, "qkv output gate_up down"))


class Model(Structure):
    _fields_ = _fields(
        (c_int32, "layers hidden inner heads groups width vocabulary cache_kind"),
        (c_float, "eps"),
        (POINTER(Layer), "layer"),
        (Matrix, "embedding head"),
        (c_void_p, "norm"),
    )


class Session(Structure):
    _fields_ = _fields(
        (POINTER(Model), "model"),
        (c_void_p, "pool keys values rope"),
        (c_int32, "capacity decompose"),
        (c_float, "threshold"),
        (c_int32, "marks_stride"),
        (c_void_p, "marks workspace"),
    )


_SIGNATURES = {
    "llmq_version": (c_int, []),
    "llmq_regions": (c_int, [POINTER(Model)]),
    "llmq_workspace_bytes": (c_int64, [POINTER(Model), c_int, c_int, c_int, c_int]),
    "llmq_packed_bytes": (c_int64, [POINTER(Matrix)]),
    "llmq_step": (None, [POINTER(Session), c_int, c_int, c_void_p, POINTER(c_double)]),
    "llmq_prefill": (c_int, [POINTER(Session), c_void_p, c_int, c_int, c_void_p, POINTER(c_double), STOPPED]),
    "pack": (None, [c_void_p, POINTER(Matrix), c_void_p]),
    "quantize": (None, [c_void_p, c_int, c_int, c_void_p, c_void_p]),
    "pool_new": (c_void_p, [c_int, c_int]),
    "pool_free": (None, [c_void_p]),
    "pool_threads": (c_int, [c_void_p]),
}


@cache
def open_library() -> ctypes.CDLL:
    """Return the library with its functions' types, compiled if need be. Raises NoLibrary."""
    library = opened_library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.llmq_version() == VERSION, "the library is of another version"
    return library


@dataclass(frozen=True)
class Packed(Tensors):
    """A matrix in the library's layout, see matrix.h. `data`: uint8, flat. `absmax`: float32, whole eights, of int8."""

    data: torch.Tensor
    absmax: torch.Tensor | None
    rows: int
    width: int
    kind: int
    paired: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.width

    def matrix(self, bias: torch.Tensor | None = None) -> Matrix:
        """Return the library's structure for it; the tensors must outlive it."""
        addresses = (None if part is None else part.data_ptr() for part in (self.data, self.absmax, bias))
        return Matrix(*addresses, self.rows, self.width, self.kind, self.paired)


class Packing:
    """The form that `load_weights` gives matrices and vectors for the library: packed one by one, the source freed."""

    def __init__(self):
        self._pages = Pages()

    def matrix(self, weight: torch.Tensor | Int8Weight, *, paired: bool = False) -> Packed:
        """Pack (rows, width). `paired`: two halves of rows whose blocks alternate, gate and up."""
        codes = (weight.codes if isinstance(weight, Int8Weight) else weight).contiguous()
        absmax = weight.absmax if isinstance(weight, Int8Weight) else None
        rows, width = codes.shape
        shape = Matrix(None, None, None, rows, width, KINDS[codes.dtype], paired)
        library = open_library()
        data = self._pages.empty(library.llmq_packed_bytes(shape))
        library.pack(codes.data_ptr(), shape, data.data_ptr())
        return Packed(data, None if absmax is None else _blocked(absmax, paired), rows, width, shape.kind, paired)

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        """Convert to float32, whole eights, the rest 0."""
        return _blocked(values, False)


def quantize_rows(weight: torch.Tensor, out: Int8Weight) -> None:
    """See `reference.quantize_rows`."""
    rows, width = weight.shape
    halves = weight.half().contiguous()
    open_library().quantize(halves.data_ptr(), rows, width, out.codes.data_ptr(), out.absmax.data_ptr())


def _blocked(values: torch.Tensor, paired: bool) -> torch.Tensor:
    """float32 in blocks of eight; of a paired matrix a block of the first half, then one of the second."""
    halves = values.float().chunk(2) if paired else (values.float(),)
    blocks = [torch.nn.functional.pad(half, (0, -len(half) % LANES)).view(-1, LANES) for half in halves]
    return torch.stack(blocks, 1).flatten().contiguous()
