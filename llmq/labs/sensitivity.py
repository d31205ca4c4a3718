"""Which layer hurts: every layer and every module quantized alone, and the recipe that follows from it, measured.

A part is quantized alone in the dense model, which computes in FP32 on a CPU (torch's FP16 products are slower there)
and in the method's own type on a GPU. Bytes saved are against the method's own type for what it does not quantize. The
recipe keeps modules out in the order of KL per byte while the method's memory grows by no more than `room` per cent;
where `joined`, q, k and v go together, and gate and up, so that our own loops can compute it. By layers alone, which
takes an eighth of the time, it keeps layers. Its KL and the whole method's are measured in the loop that each runs in;
the sum of the parts stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.contestant import Contestant, OneContestant
from llmq.engine.loading import Key, statistics_file
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.fields import Choice, Number, Switch
from llmq.figures.blocks import Drawing
from llmq.figures.sensitivity import sensitivity_figure
from llmq.formatting import format_bytes, format_share
from llmq.labs.rows import RowLab, Rows, Workbench
from llmq.methods import METHODS, Method, mixed
from llmq.methods.mixed import FUSED, places, skip_modules
from llmq.methods.swap import linear_layers

if TYPE_CHECKING:
    import torch

    from llmq.inspect.sensitivity import Part, PartByPart

WORST = {"layer": 5, "module": 10}  # how many are listed; the figure and the file hold all
QUANTIZED = {"layer": "layer {place}", "module": "{place}", "method": "all modules", "recipe": "all but those kept"}
ROOM = Number(
    0.1, 100, help="per cent of memory that the recipe may add", label="Room (% of memory)", shown=20,
    step=0.1, named="room for the recipe",
)  # fmt: skip
BY = Choice(
    ("modules", "layers"), ("layers, then modules", "layers only"), help="modules, or layers only, which is quicker",
    label="Take apart",
)  # fmt: skip
JOINED = Switch(
    help="keep q, k and v apart, and gate and up: nearer to FP16, but through transformers only",
    label="Keep q, k, v and gate, up together",
)  # fmt: skip
METHOD = OneContestant(flag="--method", label="Method", named="method", help="such as llm-int8, absmax or gptq@bits=4")


@dataclass(frozen=True, kw_only=True)
class Sensitivity(RowLab):
    """`contestant` is taken apart `by` modules or layers; `room`: per cent of its memory that a recipe may add."""

    kind, command, panel = "sensitivity", ("experiment", "sensitivity"), True
    title = "Which layer hurts?"
    about = (
        "Every layer, then every module, is quantized **alone**. How far do the predictions move (KL), how clean is "
        "its output (SQNR), what does it save? Then the modules that cost most for each byte saved stay in 16 bit, and "
        "this recipe is measured. Its name can be typed into every field for a method."
    )
    contestant: Annotated[Contestant, METHOD] = Contestant.parse("llm-int8")
    by: Annotated[str, BY] = "modules"
    room: Annotated[float, ROOM] = 3.0
    joined: Annotated[bool, JOINED] = True
    columns = {
        "Quantized": lambda row: QUANTIZED[row["part"]].format_map(row),
        "KL to FP16": "{kl_to_fp16:.3g}",
        "Sum of its parts": lambda row: f"{row['sum_of_parts']:.3g}" if "sum_of_parts" in row else "",
        "SQNR": lambda row: f"{row['sqnr_db']:.1f} dB" if "sqnr_db" in row else "",
        "Saves": lambda row: format_bytes(row["bytes_saved"]),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.contestant.method.dense:
            quantizing = ", ".join(name for name, method in METHODS.items() if not method.dense)
            raise BadChoice(f"{self.contestant.label} quantizes no layer; choose from {quantizing}")

    def conditions(self) -> dict:
        return {"method": self.contestant.label, "by": self.by, "room_percent": self.room, "joined": self.joined}

    def measure(self, bench: Workbench) -> Rows:
        from llmq.inspect.sensitivity import PartByPart

        statistics = yield from self._statistics(bench)
        dtype = "float32" if self.device == "cpu" else self.contestant.method.dtype
        dense = next(method for method in METHODS.values() if method.dense and method.dtype == dtype)
        rows = []
        with bench.engine(Contestant(dense), loop="hf", passing=True) as engine:
            apart = PartByPart(engine.model, self.contestant.method, statistics, self.device)
            for ids in bench.texts:
                yield bench.progress(f"{dense.label} reads the text", 0.0)
                apart.read(ids)
            truth = [window.logits for window in apart.windows]
            for item in _alone(bench, apart, apart.modules if self.by == "modules" else []):
                rows += [item] if isinstance(item, dict) else []
                yield item
            del apart
        yield from self._together(bench, truth, _smallest(rows))

    def _statistics(self, bench: Workbench) -> Generator[Progress, None, Callable[[str], torch.Tensor | None]]:
        """Where a calibrated method's statistics come from, one layer's at a time; collected first where needed."""
        key = Key.of(bench.model, self.contestant.method, self.device)
        yield from bench.lease.calibrate(key)
        if not key.method.calibrated:
            return lambda name: None
        from safetensors import safe_open

        return safe_open(statistics_file(key), "pt").get_tensor

    def _together(self, bench: Workbench, truth: list[torch.Tensor], rows: list[dict]) -> Rows:
        """The whole method, and the recipe, each measured."""
        method, shape = self.contestant.method, bench.model.shape
        yield bench.progress(f"{method.spelled} reads the text", 0.97)
        whole = {"part": "method", "memory_bytes": _bytes(method, bench), **_sums(rows)}
        yield whole | {"place": method.spelled} | _divergence(bench, method, truth)
        kept = greedy(rows, self.room / 100 * whole["memory_bytes"], joined=self.joined)
        if not kept:
            return
        names = [name for name, _ in linear_layers(shape)]
        inside = {name for name in names for row in kept if f"{name}.".startswith(f"{row['name']}.")}
        recipe = mixed(method, places(inside | method.kept(names), names))
        yield bench.progress(f"{recipe.spelled} reads the text", 0.98)
        row = {"part": "recipe", "place": recipe.spelled, "memory_bytes": _bytes(recipe, bench)}
        row |= _sums([row for row in rows if row not in kept]) | {"skip_modules": skip_modules(shape, recipe)}
        yield row | _divergence(bench, recipe, truth)

    @classmethod
    def shown(cls, rows: list[dict]) -> list[dict]:
        """The whole and the recipe, then the worst layers and the worst modules."""
        found = _of(rows, "method", "recipe")
        for part, count in WORST.items():
            found += sorted(_of(rows, part), key=lambda row: -row["kl_to_fp16"])[:count]
        return found

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        parts = _smallest(rows)
        if not parts:
            return ""
        worst = max(parts, key=lambda row: row["kl_to_fp16"])
        share = worst["kl_to_fp16"] / (_sums(parts)["sum_of_parts"] or 1)
        name = QUANTIZED[worst["part"]].format_map(worst)
        said = (
            f"Of {len(parts)} {worst['part']}s, {name} hurts most: quantized alone it costs KL "
            f"{worst['kl_to_fp16']:.3g}, {format_share(share)} of the sum over all"
        )
        found = {row["part"]: row for row in _of(rows, "method", "recipe")}
        return f"{said}. {_saved(found['method'], found['recipe'])}." if "recipe" in found else f"{said}."

    @classmethod
    def takeaway(cls, rows: list[dict]) -> str:
        """The recipe for a field of methods here, and for transformers."""
        found = _of(rows, "recipe")
        return f"{found[0]['place']}\nllm_int8_skip_modules={found[0]['skip_modules']!r}" if found else ""

    @classmethod
    def figures(cls, rows: list[dict]) -> list[Drawing]:
        kept = {name for row in _of(rows, "recipe") for name in row["skip_modules"]}
        parts = [row for row in _of(rows, "layer", "module") if "layer" in row]
        return [Drawing.of(sensitivity_figure, parts, kept)] if parts else []


def _of(rows: list[dict], *parts: str) -> list[dict]:
    return [row for row in rows if row["part"] in parts]


def _smallest(rows: list[dict]) -> list[dict]:
    """The modules, or the layers where no module was measured."""
    return _of(rows, "module") or _of(rows, "layer")


def _saved(whole: dict, recipe: dict) -> str:
    """What the recipe brings and costs, in words."""
    before, after = whole["kl_to_fp16"], recipe["kl_to_fp16"]
    more = 100 * (recipe["memory_bytes"] / whole["memory_bytes"] - 1)
    fell = f" ({format_share(1 - after / before)} less)" if after < before < math.inf else ""
    return (
        f"With {len(recipe['skip_modules']) - 1} modules in 16 bit (+{more:.2g}% memory) the KL of {whole['place']} "
        f"goes from {before:.3g} to {after:.3g}{fell}, as measured; the parts add up to {whole['sum_of_parts']:.3g} "
        f"and {recipe['sum_of_parts']:.3g}"
    )


def _alone(bench: Workbench, apart: PartByPart, modules: list[Part]) -> Rows:
    """A row for every layer, then for each of `modules`, those of the worst layers first."""
    layers, names = apart.layers, [part.name for part in modules]
    steps = (len(layers) + len(modules)) * len(apart.windows)
    done = iter(range(steps))
    harm: dict[int | None, float] = {}
    for part in layers:
        row = yield from _row(bench, apart, part, str(part.layer), lambda: 0.95 * next(done) / steps)
        harm[part.layer] = row["kl_to_fp16"]
        yield row | {"part": "layer"}
    for part in sorted(modules, key=lambda part: -harm.get(part.layer, math.inf)):
        [place] = places({part.name}, names)
        row = yield from _row(bench, apart, part, place, lambda: 0.95 * next(done) / steps)
        yield row | {"part": "module", "module": place.partition(".")[2] or place}


def _row(
    bench: Workbench, apart: PartByPart, part: Part, place: str, share: Callable[[], float]
) -> Generator[Progress, None, dict]:
    row = {"place": place, "name": part.name} | ({} if part.layer is None else {"layer": part.layer})
    with closing(apart.measure(part)) as windows:
        for number, found in enumerate(windows, 1):
            row |= {name: value for name, value in found.items() if name != "sqnr_db" or math.isfinite(value)}
            yield bench.progress(f"{place} alone: window {number} of {len(apart.windows)}", share())
    return row | {"bytes_saved": apart.bytes_saved(part)}


def _divergence(bench: Workbench, method: Method, truth: list[torch.Tensor]) -> dict:
    """The KL of a whole method in the loop that it runs in."""
    from llmq.inspect.sensitivity import divergence

    with bench.engine(Contestant(method), passing=True) as engine:
        read = zip(bench.texts, truth, strict=True)
        found = [divergence(engine.logits(ids, bench.lease.stop.is_set).float(), dense, ids) for ids, dense in read]
        return {"kl_to_fp16": math.fsum(found) / len(found), "engine": engine.name}


def _bytes(method: Method, bench: Workbench) -> int:
    return sum(asdict(method.predict(bench.model.shape)).values())


def _sums(rows: list[dict]) -> dict:
    """What rows of modules come to together."""
    kl = math.fsum(row["kl_to_fp16"] for row in rows)
    return {"sum_of_parts": kl, "bytes_saved": sum(row["bytes_saved"] for row in rows)}


def greedy(rows: list[dict], room: float, *, joined: bool = True) -> list[dict]:
    """The modules or layers to keep, by KL per byte, whose bytes fit into `room`; where `joined`, modules that our
    loops multiply as one matrix go together. Empty where none fit, or all would."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        fused = next((name for name, parts in FUSED.items() if joined and row.get("module") in parts), row["name"])
        groups.setdefault((row.get("layer"), fused), []).append(row)
    kept: list[dict] = []
    for group in sorted(groups.values(), key=_per_byte, reverse=True):
        size = _sums(group)["bytes_saved"]
        if 0 < size <= room and _per_byte(group) > 0:
            room, kept = room - size, kept + group
    return kept if len(kept) < len(rows) else []


def _per_byte(rows: list[dict]) -> float:
    sums = _sums(rows)
    return sums["sum_of_parts"] / max(1, sums["bytes_saved"])
