"""Contestants and a schedule in, events out: one prompt through up to three methods and servers, each step timed alone.

`interleave`: one thread alternates the contestants' steps, so their texts grow side by side and no step overlaps
another. `in-turn`: one contestant after the other; chosen by itself when they do not fit together, and then each is
freed, and seen to be freed, before the next is loaded. A server's steps cannot be held back: it writes its whole text
alone, after those that take turns. `parallel`: servers write while the others do; what shares a machine shares its
speed. Of several GPUs each contestant has one of its own then, in a thread of its own, at the same time as the others;
under every other schedule each model is spread over all of them.

The stream ends by itself, also after a failure: a contestant that fails is out, the others go on, and what was
generated stays. Closing the generator gives the device back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import cycle
from threading import Lock
from typing import Annotated

from llmq import memory, telemetry
from llmq.contestant import Contestant
from llmq.devices import are_several, parts
from llmq.engine.base import Interrupted
from llmq.engine.choice import ENGINES, choose_engines
from llmq.engine.loading import Key
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, OutOfMemory, UserError
from llmq.events import Event, Freed, Memory, Planned
from llmq.fields import Choice
from llmq.labs.base import Lab
from llmq.labs.lanes import Course, Lane, LoadedLane, ServedLane
from llmq.labs.merged import merged
from llmq.machine.door import Lease, out_of_memory, predicted, shortage
from llmq.methods import METHODS
from llmq.models.text import require_text
from llmq.servers.served import Served

SCHEDULES = ("interleave", "in-turn", "parallel")
SENT = ("messages", "text")  # how a prompt goes to a server
MAX_CONTESTANTS = 3
HELD_UP = (
    "transformers' loop needs the processor for most of a step, and two of them wait for each other: "
    "each is slower than alone"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison(Lab):
    """Everything that decides a run. `device`: 'cpu', 'cuda:N' or 'cuda:N,cuda:M'. `sent`: a server gets the
    prompt as a message, to which it applies its template, or as the text that the model here would read. `keys`: of
    servers, by host; of this run only, and written nowhere."""

    prompt: str
    contestants: tuple[Contestant | Served, ...] = (Contestant.parse("fp16"), Contestant.parse("bnb-int8"))
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    schedule: Annotated[str, Choice(SCHEDULES)] = "interleave"
    random_weights: bool = False
    engine: Annotated[str, Choice(ENGINES)] = "auto"
    sent: Annotated[str, Choice(SENT)] = SENT[0]
    keys: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

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
        told = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "keys"}
        return told | {"contestants": [c.label for c in self.contestants], "sampling": asdict(self.sampling)}

    @property
    def computed(self) -> tuple[Contestant, ...]:
        """Those that compute here."""
        return tuple(one for one in self.contestants if isinstance(one, Contestant))

    def run(self, lease: Lease) -> Iterator[Event]:
        """Yield the events of the comparison. Raises UserError only before the plan (bad model, bad prompt)."""
        yield from _Race(self, lease).run()


def _running(lanes: list[Lane]) -> list[Lane]:
    return [lane for lane in lanes if not lane.over]


class _Race:
    """The body of one comparison, with the device held."""

    def __init__(self, comparison: Comparison, lease: Lease):
        self.comparison, self.lease, self.pool = comparison, lease, lease.pool
        lease.reach = lease.reach.with_keys(comparison.keys)
        self.lanes: list[Lane] = []
        self._lock = Lock()  # of what the lanes tell and the samples, where each has a thread
        self._ledger: dict[str, dict[str, int]] = {}  # of every lane, after its last stage
        self._peaks: dict[str, int] = {}  # by device

    def run(self) -> Iterator[Event]:
        plan = yield from self._plan((yield from self._opened()))
        for lane in self.lanes:
            self._note(lane)
        with telemetry.Sampler(self.comparison.device) as self.sampler:
            try:
                yield from (self._in_turn() if plan.schedule == "in-turn" else self._together(self.lanes))
                yield from self._memory()
            finally:
                for lane in self.lanes:
                    lane.close()

    def _opened(self) -> Generator[Event, None, Course]:
        """The model and its prompt, where one of the contestants needs them."""
        comparison = self.comparison
        if not comparison.computed and comparison.sent == "messages":
            require_text(comparison.prompt, "prompt", "type something, or pick an example")
            return Course(comparison, self.lease, None, [])
        model = yield from self.lease.open(comparison.model, random_weights=comparison.random_weights)
        return Course(comparison, self.lease, model, model.encode(comparison.prompt))

    def _plan(self, course: Course) -> Generator[Event, None, memory.Plan]:
        """Predict memory before anything is loaded; decide the schedule; make the lanes."""
        comparison, computed = self.comparison, self._computed(course) if self.comparison.computed else {}
        self.lanes = [
            computed[one] if isinstance(one, Contestant) else ServedLane(course, one) for one in comparison.contestants
        ]
        plan = self._make_room()
        yield Planned(
            schedule=plan.schedule,
            reason=plan.reason,
            prompt_tokens=len(course.prompt_ids) or None,
            predicted_bytes={
                lane.name: lane.prediction.total if isinstance(lane, LoadedLane) else None for lane in self.lanes
            },
            free_bytes=plan.free_bytes,
            device=comparison.device,
            devices={lane.name: lane.key.device for lane in computed.values()} if self.abreast else {},
        )
        return plan

    @property
    def abreast(self) -> bool:
        """Whether each contestant has a device of its own."""
        return self.comparison.schedule == "parallel" and are_several(self.comparison.device)

    def _devices(self) -> tuple[str, ...]:
        """The device of each contestant in turn."""
        return parts(self.comparison.device) if self.abreast else (self.comparison.device,)

    def _computed(self, course: Course) -> dict[Contestant, LoadedLane]:
        """The lanes of those that compute here."""
        comparison, model, lanes = self.comparison, course.model, {}
        tokens = min(model.context, len(course.prompt_ids) + comparison.sampling.max_new_tokens)
        asked = {"tokens": tokens, "answer": tokens - len(course.prompt_ids)}
        methods = [contestant.method for contestant in comparison.computed]
        loops = choose_engines(comparison.engine, methods, model.config.to_dict(), self._devices()[0])
        for contestant, loop, device in zip(comparison.computed, loops, cycle(self._devices())):
            key = Key.of(model, contestant.method, device, loop)
            lanes[contestant] = LoadedLane(course, contestant, key=key, prediction=predicted(key, **asked))
        return lanes

    def _make_room(self) -> memory.Plan:
        """Plan as if nothing of ours were loaded; drop other models only when this run needs their room. Each device of
        those who compute at the same time has a plan, and one that is too small is everybody's."""
        lanes = [lane for lane in self.lanes if isinstance(lane, LoadedLane)]
        keys = [lane.key for lane in lanes]
        rooms = [self._room(device, lanes) for device in self._devices()]
        self.fits_together = all(fits for _, fits, _ in rooms)
        if not self.fits_together:
            self.pool.drop_others(set())
        elif not all(fits_now for _, _, fits_now in rooms):
            self.pool.drop_others(set(keys))
        plan = next((plan for plan, _, _ in rooms if plan.reason), rooms[0][0])
        if self.abreast and not plan.reason and sum(key.loop == "hf" for key in keys) > 1:
            plan = replace(plan, reason=HELD_UP)
        return replace(plan, free_bytes=sum(plan.free_bytes for plan, _, _ in rooms))

    def _room(self, device: str, everybody: list[LoadedLane]) -> tuple[memory.Plan, bool, bool]:
        """The plan for a device, whether those on it fit together there, and whether they do beside what is loaded."""
        lanes = [lane for lane in everybody if lane.key.device == device]
        keys, free_now = [lane.key for lane in lanes], telemetry.free_bytes(device)
        needs = [self._need(lane, keys[:place]) for place, lane in enumerate(lanes)]
        plan = memory.plan(self.comparison.schedule, needs, free_now + self.pool.bytes_on(device))
        missing = [need for key, need in zip(keys, needs, strict=True) if key not in self.pool]
        return plan, memory.fit_together(needs, plan.free_bytes), memory.fit_together(missing, free_now)

    def _need(self, lane: LoadedLane, before: list[Key]) -> memory.Prediction:
        """Of a lane: contestants that share their weights need them once, and what is loaded is not loaded again."""
        if lane.key in before:
            return replace(lane.prediction, weights=0, scales=0, loading=0)
        return replace(lane.prediction, loading=0) if lane.key in self.pool else lane.prediction

    def _together(self, lanes: list[Lane]) -> Iterator[Event]:
        """Those that compute here take turns; servers write all the while, or each alone after them."""
        alone = [] if self.comparison.schedule == "parallel" else [one for one in lanes if isinstance(one, ServedLane)]
        together = [lane for lane in lanes if lane not in alone]
        yield from self._load(together)
        groups: dict[str, list[Lane]] = {}
        for lane in together:
            groups.setdefault(lane.key.device if isinstance(lane, LoadedLane) else "", []).append(lane)
        apart = groups.values() if self.abreast else [together]
        yield from merged([self._write(group) for group in apart])
        for lane in alone:
            yield from self._interleave([lane])

    def _interleave(self, lanes: list[Lane]) -> Iterator[Event]:
        yield from self._load(lanes)
        yield from self._write(lanes)

    def _load(self, lanes: list[Lane]) -> Iterator[Event]:
        by_need = {lane.name: memory.loading_order(lane.prediction) for lane in lanes if isinstance(lane, LoadedLane)}
        for lane in sorted(lanes, key=lambda lane: by_need.get(lane.name, 0)):
            yield from self._guarded(lane, lane.load)

    def _write(self, lanes: list[Lane]) -> Iterator[Event]:
        for lane in _running(lanes):
            yield from self._guarded(lane, lane.prefill)
        while running := _running(lanes):
            computing = any(isinstance(lane, LoadedLane) for lane in running)
            for lane in running:
                if isinstance(lane, ServedLane):
                    lane.waits = not computing
                yield from self._guarded(lane, lane.step)

    def _in_turn(self) -> Iterator[Event]:
        for lane in self.lanes:
            yield from self._interleave([lane])
            if isinstance(lane, LoadedLane) and not self.fits_together and not self._needed(lane.key):
                yield self._free(lane)

    def _needed(self, key: Key) -> bool:
        """Whether an engine has another lane to go."""
        return any(isinstance(lane, LoadedLane) and lane.key == key for lane in _running(self.lanes))

    def _guarded(self, lane: Lane, stage: Callable[[], Iterator[Event]]) -> Iterator[Event]:
        """Run one stage of one lane: a stop ends it quietly, a failure ends only this lane."""
        try:
            self.lease.check()
            with out_of_memory():
                yield from stage()
        except Interrupted:
            yield lane.finish("stopped")
        except OutOfMemory as error:
            yield lane.fail(self._shortage(lane) if isinstance(lane, LoadedLane) else str(error))
        except UserError as error:
            yield lane.fail(str(error))
        except Exception as error:  # the boundary: whatever breaks one contestant must not take the others along
            log.exception("%s failed", lane.name)
            yield lane.fail(f"{type(error).__name__}: {error}")
        self._note(lane)
        yield from self._memory()

    def _note(self, lane: Lane) -> None:
        """What a lane holds now, told in the thread that changes it."""
        if isinstance(lane, LoadedLane):
            ledger, peak, device = lane.ledger(), lane.allocator_peak_bytes, lane.key.device
            with self._lock:
                self._ledger[lane.name] = ledger
                self._peaks[device] = max(peak, self._peaks.get(device, 0))

    def _shortage(self, lane: LoadedLane) -> str:
        """What was missing, once what the lane had is given back."""
        self._free(lane)
        return shortage(lane.name, lane.prediction.most, telemetry.free_bytes(lane.key.device))

    def _free(self, lane: LoadedLane) -> Freed:
        lane.close()
        lane.engine = None
        self._note(lane)
        return Freed(contestant=lane.name, **asdict(self.pool.drop(lane.key)))

    def _memory(self) -> Iterator[Memory]:
        """The samples that came in, each with the ledger as it is now. The peak of several devices is that of each."""
        with self._lock:
            ledger = {lane.name: self._ledger[lane.name] for lane in self.lanes if lane.name in self._ledger}
            samples = [replace(sample, **self._peak(sample), ledger=ledger) for sample in self.sampler.drain()]
        yield from samples

    def _peak(self, sample: Memory) -> dict[str, int]:
        if sample.allocated_bytes is None:
            return {}
        seen = sample.by_device if self.abreast else {self.comparison.device: sample.allocated_bytes}
        self._peaks = {device: max(count, self._peaks.get(device, 0)) for device, count in seen.items()}
        return {"peak_allocated_bytes": sum(self._peaks.values())}
