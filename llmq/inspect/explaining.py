"""The chain of cause of one token as a job: the same two engines as a reading, then `patching.explain_token`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.inspect.cause import Cause
from llmq.inspect.reading import load_pair
from llmq.machine.door import Lease
from llmq.methods import METHODS
from llmq.methods.base import DEFAULT_THRESHOLD


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Which token of which text to explain. `token_ids`: the text; `position`: of the token that is forecast from those
    before it; `patch`: whether every module is tried in 16 bit."""

    token_ids: tuple[int, ...]
    position: int
    model: str = "demo"
    baseline: Contestant = Contestant.parse("fp16")
    contestant: Contestant = Contestant.parse("bnb-int8")
    patch: bool = True
    device: str = "cpu"

    def __post_init__(self):
        if not self.baseline.method.dense:
            dense = ", ".join(name for name, method in METHODS.items() if method.dense)
            raise BadChoice(f"{self.baseline.label} has no 16-bit modules to put back; choose one of {dense}")

    @property
    def threshold(self) -> float:
        """What counts as an outlier: the method's own threshold, the usual one where it has none."""
        return DEFAULT_THRESHOLD if self.contestant.threshold is None else self.contestant.threshold

    def run(self, lease: Lease) -> Iterator[Event | Progress | Cause]:
        """Yield events, progress, and a Cause whenever more is known; the last is whole unless it says `stopped`."""
        from llmq.inspect.patching import explain_token

        model = yield from lease.open(self.model)
        pair = yield from load_pair(self, model, lease)
        yield from explain_token(
            pair[0].model,
            pair[1].model,
            list(self.token_ids),
            self.position,
            threshold=self.threshold,
            patch=self.patch,
            stop=lease.stop,
        )
