"""How fast a device reads its memory: what a share of the bandwidth is a share of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

BANDWIDTH_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
BANDWIDTH_REPEATS = 9


def bytes_to_read(device: str) -> int:
    """Bytes that a reading of `device` takes meanwhile."""
    return BANDWIDTH_BYTES[device.partition(":")[0]]


def read_bandwidth(device: str) -> float:
    """Bytes per second this device reads from memory: the median time to sum a tensor much larger than its caches."""
    import torch

    data = torch.ones(bytes_to_read(device) // 4, dtype=torch.float32, device=device)
    return data.nbytes / statistics.median(list(_sum_seconds(data, device.startswith("cuda")))[2:])


def bandwidth_share(bytes_per_token: int | None, speeds: list[float], readings: list[float]) -> dict:
    """The share of the read bandwidth that decoding used: the median over rounds of bytes a second over the reading of
    the same round; None where the bytes are not known. Over 1 it is None with a reason in `bandwidth_refused`: nothing
    reads faster than memory, so speed and reading were not measured on the same machine."""
    if bytes_per_token is None:
        return {"bandwidth_fraction": None, "bandwidth_refused": ""}
    share = statistics.median(bytes_per_token * a / b for a, b in zip(speeds, readings, strict=True))
    if share <= 1:
        return {"bandwidth_fraction": share, "bandwidth_refused": ""}
    reason = f"not believable: {share:.2f} of the read bandwidth of the same rounds; measure on a quiet machine"
    return {"bandwidth_fraction": None, "bandwidth_refused": reason}


def _sum_seconds(data, cuda: bool) -> Iterator[float]:
    import torch

    for _ in range(BANDWIDTH_REPEATS + 2):  # the first two warm up
        if cuda:
            torch.cuda.synchronize(data.device)
        started = time.perf_counter()
        data.sum().item()
        yield time.perf_counter() - started
