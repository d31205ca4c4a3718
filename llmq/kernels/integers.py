"""Products of int8 codes by torch's operations: exact on any device, whatever its integer products are worth."""

from __future__ import annotations

import torch
from torch.nn import functional

FEWEST_ROWS = 17  # of cuBLAS' int8 product, as torch calls it
FEW_ROWS = 4  # fewer are multiplied as fast by torch's integer product on any processor
EXACT_COLUMNS = 1024  # of int8 codes: their products add up to 2**24 at most


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply int8 (rows, in) by int8 (out, in) transposed -> float32 (rows, out)."""
    if not x.is_cuda:
        fast = x.shape[0] < FEW_ROWS or "AVX512" in torch.backends.cpu.get_cpu_capability()
        # torch 2.13 is wrong about a single column, and takes 10 to 28 times as long where it has to do without VNNI
        return torch._int_mm(x, weight.T).float() if fast and x.shape[1] > 1 else float_product(x, weight)
    if x.shape[1] % 8 or weight.shape[0] % 8:
        return float_product(x, weight)
    padded = functional.pad(x, (0, 0, 0, max(0, FEWEST_ROWS - x.shape[0])))
    return torch._int_mm(padded, weight.T)[: x.shape[0]].float()


def float_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Do `integer_product` by products of floats: sums of EXACT_COLUMNS of codes are exact in any order, and whole sums
    are added up as integers."""
    parts = zip(x.split(EXACT_COLUMNS, dim=1), weight.split(EXACT_COLUMNS, dim=1), strict=True)
    whole, *more = ((codes.float() @ columns.float().T) for codes, columns in parts)
    return sum((part.int() for part in more), whole.int()).float() if more else whole
