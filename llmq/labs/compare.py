"""Contestants and a schedule in, events out: one prompt through two or three methods, each step timed alone.

`interleave`: one thread alternates the contestants' steps, so their texts grow side by side and no step overlaps
another. `in-turn`: one contestant after the other; chosen by itself when they do not fit together, and then each is
freed, and seen to be freed, before the next is loaded.

The stream ends by itself, also after a failure: a contestant that fails is out, the others go on, and what was
generated stays. Closing the generator gives the device back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from llmq import memory, telemetry
from llmq.contestant import Contestant
from llmq.engine.base import Engine, Generation, Interrupted, Token, tokens_of
from llmq.engine.choice import ENGINES, choose_engines
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, OutOfMemory, UserError
from llmq.events import Event, Failed, Finished, Freed, Memory, Planned, Prefilled, Reading, Step
from llmq.fields import Choice
from llmq.labs.base import Lab
from llmq.machine.door import Lease, out_of_memory, shortage
from llmq.methods import METHODS
from llmq.models.loading import range_note
from llmq.models.opening import Model
from llmq.models.text import TextStream
from llmq.parting import ORDINALS

SCHEDULES = ("interleave", "in-turn")
MAX_CONTESTANTS = 3
TOLD_SECONDS = 0.5  # from the beginning of a prompt to a word of how far it is read, and between two
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison(Lab):
    """Everything that decides a run. `device`: 'cpu' or 'cuda:N'."""

    prompt: str
    contestants: tuple[Contestant, ...] = (Contestant.parse("fp16"), Contestant.parse("bnb-int8"))
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    schedule: Annotated[str, Choice(SCHEDULES)] = "interleave"
    random_weights: bool = False
    engine: Annotated[str, Choice(ENGINES)] = "auto"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(self.contestants) <= MAX_CONTESTANTS:
            choices = f"choose 1 to {MAX_CONTESTANTS} of {', '.join(METHODS)}"
            raise BadChoice(f"{len(self.contestants)} methods given; {choices}")
        labels = [c.label for c in self.contestants]
        if len(set(labels)) < len(labels):
            raise BadChoice(f"the methods {', '.join(labels)} repeat one; choose different methods or thresholds")

    def settings(self) -> dict:
        """As stored in a run: plain JSON."""
        return asdict(self) | {"contestants": [c.label for c in self.contestants]}

    def run(self, lease: Lease) -> Iterator[Event]:
        """Yield the events of the comparison. Raises UserError only before the plan (bad model, bad prompt)."""
        yield from _Race(self, lease).run()


@dataclass
class _Lane:
    """One contestant's way through a run."""

    contestant: Contestant
    key: Key
    prediction: memory.Prediction
    engine: Engine | None = None
    generation: Generation | None = None
    text: TextStream | None = None
    tokens: Iterator[Token] | None = None
    count: int = 0
    ends_at: float = float("inf")
    over: bool = False

    @property
    def name(self) -> str:
        return self.contestant.label

    def ledger(self) -> dict[str, int]:
        weights, scales = (self.engine.weight_bytes, self.engine.scale_bytes) if self.engine else (0, 0)
        kv, workspace = (self.generation.kv_bytes, self.generation.workspace_bytes) if self.generation else (0, 0)
        return {"weights": weights, "scales": scales, "kv": kv, "workspace": workspace}

    def finish(self, reason: str) -> Finished:
        """End this lane, freeing its KV cache."""
        ledger = self.ledger()
        peak = ledger["weights"] + ledger["scales"] + (self.generation.peak_bytes if self.generation else 0)
        rest = self.text.flush() if self.text else ""
        self.close()
        return Finished(contestant=self.name, reason=reason, text=rest, kv_bytes=ledger["kv"], peak_bytes=peak)

    def close(self) -> None:
        self.over = True
        if self.generation:
            self.generation.close()
        self.generation = self.tokens = None


class _PromptProgress:
    """Whether to stop. Asked while a prompt is read, it tells how much of it is, as far as the engine makes that known:
    nothing of the computation changes."""

    def __init__(self, lane: _Lane, lease: Lease):
        self.lane, self.lease, self.times = lane, lease, 0
        self.whole, self.due = lane.engine.prompt_checks, lease.clock() + TOLD_SECONDS

    def __call__(self) -> bool:
        self.times += 1
        if self.whole and self.lane.count == 0 and self.lease.clock() >= self.due:
            self.due = self.lease.clock() + TOLD_SECONDS
            fraction = min(1.0, round(self.times / self.whole, 3))
            self.lease.aside.put(Reading(contestant=self.lane.name, fraction=fraction))
        return self.lease.stop.is_set()


def _running(lanes: list[_Lane]) -> list[_Lane]:
    return [lane for lane in lanes if not lane.over]


class _Race:
    """The body of one comparison, with the device held."""

    def __init__(self, comparison: Comparison, lease: Lease):
        self.comparison, self.lease, self.pool = comparison, lease, lease.pool
        self.lanes: list[_Lane] = []
        self._peak = 0

    def run(self) -> Iterator[Event]:
        self.model = yield from self.lease.open(self.comparison.model, random_weights=self.comparison.random_weights)
        plan = yield from self._plan(self.model)
        with telemetry.Sampler(self.comparison.device) as self.sampler:
            try:
                yield from (self._interleave(self.lanes) if plan.schedule == "interleave" else self._in_turn())
                yield from self._memory()
            finally:
                for lane in self.lanes:
                    lane.close()

    def _plan(self, model: Model) -> Iterator[Event]:
        """Predict memory before anything is loaded; decide the schedule; make the lanes."""
        comparison = self.comparison
        self.prompt_ids = model.encode(comparison.prompt)
        tokens = min(model.context, len(self.prompt_ids) + comparison.sampling.max_new_tokens)
        answer = tokens - len(self.prompt_ids)
        methods = [contestant.method for contestant in comparison.contestants]
        loops = choose_engines(comparison.engine, methods, model.config.to_dict(), comparison.device)
        for contestant, loop in zip(comparison.contestants, loops, strict=True):
            key, asked = Key.of(model, contestant.method, comparison.device, loop), {"tokens": tokens, "answer": answer}
            prediction = memory.predict(model.shape, key.method, **asked, loop=loop, device=comparison.device)
            self.lanes.append(_Lane(contestant, key, prediction))
        plan = self._make_room()
        yield Planned(
            schedule=plan.schedule,
            reason=plan.reason,
            prompt_tokens=len(self.prompt_ids),
            predicted_bytes={lane.name: lane.prediction.total for lane in self.lanes},
            free_bytes=plan.free_bytes,
            device=comparison.device,
        )
        return plan

    def _make_room(self) -> memory.Plan:
        """Plan as if nothing of ours were loaded; drop other models only when this run needs their room."""
        device, keys = self.comparison.device, [lane.key for lane in self.lanes]
        free_now = telemetry.free_bytes(device)
        needs = [
            replace(lane.prediction, weights=0, scales=0) if lane.key in keys[:place] else lane.prediction
            for place, lane in enumerate(self.lanes)  # contestants that share their weights need them once
        ]
        plan = memory.plan(self.comparison.schedule, needs, free_now + self.pool.bytes_on(device))
        missing = [need for key, need in zip(keys, needs, strict=True) if key not in self.pool]
        self.fits_together = memory.fit_together(needs, plan.free_bytes)
        if not self.fits_together:
            self.pool.drop_others(set())
        elif not memory.fit_together(missing, free_now):
            self.pool.drop_others(set(keys))
        return plan

    def _interleave(self, lanes: list[_Lane]) -> Iterator[Event]:
        for stage in (self._load, self._prefill):
            for lane in _running(lanes):
                yield from self._guarded(lane, stage)
        while running := _running(lanes):
            for lane in running:
                yield from self._guarded(lane, self._step)

    def _in_turn(self) -> Iterator[Event]:
        for lane in self.lanes:
            yield from self._interleave([lane])
            if not self.fits_together and not any(other.key == lane.key for other in _running(self.lanes)):
                yield self._free(lane)

    def _load(self, lane: _Lane) -> Iterator[Event]:
        ignored = ", ".join(self.model.ignored_settings)  # which the answers here do not follow
        ignored = f"ignored, of the model's own generation settings: {ignored}" if ignored else ""
        note = "; ".join(filter(None, (range_note(self.model.config, lane.contestant.method), ignored)))
        lane.engine = yield from self.lease.load(lane.key, lane.contestant, lane.prediction, note)
        lane.engine.warm_up(self.prompt_ids)

    def _prefill(self, lane: _Lane) -> Iterator[Event]:
        sampling, stopped = self.comparison.sampling, _PromptProgress(lane, self.lease)
        lane.text = TextStream(self.model.tokenizer)
        lane.generation = lane.engine.start(self.prompt_ids, sampling)
        lane.tokens = tokens_of(lane.generation, lane.engine, len(self.prompt_ids), sampling, stopped)
        lane.ends_at = self.lease.clock() + sampling.max_seconds
        token = next(lane.tokens)
        yield Prefilled(contestant=lane.name, prompt_tokens=len(self.prompt_ids), seconds=token.seconds)
        yield from self._emit(lane, replace(token, seconds=0.0))

    def _step(self, lane: _Lane) -> Iterator[Event]:
        yield from self._emit(lane, next(lane.tokens))

    def _emit(self, lane: _Lane, token: Token) -> Iterator[Event]:
        found = {"token_id": token.token_id, "seconds": token.seconds, "logprob": token.logprob}
        best = lane.generation.best(token, len(ORDINALS)).items()
        found["best"] = {str(likely): float(f"{share:.4g}") for likely, share in best}
        yield Step(contestant=lane.name, index=lane.count, text=lane.text.push(token.token_id), **found)
        lane.count += 1
        if reason := token.end or ("time" if self.lease.clock() >= lane.ends_at else ""):
            yield lane.finish(reason)

    def _guarded(self, lane: _Lane, stage: Callable[[_Lane], Iterator[Event]]) -> Iterator[Event]:
        """Run one stage of one lane: a stop ends it quietly, a failure ends only this lane."""
        try:
            self.lease.check()
            with out_of_memory():
                yield from stage(lane)
        except Interrupted:
            yield lane.finish("stopped")
        except OutOfMemory:
            self._free(lane)
            message = shortage(lane.name, lane.prediction.total, telemetry.free_bytes(lane.key.device))
            yield Failed(contestant=lane.name, message=message)
        except UserError as error:
            yield self._fail(lane, str(error))
        except Exception as error:  # the boundary: whatever breaks one contestant must not take the others along
            log.exception("%s failed", lane.name)
            yield self._fail(lane, f"{type(error).__name__}: {error}")
        yield from self._memory()

    def _fail(self, lane: _Lane, message: str) -> Failed:
        lane.close()
        return Failed(contestant=lane.name, message=message)

    def _free(self, lane: _Lane) -> Freed:
        lane.close()
        lane.engine = None
        return Freed(contestant=lane.name, **asdict(self.pool.drop(lane.key)))

    def _memory(self) -> Iterator[Memory]:
        """The samples that came in, each with the ledger as it is now."""
        ledger = {lane.name: lane.ledger() for lane in self.lanes}
        seen = [lane.generation.allocator_peak_bytes for lane in _running(self.lanes) if lane.generation]
        for sample in self.sampler.drain():
            self._peak = max([self._peak, sample.allocated_bytes or 0, *seen])
            peak = self._peak if sample.allocated_bytes is not None else None
            yield replace(sample, peak_allocated_bytes=peak, ledger=ledger)
