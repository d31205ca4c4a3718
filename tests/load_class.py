"""A class over HTTP: `python tests/load_class.py ADDRESS --key KEY --clients 30 --seconds 600`, or `… --plan kill`.

Plan `class`, against a running server: students join, ask every two seconds, vote, read, generate, stop, leave and come
back, while a teacher leads; at the end the server's tallies are held against what was cast. Plan `kill` starts servers
of its own, kills each amid votes, and looks for acknowledged votes that the next one does not have. Each prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from browser_support import ROOT, wait_for
from load_server import PROMPTS, Visitor, alone, at, rounded

PLACE = "/lesson/class"
EVERY_SECONDS = 2.0  # as the page asks
TOKENS = 4  # of an answer
READS = ("/lesson/",)  # what a step needs; {step} is its name
VOTERS = 8  # threads that vote while a server is killed


@dataclass
class Log:
    """What all saw. `cast`: acknowledged votes; `lost`: those that were told otherwise later."""

    polls: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    cast: list[tuple[str, str]] = field(default_factory=list)
    runs: int = 0
    mixed: int = 0
    lost: int = 0
    reloads: int = 0
    missing_files: int = 0


class Member:
    """A browser with a token of a class."""

    def __init__(self, http: httpx.Client, code: str, token: str):
        self.http, self.code, self.token = http, code, token

    def ask(self, way: str, path: str = "", **options) -> dict:
        """The answer's JSON. Raises RuntimeError with the sentence of a refusal."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return _json(self.http.request(way, f"{PLACE}/{self.code}{path}", headers=headers, **options))

    def post(self, path: str, **body) -> dict:
        return self.ask("POST", path, json=body)

    def choices_of(self, path: str, **body) -> list[str]:
        """The names that the server would take: it says them where it is given another."""
        try:
            self.post(path, **body)
        except RuntimeError as refused:
            return str(refused).partition("choose from ")[2].split(", ")
        raise AssertionError(f"{body} was taken")


def _json(answer: httpx.Response) -> dict:
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code} {answer.json().get('error', answer.text):.300}")
    return answer.json()


def teach(http: httpx.Client, key: str) -> Member:
    made = _json(http.post(f"{PLACE}/teach", json={"key": key}))
    return Member(http, made["class"], made["token"])


def join(http: httpx.Client, code: str) -> Member:
    return Member(http, code, _json(http.post(f"{PLACE}/{code}/join", json={}))["token"])


def asked_in(teacher: Member) -> dict[str, list[str]]:
    """The choices of every question."""
    probe = join(teacher.http, teacher.code)
    questions = probe.ask("GET")["votes"]
    return {name: probe.choices_of("/vote", question=name, choice="?") for name in questions}


@dataclass
class Student:
    """One student for the whole lesson, from an address of its own, in one browser after the other."""

    address: str
    number: int
    code: str
    questions: dict[str, list[str]]
    expected: dict[str, tuple[str, ...]]
    reads: tuple[str, ...]
    log: Log
    member: Member | None = None
    version: int | str = ""
    shown: str | None = ""  # the step whose files this browser has; '' before its first
    voted: dict[str, str] = field(default_factory=dict)

    def attend(self, seconds: float) -> None:
        """Ask every two seconds until the lesson is over; vote on every question at some time; do something else now
        and then."""
        chance, began = random.Random(self.number), time.monotonic()
        due = sorted((chance.uniform(0, 0.8 * seconds), question) for question in self.questions)
        visitor = Visitor(self.address, self.number)
        self.member = join(visitor.http, self.code)
        while (passed := time.monotonic() - began) < seconds:
            asked = time.monotonic()
            try:
                self.follow()
                while due and due[0][0] < passed:
                    self.vote(due.pop(0)[1], chance)
                if chance.random() < 0.3:
                    visitor = self.beside(visitor, chance)
            except (RuntimeError, httpx.HTTPError) as error:
                self.log.errors.append(f"{type(error).__name__}: {error}")
            time.sleep(max(0.0, min(EVERY_SECONDS - (time.monotonic() - asked), seconds - passed)))
        for _, question in due:
            self.vote(question, chance)
        self.compare(self.member.ask("GET"))
        visitor.http.close()

    def follow(self) -> None:
        """A poll, and where it tells of another step, or this browser is new, what the step needs."""
        began = time.monotonic()
        state = self.member.ask("GET", params={"seen": self.version} if self.version != "" else {})
        self.log.polls.append(time.monotonic() - began)
        if len(state) == 1:
            return
        self.version = state["version"]
        self.compare(state)
        if state["step"] == self.shown:
            return
        self.shown = state["step"]
        for path in self.reads:
            answer = self.member.http.get(path.format(step=state["step"] or ""), headers={"Accept-Encoding": "gzip"})
            if answer.status_code == 404:
                self.log.missing_files += 1
            elif answer.status_code >= 400:
                raise RuntimeError(f"{answer.status_code} at {path}")
        self.log.steps.append(time.monotonic() - began)

    def compare(self, state: dict) -> None:
        """Count votes that the server tells otherwise than it acknowledged them."""
        told = {question: found["yours"] for question, found in state["votes"].items() if found["yours"] is not None}
        self.log.lost += len(self.voted.items() - told.items())

    def vote(self, question: str, chance: random.Random) -> None:
        """Vote, and once more otherwise, which changes nothing."""
        choice = chance.choice(self.questions[question])
        first = self.member.post("/vote", question=question, choice=choice)
        self.voted[question] = choice
        self.log.cast.append((question, choice))
        again = self.member.post("/vote", question=question, choice=chance.choice(self.questions[question]))
        assert (first, again) == ({"counted": True, "choice": choice}, {"counted": False, "choice": choice})

    def beside(self, visitor: Visitor, chance: random.Random) -> Visitor:
        """Generate, stop, leave amid an answer, or open the page anew; returns the browser that is open then."""
        prompt = chance.choice(PROMPTS)
        match chance.choices(("run", "stop", "leave", "reload"), (4, 1, 1, 2))[0]:
            case "run":
                ended = visitor.run(prompt, TOKENS)
                self.log.runs += 1
                self.log.mixed += not ended.error and ended.texts != self.expected[prompt]
                self.log.errors += [ended.error] if ended.error else []
                return visitor
            case "stop":
                visitor.run(prompt, 64, seen=bool)
                visitor.stop()
            case "leave":
                visitor.run(prompt, 64, seen=bool)
        visitor.http.close()
        again = Visitor(self.address, self.number)
        self.member, self.version = Member(again.http, self.code, self.member.token), ""
        self.shown = ""
        self.log.reloads += 1
        self.follow()
        return again


def lead(teacher: Member, seconds: float, log: Log) -> None:
    """Go through the steps, revealing each halfway, asking as students do."""
    steps, until = teacher.choices_of("/lead", step="?"), time.monotonic() + seconds
    for number, step in enumerate(steps):
        for changes in ({"step": step}, {"revealed": True}):
            ends = until - seconds * (1 - (number + (1 if "revealed" in changes else 0.5)) / len(steps))
            try:
                state = teacher.post("/lead", **changes)
                if (state["step"], state["revealed"]) != (step, "revealed" in changes):
                    log.errors.append(f"{changes} led to {state['step']}, {state['revealed']}")
                while (left := ends - time.monotonic()) > 0:
                    time.sleep(min(left, EVERY_SECONDS))
                    teacher.ask("GET")
            except (RuntimeError, httpx.HTTPError) as error:
                log.errors.append(f"teacher: {error}")
    teacher.post("/lead", step=None)


def lesson(address: str, key: str, clients: int, seconds: float, reads: tuple[str, ...] = READS) -> dict:
    """Thirty and a teacher; what they saw, and how the server's tallies differ from what was cast."""
    log, expected = Log(), alone(address)
    with httpx.Client(base_url=address, timeout=60) as http:
        teacher = teach(http, key)
        questions = asked_in(teacher)
        students = [
            Student(address, number, teacher.code, questions, expected, reads, log) for number in range(2, clients + 2)
        ]
        crew = [threading.Thread(target=_noted, args=(log, student.attend, seconds)) for student in students]
        crew.append(threading.Thread(target=_noted, args=(log, lead, teacher, seconds, log)))
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        found = teacher.ask("GET", "/export", params={"format": "json"})["votes"]
        teacher.post("/end")
    cast = Counter(log.cast)
    wrong = [(q, c) for q, counts in found.items() for c, votes in counts.items() if votes != cast[q, c]]
    return {
        "clients": clients, "seconds": seconds, "polls": len(log.polls), "steps": len(log.steps), "runs": log.runs,
        "reloads": log.reloads, "votes": len(log.cast), "errors": len(log.errors), "said": sorted(set(log.errors))[:5],
        "wrong_tallies": len(wrong), "votes_lost": log.lost, "mixed": log.mixed, "missing_files": log.missing_files,
        "poll_p50": rounded(at(log.polls, 0.5)), "poll_p95": rounded(at(log.polls, 0.95)),
        "step_p50": rounded(at(log.steps, 0.5)), "step_p95": rounded(at(log.steps, 0.95)),
    }  # fmt: skip


def _noted(log: Log, part, *given) -> None:
    """A thread that fails is an error of the plan, not a line between its results."""
    try:
        part(*given)
    except (RuntimeError, AssertionError, httpx.HTTPError) as error:
        log.errors.append(f"{type(error).__name__}: {error}")


@contextmanager
def started(file: Path, key: str, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python app.py` with the classes of `file`, on a free port; killed at the end at the latest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    port = address.rpartition(":")[2]
    command = [sys.executable, "app.py", "--port", port, "--device", "cpu", "--class-file", str(file), *flags]
    environment = os.environ | {"LLMQ_CLASS_KEY": key}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            wait_for(address, process, log)
            yield address, process
        finally:
            process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def kill(rounds: int, seconds: float, *flags: str) -> dict:
    """Votes that were acknowledged before a SIGKILL and are not there after it; `unacknowledged`: those that are there
    and whose voter was told nothing, one for each thread at most."""
    key, told = secrets.token_urlsafe(12), {"rounds": rounds, "acknowledged": 0, "lost": 0, "unacknowledged": 0}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            with started(Path(folder) / "classes.sqlite3", key, *flags) as (address, process):
                with httpx.Client(base_url=address, timeout=60) as http:
                    teacher = teach(http, key)
                    questions = asked_in(teacher)
                acknowledged: list[tuple[str, str, str]] = []
                voters = [
                    threading.Thread(target=_vote_on, args=(address, key, questions, acknowledged))
                    for _ in range(VOTERS)
                ]
                for thread in voters:
                    thread.start()
                time.sleep(seconds)
                os.killpg(process.pid, signal.SIGKILL)
                for thread in voters:
                    thread.join()
            with started(Path(folder) / "classes.sqlite3", key, *flags) as (address, _):
                for name, found in _found_after(address, acknowledged).items():
                    told[name] += found
    return told


def _vote_on(address: str, key: str, questions: dict, acknowledged: list) -> None:
    """One student after the other in a class of this thread's own, until the server is gone."""
    with httpx.Client(base_url=address, timeout=60) as http:
        try:
            teacher = teach(http, key)
            while True:
                student = join(http, teacher.code)
                for question, choices in questions.items():
                    choice = random.choice(choices)
                    given = student.post("/vote", question=question, choice=choice)
                    acknowledged.append((f"{teacher.code} {teacher.token} {student.token}", question, given["choice"]))
        except httpx.HTTPError:
            return


def _found_after(address: str, acknowledged: list[tuple[str, str, str]]) -> dict[str, int]:
    with httpx.Client(base_url=address, timeout=60) as http:
        lost, voted = 0, Counter()
        for names in dict.fromkeys(name for name, _, _ in acknowledged):
            code, _, student = names.split()
            votes = Member(http, code, student).ask("GET")["votes"]
            lost += sum(votes[q]["yours"] != choice for name, q, choice in acknowledged if name == names)
        for code, teacher in dict.fromkeys(tuple(name.split()[:2]) for name, _, _ in acknowledged):
            found = Member(http, code, teacher).ask("GET", "/export", params={"format": "json"})
            voted[code] = sum(sum(counts.values()) for counts in found["votes"].values())
    more = sum(voted.values()) - (len(acknowledged) - lost)
    return {"acknowledged": len(acknowledged), "lost": lost, "unacknowledged": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?", help="of the running server (plan class)")
    parser.add_argument("--plan", choices=("class", "kill"), default="class")
    parser.add_argument("--key", help="the teacher's key (plan class)")
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, help="class: of the lesson (600); kill: until the kill (3)")
    parser.add_argument("--reads", default=",".join(READS), help="what a step reads, comma-separated; {step}: its name")
    parser.add_argument("--rounds", type=int, default=3, help="kill: how often")
    given = parser.parse_args()
    if given.plan == "kill":
        told = kill(given.rounds, given.seconds or 3.0)
    elif given.address and given.key:
        told = lesson(given.address, given.key, given.clients, given.seconds or 600.0, tuple(given.reads.split(",")))
    else:
        parser.error("the plan class needs an address and --key")
    print(json.dumps({"plan": given.plan} | told))


if __name__ == "__main__":
    main()
