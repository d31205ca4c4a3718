"""Each operation in torch: its definition, the fallback on any device, and what the tests compare with.

Every function writes into `out`; vectors are one token's. Products and sums are in float32 and rounded once, at the
end, to the type of `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from llmq.kernels import primitives
from llmq.kernels.buffers import Cache, NotedVector, Noting, Partials, Rows, SplitVector
from llmq.kernels.integers import integer_product
from llmq.kernels.primitives import Int8Weight, SplitRows, own_outliers, split_rows

Weight = torch.Tensor | Int8Weight

prompts_can_be_captured = False  # a split asks the host how many outliers there are


def quantize_rows(weight: torch.Tensor, out: Int8Weight) -> None:
    """Convert (out, in) floating point -> int8 codes and row scales, in place."""
    made = primitives.quantize_rows(weight)
    out.codes.copy_(made.codes)
    out.absmax.copy_(made.absmax)


def embed(table: Weight, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows of `table` (vocab_size, width), one for each of `tokens` int64 (n,), into `out` (n, width)."""
    if isinstance(table, Int8Weight):
        torch.mul(table.codes[tokens], (table.absmax[tokens] / 127)[:, None], out=out)
    else:
        torch.index_select(table, 0, tokens, out=out)


def norm(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, out: torch.Tensor, *, empty: torch.Tensor | None = None
) -> None:
    """Do RMSNorm (Zhang and Sennrich 2019, equation 4): x / sqrt(mean(x²) + eps) · norm_weight. `x`: (..., width).

    `empty`: the tallies of `NotedVector`s that are written next, which become 0.
    """
    if empty is not None:
        empty.zero_()
    x32 = x.float()
    scaled = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)  # rounded here, as in LLaMA
    out.copy_(scaled * norm_weight)


def split(x: torch.Tensor, threshold: float, out: SplitVector) -> None:
    """Decompose one token's activations (width,) for `product`: |x| >= threshold keeps its 16 bits; 0 turns that
    off."""
    rows = split_rows(x[None], threshold)
    count = len(rows.columns)
    out.codes.copy_(rows.codes[0])
    out.absmax.copy_(rows.absmax)
    out.count.fill_(count)
    out.index[:count] = rows.columns.int()
    out.value[:count] = x[rows.columns].float()


def norm_split(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    threshold: float,
    out: SplitVector,
    *,
    empty: torch.Tensor | None = None,
) -> None:
    """Do `norm`, then `split`."""
    normed = torch.empty_like(x)
    norm(x, norm_weight, eps, normed, empty=empty)
    split(normed, threshold, out)


def product(
    x: torch.Tensor | SplitVector | NotedVector,
    weight: Weight,
    out: torch.Tensor | NotedVector,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> None:
    """Set out = weight · x [+ bias] [+ residual]; with `gated`, SiLU(first half of the rows · x) · (second half · x).

    `x`: (in,), or a SplitVector or NotedVector with an int8 weight (LLM.int8()); an int8 weight with a plain `x` is
    weight-only. `out`: (out,), or with `gated` a NotedVector, of which the other implementations note what they write.
    """
    out = out.x if isinstance(out, NotedVector) else out
    if isinstance(x, SplitVector):
        count = int(x.count)
        rows = SplitRows(x.codes[None], x.absmax, x.index[:count].long())
        y = _split_product(rows, x.value[None, :count], weight)[0]
    elif isinstance(x, NotedVector):
        rows = split_rows(x.x[None], x.threshold)
        y = _split_product(rows, x.x[None, rows.columns], weight)[0]
    elif isinstance(weight, Int8Weight):
        y = (weight.codes.float() @ x.float()) * weight.absmax / 127
    else:
        y = weight.float() @ x.float()
    if bias is not None:
        y = y + bias
    if gated:
        gate, up = y.chunk(2)
        y = functional.silu(gate) * up
    out.copy_(y if residual is None else y + residual)


def products(
    x: SplitVector,
    weights: Sequence[Int8Weight],
    outs: Sequence[torch.Tensor],
    *,
    biases: Sequence[torch.Tensor] | None = None,
    product: Callable = product,
) -> None:
    """Do `product` with each of several weights, into as many `outs`; all or none have biases."""
    for weight, out, bias in zip(weights, outs, biases or [None] * len(outs), strict=True):
        product(x, weight, out, bias=bias)


def attend(
    qkv: torch.Tensor,
    cache: Cache,
    rope: torch.Tensor,
    position: torch.Tensor,
    out: torch.Tensor | NotedVector,
    scratch: Partials,
) -> None:
    """Append one token's key and value to the cache, and attend over it.

    `qkv`: ((heads + 2·kv_heads)·head_dim,), queries first. `rope`: float32 (positions, head_dim), cosines then sines.
    `position`: int64 (1,), how many positions are in the cache already. `out`: (heads·head_dim,), or a NotedVector, as
    in `product`. `scratch` is memory for the other implementations.

    Several sequences, each with one token: `qkv`, `cache`, `position` and `out` (sequences, ...).
    """
    if qkv.ndim == 2:
        for row, at in enumerate(position):
            attend(qkv[row], Cache(cache.keys[row], cache.values[row]), rope, at, out[row], scratch)
        return
    out = out.x if isinstance(out, NotedVector) else out
    kv_heads, _, head_dim = cache.keys.shape
    heads = out.shape[0] // head_dim
    at = int(position)
    queries, keys, values = qkv.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))
    cache.keys[:, at] = _rotated(keys.view(kv_heads, head_dim), rope[at]).to(cache.keys.dtype)
    cache.values[:, at] = values.view(kv_heads, head_dim)
    queries = _rotated(queries.view(heads, head_dim), rope[at]).view(kv_heads, heads // kv_heads, head_dim)
    scores = queries @ cache.keys[:, : at + 1].float().transpose(1, 2) * head_dim**-0.5
    out.copy_((scores.softmax(-1) @ cache.values[:, : at + 1].float()).view(-1))


def _rotated(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, halves paired as in LLaMA checkpoints. `x`: (..., head_dim), `rope`: (head_dim,)."""
    first, second = x.float().chunk(2, -1)
    cosine, sine = rope.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def likeliest(logits: torch.Tensor, token: torch.Tensor, chosen: torch.Tensor) -> None:
    """Choose the most likely token. `logits`: float32 (vocab_size,); `token`: int64 (1,), the next step's input;
    `chosen`: float64 (2,), the token and its log-probability, NaN where a logit is. Of several sequences
    (sequences, vocab_size), (sequences,) and (sequences, 2)."""
    rows = logits.view(-1, logits.shape[-1])
    best = rows.argmax(-1, keepdim=True)
    token.copy_(best.view(-1))
    logprob = rows.gather(-1, best) - rows.logsumexp(-1, keepdim=True)
    chosen.copy_(torch.cat((best.double(), logprob.double()), -1).view_as(chosen))


def append_rows(
    qkv: torch.Tensor, cache: Cache, rope: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate queries and keys of several tokens and append keys and values to the cache at `start`.

    `qkv`: (rows, (heads + 2·kv_heads)·head_dim). Returns queries (heads, rows, head_dim) and views of the cache's keys
    and values (kv_heads, start + rows, head_dim).
    """
    rows = qkv.shape[0]
    kv_heads, _, head_dim = cache.keys.shape
    stop = start + rows
    parts = qkv.view(rows, -1, head_dim).transpose(0, 1)
    rotated = _rotated(parts[:-kv_heads], rope[start:stop]).to(qkv.dtype)
    cache.keys[:, start:stop] = rotated[-kv_heads:]
    cache.values[:, start:stop] = parts[-kv_heads:]
    return rotated[:-kv_heads], cache.keys[:, :stop], cache.values[:, :stop]


def plain_rows(x: torch.Tensor, noting: Noting) -> Rows:
    """Hand on `x` (rows, in) as it is."""
    if noting.used is not None:
        x = x * (torch.arange(len(x), device=x.device) < noting.used)[:, None]  # the rows beyond mean nothing
    return Rows(x, noting.threshold, outlier_marks=noting.outlier_marks, by_row=noting.by_row)


def norm_rows(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, noting: Noting) -> Rows:
    """Compute `norm` of several tokens, (rows, width)."""
    out = torch.empty_like(x)
    norm(x, norm_weight, eps, out)
    return plain_rows(out, noting)


def gate_rows(gate_up: torch.Tensor, noting: Noting) -> Rows:
    """Multiply (rows, 2·in) -> (rows, in): SiLU of the first half times the second (SwiGLU, Shazeer 2020)."""
    gate, up = gate_up.chunk(2, -1)
    return plain_rows(functional.silu(gate) * up, noting)


def gated_rows(rows: Rows, weight: Weight, noting: Noting) -> Rows:
    """Do `linear_rows`, then `gate_rows`: gate and up in one matrix, (2·inner, in). By row nothing is rounded between
    them, as in `product`."""
    x = rows.x.float() if rows.by_row and isinstance(weight, Int8Weight) else rows.x
    gated = gate_rows(linear_rows(replace(rows, x=x), weight), Noting())
    return plain_rows(gated.x.to(rows.x.dtype), noting)


def linear_rows(
    rows: Rows, weight: Weight, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply (rows, in) -> (rows, out) [+ bias] in the type of the input; with `residual`, added to it in place.

    An int8 weight is LLM.int8() for rows with a threshold and weight-only for those without.
    """
    x = rows.x
    if not isinstance(weight, Int8Weight):
        y = functional.linear(x, weight, bias)
    elif rows.threshold is None:
        y = functional.linear(x, weight.dequantized(x.dtype), bias)
    elif rows.by_row:
        y = linear_by_row(x.float(), weight, bias, rows.threshold, rows.outlier_marks)
        return y.to(x.dtype) if residual is None else residual.copy_(y + residual)
    else:
        y = _int8_rows(x, weight, bias, rows.threshold, rows.outlier_marks)
    return y if residual is None else residual.add_(y)


def scores(rows: Rows, weight: Weight, out: torch.Tensor) -> None:
    """Set `out`, float32 (rows, out), as `linear_rows` does: the logits, which are not rounded to 16 bits."""
    if isinstance(weight, Int8Weight):
        out.copy_(linear_rows(replace(rows, x=rows.x.float()), weight))
    elif rows.x.is_cuda and rows.x.dtype != torch.float32:
        torch.mm(rows.x, weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(rows.x.float(), weight.float().T, out=out)


def _int8_rows(
    x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, threshold: float, outlier_marks: torch.Tensor | None
) -> torch.Tensor:
    split = split_rows(x, threshold)
    if outlier_marks is not None:
        outlier_marks[split.columns] = 1
    y = _split_product(split, x[:, split.columns], weight)
    return (y if bias is None else y + bias).to(x.dtype)


def linear_by_row(
    x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, threshold: float, outlier_marks: torch.Tensor
) -> torch.Tensor:
    """Do LLM.int8() of (rows, in), each row with outliers of its own, so that no row depends on another.

    The products of halves and codes are summed in float64, which is exact for thresholds of 1/64 or more: a sum then
    does not depend on which columns others add zeros for. `outlier_marks` as in `Noting`.
    """
    split = split_rows(x, threshold, by_row=True)
    outlier_marks[split.columns] = 1
    values = own_outliers(x[:, split.columns], threshold).double()
    others = (values @ weight.codes[:, split.columns].double().T).float() * (weight.absmax / 127)
    y = _scaled_product(split, weight) + others
    return (y if bias is None else y + bias).to(x.dtype)


def _split_product(split: SplitRows, outliers: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """See `primitives.split_product`; scaled and summed in float32."""
    y = _scaled_product(split, weight)
    if len(split.columns):
        columns = weight.codes[:, split.columns].float() * (weight.absmax / 127)[:, None]
        y.addmm_(outliers.float(), columns.T)
    return y


def _scaled_product(split: SplitRows, weight: Int8Weight) -> torch.Tensor:
    """The int8 part alone, float32 (rows, out)."""
    return integer_product(split.codes, weight.codes).mul_(split.absmax[:, None]).mul_(weight.absmax / 127**2)
