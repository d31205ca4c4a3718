"""The rotary embedding's angles as a table (Su et al. 2021)."""

from __future__ import annotations

import torch

from llmq.models.architecture import Architecture


def rope_table(architecture: Architecture, positions: int, device: str) -> torch.Tensor:
    """Return float32 (positions, head_dim): cosines, then sines, of each position's angles."""
    frequencies = torch.tensor(architecture.rope.frequencies(architecture.head_dim), dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).float().to(device)
