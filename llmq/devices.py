"""Names of devices: 'cpu', 'cuda:0', and 'cuda:0,cuda:1' for several GPUs over which one model is spread."""

from __future__ import annotations


def parts(device: str) -> tuple[str, ...]:
    """The single devices that a name stands for, in its order."""
    return tuple(device.split(","))


def first(device: str) -> str:
    """Where token ids go in and logits come out."""
    return parts(device)[0]


def are_several(device: str) -> bool:
    return len(parts(device)) > 1


def share_on(device: str, of: str) -> float:
    """Which share of what lies on `of`, evenly, lies on `device`."""
    held = parts(of)
    return len(set(held) & set(parts(device))) / len(held)
