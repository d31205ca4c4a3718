"""The ways of the contestants through a comparison: each loads, reads the prompt, writes a token at a time, and ends.

A `LoadedLane` computes here, with an engine of ours; a `ServedLane` listens to a server, which goes on by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from llmq import memory
from llmq.contestant import Contestant
from llmq.engine.base import Engine, Generation, Interrupted, Token, tokens_of
from llmq.engine.loading import Key
from llmq.errors import UserError
from llmq.events import Event, Failed, Finished, Loaded, Loading, Prefilled, Reading, Step
from llmq.formatting import OVER_HTTP
from llmq.machine.door import Lease
from llmq.models.loading import range_note
from llmq.models.opening import Model
from llmq.models.text import TextStream, as_text, one_token
from llmq.parting import ORDINALS
from llmq.servers.protocol import Arrived, Refused, Request, Stopped, Usage
from llmq.servers.served import Served

if TYPE_CHECKING:
    from llmq.labs.compare import Comparison
    from llmq.servers.connection import Connection, Reply

POLL_SECONDS = 0.1  # between two looks at what a server has sent
TOLD_SECONDS = 0.5  # from the beginning of a prompt to a word of how far it is read, and between two


@dataclass
class Course:
    """What the lanes of one comparison share. `model`, `prompt_ids`: of ours, None and empty where none is needed."""

    comparison: Comparison
    lease: Lease
    model: Model | None
    prompt_ids: list[int]


@dataclass
class Lane:
    """One contestant's way through a run."""

    course: Course
    contestant: Contestant | Served
    count: int = 0
    ends_at: float = float("inf")
    over: bool = False

    @property
    def name(self) -> str:
        return self.contestant.label

    @property
    def allocator_peak_bytes(self) -> int:
        """The most that everyone on the device held during its calls."""
        return 0

    def load(self) -> Iterator[Event]:
        raise NotImplementedError

    def prefill(self) -> Iterator[Event]:
        raise NotImplementedError

    def step(self) -> Iterator[Event]:
        raise NotImplementedError

    def finish(self, reason: str) -> Finished:
        raise NotImplementedError

    def fail(self, message: str) -> Failed:
        """End this lane, saying why."""
        self.close()
        return Failed(contestant=self.name, message=message)

    def close(self) -> None:
        """End this lane, and free what it holds but the weights."""
        self.over = True

    def _start_clock(self) -> None:
        self.ends_at = self.course.lease.clock() + self.course.comparison.sampling.max_seconds

    def _out_of_time(self) -> str:
        return "time" if self.course.lease.clock() >= self.ends_at else ""


@dataclass
class LoadedLane(Lane):
    """An engine of ours, which computes a step whenever it is asked to."""

    key: Key = field(kw_only=True)
    prediction: memory.Prediction = field(kw_only=True)
    engine: Engine | None = None
    generation: Generation | None = None
    text: TextStream | None = None
    tokens: Iterator[Token] | None = None

    @property
    def allocator_peak_bytes(self) -> int:
        return self.generation.allocator_peak_bytes if self.generation else 0

    def ledger(self) -> dict[str, int]:
        weights, scales = (self.engine.weight_bytes, self.engine.scale_bytes) if self.engine else (0, 0)
        kv, workspace = (self.generation.kv_bytes, self.generation.workspace_bytes) if self.generation else (0, 0)
        return {"weights": weights, "scales": scales, "kv": kv, "workspace": workspace}

    def load(self) -> Iterator[Event]:
        model, lease = self.course.model, self.course.lease
        ignored = ", ".join(model.ignored_settings)  # which the answers here do not follow
        ignored = f"ignored, of the model's own generation settings: {ignored}" if ignored else ""
        note = "; ".join(filter(None, (range_note(model.config, self.contestant.method), ignored)))
        self.engine = yield from lease.load(self.key, self.contestant, self.prediction, note)
        self.engine.warm_up(self.course.prompt_ids)

    def prefill(self) -> Iterator[Event]:
        ids, sampling = self.course.prompt_ids, self.course.comparison.sampling
        stopped = _PromptProgress(self, self.course.lease)
        self.text = TextStream(self.course.model.tokenizer)
        self.generation = self.engine.start(ids, sampling)
        self.tokens = tokens_of(self.generation, self.engine, len(ids), sampling, stopped)
        self._start_clock()
        token = next(self.tokens)
        yield Prefilled(contestant=self.name, prompt_tokens=len(ids), seconds=token.seconds)
        yield from self._emit(replace(token, seconds=0.0))

    def step(self) -> Iterator[Event]:
        yield from self._emit(next(self.tokens))

    def _emit(self, token: Token) -> Iterator[Event]:
        found = {"token_id": token.token_id, "seconds": token.seconds, "logprob": token.logprob}
        best = self.generation.best(token, len(ORDINALS)).items()
        found["best"] = {str(likely): float(f"{share:.4g}") for likely, share in best}
        yield Step(contestant=self.name, index=self.count, text=self.text.push(token.token_id), **found)
        self.count += 1
        if reason := token.end or self._out_of_time():
            yield self.finish(reason)

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

    def __init__(self, lane: LoadedLane, lease: Lease):
        self.lane, self.lease, self.times = lane, lease, 0
        self.whole, self.due = lane.engine.prompt_checks, lease.clock() + TOLD_SECONDS

    def __call__(self) -> bool:
        self.times += 1
        if self.whole and self.lane.count == 0 and self.lease.clock() >= self.due:
            self.due = self.lease.clock() + TOLD_SECONDS
            fraction = min(1.0, round(self.times / self.whole, 3))
            self.lease.aside.put(Reading(contestant=self.lane.name, fraction=fraction))
        return self.lease.stop.is_set()


@dataclass
class ServedLane(Lane):
    """A server. Its times are those at which an event was read here, whenever it is told. `waits`: whether it may hold
    up the others, of which none computes."""

    contestant: Served
    connection: Connection | None = None
    reply: Reply | None = None
    model: str = ""
    end: str = ""
    usage: Usage | None = None
    arrived: float = 0.0
    waits: bool = True
    cache: Future | None = None

    def load(self) -> Iterator[Event]:
        """Ask the server what it has, by which the connection stands before anything is timed. Some open more models
        than they list, so whether there is the one that is wanted says the answer to the question itself."""
        yield Loading(contestant=self.name, message="asking the server")
        from llmq.servers.connection import Connection

        lease, served = self.course.lease, self.contestant
        lease.reach.check(served)
        self.connection = Connection(served, lease.reach)
        try:
            models = self.connection.models(lease.stop.is_set)
        except Stopped:
            raise Interrupted from None
        except Refused:  # it keeps no list
            models = ()
        self.model = served.model or served.only_one(models)
        yield Loaded(contestant=self.name, weight_bytes=None, seconds=0.0, resident=True, engine=OVER_HTTP)

    def prefill(self) -> Iterator[Event]:
        """Ask, and wait for nothing; no log-probabilities, which cost some servers more than the token."""
        self._start_clock()
        self.reply = self.connection.ask(self._request(), self.model)
        yield from ()

    def _request(self) -> Request:
        comparison = self.course.comparison
        asked = asdict(comparison.sampling)
        del asked["max_seconds"]
        asked["max_tokens"] = asked.pop("max_new_tokens")
        if comparison.sent == "messages":
            return Request(comparison.prompt, **asked)
        ids, tokenizer = self.course.prompt_ids, self.course.model.tokenizer
        return Request(ids if self.contestant.dialect.ids else as_text(tokenizer, ids), raw=True, **asked)

    def _refused(self, error: Refused) -> UserError:
        """With the models that the server has, where it is asked for another."""
        try:
            models = self.connection.models(self.course.lease.stop.is_set)
        except (UserError, Stopped):
            return error
        unknown = models and self.model not in models
        return UserError(f"{error}; it lists the models {', '.join(models)[:300]}") if unknown else error

    def _next(self, seconds: float) -> Arrived | None:
        """The next piece with a text, if it comes in time; what else there is is noted."""
        while arrived := self.reply.get(seconds):
            self.end, self.usage = arrived.piece.end or self.end, arrived.piece.usage or self.usage
            if arrived.piece.text:
                return arrived
        return None

    def step(self) -> Iterator[Event]:
        """What has arrived, or does in a moment; where others compute meanwhile nothing is waited for."""
        try:
            arrived = self._next(POLL_SECONDS if self.waits else 0.0)
        except Refused as error:
            raise self._refused(error) from None
        if arrived:
            yield from self._emit(arrived)
        elif reason := (self.end if self.reply.over else self._out_of_time()):
            yield self.finish(reason)

    def _emit(self, arrived: Arrived) -> Iterator[Event]:
        text, count = arrived.piece.text, len(arrived.piece.ids) or None
        token_id = self._id(text) if count in (None, 1) else None
        found = {"token_id": token_id, "tokens": count or (1 if token_id is not None else None)}
        if self.count == 0:
            yield Prefilled(contestant=self.name, prompt_tokens=None, seconds=arrived.seconds)
            self.arrived = arrived.seconds
            name = self.contestant.dialect.metrics
            self.cache = self.connection.gauge(name) if name else None
        seconds, self.arrived = arrived.seconds - self.arrived, arrived.seconds
        yield Step(contestant=self.name, index=self.count, text=text, seconds=seconds, **found)
        self.count += 1
        if self._out_of_time():
            yield self.finish("time")

    def _id(self, text: str) -> int | None:
        """The id of `text` where it is one token of the model here."""
        return one_token(self.course.model.tokenizer, text) if self.course.model else None

    def finish(self, reason: str) -> Finished:
        used = self.usage
        told = {"prompt_tokens": used.prompt_tokens, "tokens": used.completion_tokens} if used else {}
        told["cache_share"] = self.cache.result() if self.cache and self.cache.done() else None
        self.close()
        return Finished(contestant=self.name, reason=reason, kv_bytes=None, peak_bytes=None, **told)

    def close(self) -> None:
        self.over = True
        if self.connection:
            self.connection.close()
        self.connection = self.reply = None
