"""Contestants and a schedule in, events out: one prompt through two or three methods, each step timed alone.

`interleave`: one thread alternates the contestants' steps, so their texts grow side by side and no step overlaps
another. `in-turn`: one contestant after the other; chosen by itself when they do not fit together, and then each is
freed, and seen to be freed, before the next is loaded.

The stream ends by itself, also after a failure: a contestant that fails is out, the others go on, and what was
generated stays. Closing the generator gives the device back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from llmq import memory, telemetry
from llmq.contestants import Comparison, Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.interface import Engine, Generation, Interrupted, capacity_for
from llmq.engine.residents import Key, Residents, reclaim
from llmq.engine.text import TextStream, encode_prompt
from llmq.errors import OutOfMemory, UserError, is_allocation_failure
from llmq.events import (
    Event,
    Failed,
    Finished,
    Freed,
    Loaded,
    Loading,
    Memory,
    Planned,
    Prefilled,
    Step,
)
from llmq.models.loading import Source, ids_within, load_config, load_tokenizer, range_note, resolve
from llmq.preparation import await_turn, make_ready
from llmq.quant import method_named

log = logging.getLogger(__name__)


def compare(
    comparison: Comparison,
    residents: Residents,
    *,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Run `comparison`, yielding events. Raises UserError only before the plan (bad model, bad prompt)."""
    stop = stop or threading.Event()
    with residents.turnstile.turn() as turn:
        if (yield from await_turn(turn, stop, clock)):
            yield from residents.thread.run(_Race(comparison, residents, stop, clock).run())


@dataclass
class _Lane:
    """One contestant's way through a run."""

    contestant: Contestant
    key: Key
    prediction: memory.Prediction
    engine: Engine | None = None
    generation: Generation | None = None
    text: TextStream | None = None
    tokens: int = 0
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
        above_weights = self.generation.peak_bytes if self.generation else 0
        rest = self.text.flush() if self.text else ""
        self.close()
        return Finished(
            contestant=self.name,
            reason=reason,
            text=rest,
            kv_bytes=ledger["kv"],
            peak_bytes=ledger["weights"] + ledger["scales"] + above_weights,
        )

    def close(self) -> None:
        self.over = True
        if self.generation:
            self.generation.close()
        self.generation = None


class _Race:
    """The body of one comparison, with the device held."""

    def __init__(self, comparison: Comparison, residents: Residents, stop: threading.Event, clock):
        self.comparison, self.residents, self.stop, self.clock = comparison, residents, stop, clock
        self.lanes: list[_Lane] = []
        self._peak = 0

    def run(self) -> Iterator[Event]:
        source = resolve(self.comparison.model, random_weights=self.comparison.random_weights)
        if not (yield from make_ready(source, self.stop)):
            return
        plan = yield from self._plan(source)
        with telemetry.Sampler(self.comparison.device) as self.sampler:
            try:
                yield from (self._interleave() if plan.schedule == "interleave" else self._in_turn(plan))
                yield from self._memory()
            finally:
                for lane in self.lanes:
                    lane.close()
                reclaim(self.comparison.device)

    def _plan(self, source: Source) -> Iterator[Event]:
        """Predict memory before anything is loaded; decide the schedule; make the lanes."""
        comparison, config = self.comparison, load_config(source)
        self.tokenizer = load_tokenizer(source)
        context = int(getattr(config, "max_position_embeddings", 2**31))
        self.prompt_ids = ids_within(config, encode_prompt(self.tokenizer, comparison.prompt, context=context))
        tokens = min(context, len(self.prompt_ids) + comparison.sampling.max_new_tokens)
        shape = memory.meta_model(config)
        methods = [contestant.method for contestant in comparison.contestants]
        engines = choose_engines(comparison.engine, methods, config.to_dict(), comparison.device)
        for contestant, engine in zip(comparison.contestants, engines, strict=True):
            key = Key(source, contestant.label, contestant.method, comparison.device, engine)
            room = capacity_for(tokens, context) if engine == "lean" else tokens
            prediction = memory.predict(shape, method_named(contestant.method).handler, tokens=room)
            self.lanes.append(_Lane(contestant, key, prediction))
        self.config = config
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
        device = self.comparison.device
        free_now = telemetry.free_bytes(device)
        plan = memory.plan(
            self.comparison.schedule,
            [lane.prediction for lane in self.lanes],
            free_now + self.residents.bytes_on(device),
        )
        missing = [lane.prediction for lane in self.lanes if lane.key not in self.residents]
        self.fits_together = memory.fit_together([lane.prediction for lane in self.lanes], plan.free_bytes)
        if not self.fits_together:
            self.residents.drop_others(set())
        elif not memory.fit_together(missing, free_now):
            self.residents.drop_others({lane.key for lane in self.lanes})
        return plan

    def _interleave(self) -> Iterator[Event]:
        for stage in (self._load, self._prefill):
            for lane in self._running():
                yield from self._guarded(lane, stage)
        while running := self._running():
            for lane in running:
                yield from self._guarded(lane, self._step)

    def _in_turn(self, plan: memory.Plan) -> Iterator[Event]:
        for lane in self.lanes:
            for stage in (self._load, self._prefill):
                if not lane.over:
                    yield from self._guarded(lane, stage)
            while not lane.over:
                yield from self._guarded(lane, self._step)
            if not self.fits_together:
                yield self._free(lane)

    def _running(self) -> list[_Lane]:
        return [lane for lane in self.lanes if not lane.over]

    def _load(self, lane: _Lane) -> Iterator[Event]:
        note = range_note(self.config, method_named(lane.contestant.method).handler)
        yield Loading(contestant=lane.name, message=note)
        free = telemetry.free_bytes(lane.key.device)
        resident = lane.key in self.residents
        if not resident and lane.prediction.total > free:
            raise OutOfMemory(f"{lane.name} needs {_both(lane.prediction.total, free)}")
        lane.engine, seconds = self.residents.get(lane.key)
        if lane.contestant.threshold is not None:
            lane.engine.set_threshold(lane.contestant.threshold)
        yield Loaded(
            contestant=lane.name,
            weight_bytes=lane.engine.weight_bytes,
            seconds=seconds,
            resident=resident,
            engine=lane.engine.name,
        )
        lane.engine.warm_up(self.prompt_ids)

    def _prefill(self, lane: _Lane) -> Iterator[Event]:
        sampling = self.comparison.sampling
        lane.text = TextStream(self.tokenizer)
        lane.generation = lane.engine.start(self.prompt_ids, sampling)
        lane.ends_at = self.clock() + sampling.max_seconds
        token = lane.generation.prefill(self.stop.is_set)
        yield Prefilled(contestant=lane.name, prompt_tokens=len(self.prompt_ids), seconds=token.seconds)
        yield from self._emit(lane, token, seconds=0.0)

    def _step(self, lane: _Lane) -> Iterator[Event]:
        token = lane.generation.step()
        yield from self._emit(lane, token, seconds=token.seconds)

    def _emit(self, lane: _Lane, token, *, seconds: float) -> Iterator[Event]:
        index, lane.tokens = lane.tokens, lane.tokens + 1
        yield Step(
            contestant=lane.name,
            index=index,
            token_id=token.token_id,
            text=lane.text.push(token.token_id),
            seconds=seconds,
            logprob=token.logprob,
        )
        if reason := self._end(lane, token.token_id):
            yield lane.finish(reason)

    def _end(self, lane: _Lane, token_id: int) -> str | None:
        if token_id in lane.engine.eos_ids:
            return "eos"
        if lane.tokens >= self.comparison.sampling.max_new_tokens:
            return "length"
        if len(self.prompt_ids) + lane.tokens >= lane.engine.context:
            return "context"
        return "time" if self.clock() >= lane.ends_at else None

    def _guarded(self, lane: _Lane, stage: Callable[[_Lane], Iterator[Event]]) -> Iterator[Event]:
        """Run one stage of one lane: a stop ends it quietly, a failure ends only this lane."""
        import torch

        if self.stop.is_set():
            yield lane.finish("stopped")
            return
        try:
            yield from stage(lane)
        except Interrupted:
            yield lane.finish("stopped")
        except (torch.OutOfMemoryError, MemoryError, OutOfMemory) as error:
            yield self._out_of_memory(lane, error)
        except UserError as error:
            yield self._fail(lane, str(error))
        except Exception as error:  # the boundary: whatever breaks one contestant must not take the others along
            if is_allocation_failure(error):
                yield self._out_of_memory(lane, error)
            else:
                log.exception("%s failed", lane.name)
                yield self._fail(lane, f"{type(error).__name__}: {error}")
        yield from self._memory()

    def _fail(self, lane: _Lane, message: str) -> Failed:
        lane.close()
        return Failed(contestant=lane.name, message=message)

    def _out_of_memory(self, lane: _Lane, error: BaseException) -> Failed:
        error.__traceback__ = None  # the frames hold the tensors that did not fit
        lane.close()
        lane.engine = None
        self.residents.drop(lane.key)
        free = telemetry.free_bytes(lane.key.device)
        message = f"out of memory: {lane.name} needs {_both(lane.prediction.total, free)}"
        return Failed(
            contestant=lane.name, message=f"{message}. Choose a smaller model, or a shorter prompt and answer."
        )

    def _free(self, lane: _Lane) -> Freed:
        lane.close()
        lane.engine = None
        freed = self.residents.drop(lane.key)
        return Freed(contestant=lane.name, **asdict(freed))

    def _memory(self) -> Iterator[Memory]:
        """The samples that came in, each with the ledger as it is now."""
        ledger = {lane.name: lane.ledger() for lane in self.lanes}
        seen = [lane.generation.allocator_peak_bytes for lane in self._running() if lane.generation]
        for sample in self.sampler.drain():
            self._peak = max([self._peak, sample.allocated_bytes or 0, *seen])
            peak = self._peak if sample.allocated_bytes is not None else None
            yield Memory(**asdict(sample), peak_allocated_bytes=peak, ledger=ledger)


def _both(predicted: int, free: int) -> str:
    needed = f"about {predicted / 1e9:.2f} GB ({predicted:,} bytes predicted)"
    return f"{needed} and {free / 1e9:.2f} GB ({free:,} bytes) are free"
