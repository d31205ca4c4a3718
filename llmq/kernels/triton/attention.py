"""Attention of one token over the cache, split over the context (flash-decoding); the length is read on the device.

A program takes one head and one part of the positions. It rotates the query itself; the program of the last part also
rotates and appends the new key and value, and the cache is read only up to there, so that no program reads what another
one is writing. Parts beyond the length end at once: a captured graph serves every length up to its capacity. Whoever of
a head's programs is the last to be done combines the parts, so that a short context pays for no second kernel.

The position, and the cache up to it, are those of before the step: a program reads them before it waits for the
kernels in front, see `launch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.buffers import Cache, NotedVector, Partials
from llmq.kernels.triton.codes import note
from llmq.kernels.triton.launch import let_next_start, options, wait_for_previous

BLOCK, WARPS = 32, 2  # positions at a time; the quickest of those tried on one H100 at 164 to 8,200 positions
COMBINED = 16  # parts at a time


@triton.jit
def _rotated(x_ptr, cosine, sine, half, HALF: tl.constexpr):
    at = tl.arange(0, HALF)
    first = tl.load(x_ptr + at, mask=at < half, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + half + at, mask=at < half, other=0.0).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _block(keys_ptr, values_ptr, first, stop, at, whole, half, width, BLOCK: tl.constexpr):
    """Keys, in their two halves, and values of BLOCK positions; 0 from `stop` on."""
    rows = first + tl.arange(0, BLOCK)
    inside = (rows < stop)[:, None]
    k = keys_ptr + rows[:, None] * width + at[None, :]  # (BLOCK, HALF) places
    k1 = tl.load(k, mask=inside & (at < half)[None, :], other=0.0)
    k2 = tl.load(k + half, mask=inside & (at < half)[None, :], other=0.0)
    v = tl.load(values_ptr + rows[:, None] * width + whole[None, :], mask=inside & (whole < width)[None, :], other=0.0)
    return k1, k2, v


@triton.jit
def _combined(
    sums_ptr, peaks_ptr, weights_ptr, first, used, width, WIDTH: tl.constexpr, COMBINED: tl.constexpr
):  # fmt: skip
    """The output of a head from its `used` parts, past the caches that may have what was there before."""
    whole = tl.arange(0, WIDTH)
    total, weight, peak = tl.zeros((WIDTH,), tl.float32), 0.0, -float("inf")
    for start in range(0, used, COMBINED):
        slot = start + tl.arange(0, COMBINED)
        peaks = tl.load(peaks_ptr + first + slot, mask=slot < used, other=-float("inf"), cache_modifier=".cg")
        weights = tl.load(weights_ptr + first + slot, mask=slot < used, other=0.0, cache_modifier=".cg")
        inside = (slot < used)[:, None] & (whole < width)[None, :]  # (COMBINED, WIDTH)
        place = (first + slot)[:, None] * width + whole[None, :]
        sums = tl.load(sums_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(peaks, 0))
        share, shrink = tl.exp(peaks - higher), tl.exp(peak - higher)
        total = total * shrink + tl.sum(sums * share[:, None], 0)
        weight = weight * shrink + tl.sum(weights * share, 0)
        peak = higher
    return total / weight  # (WIDTH,)


@triton.jit
def _part(
    qkv_ptr, keys_ptr, values_ptr, rope_ptr, position_ptr, sums_ptr, peaks_ptr, weights_ptr, arrived_ptr, out_ptr,
    tally_ptr, index_ptr, value_ptr, part_ptr, threshold, heads, groups, width, capacity, parts, part, scale,
    HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMBINED: tl.constexpr,
    NOTE: tl.constexpr, SEVERAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    head, mine, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared = heads // groups
    group = head // shared
    lane = row * heads + head  # of all heads of all sequences
    qkv_ptr += row * (heads + 2 * groups) * width
    half = width // 2
    at, whole = tl.arange(0, HALF), tl.arange(0, WIDTH)
    position = tl.load(position_ptr + row).to(tl.int32)
    if SEVERAL:
        part = tl.load(part_ptr + row)
    start = mine * part
    if start <= position:
        stop = tl.minimum(start + part, position)
        keys_ptr += (row * groups + group).to(tl.int64) * capacity * width
        values_ptr += (row * groups + group).to(tl.int64) * capacity * width
        k1, k2, v = _block(keys_ptr, values_ptr, start, stop, at, whole, half, width, BLOCK)
        cosine = tl.load(rope_ptr + position * width + at, mask=at < half, other=0.0)
        sine = tl.load(rope_ptr + position * width + half + at, mask=at < half, other=0.0)
        wait_for_previous(OVERLAP)
        q1, q2 = _rotated(qkv_ptr + head * width, cosine, sine, half, HALF)  # (HALF,) each
        q1, q2 = q1 * scale, q2 * scale
        peak = -float("inf")
        # Each position of a block has sums of its own until the end: a sum over them in every turn costs a third.
        weights, totals = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
        for begin in range(start, stop, BLOCK):
            score = tl.sum(k1.to(tl.float32) * q1[None, :] + k2.to(tl.float32) * q2[None, :], 1)  # (BLOCK,)
            score = tl.where(begin + tl.arange(0, BLOCK) < stop, score, -float("inf"))
            higher = tl.maximum(peak, tl.max(score, 0))
            share = tl.exp(score - higher)
            shrink = tl.exp(peak - higher)
            weights = weights * shrink + share
            totals = totals * shrink + v.to(tl.float32) * share[:, None]
            peak = higher
            k1, k2, v = _block(keys_ptr, values_ptr, begin + BLOCK, stop, at, whole, half, width, BLOCK)
        weight, total = tl.sum(weights, 0), tl.sum(totals, 0)
        if position < start + part:  # the new token belongs to this part
            first, second = _rotated(qkv_ptr + (heads + group) * width, cosine, sine, half, HALF)
            first, second = first.to(keys_ptr.dtype.element_ty), second.to(keys_ptr.dtype.element_ty)
            new = tl.load(qkv_ptr + (heads + groups + group) * width + whole, mask=whole < width, other=0.0)  # (WIDTH,)
            if head % shared == 0:
                tl.store(keys_ptr + position * width + at, first, mask=at < half)
                tl.store(keys_ptr + position * width + half + at, second, mask=at < half)
                tl.store(values_ptr + position * width + whole, new, mask=whole < width)
            score = tl.sum(first.to(tl.float32) * q1 + second.to(tl.float32) * q2, 0)
            higher = tl.maximum(peak, score)
            share = tl.exp(score - higher)
            shrink = tl.exp(peak - higher)
            weight = weight * shrink + share
            total = total * shrink + new.to(tl.float32) * share
            peak = higher
        used = position // part + 1
        y, last = total / weight, used == 1
        if not last:
            slot = lane * parts + mine
            tl.store(sums_ptr + slot * width + whole, total, mask=whole < width)
            tl.store(peaks_ptr + slot, peak)
            tl.store(weights_ptr + slot, weight)
            tl.debug_barrier()  # all that this program stored, before it says so
            last = tl.atomic_add(arrived_ptr + lane, 1, sem="acq_rel") == used - 1
            if last:
                tl.store(arrived_ptr + lane, 0)  # for the next token
                y = _combined(sums_ptr, peaks_ptr, weights_ptr, lane * parts, used, width, WIDTH, COMBINED)
        if last:
            written = y.to(out_ptr.dtype.element_ty)
            place = lane * width + whole
            tl.store(out_ptr + place, written, mask=whole < width)
            if NOTE:
                note(written.to(tl.float32), place, whole < width, threshold, head, tally_ptr, index_ptr, value_ptr)
    else:
        wait_for_previous(OVERLAP)


def attend(
    qkv: torch.Tensor,
    cache: Cache,
    rope: torch.Tensor,
    position: torch.Tensor,
    out: torch.Tensor | NotedVector,
    scratch: Partials,
) -> None:
    """See `reference.attend`."""
    groups, capacity, width = cache.keys.shape[-3:]
    heads, parts, rows = qkv.shape[-1] // width - 2 * groups, scratch.sums.shape[1], position.shape[0]
    noted = isinstance(out, NotedVector)
    made = (out.x, out.tally, out.index, out.value, out.threshold) if noted else (out, None, None, None, 0.0)
    several = scratch.sequence_parts is not None
    assert not (several and noted), "what is noted is one token's"
    overlap = {"OVERLAP": False} if several else options(qkv.device)  # see `by_row`
    _part[(heads, parts, rows)](
        qkv, cache.keys, cache.values, rope, position,
        scratch.sums, scratch.peaks, scratch.weights, scratch.arrived, *made[:4],
        scratch.sequence_parts, made[4], heads, groups, width, capacity, parts, scratch.part, width**-0.5,
        HALF=triton.next_power_of_2(width // 2), WIDTH=triton.next_power_of_2(width), BLOCK=BLOCK,
        COMBINED=COMBINED, NOTE=noted, SEVERAL=several, num_warps=WARPS, **overlap,
    )  # fmt: skip
