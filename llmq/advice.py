"""Should I quantize? A model, a place, and a recommendation with its reason.

Bytes are `memory`'s predictions against what is free. Speeds and qualities are stored results of the same model, each
with its device and date, or what the bench has just measured; what nobody measured is said not to be. That a method is
faster counts only where it was measured on the same device, and a quality of another model only where methods need the
same bytes and none was measured of this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from llmq import telemetry
from llmq.bench.speed import DecodeBench
from llmq.bench.tables import RESULTS
from llmq.cards import CARDS, device_bytes, place_named
from llmq.contestant import Contestant, shown_name
from llmq.environment import device_label
from llmq.errors import BadChoice
from llmq.figures.blocks import Block, Table
from llmq.formatting import MISSING, format_bytes, format_count, format_speed, plain_json
from llmq.labs.quality import shown_change
from llmq.labs.rows import BASELINE
from llmq.memory import forecast
from llmq.models.opening import Model

METHODS = "fp16,llm-int8,int8-weight-only,bnb-int8,nf4"
BEST_KNOWN = "llm-int8"  # what the recommended method is held against
SURE = 0.01  # of perplexity: a method is sure to cost less where the end of its interval does
FASTER = 1.05  # times FP16's speed: less is within one run's noise
NEARER = 1.5  # times the KL of the other
NOT_MEASURED = "not measured"
HEADERS = ["Method", "Fits", "Needs", "Saves", "Longest context", "Decode", "on", "Perplexity change (95 %)"]


@dataclass(frozen=True)
class Place:
    """Where the model is to run: `bytes` that are free there; `device_name`: as results name it, or a part of that."""

    name: str
    bytes: float
    device_name: str = ""

    @classmethod
    def here(cls, device: str) -> Place:
        return cls("this machine", telemetry.free_bytes(device), device_label(device))

    @classmethod
    def named(cls, text: str) -> Place:
        """A card, or an amount of memory. Raises BadChoice for what is neither."""
        card = CARDS.get(text.strip().lower())
        return cls(place_named(text), device_bytes(text), card.model if card else "")

    def measured(self, result: Mapping) -> bool:
        """Whether a stored result is of this device: 'RTX 4090' is in 'NVIDIA GeForce RTX 4090', L4 not in L40S."""
        own = self.device_name.split()
        return bool(own) and set(own) <= set(result["conditions"].get("device_name", "").split())


@dataclass(frozen=True)
class Advice:
    """The recommendation and what it rests on, in the stable shape of a result."""

    result: dict
    kind = "advice"

    @property
    def title(self) -> str:
        return f"Should I quantize {self.result['model']}?"

    def blocks(self) -> Iterator[Block]:
        """The recommendation, the methods, and where the figures are from."""
        yield self.result["recommendation"]["sentence"]
        yield Table(HEADERS, [_cells(row) for row in self.result["results"]], "By method")
        yield " ".join(_notes(self.result))

    def bench(self, device: str) -> DecodeBench:
        """What measures the speed of the methods that fit. Raises BadChoice where none does, or for several texts."""
        fitting = [Contestant.parse(row["method"]) for row in self.result["results"] if row["fits"]]
        if not fitting or self.result["batch"] != 1:
            why = "speed is measured at batch 1" if fitting else "no method fits, so nothing can be measured"
            raise BadChoice(f"{why}; leave out --measure")
        return DecodeBench(model=self.result["model"], contestants=tuple(fitting), device=device)

    def to_json(self) -> dict:
        return plain_json(self.result)

    stored = to_json


def advise(
    model: Model, contestants: Sequence[Contestant], place: Place, results: Sequence[Mapping], *, tokens: int,
    batch: int = 1, measured: Mapping | None = None,
) -> Advice:  # fmt: skip
    """Say whether to quantize, for up to `tokens` tokens of `batch` texts. `results`: stored ones of any model;
    `measured`: what the bench found just now. Raises BadChoice as `forecast` does."""
    contestants = list(dict.fromkeys((BASELINE, *contestants)))
    asked = {"tokens": min(tokens, model.context), "batch": batch, "device_bytes": place.bytes}
    result = forecast(model, contestants, **asked)
    own = [found for found in results if found.get("model") == model.name]
    labels = {contestant.label for contestant in contestants}
    speeds, qualities, elsewhere = _speeds(own, labels, place, batch, measured), _qualities(own), _qualities(results)
    dense = result["results"][0]
    for row in result["results"]:
        saved = None if row["total"] is None or row is dense else dense["total"] - row["total"]
        row |= {"saved": saved, "speed": speeds.get(row["method"]), "quality": qualities.get(row["method"])}
        row["quality_elsewhere"] = None if row["quality"] else elsewhere.get(row["method"])
    method, sentence = recommended(result["results"], place, result["usable_memory"])
    said = {"method": method, "sentence": sentence}
    return Advice({"kind": Advice.kind, **result, "place": place.name, "recommendation": said})


@cache
def stored_results() -> tuple[dict, ...]:
    """The results that ship with the project; none where the package is installed without them."""
    return tuple(json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))


def _speeds(
    results: Sequence[Mapping], labels: set[str], place: Place, batch: int, measured: Mapping | None
) -> dict[str, dict]:
    """The speed of each method: measured now, else of this device, else from the result with most of the methods."""
    usable = [found for found in results if found["kind"] == "decode" and found["conditions"].get("batch") == batch]

    def worth(found: Mapping) -> tuple:
        there = labels & {row["method"] for row in found["results"]}
        conditions = found["conditions"]
        return place.measured(found), len(there), -conditions["prompt_tokens"], conditions["date"]

    ordered = sorted(usable, key=worth) + ([measured] if measured else [])
    return {
        row["method"]: _speed(row, found, here=found is measured or place.measured(found))
        for found in ordered
        for row in found["results"]
    }


def _speed(row: Mapping, result: Mapping, *, here: bool) -> dict:
    """One method's speed with what it was measured under. `over_fp16`: against FP16 in the same loop of the result."""
    base = {found["method"]: found for found in result["results"] if found["engine"] == row["engine"]}.get("fp16")
    ratio = row.get("over_fp16") or (row["tokens_per_second"] / base["tokens_per_second"] if base else None)
    conditions = result["conditions"]
    named = {name: conditions.get(name) for name in ("device_name", "date", "prompt_tokens", "random_weights")}
    speed = {"tokens_per_second": row["tokens_per_second"], "over_fp16": ratio, "engine": row["engine"]}
    return speed | named | {"here": here}


def _qualities(results: Sequence[Mapping]) -> dict[str, dict]:
    """The quality of each method, from the result with the most windows, of those the newest."""
    read = [found for found in results if found["kind"] == "quality"]
    found = {}
    for result in sorted(read, key=lambda result: (result["conditions"]["windows"], result["conditions"]["date"])):
        conditions = {name: result["conditions"].get(name) for name in ("device_name", "date", "windows")}
        for row in result["results"]:
            if "perplexity_change" in row:
                names = ("perplexity_change", "perplexity_change_interval", "kl_to_fp16")
                read_by = {"model": result["model"], "text": result["text"]}
                found[row["method"]] = {name: row[name] for name in names} | conditions | read_by
    return found


def recommended(rows: Sequence[Mapping], place: Place, usable: float) -> tuple[str | None, str]:
    """The method to take, None where nothing is to be changed or can be, and why, in a sentence."""
    dense, *others = rows
    if dense["fits"] is None:
        return None, f"Not known: what its attention keeps for a token is not, so neither is what fits {place.name}."
    fitting = [row for row in others if row["fits"]]
    if dense["fits"]:
        return _faster(dense, fitting, place, usable)
    if not fitting:
        least = min(rows, key=lambda row: row["total"])
        reach = f"; with at most {least['largest_context']:,} tokens it does" if least["largest_context"] else ""
        return None, (
            f"**No method here fits {place.name}**: {_name(least)} comes nearest, and needs {_bytes(least)} of the "
            f"{format_bytes(usable)} that may be used{reach}."
        )
    best = min(fitting, key=_loss)
    return best["method"], (
        f"**Yes, with {_name(best)}**: FP16 needs {_bytes(dense)} and {format_bytes(usable)} may be used on "
        f"{place.name}; it needs {_bytes(best)}{_pace(best)}, {_cost(best)}{_against(best, others)}."
    )


def _faster(dense: Mapping, fitting: Sequence[Mapping], place: Place, usable: float) -> tuple[str | None, str]:
    """Where FP16 fits: the method that is faster there and sure to cost little, if one is."""
    fast = [row for row in fitting if row["speed"] and row["speed"]["here"] and _ratio(row) >= FASTER]
    sure = [row for row in fast if row["quality"] and row["quality"]["perplexity_change_interval"][1] <= SURE]
    if sure:
        best = min(sure, key=_loss)
        return best["method"], (
            f"**Yes, with {_name(best)}**: FP16 fits {place.name} too, but it needs {format_bytes(best['saved'])} "
            f"less{_pace(best)}, {_cost(best)}{_against(best, fitting)}."
        )
    left = f"**No need**: FP16 fits {place.name} with {format_bytes(usable - dense['total'])} to spare"
    if fast:
        best = min(fast, key=_loss)
        return None, f"{left}; {_name(best)} is {_ratio(best):.2f} times as fast there, {_cost(best)}."
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
            told = f"{far / near:.2g} times nearer to FP16 than {_name(other)} (KL {near:.2g} against {far:.2g} nats"
            told += ")" if where == "quality" else f" on {best[where]['model']})"
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
    return f", writes {_times(_ratio(row))} as FP16 ({row['speed']['device_name']})"


def _times(ratio: float) -> str:
    return "as fast" if 1 / FASTER <= ratio <= FASTER else f"{ratio:.2f} times as fast"


def _cost(row: Mapping) -> str:
    if quality := row["quality"]:
        return f"and its perplexity changes by {shown_change(quality)}"
    other = row["quality_elsewhere"]
    beside = f"; on {other['model']} it costs {shown_change(other)}" if other else ""
    return f"and what it costs in perplexity is not measured for this model{beside}"


def _ratio(row: Mapping) -> float:
    return (row["speed"] and row["speed"]["over_fp16"]) or 0.0


def _name(row: Mapping) -> str:
    return shown_name(row["method"])


def _bytes(row: Mapping) -> str:
    return "not known" if row["total"] is None else format_bytes(row["total"])


def _cells(row: Mapping) -> list[str]:
    fits = {None: "not known", True: "yes", False: "no"}[row["fits"]]
    saves = format_bytes(row["saved"]) if row["saved"] is None or row["saved"] > 0 else "nothing"
    speed, where, reach = NOT_MEASURED, MISSING, format_count(row["largest_context"])
    if row["speed"]:
        ratio = f", {_ratio(row):.2f}× FP16" if _ratio(row) else ""
        speed, where = f"{format_speed(row['speed']['tokens_per_second'])}{ratio}", row["speed"]["device_name"]
    quality = NOT_MEASURED if not row["quality"] else shown_change(row["quality"])
    quality = MISSING if row["method"] == BASELINE.label else quality
    return [_name(row), fits, _bytes(row), saves, reach, speed, where, quality]


def _notes(result: Mapping) -> Iterator[str]:
    """What the figures hold for, and where they are from."""
    texts = "one text" if result["batch"] == 1 else f"{result['batch']:,} texts"
    free = f"{format_bytes(result['device_memory'])}, of which {format_bytes(result['usable_memory'])} may be used"
    yield f"For {texts} of {result['context']:,} tokens on {result['place']}: {free}."
    speeds, qualities = ([row[kind] for row in result["results"] if row[kind]] for kind in ("speed", "quality"))
    yield from dict.fromkeys(_speed_note(speed) for speed in speeds)
    yield from dict.fromkeys(_quality_note(quality) for quality in qualities)


def _speed_note(speed: Mapping) -> str:
    weights = ", random weights of this shape" if speed["random_weights"] else ""
    where = f"{speed['device_name']}, loop {speed['engine']}, {speed['date'][:10]}"
    return f"Decode: batch 1 after {speed['prompt_tokens']} tokens, {where}{weights}."


def _quality_note(quality: Mapping) -> str:
    where = f"{quality['device_name']}, {quality['date'][:10]}"
    return f"Perplexity: {quality['windows']} windows of {quality['text']}, {where}."
