"""The paper's own figures of a model: which dimensions are outlier features, and how far they reach. numpy only.

Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 4.1: a dimension of the hidden state is an outlier feature
when its magnitude is at least 6.0 in at least 25 % of the layers and at at least 6 % of the sequence positions; looked
for in what the attention projections and the first feed-forward layer read. A layer counts here for a dimension when
either of the two reads 6.0 in it at any position; its share of positions is the mean over the layers that count, of the
input that has more.

Massive activations are something else: a few numbers hundreds of times larger than all others, at fixed tokens, in the
residual stream and at down_proj's input (Sun et al. 2024, arXiv 2402.17762).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from llmq.inspect.report import CRITERION, ModuleOutliers, OutlierReport

LAYER_SHARE, POSITION_SHARE = 0.25, 0.06  # of the paper's criterion
# They read what the attention or the feed-forward layer made of the stream, or what comes after the last layer.
NOT_THE_STREAM = ("o", "out_proj", "dense", "c_proj", "down", "lm_head", "embed_out", "output")


@dataclass(frozen=True)
class OutlierFeature:
    """A dimension of the hidden state. Shares are of all layers, and of the prompt's positions (0 to 1)."""

    channel: int
    absmax: float
    layers: tuple[int, ...]
    layer_share: float
    position_share: float

    @property
    def meets_criterion(self) -> bool:
        return self.layer_share >= LAYER_SHARE and self.position_share >= POSITION_SHARE


@dataclass(frozen=True)
class Emergence:
    """One model over one prompt. `features`: every dimension that reaches 6.0 anywhere, strongest first.

    `layers_touched`, `positions_touched`: shares of the layers and positions where an outlier feature, as the criterion
    has it, reaches 6.0. `peaks`: largest |x| of what each layer reads behind its norms, by layer.
    """

    layers: int
    positions: int
    features: tuple[OutlierFeature, ...]
    peaks: tuple[float, ...]

    @property
    def outlier_features(self) -> tuple[OutlierFeature, ...]:
        return tuple(feature for feature in self.features if feature.meets_criterion)

    @property
    def layers_touched(self) -> float:
        return len({layer for feature in self.outlier_features for layer in feature.layers}) / max(self.layers, 1)

    @property
    def positions_touched(self) -> float:
        """Of the outlier feature that touches most."""
        return max((feature.position_share for feature in self.outlier_features), default=0.0)

    @property
    def median_magnitude(self) -> float:
        """Median over the outlier features of their largest |x|; 0 without any."""
        return float(np.median([feature.absmax for feature in self.outlier_features] or [0.0]))

    def to_json(self) -> dict:
        """Return plain values for `json.dumps`."""
        counted = ("layers", "positions", "layers_touched", "positions_touched", "median_magnitude")
        return {
            "criterion": {"magnitude": CRITERION, "layer_share": LAYER_SHARE, "position_share": POSITION_SHARE},
            **{name: getattr(self, name) for name in counted},
            "outlier_features": [asdict(feature) for feature in self.outlier_features],
            "dimensions_reaching_magnitude": len(self.features),
            "peaks": list(self.peaks),
        }


@dataclass(frozen=True)
class MassiveActivation:
    """One number. `where`: 'residual stream' or the kind of linear layer that reads it; `times_typical`: against the
    median over the channels of their largest |x| there."""

    where: str
    layer: int
    token: int
    text: str
    channel: int
    absmax: float
    times_typical: float


def emergence(report: OutlierReport) -> Emergence:
    """Return the paper's figures from a prompt that was watched whole; of no layer where none ran."""
    by_layer = stream_inputs(report)
    if not by_layer:
        return Emergence(0, 0, (), ())
    counts = np.stack([np.max([m.positions.counts for m in modules], axis=0) for modules in by_layer.values()])
    absmax = np.stack([np.max([m.prefill.absmax for m in modules], axis=0) for modules in by_layer.values()])
    positions = max((len(m.positions.touched) for modules in by_layer.values() for m in modules), default=0)
    layers = np.array(list(by_layer))
    features = [
        OutlierFeature(
            int(channel),
            float(absmax[:, channel].max()),
            tuple(layers[counts[:, channel] > 0].tolist()),
            float((counts[:, channel] > 0).mean()),
            float(counts[counts[:, channel] > 0, channel].mean() / positions),
        )
        for channel in np.flatnonzero(counts.any(axis=0))
    ]
    features.sort(key=lambda feature: -feature.absmax)
    return Emergence(len(by_layer), positions, tuple(features), tuple(absmax.max(axis=1).tolist()))


def stream_inputs(report: OutlierReport) -> dict[int, list[ModuleOutliers]]:
    """Return the layers' linear inputs that have the residual stream's channels, by layer: those of the stream's width,
    but the ones whose name says that they read something else."""
    watched = [m for m in report.modules if m.layer is not None and m.positions is not None]
    widths = [len(peak.absmax) for peak in report.stream[:1]] or [m.in_features for m in watched[:1]]
    inside = [m for m in watched if m.kind not in NOT_THE_STREAM and [m.in_features] == widths]
    found: dict[int, list[ModuleOutliers]] = {}
    for module in inside:
        found.setdefault(module.layer, []).append(module)
    return found


def massive_activations(report: OutlierReport, n: int = 12) -> list[MassiveActivation]:
    """Return the strongest numbers of the residual stream (one a channel and token, in the layer where it is largest)
    and of what the linear layers read, strongest first; `n` of each."""
    texts = report.token_texts
    return [*_massive_stream(report, texts, n), *_massive_inputs(report, texts, n)]


def _massive_stream(report: OutlierReport, texts: list[str], n: int) -> list[MassiveActivation]:
    largest: dict[tuple[int, int], MassiveActivation] = {}
    for peak in report.stream:
        typical = float(np.median(peak.absmax)) or 1.0
        for channel, token, value in peak.strongest(n):
            if (token, channel) not in largest or value > largest[token, channel].absmax:
                where = "residual stream", peak.layer, token, _text(texts, token), channel
                largest[token, channel] = MassiveActivation(*where, value, value / typical)
    return sorted(largest.values(), key=lambda entry: -entry.absmax)[:n]


def _massive_inputs(report: OutlierReport, texts: list[str], n: int) -> list[MassiveActivation]:
    """From the token maps, whose cells keep where their largest number is."""
    found = []
    for module in {(m.layer, m.kind): m for m in report.modules if m.layer is not None}.values():
        cells = module.token_map
        if cells is None:
            continue
        typical = float(np.median(module.prefill.absmax)) or 1.0
        for flat in np.argsort(-cells.values, axis=None, kind="stable")[:n]:
            value = float(cells.values.flat[flat])
            token, channel = int(cells.tokens.flat[flat]), int(cells.channels.flat[flat])
            where = module.kind, module.layer, token, _text(texts, token), channel
            found.append(MassiveActivation(*where, value, value / typical))
    return sorted(found, key=lambda entry: -entry.absmax)[:n]


def _text(texts: list[str], token: int) -> str:
    """Return the text of a token; '' where the recording has none."""
    return texts[token] if token < len(texts) else ""
