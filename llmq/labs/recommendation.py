"""The sentence of 'Should I quantize?': which method to take, if any, and the reason, from rows of `advice`.

That a method is faster counts only where it was measured on the same device, and a quality of another model only where
methods need the same bytes and none was measured of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmq.contestant import shown_name
from llmq.formatting import format_bytes
from llmq.labs.quality import shown_change
from llmq.models.presets import model_title

BEST_KNOWN = "llm-int8"  # what the recommended method is held against
SURE = 0.01  # of perplexity: a method is sure to cost less where the end of its interval does
FASTER = 1.05  # times FP16's speed: less is within one run's noise
NEARER = 1.5  # times the KL of the other


def recommended(rows: Sequence[Mapping], place: str, usable: float) -> tuple[str | None, str]:
    """The method to take, None where nothing is to be changed or can be, and why, in a sentence."""
    dense, *others = rows
    if dense["fits"] is None:
        return None, f"Not known: what its attention keeps for a token is not, so neither is what fits {place}."
    fitting = [row for row in others if row["fits"]]
    if dense["fits"]:
        return _faster(dense, fitting, place, usable)
    if not fitting:
        least = min(rows, key=lambda row: row["total"])
        reach = f"; with at most {least['largest_context']:,} tokens it does" if least["largest_context"] else ""
        return None, (
            f"**No method here fits {place}**: {_name(least)} comes nearest, and needs {_bytes(least)} of the "
            f"{format_bytes(usable)} that may be used{reach}."
        )
    best = min(fitting, key=_loss)
    may = f"{format_bytes(usable)} may be used on {place}"
    short = f"FP16 needs {_bytes(dense)} and {may}"
    if _bytes(dense) == format_bytes(usable):
        short = f"FP16 needs {format_bytes(dense['total'] - usable)} more than the {may.replace('may', 'that may', 1)}"
    rest = f"it needs {_bytes(best)}{_pace(best)}, {_cost(best)}{_against(best, others)}"
    return best["method"], f"**Yes, with {_name(best)}**: {short}; {rest}."


def _faster(dense: Mapping, fitting: Sequence[Mapping], place: str, usable: float) -> tuple[str | None, str]:
    """Where FP16 fits: the method that is faster there and sure to cost little, if one is."""
    fast = [row for row in fitting if row["speed"] and row["speed"]["here"] and speed_ratio(row) >= FASTER]
    sure = [row for row in fast if row["quality"] and row["quality"]["perplexity_change_interval"][1] <= SURE]
    if sure:
        best = min(sure, key=_loss)
        return best["method"], (
            f"**Yes, with {_name(best)}**: FP16 fits {place} too, but it needs {format_bytes(best['saved'])} "
            f"less{_pace(best)}, {_cost(best)}{_against(best, fitting)}."
        )
    left = f"**No need**: FP16 fits {place} with {format_bytes(usable - dense['total'])} to spare"
    if fast:
        best = min(fast, key=_loss)
        return None, f"{left}; {_name(best)} is {speed_ratio(best):.2f} times as fast there, {_cost(best)}."
    known = any(row["speed"] and row["speed"]["here"] and row["speed"]["over_fp16"] for row in fitting)
    why = "no method that was measured there is faster" if known else "whether a method is faster there is not measured"
    smaller = [row for row in fitting if row["saved"] > 0]
    best = min(smaller, key=_loss, default=None)
    saving = f"; {_name(best)} would save {format_bytes(best['saved'])}, {_cost(best)}" if best else ""
    return None, f"{left}, and {why}{saving}."


def _loss(row: Mapping) -> tuple:
    """What is least for the method to take: nearest to FP16; where that was not measured of this model, that which
    keeps most bits, then the nearest on another model."""
    own, other = (row[name]["kl_to_fp16"] if row[name] else float("inf") for name in ("quality", "quality_elsewhere"))
    return own, -row["total"], other


def _against(best: Mapping, rows: Sequence[Mapping]) -> str:
    """How the method stands against LLM.int8(), where both were measured: in speed in one result, and in quality."""
    other = next((row for row in rows if row["method"] == BEST_KNOWN and row is not best), None)
    for where in ("quality", "quality_elsewhere"):
        if other and best[where] and other[where]:
            far, near = (row[where]["kl_to_fp16"] for row in (other, best))
            if far < NEARER * near:
                return ""
            on = "" if where == "quality" else f" on {model_title(best[where]['model'])}"
            told = (
                f"{far / near:.2g} times nearer to FP16 than {_name(other)}{on} (KL {near:.2g} against {far:.2g} nats)"
            )
            return f"; at batch 1 it is {pace} and {told}" if (pace := _relative(best, other)) else f"; it is {told}"
    return ""


def _relative(best: Mapping, other: Mapping) -> str:
    """How fast one is beside the other; '' where no result has both."""
    own, its = best["speed"], other["speed"]
    if not own or not its or any(own[name] != its[name] for name in ("device_name", "date", "engine")):
        return ""
    return _times(own["tokens_per_second"] / its["tokens_per_second"])


def _pace(row: Mapping) -> str:
    """', writes 1.7 times as fast as FP16 (NVIDIA H100 80GB HBM3)'; '' where that is not known."""
    if not row["speed"] or not row["speed"]["over_fp16"]:
        return ""
    return f", writes {_times(speed_ratio(row))} as FP16 ({row['speed']['device_name']})"


def _times(ratio: float) -> str:
    return "as fast" if 1 / FASTER <= ratio <= FASTER else f"{ratio:.2f} times as fast"


def _cost(row: Mapping) -> str:
    if quality := row["quality"]:
        return f"and its perplexity changes by {shown_change(quality)}"
    other = row["quality_elsewhere"]
    beside = f"; on {model_title(other['model'])} it costs {shown_change(other)}" if other else ""
    return f"and what it costs in perplexity is not measured for this model{beside}"


def speed_ratio(row: Mapping) -> float:
    return (row["speed"] and row["speed"]["over_fp16"]) or 0.0


def _name(row: Mapping) -> str:
    return shown_name(row["method"])


def _bytes(row: Mapping) -> str:
    return "not known" if row["total"] is None else format_bytes(row["total"])
