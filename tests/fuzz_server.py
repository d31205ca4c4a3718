"""Malformed calls to the real server, drawn from a seed: `python tests/fuzz_server.py --calls 2200 --seed 1`.

Prints a table and exits 1 unless there was no answer 500, no path of the server, no stack, no call without an answer,
and at most one line of its log a call. A call that is accepted is followed to its end.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from browser_support import app_process

SECONDS = 120  # for one answer
API = "/gradio_api"
PATH = re.compile(r"(?<![\w.:/~=-])/(?:root|home|tmp|opt|usr|etc|var|work|mnt|app)/[\w.+-]+")
STACK = re.compile(r'Traceback|File "|line \d+, in |\.py:\d+')
DEEP = "[" * 3000
SCALARS = [
    None, True, False, 0, -1, 1, 2.5, 1e308, 10**25, "", " ", "x", "fp16", "bnb-int8", "demo", "nope", "<img src=x>",
    "/etc/passwd", "~root", "../..", "owner/name", "https://example.com/a/b", "http://169.254.169.254/", "a" * 3000,
    "\x00", "\u202e", "\ud800", "NaN", [], {}, [[]], {"a": 1}, [None], ["fp16"], {"path": "/etc/passwd"},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": "http://127.0.0.1:1/", "url": "x"},
]  # fmt: skip
PLACES = [
    "/etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "../../../../etc/passwd", "/proc/self/environ", "app.py", "%00", "",
    "C:\\windows", "http://169.254.169.254/", "//example.com", "....//....//etc/passwd", "x" * 5000, "/tmp", "~",
]  # fmt: skip
RAW = [b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xff\xfe", DEEP.encode(), b'{"data":', b"a=b&c=d", b'{"data": NaN}']
TYPES = ["application/json", "text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "image/png", ""]
POSTS = [
    "queue/join", "cancel", "reset", "upload", "component_server", "run/predict", "api/predict", "call/compare",
    "call/v2/compare", "stream/x", "stream/x/close", "process_recording", "vibe-edit", "vibe-code",
]  # fmt: skip
GETS = [
    "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/queue/status", "/gradio_api/call/compare/x",
    "/gradio_api/upload_progress?upload_id=x", "/gradio_api/queue/data?session_hash=", "/monitoring", "/theme.css",
    "/monitoring/summary", "/gradio_api/deep_link", "/manifest.json", "/pwa_icon/9", "/gradio_api/user", "/login",
    "/gradio_api/stream/a/b/c/playlist.m3u8", "/gradio_api/custom_component/a/b/c/d", "/gradio_api/runs", "/logout",
]  # fmt: skip


@dataclass
class Server:
    """What the calls are made of: where it is, its endpoints with their parameters, its events with their inputs."""

    client: httpx.Client
    endpoints: dict[str, list[str]]
    events: dict[int, int]

    @classmethod
    def at(cls, address: str) -> Server:
        client = httpx.Client(base_url=address, timeout=SECONDS)
        named = client.get(f"{API}/info").json()["named_endpoints"]
        endpoints = {name[1:]: [p["parameter_name"] for p in told["parameters"]] for name, told in named.items()}
        events = {event["id"]: len(event["inputs"]) for event in client.get("/config").json()["dependencies"]}
        return cls(client, endpoints, events)


@dataclass
class Report:
    calls: int = 0
    seconds: float = 0.0
    log_lines: int = 0
    statuses: Counter = field(default_factory=Counter)
    fives: list[str] = field(default_factory=list)
    known: str = ""  # paths that the owner shows: the folder of the page's model
    paths: list[str] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # connections that ended without an answer

    def look(self, kind: str, asked: str, status: int, text: str) -> None:
        self.statuses[status] += 1
        if status >= 500 and status != 503:
            self.fives.append(f"{status}: {asked[:200]}")
        found = {path for path in PATH.findall(text) if path.rstrip(".") not in asked + self.known}
        if found and not (kind == "upload" and status == 200):  # Gradio's own answer to a file that it took
            self.paths.append(f"{kind}: {found} after {asked[:200]}")
        if STACK.search(text):
            self.stacks.append(f"{kind}: {STACK.search(text)[0]} after {asked[:200]}")

    @property
    def clean(self) -> bool:
        few = self.log_lines <= self.calls
        return few and not (self.fives or self.paths or self.stacks or self.hangs or self.broken)

    def __str__(self) -> str:
        rows = {
            "calls": f"{self.calls} in {self.seconds:.0f} s", "answers 500": len(self.fives),
            "paths": len(self.paths), "stacks": len(self.stacks), "without an answer": len(self.hangs),
            "connections broken": len(self.broken), "log lines a call": f"{self.log_lines / max(1, self.calls):.3f}",
            "statuses": dict(sorted(self.statuses.items())),
        }  # fmt: skip
        lines = [f"| {name} | {value} |" for name, value in rows.items()]
        return "\n".join(
            [*lines, *self.fives[:9], *self.paths[:9], *self.stacks[:9], *self.hangs[:9], *self.broken[:9]]
        )


def value(draw: random.Random):
    return draw.choice(SCALARS)


def values(draw: random.Random, count: int) -> list:
    return [value(draw) for _ in range(max(0, count + draw.choice([0, 0, 0, -1, 1, 5])))]


def by_name(draw, server):
    name = draw.choice([*server.endpoints, "nope", "", "a/b", "%00", "_generate"])
    names = draw.sample(server.endpoints.get(name, ["x"]), k=draw.randint(0, len(server.endpoints.get(name, ["x"]))))
    body = {name: value(draw) for name in [*names, *draw.choice([[], ["nope"], [""]])]}
    return "POST", f"{API}/call/v2/{name}", {"json": body}


def by_place(draw, server):
    name = draw.choice([*server.endpoints, "nope", "_generate", "predict"])
    way = draw.choice(["call", "run", "api"])
    body = {"data": values(draw, len(server.endpoints.get(name, [])))}
    if draw.random() < 0.4:
        body |= {"fn_index": draw.choice([*server.events, -1, 10**6, None]), "session_hash": draw.choice(["s", None])}
    return "POST", f"{API}/{way}/{name}", {"json": body}


def by_event(draw, server):
    index = draw.choice([*server.events, *server.events, -1, 10**6, "x", None, 2.5, []])
    count = server.events.get(index, 1) if isinstance(index, int) else 1
    body = {
        "fn_index": index,
        "data": values(draw, count),
        "session_hash": f"s{draw.random()}",
        "event_data": value(draw),
    }
    return "POST", f"{API}/queue/join", {"json": body | draw.choice([{}, {"trigger_id": value(draw)}, {"data": None}])}


def raw(draw, server):
    kind = draw.choice(TYPES)
    return "POST", f"{API}/{draw.choice(POSTS)}", {"content": draw.choice(RAW), "headers": {"Content-Type": kind}}


def file(draw, server):
    where = draw.choice(
        ["/file=", f"{API}/file=", f"{API}/file/", "/static/", "/assets/", f"{API}/proxy=", "/svelte/", "/custom/"]
    )
    return draw.choice(["GET", "HEAD"]), where + draw.choice(PLACES), {}


def get(draw, server):
    return draw.choice(["GET", "HEAD", "PUT", "DELETE", "OPTIONS"]), draw.choice(GETS), {}


def part(draw, server):
    body = {"component_id": draw.choice([0, 5, -1, 10**9, "x", None]), "fn_name": value(draw), "data": value(draw),
            "session_hash": draw.choice(["s", None, 5])}  # fmt: skip
    return "POST", f"{API}/component_server", {"json": body}


def cancel(draw, server):
    body = {"session_hash": value(draw), "fn_index": value(draw), "event_id": value(draw)}
    return "POST", f"{API}/{draw.choice(['cancel', 'reset'])}", {"json": body}


def upload(draw, server):
    name = draw.choice(["x.jsonl", "../x", "a" * 300, "\x00", "x.html", "", "/etc/passwd", "con", "ü.json"])
    content = draw.choice([b"", b"x", b"{}", DEEP.encode()])
    return "POST", f"{API}/upload", {"files": {draw.choice(["files", "file", ""]): (name, content)}}


def header(draw, server):
    bad = {"Origin": draw.choice(["null", "x", "http://", "https://example.com"]), "X-Forwarded-Host": "a,b",
           "Cookie": "access-token=x; ;=;", "Range": "bytes=9-1", "Content-Length": "5"}  # fmt: skip
    name = draw.choice([*bad][:4])
    return draw.choice(["GET", "POST"]), draw.choice(["/", "/config", f"{API}/reset"]), {"headers": {name: bad[name]}}


KINDS: dict[str, tuple[Callable, int]] = {  # how to draw a call, and how often
    "by name": (by_name, 5), "by place": (by_place, 5), "event": (by_event, 5), "raw": (raw, 4), "file": (file, 3),
    "get": (get, 2), "part": (part, 1), "cancel": (cancel, 1), "upload": (upload, 1), "header": (header, 1),
}  # fmt: skip


def fuzz(address: str, calls: int, seed: int, known: str = "") -> Report:
    """Make `calls` calls, one after the other, and look at every answer."""
    draw, report, server = random.Random(seed), Report(known=known), Server.at(address)
    started = time.monotonic()
    for _ in range(calls):
        kind = draw.choices([*KINDS], [weight for _, weight in KINDS.values()])[0]
        method, path, body = KINDS[kind][0](draw, server)
        one_call(server.client, report, kind, method, path, body)
        report.calls += 1
    report.seconds = time.monotonic() - started
    return report


def one_call(client: httpx.Client, report: Report, kind: str, method: str, path: str, body: dict) -> None:
    asked = f"{method} {path} {body}"
    if "json" in body:  # a lone surrogate is JSON, and httpx would not write it
        body = {"content": json.dumps(body["json"]).encode(), "headers": {"Content-Type": "application/json"}}
    try:
        answer = client.request(method, path, **body)
        report.look(kind, asked, answer.status_code, answer.text)
        if answer.status_code == 200 and "event_id" in answer.text and method == "POST":
            follow(client, report, kind, path, asked, answer.json()["event_id"])
    except httpx.TimeoutException:
        report.hangs.append(asked[:200])
    except httpx.TransportError as error:
        report.broken.append(f"{error!r} after {asked[:200]}")
    except httpx.InvalidURL:
        pass


def follow(client: httpx.Client, report: Report, kind: str, path: str, asked: str, event: str) -> None:
    """Read what an accepted call comes to, for SECONDS at most, which is when a run of its own may still go on."""
    where = f"{path}/{event}"
    if path.endswith("queue/join"):
        session = re.search(r"'session_hash': '(s[\d.e-]+)'", asked)[1]
        where = f"{API}/queue/data?session_hash={session}"
    ends = time.monotonic() + SECONDS
    with client.stream("GET", where) as stream:
        for line in stream.iter_lines():
            report.look(kind, asked, stream.status_code, line)
            if "process_completed" in line or "close_stream" in line:
                return
            if time.monotonic() > ends:
                return


@contextmanager
def fuzzed_app(*flags: str):
    """`python app.py` with its log in a file; yields (address, lines), where `lines()` counts those of the log."""
    with tempfile.NamedTemporaryFile("w+") as log, app_process(log, *flags) as address:
        before = len(Path(log.name).read_text(errors="replace").splitlines())
        yield address, lambda: len(Path(log.name).read_text(errors="replace").splitlines()) - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="of app.py, after --")
    options = parser.parse_args()
    with fuzzed_app(*options.flags) as (address, lines):
        report = fuzz(address, options.calls, options.seed, " ".join(options.flags))
        report.log_lines = lines()
        print(report)
    return not report.clean


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
