"""Should I quantize? A model, a place, and a recommendation with its reason.

Bytes are `memory`'s predictions against what is free. Speeds, energies and qualities are stored results of the same
model, each with its device and date, or what the bench has just measured; what nobody measured is said not to be.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmq import telemetry
from llmq.cards import CARDS, device_bytes, place_named
from llmq.contestant import Contestant, shown_name
from llmq.environment import describe, device_label
from llmq.figures.blocks import Block, Drawing, Table
from llmq.figures.fits import Need, fits_figure, with_words
from llmq.formatting import MISSING, format_bytes, format_count, format_joules, format_speed, plain_json
from llmq.labs.quality import shown_change
from llmq.labs.recommendation import recommended, speed_ratio
from llmq.labs.rows import BASELINE
from llmq.memory import forecast
from llmq.models.loading import Source
from llmq.models.opening import Model
from llmq.models.presets import model_title

if TYPE_CHECKING:
    import plotly.graph_objects as go

METHODS = "fp16,llm-int8,int8-weight-only,bnb-int8,nf4"
RESULTS = Path(__file__).parents[1] / "results"
NOT_MEASURED = "not measured"
HEADERS = ["Method", "Fits", "Needs", "Saves", "Longest context", "Decode", "Measured on", "Perplexity change (95 %)"]
MEASURED_UNDER = ("device_name", "date", "prompt_tokens", "random_weights")
MADE_WITH = ("date", "versions", "commit", "model_revision")


@dataclass(frozen=True)
class Place:
    """Where the model is to run: `bytes` that are free there; `device_name`: as results name it, or a part of that;
    `typed`: as the command line names it, '' for this machine."""

    name: str
    bytes: float
    device_name: str = ""
    typed: str = ""

    @classmethod
    def here(cls, device: str) -> Place:
        return cls("this machine", telemetry.free_bytes(device), device_label(device))

    @classmethod
    def named(cls, text: str) -> Place:
        """A card, or an amount of memory. Raises BadChoice for what is neither."""
        card = CARDS.get(text.strip().lower())
        return cls(place_named(text), device_bytes(text), card.model if card else "", text)

    def measured(self, result: Mapping) -> bool:
        """Whether a stored result is of this device: 'RTX 4090' is in 'NVIDIA GeForce RTX 4090', L4 not in L40S."""
        own = self.device_name.split()
        return bool(own) and set(own) <= set(result["conditions"].get("device_name", "").split())


@dataclass(frozen=True)
class Advice:
    """The recommendation and what it rests on, in the stable shape of a result. `source`: of the model, None where the
    answer was loaded and says itself what it was made with."""

    result: dict
    source: Source | None = None
    kind = "advice"

    @property
    def title(self) -> str:
        return f"Should I quantize {model_title(self.result['model'])}?"

    @property
    def sentence(self) -> str:
        return self.result["recommendation"]["sentence"]

    def blocks(self) -> Iterator[Block]:
        """The recommendation, what fits as a figure, the methods, and where the figures are from."""
        yield self.sentence
        yield Drawing.of(self.figure)
        yield Table(HEADERS, [_cells(row) for row in self.result["results"]], "By method")
        yield self.notes

    @property
    def notes(self) -> str:
        return " ".join(_notes(self.result))

    def figure(self) -> go.Figure:
        """Bytes by method beside what may be used."""
        needs = [_need(row) for row in self.result["results"]]
        return fits_figure(self.title, needs, self.result["usable_memory"], self.result["place"])

    def picture(self) -> go.Figure:
        """The figure with the recommendation above and the notes below, to stand alone."""
        return with_words(self.figure(), self.sentence.replace("**", ""), self.notes)

    def to_json(self) -> dict:
        """With the command that asks this again, the date and the versions, as `conditions`."""
        facts = describe("cpu", self.source) if self.source else {}
        made = {name: facts[name] for name in MADE_WITH if name in facts}
        return plain_json(self.result | {"conditions": self.result["conditions"] | made})

    stored = to_json

    @classmethod
    def restore(cls, stored: dict) -> Advice:
        return cls(stored)


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
    speeds, energies = _speeds(own, labels, place, batch, measured), _energies(own, place, batch)
    qualities, elsewhere = _qualities(own), _qualities(results)
    dense = result["results"][0]
    for row in result["results"]:
        saved = None if row["total"] is None or row is dense else dense["total"] - row["total"]
        row |= {"saved": saved, "speed": speeds.get(row["method"]), "energy": energies.get(row["method"])}
        row["quality"] = qualities.get(row["method"])
        row["quality_elsewhere"] = None if row["quality"] else elsewhere.get(row["method"])
    method, sentence = recommended(result["results"], place.name, result["usable_memory"])
    said = {"method": method, "sentence": sentence}
    conditions = {"command": _typed(result, place, measured)}
    told = {"place": place.name, "recommendation": said, "conditions": conditions}
    return Advice({"kind": Advice.kind, **result, **told}, model.source)


def _typed(result: Mapping, place: Place, measured: Mapping | None) -> str:
    """The words that ask this at the command line."""
    words = ["python", "-m", "llmq", "advise", "--model", result["model"]]
    words += ["--methods", ",".join(row["method"] for row in result["results"])]
    words += ["--context", str(result["context"]), "--batch", str(result["batch"])]
    words += ["--device-memory", place.typed] if place.typed else []
    return shlex.join(words + (["--measure"] if measured else []))


@cache
def stored_results() -> tuple[dict, ...]:
    """The results that travel with the package."""
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
    speed = {"tokens_per_second": row["tokens_per_second"], "over_fp16": ratio, "engine": row["engine"]}
    return speed | _measured_under(result) | {"here": here}


def _measured_under(result: Mapping) -> dict:
    return {name: result["conditions"].get(name) for name in MEASURED_UNDER}


def _energies(results: Sequence[Mapping], place: Place, batch: int) -> dict[str, dict]:
    """Joules a token of each method: of this device, else the newest."""
    found = [r for r in results if r["kind"] == "energy" and r["conditions"]["batch"] == batch]
    names = [f"{phase}_joules_{end}" for phase in ("prefill", "decode") for end in ("per_token", "over_fp16")]
    return {
        row["method"]: {name: row[name] for name in names} | _measured_under(result)
        for result in sorted(found, key=lambda result: (place.measured(result), result["conditions"]["date"]))
        for row in result["results"]
    }


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


def _cells(row: Mapping) -> list[str]:
    fits = {None: "not known", True: "yes", False: "no"}[row["fits"]]
    saves = format_bytes(row["saved"]) if row["saved"] is None or row["saved"] > 0 else "nothing"
    speed, where = NOT_MEASURED, MISSING
    reach = "none" if row["largest_context"] == 0 else format_count(row["largest_context"])
    if row["speed"]:
        dense = row["method"] == BASELINE.label
        ratio = f", {speed_ratio(row):.2f}× FP16" if speed_ratio(row) and not dense else ""
        speed, where = f"{format_speed(row['speed']['tokens_per_second'])}{ratio}", row["speed"]["device_name"]
    quality = NOT_MEASURED if not row["quality"] else shown_change(row["quality"])
    quality = MISSING if row["method"] == BASELINE.label else quality
    needs = "not known" if row["total"] is None else format_bytes(row["total"])
    return [shown_name(row["method"]), fits, needs, saves, reach, speed, where, quality]


def _need(row: Mapping) -> Need:
    """A row as a bar, with what is known of it in words."""
    told = [] if row["total"] is None else [format_bytes(row["total"])]
    told += [f"{speed_ratio(row):.2f}× FP16's speed"] if speed_ratio(row) and row["method"] != BASELINE.label else []
    told += [f"perplexity {shown_change(row['quality'])}"] if row["quality"] and row["saved"] is not None else []
    parts = (row["weights"] + row["scales"], row["kv"] or 0, row["workspace"])
    return Need(shown_name(row["method"]), ", ".join(told), parts, row["fits"])


def _notes(result: Mapping) -> Iterator[str]:
    """What the figures hold for, and where they are from."""
    texts = "one text" if result["batch"] == 1 else f"{result['batch']:,} texts"
    free = f"{format_bytes(result['device_memory'])}, of which {format_bytes(result['usable_memory'])} may be used"
    yield f"For {texts} of {result['context']:,} tokens on {result['place']}: {free}."
    speeds, qualities = ([row[kind] for row in result["results"] if row[kind]] for kind in ("speed", "quality"))
    yield from dict.fromkeys(_speed_note(speed) for speed in speeds)
    yield from _energy_notes(result["results"])
    yield from dict.fromkeys(_quality_note(quality) for quality in qualities)


def _speed_note(speed: Mapping) -> str:
    weights = ", random weights of this shape" if speed["random_weights"] else ""
    where = f"{speed['device_name']}, loop {speed['engine']}, {speed['date'][:10]}"
    return f"Decode: batch 1 after {speed['prompt_tokens']} tokens, {where}{weights}."


def _energy_notes(rows: Sequence[Mapping]) -> Iterator[str]:
    """A sentence for every result with joules: a token of the answer by method, and in brackets one of the prompt."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if energy := row["energy"]:
            weights = ", random weights of this shape" if energy["random_weights"] else ""
            where = f"{energy['device_name']}, {energy['date'][:10]}{weights}"
            decode, prefill = (format_joules(energy[f"{phase}_joules_per_token"]) for phase in ("decode", "prefill"))
            told.setdefault(where, []).append(f"{shown_name(row['method'])} {decode} ({prefill})")
    for where, joules in told.items():
        yield f"Energy of a token of the answer (of the prompt), batch 1: {'; '.join(joules)}; {where}."


def _quality_note(quality: Mapping) -> str:
    where = f"{quality['device_name']}, {quality['date'][:10]}"
    return f"Perplexity: {quality['windows']} windows of {quality['text']}, {where}."
