"""A server with many visitors, over HTTP: the load script in seconds, who listens, its owner, its health, its end."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import load_server
import pytest
from browser_support import ROOT, wait_for
from gradio.queueing import Queue
from load_server import Visitor
from page_form import filled
from test_api import served
from tiny_runs import light

import app
from llmq.engine.base import Token
from llmq.engine.hf import Generation
from llmq.machine.jobs import Limits
from llmq.ui import launch
from llmq.ui.shell.owner import PASSWORD
from llmq.ui.shell.state import FOLDER
from llmq.ui.tabs.compare_tab import UNSAVED

PATIENCE = 60  # seconds until what does not come is a failure
ENDLESS = "Tell me everything about the sea."
CALL = "/gradio_api/call/v2/compare"


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(PATIENCE * 20):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not come")


@pytest.fixture(scope="module")
def server(tiny_folder) -> Iterator[str]:
    options = app.parse(["--model", str(tiny_folder), "--methods", "fp16,bnb-int8", "--device", "cpu"])
    before = Visitor.model, Visitor.methods
    Visitor.model, Visitor.methods = str(tiny_folder), ("fp16", "bnb-int8")
    launch.KEPT_SESSIONS, kept = 2, launch.KEPT_SESSIONS
    with light(), served(app.make_state(options)) as address:
        yield address
    (Visitor.model, Visitor.methods), launch.KEPT_SESSIONS = before, kept


@pytest.fixture
def quiet_limits(monkeypatch):
    """Limits that a test need not wait for."""
    monkeypatch.setattr(app.JOBS, "limits", Limits(unheard_seconds=0.5, pending_an_address=4))


def test_a_crowd_sees_no_error_and_nobody_else_s_words(server):
    """More visitors than the server keeps pages of: whoever is forgotten goes on."""
    told = load_server.crowd(server, clients=5, seconds=4)
    assert (told["errors"], told["mixed"], told["said"]) == (0, 0, [])
    assert told["runs"] and told["clicks"]
    wait_until(lambda: not list(app.JOBS))


def test_stop_frees_the_device(server):
    assert load_server.stop(server, 2)["stops"] == 2
    wait_until(lambda: httpx.get(f"{server}/healthz").json()["state"] == "idle")


def ask(server: str, tokens: int = 16) -> httpx.Response:
    """As somebody does who never listens."""
    asked = {"prompt": ENDLESS, "model": Visitor.model, "methods": "fp16", "max_new_tokens": tokens}
    return httpx.post(f"{server}{CALL}", json=asked)


def test_what_nobody_listens_to_never_has_the_device_and_keeps_nobody_waiting(server, quiet_limits):
    assert [ask(server).status_code for _ in range(8)] == [200] * 8, "told in the answer, which they never read"
    ended = Visitor(server).run("Hi")
    assert (ended.error, len(ended.texts)) == ("", 2)
    assert all(job.started is None for job in app.JOBS)
    wait_until(lambda: not list(app.JOBS))


def test_whoever_listens_late_is_answered_or_told_why_not(server, quiet_limits):
    event = ask(server).json()["event_id"]
    wait_until(lambda: list(app.JOBS))
    wait_until(lambda: not list(app.JOBS))
    assert "nobody listened" in httpx.get(f"{server}{CALL}/{event}", timeout=PATIENCE).text
    event = ask(server, tokens=2).json()["event_id"]
    assert "event: complete" in httpx.get(f"{server}{CALL}/{event}", timeout=PATIENCE).text


def test_a_second_question_of_one_visitor_is_refused_in_a_sentence(server):
    visitor, told = Visitor(server), []

    def second(value: dict) -> bool:
        if not told:
            told.append(visitor.http.post("/gradio_api/queue/join", json=joined(visitor)).status_code)
        return False

    refused = visitor.run(ENDLESS, 1024, second)
    assert told == [200] and "still going on; stop it, or wait" in refused.value["notice"]
    wait_until(lambda: not list(app.JOBS))
    assert visitor.run("Hi").texts, "the first ended when nobody listened to it any more"


def joined(visitor: Visitor) -> dict:
    data = filled(ENDLESS, Visitor.model, Visitor.methods, tokens=4)
    number = load_server.dependencies(visitor.address)["generate", "click"]
    return {"data": data, "fn_index": number, "session_hash": visitor.session, "event_data": None}


def test_only_what_takes_time_is_queued(server):
    """A browser may miss the answer of what it queues while another's ends, as a load event's does below a first click
    on Generate; see llmq.ui.shell.wiring."""
    config = httpx.get(f"{server}/config").json()
    names = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    short = [
        [(names.get(part), event) for part, event in one["targets"]]
        for one in config["dependencies"]
        if one["backend_fn"] and one["api_visibility"] == "private" and one["queue"] is not False
        and not one["types"]["generator"]
    ]  # fmt: skip
    assert short == [[("tab-outliers", "select")]], "which loads a model"


def test_who_only_opens_and_closes_connections_leaves_nothing_behind(server):
    """Gradio makes a page for a session whose end the page wants to hear of, and anybody can invent sessions."""
    dependencies = httpx.get(f"{server}/config").json()["dependencies"]
    assert dependencies and all(event != "unload" for one in dependencies for _, event in one["targets"])


def test_nothing_is_kept_of_visitors_who_were_answered(server):
    visitors = [Visitor(server, number) for number in range(3)]
    queues = [thing for thing in gc.get_objects() if isinstance(thing, Queue)]

    def kept() -> list[Queue]:
        lines = [{*queue.pending_messages_per_session, *queue.pending_event_ids_session} for queue in queues]
        return [line for line in lines if line & {visitor.session for visitor in visitors}]

    for _ in range(2):  # who comes back has a new line of answers
        assert not any(visitor.run("Hi").error for visitor in visitors)
        wait_until(lambda: not kept())
    visitor = visitors[0]
    assert visitor.http.post(load_server.JOIN, json=joined(visitor)).json()["event_id"]
    assert kept(), "what nobody heard yet"
    with visitor.http.stream("GET", load_server.DATA, params={"session_hash": visitor.session}) as stream:
        heard = {message["msg"] for message in load_server.messages(stream.iter_lines())}
    assert "process_completed" in heard
    wait_until(lambda: not kept())


@pytest.mark.parametrize(
    ("password", "given", "headers", "status"),
    [
        (None, "", {}, 404),
        ("secret", "", {}, 401),
        ("secret", "wrong", {}, 401),
        ("secret", "secret", {"Origin": "http://127.0.0.1"}, 403),
        ("secret", "secret", {}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/jobs", "/jobs/1/end"])
def test_only_the_owner_sees_and_ends_jobs(path, password, given, headers, status, server, monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    if password:
        monkeypatch.setenv(PASSWORD, password)
    method = "POST" if path.endswith("end") else "GET"
    assert httpx.request(method, server + path, auth=("owner", given), headers=headers).status_code == status


def test_the_owner_ends_what_runs_and_the_visitor_is_told(server, monkeypatch):
    monkeypatch.setenv(PASSWORD, "secret")
    owner, listed = httpx.Client(base_url=server, auth=("owner", "secret")), []

    def end(value: dict) -> bool:
        if not listed and any(value.get("texts", ())):
            listed.extend(owner.get("/jobs").json())
            owner.post(f"/jobs/{listed[0]['number']}/end")
        return False

    ended = Visitor(server, 7).run(ENDLESS, 1024, end)
    assert (listed[0]["question"], listed[0]["address"], listed[0]["waits"]) == ("Comparison", "127.0.1.8", False)
    assert ended.value["status"] == "Ended early: the owner of this server ended it"


def test_health_says_when_a_step_hangs(server, monkeypatch):
    assert httpx.get(f"{server}/healthz").status_code == 200
    monkeypatch.setattr(type(app.JOBS.machine.thread), "silent_seconds", 10**6)
    answer = httpx.get(f"{server}/healthz")
    assert (answer.status_code, answer.json()["state"]) == (503, "hangs")


def test_a_c_call_that_never_returns_is_given_up_and_the_next_run_is_answered(server, monkeypatch):
    """A read of a pipe that nobody writes to, in the compute thread and without the GIL, as a hung kernel is."""
    assert Visitor(server).run("Hi").texts, "all is loaded"
    (reads, writes), thread, forward = os.pipe(), app.JOBS.machine.thread, Generation._forward
    calls, given_up, worker = [], thread.given_up, thread._worker

    def hang(self, ids: list[int]) -> Token:
        if len(calls) == 2:  # tokens are there
            ctypes.CDLL(None).read(reads, ctypes.create_string_buffer(1), 1)
        calls.append(ids)
        return forward(self, ids)

    with monkeypatch.context() as patched:
        patched.setattr(Generation, "_forward", hang)
        patched.setattr(thread, "patience", 3.0)
        hung = Visitor(server, 2).run("Hi")
    assert "Ended early: a step did not come back for 3 s and was given up" in hung.value["status"]
    assert hung.texts and len(calls) == 2 and thread.given_up == given_up + 1
    ended = Visitor(server, 3).run("Hi")
    assert (ended.error, len(ended.texts)) == ("", 2)
    os.write(writes, b"x")
    worker.join(PATIENCE)
    assert not worker.is_alive(), "the thread that was given up ends with its call"


@contextmanager
def server_process(folder: Path, log: IO[str], *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The app in a process of its own, whose temporary files are in `folder`; yields its address and the process."""
    port = app.free_address("127.0.0.1", "0")[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu", *flags]
    ours = os.environ | {"TMPDIR": str(folder)}
    server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=ours)
    try:
        wait_for(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_ended_tells_its_visitors_and_leaves_nothing(number, demo, tmp_path):
    said = []
    with tempfile.TemporaryFile("w+") as log:
        with server_process(tmp_path, log) as (address, server):
            assert len(list(tmp_path.glob(f"{FOLDER}*"))) == 1
            monkeyed = Visitor(address)
            monkeyed.model, monkeyed.methods = "demo", ("fp16", "llm-int8")

            def end(value: dict) -> bool:
                if not said and any(value.get("texts", ())):
                    said.append(server.send_signal(number))
                return False

            ended = monkeyed.run(ENDLESS, 512, end)
            assert ended.value["status"] == "Ended early: the server is ending"
            assert server.wait(PATIENCE) == 0
        log.seek(0)
        assert "Traceback" not in log.read()
    assert not list(Path(tmp_path).glob(f"{FOLDER}*"))


def test_where_no_file_can_grow_the_result_is_shown_and_the_rest_refused_in_a_sentence(tiny_folder, tmp_path):
    """The kernel refuses every write to a file of the server's, as a full disk does."""
    model, methods = str(tiny_folder), ("fp16", "int8-weight-only")
    flags = ("--model", model, "--methods", ",".join(methods))

    def upload(address: str) -> httpx.Response:
        return httpx.post(f"{address}/gradio_api/upload", files={"files": ("run.jsonl", b"x" * 1000)})

    with tempfile.TemporaryFile("w+") as log, server_process(tmp_path, log, *flags) as (address, server):
        visitor = Visitor(address)
        visitor.model, visitor.methods = model, methods
        assert visitor.run("Hi").value["status"] == "Finished."
        before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, before[1]))
        full = visitor.run("Hi")
        assert (full.error, len(full.texts), full.value["status"]) == ("", 2, f"Finished. {UNSAVED}")
        refused = upload(address)
        assert (refused.status_code, refused.json()["error"].partition(";")[0]) == (507, "the server's disk is full")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)
        assert visitor.run("Hi").value["status"] == "Finished." and upload(address).status_code == 200
