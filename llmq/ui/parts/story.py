"""What a watched run says, in plain sentences, and what silencing a channel did to a model. No gradio."""

from __future__ import annotations

import math

import numpy as np

from llmq.contestant import Contestant, shown_name
from llmq.errors import UserError
from llmq.formatting import format_number, format_share
from llmq.inspect.emergence import stream_inputs
from llmq.inspect.report import ModuleOutliers, OutlierReport
from llmq.labs.rows import shown_perplexity
from llmq.models.presets import model_title


def headline(report: OutlierReport, threshold: float) -> str:
    """What came out, in two sentences."""
    peaks = stream_peaks(report)
    reached = f"reach{'es' * (int((peaks >= threshold).sum()) == 1)} {threshold:g}"
    kept = kept_in_16_bit(report, threshold)
    if not peaks.size:
        return kept
    said = f"{int((peaks >= threshold).sum())} of the {peaks.size:,} channels that run through the model {reached}"
    loud, typical = format_number(peaks.max()), format_number(float(np.median(peaks)))
    largest = f"The largest number is {loud}, in channel {peaks.argmax()}; in a typical channel it is {typical}."
    return f"{said}. {largest} {kept}"


def kept_in_16_bit(report: OutlierReport, threshold: float) -> str:
    """How many columns of what the layers read the method keeps in 16 bit, reading the prompt."""
    modules = inputs_of(report)
    over = sum(len(module.prefill_columns(threshold)) for module in modules)
    total = sum(module.in_features for module in modules)
    share = f"{over:,} of {total:,} columns ({format_share(over / max(total, 1))})"
    name = shown_name(report.method)
    if any(module.outlier_columns is not None for module in modules):
        return f"{name} keeps {share} in 16 bit, the orange ones."
    return f"{name} keeps no column in 16 bit; LLM.int8() would keep {share}, the orange ones."


def inputs_of(report: OutlierReport) -> list[ModuleOutliers]:
    """One linear layer inside the stack for each tensor that is read: q, k and v of a layer read the same."""
    return list({(m.layer, m.kind): m for m in report.modules if m.layer is not None}.values())


def stream_peaks(report: OutlierReport) -> np.ndarray:
    """(channels,) largest |x| in the prompt, over all layers, of what is read behind a norm; empty without one."""
    read = [module.prefill.absmax for modules in stream_inputs(report).values() for module in modules]
    widths = {len(peaks) for peaks in read}
    return np.max(read, axis=0) if len(widths) == 1 else np.zeros(0, np.float32)


def watched_line(report: OutlierReport) -> str:
    """What was watched."""
    said = f"{report.prompt_tokens} prompt tokens and {report.generated_tokens} generated tokens watched"
    return f"{'Stopped early: ' if report.stopped else ''}{said} in {len(report.modules)} linear layers."


def asked_of(model: str, method: str, prompt: str) -> dict:
    """What a watched run answers: `prompt`, and `settings` in one line."""
    settings, usual = f"{model_title(model)} · {shown_name(method)}", _threshold(method)
    if usual and "@" not in method:
        settings += f" · threshold {usual:g}"
    return {"prompt": prompt, "settings": settings}


def _threshold(method: str) -> float | None:
    try:
        return Contestant.parse(method).threshold
    except UserError:
        return None


def loudest_line(report: OutlierReport) -> str:
    """Which channel is worth silencing; '' where there is no stream to look at."""
    peaks = stream_peaks(report)
    if not peaks.size:
        return ""
    times = peaks.max() / max(float(np.median(peaks)), 1e-9)
    return f"The strongest channel here is {peaks.argmax()}: up to {format_number(times)} times a typical one."


def silenced(rows: list[dict]) -> dict:
    """What the rows of the silencing lab say of one channel: `change` (perplexity before and after), `texts` (name and
    text of each); `{}` until both are measured."""
    before = next((row for row in rows if row["silenced"] == "none"), None)
    after = next((row for row in rows if row["silenced"] == "strongest"), None)
    if before is None or after is None:
        return {}
    names = ", ".join(map(str, after["channels"]))
    texts = [["With every channel", before["text"]], [f"Without channel {names}", after["text"]]]
    return {"change": [_perplexity(before), _perplexity(after)], "texts": [entry for entry in texts if entry[1]]}


def _perplexity(row: dict) -> str:
    return format_number(row["perplexity"]) if math.isfinite(row["perplexity"]) else shown_perplexity(row)
