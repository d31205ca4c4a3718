"""The records every comparison yields, and `Run`: settings, environment and events in one JSON Lines file.

The core yields these records; the page, the command line, the benchmarks, the tests and the replays consume the same
stream. Nothing in here knows who listens, and nothing in here imports torch.

Units: seconds, bytes, tokens. `contestant` is the label of one (method, threshold) pair, unique within a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import get_args

from llmq.errors import UserError
from llmq.fields import types_of
from llmq.files import parse_json, read_text, write_text

FORMAT = "llmq-run"
VERSION = 1
LONGEST_PAUSE = 1.5  # seconds a replay waits between two events
LARGEST = 2.0**63  # of a number in a recording


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Others are in front of this run, `position` of them with the one running; yielded until it is our turn."""

    seconds: float
    position: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work is: what it does now, and the share of it that is done (0 to 1; None: unknown)."""

    message: str
    fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What will happen and why, before anything is loaded."""

    schedule: str
    reason: str
    prompt_tokens: int | None  # by the model here
    predicted_bytes: dict[str, int | None]  # weights, KV cache, workspace at the full length; None of a server
    free_bytes: int
    device: str
    devices: dict[str, str] = field(default_factory=dict)  # contestant -> its own, where they compute at the same time


@dataclass(frozen=True, kw_only=True)
class Loading:
    contestant: str
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """`seconds` is 0 when the weights were already resident from an earlier run (`resident`).

    `engine` is the loop the contestant runs through; speeds compare within one. `coverage`: which share of its linear
    weights ('linear') and of all its weights ('all') the method stores in 8 bit; empty in older recordings.
    """

    contestant: str
    weight_bytes: int | None
    seconds: float
    resident: bool = False
    engine: str = "hf"
    coverage: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """`fraction` of the prompt is read, 0 to 1; only of a prompt that takes a while, by an engine that can tell."""

    contestant: str
    fraction: float


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """The prompt is in the KV cache and the first token is sampled: `seconds` is the time to first token. The tokens of
    a prompt are not known where a server counts them, until it has."""

    contestant: str
    prompt_tokens: int | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One generated token.

    `index` counts from 0. Token 0 comes out of the prefill, so its `seconds` is 0 and it is left out of the decode
    speed. `text` is what became printable with this token: empty while a multi-byte character is incomplete.
    `logprob` is the natural logarithm of the token's probability before temperature and filtering; `best` the likeliest
    tokens at its place, id -> probability, likeliest first; empty in older recordings.

    Of a server it is one event of its stream, read at this end after `seconds`: `tokens` of them, None where that is
    not known, with the id only of a single one that the model of the run knows, and a `logprob` where it is told.
    """

    contestant: str
    index: int
    token_id: int | None
    text: str
    seconds: float
    logprob: float | None = None
    best: dict[str, float] = field(default_factory=dict)
    tokens: int | None = 1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One sample. `at` is seconds since the run began; `None` where the machine cannot tell.

    `ledger`: contestant -> {"weights", "scales", "kv", "workspace"} in bytes, exact tensor sizes.
    """

    at: float
    process_bytes: int | None = None  # resident memory of this process
    device_bytes: int | None = None  # NVML, whole device
    device_process_bytes: int | None = None  # NVML, this process
    allocated_bytes: int | None = None  # torch allocator, live tensors
    by_device: dict[str, int] = field(default_factory=dict)  # the same on each, where there are several
    peak_allocated_bytes: int | None = None  # torch allocator, high-water mark of this run
    ledger: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Freed:
    """A contestant's weights were dropped; `verified` says whether the memory really came back."""

    contestant: str
    expected_bytes: int
    freed_bytes: int
    verified: bool


@dataclass(frozen=True, kw_only=True)
class Finished:
    """`reason`: 'eos', 'length', 'context', 'time' or 'stopped'. `text` flushes an incomplete last character.

    `peak_bytes` is what this contestant needed at its highest: weights, scales, KV cache and (on a GPU) workspace. What
    a server says at the end: `prompt_tokens` and `tokens` by its own count, `cache_share` of its KV cache that was in
    use when it began to write, everybody's. None is not known.
    """

    contestant: str
    reason: str
    text: str = ""
    kv_bytes: int | None = 0
    peak_bytes: int | None = 0
    prompt_tokens: int | None = None
    tokens: int | None = None
    cache_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """This contestant is out; the others go on."""

    contestant: str
    message: str


Event = Waiting | Planned | Loading | Loaded | Reading | Prefilled | Step | Memory | Freed | Finished | Failed
EVENT_TYPES = {cls.__name__: cls for cls in get_args(Event)}


@dataclass(frozen=True)
class TimedEvent:
    """An event and when it was yielded, in seconds since the run began."""

    at: float
    event: Event


@dataclass
class Run:
    """One comparison: its settings, its environment, and every event with its time.

    Saved as JSON Lines: a header object, then one object an event. Replaying yields the same events; consumers cannot
    tell a replay from a live run except by `Run.environment`, which the page shows.
    """

    settings: dict
    environment: dict
    events: list[TimedEvent] = field(default_factory=list)

    def record(self, stream: Iterable[Event], clock) -> Iterator[Event]:
        """Pass `stream` through, keeping every event with its time from `clock()` (seconds, any origin)."""
        start = clock()
        for event in stream:
            self.events.append(TimedEvent(round(clock() - start, 4), event))
            yield event

    def replay(self, sleep=None, clock=None) -> Iterator[Event]:
        """Yield the recorded events; with `sleep(seconds)` and `clock()`, at their recorded pace.

        A listener that is slower than the recording makes the pace up again. Pauses over LONGEST_PAUSE seconds, in
        which a model was loading, are cut to it.
        """
        due = clock() if clock else 0.0
        for timed, pause in zip(self.events, self._pauses(), strict=True):
            due += pause
            if sleep and clock and (ahead := due - clock()) > 0:
                sleep(ahead)
            yield timed.event

    @property
    def seconds(self) -> float:
        """How long a replay takes."""
        return sum(self._pauses())

    def _pauses(self) -> Iterator[float]:
        """What passes before each event."""
        times = [0.0, *(timed.at for timed in self.events)]
        return (min(max(after - before, 0.0), LONGEST_PAUSE) for before, after in pairwise(times))

    def save(self, path: str | Path) -> Path:
        """Write the run to a file, as `files.write_text` does."""
        write_text(Path(path), "".join(line + "\n" for line in self.to_lines()))
        return Path(path)

    def to_lines(self) -> Iterator[str]:
        header = {"format": FORMAT, "version": VERSION, "settings": self.settings, "environment": self.environment}
        yield json.dumps(header, ensure_ascii=False, allow_nan=False)
        for timed in self.events:
            record = {"time": timed.at, "event": type(timed.event).__name__, **_finite(asdict(timed.event))}
            yield json.dumps(record, ensure_ascii=False, allow_nan=False)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a saved run. Raises UserError naming the file and the line that is wrong."""
        # Not splitlines(): a text may hold U+2028 or U+0085, which are no line ends here.
        return cls.from_lines(read_text(Path(path)).split("\n"), name=str(path))

    @classmethod
    def from_lines(cls, lines: Iterable[str], *, name: str = "run") -> Run:
        rows = [(number, _parse(line, name, number)) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows or rows[0][1].get("format") != FORMAT:
            raise UserError(f"{name} is not a saved llmq run (no {FORMAT!r} header in its first line)")
        header = rows[0][1]
        if header.get("version") != VERSION:
            raise UserError(f"{name} has version {header.get('version')!r}; this llmq reads version {VERSION}")
        settings, environment = header.get("settings"), header.get("environment")
        if not isinstance(settings, dict) or not isinstance(environment, dict):
            raise UserError(f"{name}: the header needs 'settings' and 'environment' objects")
        return cls(settings, environment, [_event(row, name, number) for number, row in rows[1:]])


def _parse(line: str, name: str, number: int) -> dict:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{name}, line {number}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{name}, line {number}: expected an object")
    return row


def _event(row: dict, name: str, number: int) -> TimedEvent:
    """One line of a file as an event. The file may come from anybody, so every value is held against its type."""
    kind = row.get("event")
    cls = EVENT_TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise UserError(f"{name}, line {number}: unknown event {kind!r:.80}")
    if not _is(row.get("time"), float):
        raise UserError(f"{name}, line {number}: 'time' must be a number of seconds, not {row.get('time')!r:.80}")
    types = types_of(cls)
    values = {key: value for key, value in row.items() if key in types}
    if "logprob" in values and values["logprob"] is None:
        values["logprob"] = -math.inf
    for key, value in values.items():
        if not _is(value, types[key]) and not (key == "logprob" and value == -math.inf):
            raise UserError(f"{name}, line {number}: {kind}'s {key!r} cannot be {value!r:.80}")
    try:
        return TimedEvent(float(row["time"]), cls(**values))
    except TypeError as error:
        raise UserError(f"{name}, line {number}: {error}") from error


_parts = cache(get_args)


def _is(value, expected) -> bool:
    """Whether a JSON value is of an annotated type: str, bool, int, float (finite), unions, and dicts of those."""
    if expected is float:
        return type(value) in (int, float) and abs(value) <= LARGEST
    if not (parts := _parts(expected)):
        return type(value) is expected
    if isinstance(expected, UnionType):
        return any(_is(value, choice) for choice in parts)
    return isinstance(value, dict) and all(_is(entry, parts[1]) for entry in value.values())


def _finite(record: dict) -> dict:
    """JSON has no infinity: the log-probability of an impossible token, -inf, is stored as null; one that is not known
    is left out."""
    told = {key: value for key, value in record.items() if key != "logprob" or value is not None}
    return {key: None if value == -math.inf else value for key, value in told.items()}
