"""What visitors do, many at once, over HTTP against a running server: `python tests/load_server.py ADDRESS PLAN …`.

Plans: `crowd` (many run, click, stop and leave), `hostile` (a few beside one who misbehaves, and without), `growth`
(runs, then visitors, and the process's size between), `stop` (from the click to the end of the run). Each prints one
JSON object. Every visitor comes from a loopback address of its own, as visitors of a public server do.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import httpx
import psutil
from page_form import filled

PROMPTS = [f"Name {count} things that are {colour}." for count in ("two", "three") for colour in ("red", "blue")]
JOIN, DATA, AT_ONCE = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/run/predict"


@cache
def dependencies(address: str) -> dict[tuple[str, str], int]:
    """(elem_id, event) -> the number of what the page calls then."""
    config = httpx.get(f"{address}/config", timeout=60).json()
    names = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    return {(names.get(part), event): d["id"] for d in config["dependencies"] for part, event in d["targets"]}


@dataclass
class Ended:
    """How an event ended: `first` and `last` are seconds from the click to its first words and to its end."""

    error: str = ""
    first: float | None = None
    last: float = 0.0
    value: dict = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.value.get("texts", ()))


class Visitor:
    """One browser: a session and an address of its own."""

    model, methods = "demo", ("fp16", "llm-int8")

    def __init__(self, address: str, number: int = 1):
        host = f"127.0.{number // 250 + 1}.{number % 250 + 1}"
        transport = httpx.HTTPTransport(local_address=host)
        self.address, self.session = address, uuid.uuid4().hex[:11]
        self.http = httpx.Client(base_url=address, transport=transport, timeout=600)

    def click(self, part: str, event: str, data: list, seen: Callable[[dict], bool] | None = None) -> Ended:
        """Click and listen to the end, or until `seen(value)` says to leave."""
        asked = {"data": data, "fn_index": dependencies(self.address)[part, event], "session_hash": self.session}
        ended, began = Ended(), time.monotonic()
        joined = self.http.post(JOIN, json=asked | {"event_data": None})
        if joined.status_code != 200:
            return Ended(error=f"{joined.status_code} {joined.text:.200}")
        with self.http.stream("GET", DATA, params={"session_hash": self.session}) as stream:
            for message in messages(stream.iter_lines()):
                ended.last = time.monotonic() - began
                if message["msg"] == "unexpected_error" or message.get("success") is False:
                    ended.error = str(message.get("message") or message.get("output"))[:200]
                _take(ended, message)
                if message["msg"] in ("process_completed", "unexpected_error") or (seen and seen(ended.value)):
                    return ended
        return ended

    def run(self, prompt: str, tokens: int = 4, seen: Callable[[dict], bool] | None = None) -> Ended:
        """Generate with both methods."""
        return self.click("generate", "click", filled(prompt, self.model, self.methods, tokens=tokens), seen)

    def light(self) -> Ended:
        """A click that needs no device."""
        return self.at_once("replay", "click", [self._recording()])

    def at_once(self, part: str, event: str, data: list) -> Ended:
        """Do what is answered where it is asked, and is not queued."""
        asked = {"data": data, "fn_index": dependencies(self.address)[part, event], "session_hash": self.session}
        began = time.monotonic()
        answer = self.http.post(AT_ONCE, json=asked)
        ended = Ended(last=time.monotonic() - began)
        if answer.status_code != 200:
            ended.error = f"{answer.status_code} {answer.text:.200}"
        return ended

    def stop(self) -> None:
        self.at_once("result", "stop", [])

    def _recording(self) -> str:
        config = self.http.get("/config").json()
        return next(c["props"]["value"] for c in config["components"] if c["props"].get("elem_id") == "recording")


def messages(lines: Iterator[str]) -> Iterator[dict]:
    return (json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:"))


def _take(ended: Ended, message: dict) -> None:
    """Put what a message changes into the value: a whole one first, differences to it afterwards."""
    output = message.get("output") or {}
    for number, part in enumerate(output.get("data") or ()):
        if isinstance(part, dict) and number == 0:
            ended.value = part.get("value", part) if part.get("__type__") == "update" else part
        elif number == 0 and isinstance(part, list):
            for action, path, value in part:
                _change(ended.value, action, path, value)
    if ended.first is None and any(ended.texts):
        ended.first = ended.last


def _change(whole: dict, action: str, path: list, value) -> None:
    for step in path[:-1]:
        whole = whole[step]
    last = path[-1] if path else None
    if action == "append":
        whole[last] += value
    elif action == "add" and isinstance(whole, list):
        whole.insert(last, value)
    elif action == "delete":
        del whole[last]
    else:
        whole[last] = value


@dataclass
class Log:
    """What all visitors saw."""

    starts: list[float] = field(default_factory=list)
    clicks: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    runs: int = 0
    mixed: int = 0

    def told(self) -> dict:
        return {
            "runs": self.runs,
            "clicks": len(self.clicks),
            "errors": len(self.errors),
            "mixed": self.mixed,
            "start_p50": rounded(at(self.starts, 0.5)),
            "start_p95": rounded(at(self.starts, 0.95)),
            "click_p50": rounded(at(self.clicks, 0.5)),
            "click_p95": rounded(at(self.clicks, 0.95)),
            "said": sorted(set(self.errors))[:5],
        }


def at(values: list[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def alone(address: str) -> dict[str, tuple[str, ...]]:
    """What each prompt is answered with when nobody else is there."""
    return {prompt: Visitor(address).run(prompt).texts for prompt in PROMPTS}


def behave(address: str, number: int, until: float, expected: dict, log: Log, pause: float) -> None:
    """Be one visitor after the other: read for `pause` seconds at most, then run, click, stop or leave."""
    chance = random.Random(number)
    while time.monotonic() < until:
        time.sleep(chance.uniform(0, pause))
        visitor, prompt = Visitor(address, number), chance.choice(PROMPTS)
        match chance.choices(("run", "click", "stop", "leave"), (4, 4, 1, 1))[0]:
            case "run":
                ended = visitor.run(prompt)
                log.runs += 1
                log.mixed += not ended.error and ended.texts != expected[prompt]
                log.starts += [ended.first] if ended.first is not None else []
            case "click":
                ended = visitor.light()
                log.clicks.append(ended.last)
            case "stop":
                ended = visitor.run(prompt, 64, seen=lambda value: bool(value))
                visitor.stop()
            case "leave":
                ended = visitor.run(prompt, 64, seen=lambda value: bool(value))
        log.errors += [ended.error] if ended.error else []
        visitor.http.close()


def crowd(address: str, clients: int, seconds: float, expected: dict | None = None, pause: float = 0) -> dict:
    log, expected = Log(), expected or alone(address)
    until = time.monotonic() + seconds
    crew = [
        threading.Thread(target=behave, args=(address, number, until, expected, log, pause))
        for number in range(2, clients + 2)
    ]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return log.told()


@contextmanager
def misbehaving(address: str, unread: int = 60, beats: int = 10_000, thresholds: int = 200) -> Iterator[dict]:
    """One visitor who asks for much and listens to nothing, for as long as the block runs."""
    over, told = threading.Event(), {"asked": 0, "beats": 0, "uploads": 0}
    http = httpx.Client(base_url=address, transport=httpx.HTTPTransport(local_address="127.0.9.9"), timeout=60)

    def ask() -> None:
        for number in range(10**9):
            if over.wait(0.05 if number < unread else 0.5):
                return
            threshold = number % thresholds / 10
            asked = {"prompt": "Tell me everything.", "methods": f"fp16,llm-int8@{threshold}", "max_new_tokens": 512}
            told["asked"] += http.post("/gradio_api/call/v2/compare", json=asked).status_code == 200

    def beat() -> None:
        while not over.is_set() and told["beats"] < beats:
            with http.stream("GET", f"/gradio_api/heartbeat/{uuid.uuid4().hex[:11]}") as stream:
                next(stream.iter_lines())
            told["beats"] += 1

    def upload() -> None:
        for _ in range(100):
            if over.wait(1):
                return
            answered = http.post("/gradio_api/upload", files={"files": ("x.jsonl", b"x" * 30_000_000)})
            told["uploads"] += answered.status_code == 200

    crew = [threading.Thread(target=quietly, args=(part,)) for part in (ask, beat, upload)]
    for thread in crew:
        thread.start()
    try:
        yield told
    finally:
        over.set()
        for thread in crew:
            thread.join()


def quietly(part: Callable[[], None]) -> None:
    """What is refused by a broken connection ends this visitor's part."""
    try:
        part()
    except httpx.HTTPError:
        return


def hostile(address: str, clients: int, seconds: float) -> dict:
    expected = alone(address)
    without, size = crowd(address, clients, seconds, expected), resident(address)
    with misbehaving(address) as told:
        beside = crowd(address, clients, seconds, expected)
    ratio = beside["start_p95"] / without["start_p95"] if beside["start_p95"] else None
    return {"without": without, "beside": beside, "ratio": rounded(ratio), "hostile": told} | {
        "megabytes": [size // 10**6, resident(address) // 10**6]
    }


def growth(address: str, runs: int, visitors: int) -> dict:
    """The process's size over runs, a new session every five, and over visitors who click once."""
    for _ in range(20):
        Visitor(address).run(PROMPTS[0])
    sizes = [resident(address)]
    for number in range(runs):
        if number % 5 == 0:
            visitor = Visitor(address)
        visitor.run(PROMPTS[number % len(PROMPTS)])
    sizes.append(resident(address))
    for number in range(visitors):
        visitor = Visitor(address, number)
        visitor.http.get("/")
        visitor.light()
        visitor.http.close()
    sizes.append(resident(address))
    by = [rounded(100 * (after / before - 1)) for before, after in zip(sizes, sizes[1:], strict=False)]
    return {"megabytes": [size // 10**6 for size in sizes], "percent_runs": by[0], "percent_visitors": by[1]}


def stop(address: str, times: int) -> dict:
    """Seconds from the click on Stop to the end of the run."""
    taken = []
    for _ in range(times):
        visitor, clicked = Visitor(address), []

        def watch(value: dict, visitor: Visitor = visitor, clicked: list = clicked) -> bool:
            if any(value.get("texts", ())) and not clicked:
                clicked.append(time.monotonic())
                threading.Thread(target=visitor.stop).start()
            return False

        visitor.run(PROMPTS[0], 256, watch)
        taken.append(time.monotonic() - clicked[0])
    return {"stops": times, "median": rounded(median(taken)), "most": rounded(max(taken))}


def resident(address: str) -> int:
    """Bytes of the process that listens there."""
    port = httpx.URL(address).port
    listening = (c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
    return psutil.Process(next(listening).pid).memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("plan", choices=("crowd", "hostile", "growth", "stop"))
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pause", type=float, default=0, help="crowd: seconds that a visitor reads, at most")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--visitors", type=int, default=2000)
    given = parser.parse_args()
    plans = {
        "crowd": lambda: crowd(given.address, given.clients, given.seconds, pause=given.pause),
        "hostile": lambda: hostile(given.address, given.clients, given.seconds),
        "growth": lambda: growth(given.address, given.runs, given.visitors),
        "stop": lambda: stop(given.address, given.runs),
    }
    print(json.dumps({"plan": given.plan} | plans[given.plan]()))


if __name__ == "__main__":
    main()
