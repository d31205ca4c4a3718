"""A watched run as the page's tables and heatmaps. No gradio, no torch."""

from __future__ import annotations

from llmq.figures.heatmaps import layer_channel_figure, token_channel_figure
from llmq.formatting import format_share
from llmq.inspect.report import OutlierReport
from llmq.inspect.views import layer_channel_map, strongest_channels

STRONGEST = 15


def shares_table(report: OutlierReport, threshold: float) -> list[list[str]]:
    """One row a kind of linear layer and phase: how many layers, which share of channels and of values."""
    phases = ("prefill", "decode") if report.generated_tokens else ("prefill",)
    return [_share_row(report, kind, phase, threshold) for kind in report.kinds for phase in phases]


def _share_row(report: OutlierReport, kind: str, phase: str, threshold: float) -> list[str]:
    # q, k and v of a layer read one tensor, as do gate and up: one module a layer speaks for them.
    modules = list({module.layer: module for module in report.modules if module.kind == kind}.values())
    channels = [module.share_of_channels(threshold, phase) for module in modules]
    values = [module.share_of_values(threshold, phase) for module in modules]
    largest = max(float(module.statistics(phase).absmax.max(initial=0)) for module in modules)
    return [
        kind,
        phase,
        f"{sum(share > 0 for share in channels)} of {len(modules)}",
        format_share(sum(channels) / len(channels)),
        format_share(sum(values) / len(values)),
        f"{largest:,.1f}",
    ]


def strongest_table(report: OutlierReport, threshold: float) -> list[list[str]]:
    """The strongest channels, strongest first, and the layers where each reaches the threshold."""
    return [
        [
            row.kind,
            str(row.channel),
            f"{row.absmax:,.1f}",
            "head" if row.layer is None else str(row.layer),
            row.phase,
            ranges([layer for layer in row.layers if layer is not None]) or "head",
        ]
        for row in strongest_channels(report, threshold, STRONGEST)
    ]


def map_figure(report: OutlierReport, kind: str, phase: str, threshold: float, *, dark: bool = False):
    """The layer × channel heatmap of one kind in one phase."""
    cells = layer_channel_map(report, kind, phase)
    title = f"Input of {kind}, {phase}: largest |x| by layer and channel"
    return layer_channel_figure(
        cells.values, cells.channels, threshold, title, dark, layers=cells.layers, width=cells.width
    )


def token_figure(report: OutlierReport, kind: str, layer: int, threshold: float, *, dark: bool):
    """Token × channel heatmap of one layer's input over the prompt; None where there is nothing to show."""
    module = next((m for m in report.modules if m.kind == kind and m.layer == layer), None)
    if module is None or module.token_map is None:
        return None
    cells = module.token_map
    return token_channel_figure(
        cells.values,
        cells.channels,
        cells.tokens,
        report.token_texts[: report.prompt_tokens],
        threshold,
        f"Input of {kind}, layer {layer}: largest |x| by token and channel",
        dark,
        width=cells.width,
        height=cells.height,
        first_token=cells.first_token,
    )


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> '1–3, 7'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in parts)
