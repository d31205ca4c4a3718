"""Why one token came out differently: the records that `patching.explain_token` finds. No torch.

The error of a layer is taken on its output at the token that makes the forecast: ||y - y16|| / ||y16||, and as a signal
to quantization noise ratio, 10 log10(||y16||² / ||y - y16||²) dB. It holds what earlier layers did too. What a single
module does is found by patching: that one module computes in 16 bit, at every token, everything else in 8 bit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerError:
    """One decoder layer's output at the token. `outliers`: (module's kind, channel, |x|), the strongest inputs over the
    threshold of its linear layers; `outlier_count`: all of them, each tensor counted once."""

    layer: int
    relative: float
    sqnr_db: float
    outlier_count: int
    outliers: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Patch:
    """The forecast with only `module` in 16 bit. `margin`: logit of the baseline's token minus the other method's;
    over 0 and `token_id` the baseline's, it is repaired."""

    module: str
    token_id: int
    margin: float
    repaired: bool


@dataclass(frozen=True)
class Cause:
    """`position`: of the token that is forecast. `baseline_token`, `other_token`: both methods' likeliest;
    `margin`: of the method with nothing patched. `patches`: best first; empty where both agree or none were asked
    for; `stopped`: not all modules were tried."""

    position: int
    baseline_token: int
    other_token: int
    margin: float
    layers: tuple[LayerError, ...]
    patches: tuple[Patch, ...] = ()
    stopped: bool = False

    @property
    def diverges(self) -> bool:
        return self.baseline_token != self.other_token

    @property
    def repairs(self) -> tuple[Patch, ...]:
        """The modules that alone bring the baseline's token back, largest margin first."""
        return tuple(patch for patch in self.patches if patch.repaired)
