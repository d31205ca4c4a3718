"""What a server of one device does to many visitors, as a queue in simpy: `python tests/simulate_server.py [ADDRESS]`.

Without an address it writes the tables of docs/scale.md. With one it measures there what every action takes while
nobody else uses the device, simulates the `crowd` of load_server.py with that, runs that crowd, and prints both as one
JSON object.

The model: one device, given to whoever's address has used it least; every other action costs nothing but its own time.
A processor that page and model share is not in it, but in what it is given: the actions are measured while others click
as often as that crowd does.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import simpy

ACTIONS, WEIGHTS = ("run", "click", "stop", "leave"), (4, 4, 1, 1)  # as in load_server.behave
HALF_LIFE = 300.0  # seconds, as in llmq.machine.queue
PENDING, AN_ADDRESS = 96, 32  # that may wait, in all and from one address, as in llmq.machine.jobs
LEFT_SECONDS = 0.5  # until a server notices that nobody listens, as in llmq.machine.jobs


@dataclass(frozen=True)
class Service:
    """Seconds that actions took where nobody waited: those for which a run held the `device`, `first` until its first
    words, and others'."""

    device: list[float]
    first: list[float]
    click: list[float]
    stop: list[float]

    @classmethod
    def same(cls, device: float, first: float | None = None) -> Service:
        return cls([device], [device if first is None else first], [0.02], [0.05])


@dataclass
class Seen:
    """What visitors saw: seconds from the click to the first words, and how many runs ended."""

    starts: list[float] = field(default_factory=list)
    runs: int = 0
    refused: int = 0
    busy: float = 0.0  # seconds that the device was held

    def told(self, seconds: float) -> dict:
        ordered = sorted(self.starts)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else None
        return {
            "runs": self.runs,
            "refused": self.refused,
            "runs_per_minute": round(60 * self.runs / seconds, 1),
            "start_p50": round(median(ordered), 3) if ordered else None,
            "start_p95": None if p95 is None else round(p95, 3),
            "utilisation": round(self.busy / seconds, 3),
        }


class Server:
    """One device and its fair line."""

    def __init__(self, chance: random.Random, service: Service, most: int = PENDING):
        self.most = most
        self.env, self.chance, self.service, self.seen = simpy.Environment(), chance, service, Seen()
        self.device = simpy.PriorityResource(self.env)
        self._used: dict[int, tuple[float, float]] = {}

    def _seconds(self, address: int) -> float:
        used, then = self._used.get(address, (0.0, 0.0))
        return used * 0.5 ** ((self.env.now - then) / HALF_LIFE)

    def _hold(self, address: int, seconds: float) -> Iterator:
        yield self.env.timeout(seconds)
        self.seen.busy += seconds
        self._used[address] = (self._seconds(address) + seconds, self.env.now)

    def admits(self) -> bool:
        """Whether one more is let into the line."""
        return len(self.device.queue) + self.device.count < self.most

    def run(self, address: int) -> Iterator:
        """A click on Generate, to its end, or to the sentence that refuses it."""
        if not self.admits():
            self.seen.refused += 1
            return
        asked, place = self.env.now, self.chance.randrange(len(self.service.device))
        with self.device.request(priority=self._seconds(address)) as turn:
            yield turn
            self.seen.starts.append(self.env.now - asked + self.service.first[place])
            yield from self._hold(address, self.service.device[place])
        self.seen.runs += 1

    def give_up(self, address: int, patience: float, held: float) -> Iterator:
        """A click on Generate that is taken back after `patience` seconds; the device is held for `held`."""
        with self.device.request(priority=self._seconds(address)) as turn:
            yield turn | self.env.timeout(patience)
            if turn.triggered:
                yield from self._hold(address, held)

    def act(self, address: int) -> Iterator:
        service, chance = self.service, self.chance
        match chance.choices(ACTIONS, WEIGHTS)[0]:
            case "run":
                yield from self.run(address)
            case "click":
                yield self.env.timeout(chance.choice(service.click))
            case "stop":
                seconds = chance.choice(service.stop)
                yield from self.give_up(address, seconds, seconds)
            case "leave":  # whoever left does not wait for the server to notice
                self.env.process(self.give_up(address, LEFT_SECONDS, LEFT_SECONDS))
                yield self.env.timeout(chance.choice(service.stop))


def crowd(clients: int, seconds: float, pause: float, service: Service, seed: int = 0) -> dict:
    """A fixed number of visitors, each of whom reads for up to `pause` seconds and acts, over and over."""
    server = Server(random.Random(seed), service)

    def behave(address: int) -> Iterator:
        while server.env.now < seconds:
            yield server.env.timeout(server.chance.uniform(0, pause))
            yield from server.act(address)

    for address in range(clients):
        server.env.process(behave(address))
    server.env.run(until=seconds)
    return server.seen.told(seconds)


def arrivals(per_hour: Callable[[float], float], hours: float, runs: int, service: Service, seed: int = 0) -> dict:
    """Visitors who come at random, `per_hour(hour)` of them, ask `runs` times with a minute between, and go."""
    server, seconds = Server(random.Random(seed), service), 3600 * hours
    most = max(per_hour(hours * step / 1000) for step in range(1000))

    def visit(address: int) -> Iterator:
        for _ in range(runs):
            yield server.env.timeout(server.chance.expovariate(1 / 60))
            yield from server.run(address)

    def come() -> Iterator:
        for address in range(10**9):
            yield server.env.timeout(server.chance.expovariate(most / 3600))
            if server.chance.random() < per_hour(server.env.now / 3600) / most:
                server.env.process(visit(address))

    server.env.process(come())
    server.env.run(until=seconds)
    return server.seen.told(seconds)


def together(students: int, within: float, service: Service, seed: int = 0, most: int = PENDING) -> dict:
    """A course in which everybody asks once within so many seconds: how long they wait, and who is refused."""
    server = Server(random.Random(seed), service, most)

    def student(address: int) -> Iterator:
        yield server.env.timeout(server.chance.uniform(0, within))
        yield from server.run(address)

    for address in range(students):
        server.env.process(student(address))
    server.env.run()
    return server.seen.told(server.env.now) | {"last_seconds": round(server.env.now, 1)}


@contextmanager
def clicking(address: str, pause: float) -> Iterator[None]:
    """Others who click, with up to twice `pause` seconds between two of all their clicks."""
    from load_server import Visitor

    over = threading.Event()

    def click() -> None:
        chance = random.Random(0)
        while not over.wait(chance.uniform(0, 2 * pause)):
            visitor = Visitor(address, 200)
            visitor.light()
            visitor.http.close()

    thread = threading.Thread(target=click)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def held_seconds(address: str, visitors: int = 3, times: int = 20) -> float:
    """Measure for how long a run holds the device: seconds by runs, with somebody always in line. What a visitor waits
    alone has the way to the server and back in it, too."""
    from time import monotonic

    from load_server import PROMPTS, Visitor

    def ask(number: int) -> None:
        for _ in range(times):
            Visitor(address, number).run(PROMPTS[number % len(PROMPTS)])

    crew = [threading.Thread(target=ask, args=(number,)) for number in range(2, visitors + 2)]
    began = monotonic()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return (monotonic() - began) / visitors / times


def lone_actions(address: str, times: int = 40) -> Service:
    """Measure one visitor's actions while nobody else uses the device."""
    from time import monotonic, sleep

    from load_server import PROMPTS, Visitor

    found = Service([], [], [], [])
    Visitor(address).run(PROMPTS[0])
    for number in range(times):
        visitor, prompt = Visitor(address, number + 2), PROMPTS[number % len(PROMPTS)]
        ended = visitor.run(prompt)
        found.device.append(ended.last)
        found.first.append(ended.first)
        found.click.append(visitor.light().last)
        began = monotonic()
        visitor.run(prompt, 64, seen=bool)
        visitor.stop()
        found.stop.append(monotonic() - began)
        visitor.http.close()
        sleep(1)
    held, usual = held_seconds(address), mean(found.device)
    return replace(found, device=[seconds * held / usual for seconds in found.device])


def compared(address: str, clients: int, seconds: float, pause: float) -> dict:
    """The same crowd simulated and measured."""
    import load_server

    of_a_click = WEIGHTS[ACTIONS.index("click")] / sum(WEIGHTS)
    with clicking(address, pause / 2 / clients / of_a_click):
        service = lone_actions(address)
    told = [crowd(clients, seconds, pause, service, seed) for seed in range(9)]
    simulated = {name: round(mean(one[name] for one in told), 3) for name in told[0]}
    measured = load_server.crowd(address, clients, seconds, pause=pause)
    measured["runs_per_minute"] = round(60 * measured["runs"] / seconds, 1)
    names = ("runs_per_minute", "start_p50", "start_p95")
    return {
        "clients": clients, "seconds": seconds, "pause": pause, "actions": asdict(service),
        "simulated": simulated, "measured": measured,
        "simulated_over_measured": {name: round(simulated[name] / measured[name], 3) for name in names},
    }  # fmt: skip


ROOT = Path(__file__).resolve().parents[1]
RESULTS, CROWD, PAGE = ROOT / "assets" / "results", ROOT / "assets" / "crowd-cpu.json", ROOT / "docs" / "scale.md"
PLACES = {  # what a comparison of FP16 and LLM.int8() was measured on
    "demo model, 2 cores of a CPU": "cpu-peers",
    "demo model, an H100": "gpu-demo-lean",
    "7B, an H100": "gpu-7b-lean",
}
ANSWER = 128  # tokens
VISITORS, BUSIEST, ASKING, RUNS = 10_000, 0.1, 0.2, 2
COURSE, WITHIN = 500, 300


def seconds_of(name: str) -> float:
    """What the two methods of a comparison need for their answers, by a stored result, one step after the other."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    speeds = {row["method"]: row for row in rows}
    both = [speeds["fp16"], speeds["llm-int8"]]
    return sum((row.get("prefill_seconds") or 0) + ANSWER / row["tokens_per_second"] for row in both)


def tables() -> list[str]:
    """The lines of docs/scale.md that are computed."""
    peak = VISITORS * BUSIEST * ASKING
    lines = ["| where | a comparison | most an hour | held in that hour | first words, median | of 95 % |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for place, name in PLACES.items():
        service = Service.same(seconds_of(name), 0)
        told = arrivals(lambda hour: peak, 12, RUNS, service)
        lines.append(f"| {place} | {service.device[0]:.2f} s | {3600 / service.device[0]:,.0f} | {_row(told)} |")
    lines += ["", "| where | first words, median | of 95 % | the last answer after | refused | behind one address |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for place, name in PLACES.items():
        service = Service.same(seconds_of(name), 0)
        told, behind = (together(COURSE, WITHIN, service, most=most) for most in (PENDING, AN_ADDRESS))
        waits = f"{told['start_p50']:.1f} s | {told['start_p95']:.1f} s | {told['last_seconds'] / 60:.1f} minutes"
        lines.append(f"| {place} | {waits} | {told['refused']} | {behind['refused']} |")
    return lines


def crowd_table() -> list[str]:
    """The stored crowd beside its simulation."""
    stored = json.loads(CROWD.read_text())
    lines = ["| | comparisons a minute | first words, median | of 95 % |", "|---|---:|---:|---:|"]
    for name in ("simulated", "measured", "simulated_over_measured"):
        told = stored[name]
        unit = "" if "over" in name else " s"
        cells = (told["runs_per_minute"], f"{told['start_p50']:.2f}{unit}", f"{told['start_p95']:.2f}{unit}")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(map(str, cells))} |")
    return lines


def filled_page(text: str) -> str:
    """docs/scale.md with its tables made anew."""
    for name, lines in (("crowd", crowd_table()), ("scale", tables())):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = "\n".join([f"{before}{begin}", *lines, end]) + rest.partition(end)[2]
    return text


def _row(told: dict) -> str:
    if told["utilisation"] > 0.98:
        return "all of it | grows | grows"
    return f"{told['utilisation']:.0%} | {told['start_p50']:.1f} s | {told['start_p95']:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?")
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--pause", type=float, default=20, help="seconds that a visitor reads, at most")
    given = parser.parse_args()
    if given.address:
        print(json.dumps(compared(given.address, given.clients, given.seconds, given.pause)))
    else:
        PAGE.write_text(filled_page(PAGE.read_text()))


if __name__ == "__main__":
    main()
