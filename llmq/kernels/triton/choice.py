"""The likeliest token and its log-probability: one pass over the logits by many programs, one to settle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmq.kernels.triton.launch import let_next_start, options, wait_for_previous

BLOCK = 1024


@triton.jit
def _part(logits_ptr, peaks_ptr, places_ptr, sums_ptr, vocabulary, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    program, row = tl.program_id(0), tl.program_id(1)
    logits_ptr += row.to(tl.int64) * vocabulary
    slot = row * tl.num_programs(0) + program
    at = program * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(OVERLAP)
    x = tl.load(logits_ptr + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
    peak, place = tl.max(x, 0, return_indices=True)
    tl.store(peaks_ptr + slot, peak)
    tl.store(places_ptr + slot, program * BLOCK + place)
    tl.store(sums_ptr + slot, tl.sum(tl.exp(x - peak), 0))


@triton.jit
def _settle(peaks_ptr, places_ptr, sums_ptr, token_ptr, chosen_ptr, parts, PARTS: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    row = tl.program_id(0)
    first, at = row * parts, tl.arange(0, PARTS)
    wait_for_previous(OVERLAP)
    peaks = tl.load(peaks_ptr + first + at, mask=at < parts, other=-float("inf"))
    sums = tl.load(sums_ptr + first + at, mask=at < parts, other=0.0)
    peak, winner = tl.max(peaks, 0, return_indices=True)
    token = tl.load(places_ptr + first + winner)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(chosen_ptr + 2 * row, token.to(tl.float64))
    tl.store(chosen_ptr + 2 * row + 1, -tl.log(tl.sum(sums * tl.exp(peaks - peak), 0)).to(tl.float64))


def likeliest(logits: torch.Tensor, token: torch.Tensor, chosen: torch.Tensor) -> None:
    """See `reference.likeliest`."""
    vocabulary, rows = logits.shape[-1], token.shape[0]
    parts = triton.cdiv(vocabulary, BLOCK)
    peaks, sums = torch.empty(2, rows * parts, device=logits.device)
    places = torch.empty(rows * parts, dtype=torch.int32, device=logits.device)
    overlap = options(logits.device)
    _part[(parts, rows)](logits, peaks, places, sums, vocabulary, BLOCK=BLOCK, num_warps=4, **overlap)
    _settle[(rows,)](
        peaks, places, sums, token, chosen, parts, PARTS=triton.next_power_of_2(parts), num_warps=4, **overlap
    )
