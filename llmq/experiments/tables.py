"""Rows of experiments as tables for people, and what they say in a sentence. No torch."""

from __future__ import annotations

import math

from llmq.experiments.channels import harm
from llmq.formatting import format_share

HEADERS = {
    "ablation": ["", "Method", "Perplexity", "KL to FP16", "Same first choice"],
    "silencing": ["Silenced", "Channels", "Perplexity", "KL to FP16", "Text"],
    "amplifying": ["s", "Method", "Perplexity", "KL to FP16", "Largest change of a logit"],
    "thresholds": ["Threshold", "Perplexity", "KL to FP16", "Columns in 16 bit", "Decode", "Lowest to highest"],
    "sweep": ["Model", "Parameters", "Perplexity", "Outlier features", "Layers", "Positions", "Median magnitude"],
}


def rows_of(result: dict) -> list[list[str]]:
    """One list of cells for every row of an experiment's result, under `HEADERS[kind]`."""
    return [_ROWS[result["kind"]](row) for row in result["results"]]


def _ablation(row: dict) -> list[str]:
    figures = [perplexity(row), f"{row['kl_to_fp16']:.3g}", format_share(row["top1_agreement"])]
    return [row["name"], row["method"], *figures]


def _silencing(row: dict) -> list[str]:
    name = "none" if row["silenced"] == "none" else f"{row['count']} {row['silenced']}"
    return [name, ", ".join(map(str, row["channels"])), perplexity(row), f"{row['kl_to_fp16']:.3g}", row["text"]]


def _amplifying(row: dict) -> list[str]:
    figures = [perplexity(row), f"{row['kl_to_fp16']:.3g}", f"{row['largest_logit_change']:.3g}"]
    return [f"{row['factor']:g}", row["method"], *figures]


def _thresholds(row: dict) -> list[str]:
    spread = f"{row['tokens_per_second_min']:.3g} to {row['tokens_per_second_max']:.3g}"
    figures = [perplexity(row), f"{row['kl_to_fp16']:.3g}", format_share(row["outlier_share"])]
    return [row["threshold"], *figures, f"{row['tokens_per_second']:.3g} tok/s", spread]


def _sweep(row: dict) -> list[str]:
    shares = [format_share(row["layers_touched"]), format_share(row["positions_touched"])]
    count = f"{len(row['outlier_features'])} of {row['dimensions_reaching_magnitude']} that reach 6"
    median = f"{row['median_magnitude']:,.1f}"
    return [row["model"], f"{row['parameters'] / 1e6:,.0f} M", perplexity(row), count, *shares, median]


_ROWS = {
    "ablation": _ablation,
    "silencing": _silencing,
    "amplifying": _amplifying,
    "thresholds": _thresholds,
    "sweep": _sweep,
}


def perplexity(row: dict) -> str:
    value = row["perplexity"]
    return "beyond measure" if not math.isfinite(value) else f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def finding(result: dict) -> str:
    """What the rows say in a sentence or two; '' while there are too few."""
    return _FINDINGS.get(result["kind"], lambda rows: "")(result["results"])


def _harm_line(rows: list[dict]) -> str:
    found = harm(rows)
    if not found:
        return ""
    entry = found[0]
    times = f", {entry['ratio']:,.3g} times as much" if math.isfinite(entry["ratio"]) else ""
    which = "channel" if entry["count"] == 1 else f"{entry['count']} channels"
    other = "a random one changes" if entry["count"] == 1 else "as many random ones change"
    return (
        f"Silencing the strongest {which} raises perplexity by {entry['strongest']:,.4g}{times}; {other} it by "
        f"{entry['random']:+.3g} (median of the draws)."
    )


def _amplified_line(rows: list[dict]) -> str:
    factors = sorted({row["factor"] for row in rows})
    if len(factors) < 2:
        return ""
    low, high = ({r["method"]: r for r in rows if r["factor"] == f} for f in (factors[0], factors[-1]))
    changes = [
        f"{method} {high[method]['perplexity'] / low[method]['perplexity']:,.4g} times"
        for method in high
        if method in low and high[method]["perplexity"] < math.inf
    ]
    return f"Perplexity at s = {factors[-1]:g} against s = {factors[0]:g}: {', '.join(changes)}." if changes else ""


def _threshold_line(rows: list[dict]) -> str:
    on = sorted((float(row["threshold"]), row) for row in rows if row["threshold"] not in ("off", "∞"))
    if len(on) < 2:
        return ""
    (_, low), (_, high) = on[0], on[-1]
    off = next((row for row in rows if row["threshold"] == "off"), None)
    end = f"; off, none stay and it is {off['kl_to_fp16']:.3g}" if off else ""
    return (
        f"At threshold {low['threshold']} {format_share(low['outlier_share'])} of columns stay in 16 bit and KL to "
        f"FP16 is {low['kl_to_fp16']:.3g}; at {high['threshold']} it is {format_share(high['outlier_share'])} and "
        f"{high['kl_to_fp16']:.3g}{end}."
    )


def _ablation_line(rows: list[dict]) -> str:
    named = {row["name"]: row["perplexity"] for row in rows}
    if not {"W32A32", "W8A32", "W32A8"} <= named.keys():
        return ""
    weights, activations = (named[name] - named["W32A32"] for name in ("W8A32", "W32A8"))
    worse, halves = ("activations", "weights") if activations > weights else ("weights", "activations")
    return (
        f"With one scale a tensor, 8-bit weights alone raise perplexity by {weights:.3g}, 8-bit activations alone by "
        f"{activations:.3g}: here it is the {worse} that break naive 8 bit, not the {halves}."
    )


_FINDINGS = {
    "silencing": _harm_line,
    "amplifying": _amplified_line,
    "thresholds": _threshold_line,
    "ablation": _ablation_line,
}
