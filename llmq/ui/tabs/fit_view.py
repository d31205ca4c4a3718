"""What 'Does it fit?' answers, as texts and lengths of bars, from a forecast of `memory`. No gradio, no arithmetic of
its own on bytes but what is left and what share of a bar they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmq.formatting import format_bytes, format_count, format_share
from llmq.methods import METHODS

PARTS = ("weights", "kv", "workspace")
METHODS_SHOWN = tuple(name for name, m in METHODS.items() if not m.emulated and m.dtype != "float32")


def failed(message: str) -> dict:
    """The view that says only why there is no answer."""
    return {"headline": message, "failed": True, "rows": []}


def fit_view(result: Mapping, *, title: str, place: str, asked: int, by_driver: bool = True) -> dict:
    """The view of a forecast with a device. `title`: the model's, `place`: 'an RTX 4080 (16 GB)', `asked`: the context
    that was asked for, where the model reads less, `by_driver`: a card's driver counted the device's memory."""
    device, usable = result["device_memory"], result["usable_memory"]
    rows = [_row(same, device) for same in _alike(result["results"])]
    longest = max([device, *(sum(row["bytes"]) for row in rows)])
    for row in rows:
        row["shares"] = [round(part / longest, 4) for part in row.pop("bytes")]
    return {
        "headline": headline(result, title, place, asked),
        "rows": rows,
        "end": round(device / longest, 4),
        "usable": round(usable / longest, 4),
        "device": format_bytes(device),
        "note": _note("By its driver's count the card has" if by_driver else "The memory given is", device, usable),
    }


def headline(result: Mapping, title: str, place: str, asked: int) -> str:
    """One sentence: whether FP16 fits, whether int8 or another method does, and up to which context."""
    (dense, *_), *rounded = _alike(result["results"])
    rounded, limit = [row for row, *_ in rounded], result["model_context"]
    at = _at(result, asked)
    if dense["total"] is None:
        weights = f"{format_bytes(_weights(dense))} in FP16"
        weights += f" and {format_bytes(_weights(rounded[0]))} in int8" if rounded else ""
        unknown = "is not known, because what its attention keeps for a token is not"
        return f"Whether {title} fits {place} {unknown}. Its weights alone take {weights}."
    far = _reach(dense["largest_context"], limit)
    if not rounded:
        fits = f"fits {place} {at}, {far}" if dense["fits"] else f"does not fit {place} {at}"
        return f"{title} {fits}; it has no layers that int8 would change."
    best = next((row for row in rounded if row["fits"]), None)
    if dense["fits"]:
        if best and best["largest_context"] > dense["largest_context"]:
            return f"{title} fits {place} in FP16 {at}, {far}; with int8, {_reach(best['largest_context'], limit)}."
        saved = dense["total"] - rounded[0]["total"]
        more = f" Int8 would leave {format_bytes(saved)} more free." if saved > 0 else ""
        return f"{title} fits {place} in FP16 {at}, {far}.{more}"
    if best:
        name = _short(best, rounded)
        alone = f", only {far}" if dense["largest_context"] else ""
        reach = _reach(best["largest_context"], limit)
        return f"{title} does not fit {place} in FP16 {at}{alone}; with {name} it does, {reach}."
    widest = max(rounded, key=lambda row: row["largest_context"])
    if widest["largest_context"]:
        fits = f"{_short(widest, rounded)} fits {_reach(widest['largest_context'], limit)}"
        alone = f", FP16 {far}" if dense["largest_context"] else ", FP16 not at all"
        return f"{title} does not fit {place} {at}: {fits}{alone}."
    weights = format_bytes(min(map(_weights, rounded)))
    return f"{title} does not fit {place} by any method here, however short the text: weights alone take {weights}."


def _at(result: Mapping, asked: int) -> str:
    tokens = _tokens(result["context"]) + (", the most it reads" if asked > result["context"] else "")
    return f"with {result['batch']:,} texts of {tokens}" if result["batch"] > 1 else f"at {tokens}"


def _reach(tokens: int, limit: int | None) -> str:
    """How far a context may go, rounded down as a person would say it."""
    if tokens == limit:
        return f"up to all {tokens:,} tokens it reads"
    step = 1000 if tokens >= 10_000 else 100 if tokens >= 1000 else 1
    return f"up to {_tokens(tokens // step * step)}"


def _tokens(count: int) -> str:
    return "none" if count == 0 else f"{format_count(count)} token{'' if count == 1 else 's'}"


def _alike(results: Sequence[Mapping]) -> list[list[Mapping]]:
    """Methods that need the same bytes, together; in the order of the methods."""

    def needs(row: Mapping) -> tuple:
        return row["weights"] + row["scales"], row["kv"], row["workspace"]

    groups: dict[tuple, list[Mapping]] = {}
    for row in results:
        groups.setdefault(needs(row), []).append(row)
    return list(groups.values())


def _row(same: Sequence[Mapping], device: float) -> dict:
    """A row of the table; `bytes` are the parts of its bar, those that are known."""
    row, *others = same
    total = row["total"]
    sizes = {"weights": _weights(row), "kv": row["kv"], "workspace": row["workspace"], "total": total}
    left = "not known" if total is None else _left(device - total)
    return {
        "method": _label(row),
        "others": ", ".join(map(_label, others)),
        "fits": row["fits"],
        "bytes": [sizes[part] or 0 for part in PARTS],
        "figures": {name: _known(size) for name, size in sizes.items()} | {"left": left},
        "largest": "not known" if row["largest_context"] is None else _tokens(row["largest_context"]),
        "batch": "not known" if row["largest_batch"] is None else format_count(row["largest_batch"]),
    }


def _known(size: int | None) -> str:
    return "not known" if size is None else format_bytes(size)


def _left(size: float) -> str:
    return format_bytes(size) if size >= 0 else f"{format_bytes(-size)} short"


def _weights(row: Mapping) -> int:
    return row["weights"] + row["scales"]


def _label(row: Mapping) -> str:
    name = row["method"].partition("@")[0]
    return METHODS[name].label if name in METHODS else row["method"]


def _short(row: Mapping, rounded: Sequence[Mapping]) -> str:
    """The usual int8 is 'int8' in a sentence; another one has its name."""
    return "int8" if row is rounded[0] else _label(row)


def _note(lead: str, device: float, usable: float) -> str:
    left = format_share(1 - usable / device)
    return (
        f"{lead} {device / 2**30:.4g} GiB, that is {format_bytes(device)} (1 GB is 10⁹ bytes, 1 GiB is 2³⁰). "
        f"{left} of it is kept for CUDA and the allocator, so a method fits that needs at most {format_bytes(usable)}. "
        "A screen, and other programs on the card, come off that. Weights and KV cache are exact; workspace is an "
        "upper estimate of one prefill."
    )
