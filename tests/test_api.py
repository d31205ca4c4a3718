"""The server for programs: every way to ask gives the JSON of the command line, and an error is one line."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from tiny_runs import PROMPT, light

import app
from llmq.cli import build_parser
from llmq.errors import Ended
from llmq.events import Progress, Step, Waiting
from llmq.labs import lab_classes
from llmq.labs.advice import METHODS
from llmq.labs.causal import FIELD as CAUSAL
from llmq.labs.compare import Comparison
from llmq.labs.race import FIELD
from llmq.ui.launch import launch
from llmq.ui.shell.state import AppState

MCP = find_spec("mcp") is not None
needs_mcp = pytest.mark.skipif(not MCP, reason="needs the package mcp")
PATIENCE = 60  # seconds until what does not come is a failure
WHERE = {"model": "demo", "device": None, "threshold": 6.0}
WINDOWS = {"windows": 1, "text": "english"}
READ = {"prompt": ..., "read": "continuation", "baseline": "fp16", "method": "bnb-int8", "new_tokens": 32}
TABLE = {  # endpoint -> its parameters and their defaults; ...: it must be given
    "compare": {
        "prompt": ..., **WHERE, "methods": "fp16,bnb-int8", "max_new_tokens": 128, "temperature": 0.0, "top_k": 0,
        "top_p": 1.0, "seed": 0, "schedule": "interleave", "engine": "auto", "random_weights": False,
        "sent": "messages",
    },
    "ablation": {**WINDOWS, **WHERE},
    "agreement": READ | WHERE,
    "amplifying": {
        **WINDOWS, "factors": "1,4,16,64", "channels": "", "spread": 3, "methods": "fp16,llm-int8,vectorwise,absmax",
        **WHERE,
    },
    "attention": {"longest": 2048, "dtype": "bfloat16", **WHERE},
    "causal": {**WINDOWS, "methods": CAUSAL, "changes": 3, **WHERE},
    "decoding": {
        "prompt": "", "methods": "llm-int8", "tokens": 40, "width": 4, "temperature": 0.7, "top_k": 40, "top_p": 0.9,
        "seed": 0, **WHERE,
    },
    "kv_cache": {"longest": 256, **WHERE},
    "paged_cache": {"requests": 8, "longest": 256, "page": 16, **WHERE},
    "rounded_cache": {**WINDOWS, **WHERE},
    "explain_token": READ | {"token": None, "patch": True, **WHERE},
    "outliers": {"prompt": "", "method": "bnb-int8", "new_tokens": 8, "sweep": "", **WHERE},
    "quality": {
        "checkpoint": "", "other": "", "methods": "fp16,bnb-int8", "engine": "auto", "text": "", "tokens": 4096,
        "reading": "pooled", "floor": True, **WHERE,
    },
    "race": {"methods": FIELD, "tokens": 2048, **WHERE},
    "rounding": {
        "layer": "", "what": "input", "prompt": "", "numbers": "", "method": "absmax", "bits": 4, "group": 128,
        "outlier": 0.0, **WHERE,
    },
    "sensitivity": {**WINDOWS, "method": "llm-int8", "by": "modules", "room": 3.0, "joined": True, **WHERE},
    "server": {
        "server": "openai@http://localhost:8000/v1", "prompt": "", "methods": "fp16,llm-int8", "tokens": 64,
        "sent": "messages", "read": "answer", **WHERE,
    },
    "silencing": {**WINDOWS, "prompt": "", "counts": "1,2,4,8", "draws": 3, **WHERE},
    "thresholds": {**WINDOWS, "method": "llm-int8", "thresholds": "0,2,4,6,8,inf", **WHERE},
    "memory": {
        "model": "demo", "methods": "fp16,bnb-int8", "threshold": 6.0, "context": 2048, "new_tokens": 0, "batch": 1,
        "device_memory": None,
    },
    "advise": {
        "model": "demo", "device": None, "methods": METHODS, "threshold": 6.0, "context": 2048, "batch": 1,
        "device_memory": None,
    },
    "models": {},
    "methods": {},
}  # fmt: skip
QUESTIONS = {  # endpoint -> what is asked on both sides
    "compare": {"prompt": PROMPT, "methods": "fp16,bnb-int8@0.5", "max_new_tokens": 4, "temperature": 0.7, "seed": 3},
    "outliers": {"prompt": PROMPT, "threshold": 2.5, "new_tokens": 2},
    "agreement": {"prompt": PROMPT, "method": "llm-int8", "threshold": 1.0, "new_tokens": 3},
    "explain_token": {"prompt": PROMPT, "method": "bnb-int8@1", "new_tokens": 3, "token": 5, "patch": False},
    "quality": {"methods": "llm-int8", "tokens": 1024},
    "rounding": {"layer": "0.q_proj", "what": "weight", "method": "rtn", "bits": 3, "outlier": 2.0},
    "memory": {"methods": "bnb-int8,llm-int8", "context": 100, "device_memory": "1GiB"},
    "advise": {"methods": "fp16,llm-int8", "context": 100, "device_memory": "t4"},
    "models": {},
}
REFUSED = [  # endpoint, what is asked, a word of the refusal
    ("compare", {"prompt": PROMPT, "methods": "int3"}, "unknown method 'int3'; choose from fp16, "),
    ("compare", {"prompt": PROMPT, "max_new_tokens": 0}, "max_new_tokens is 0; choose a whole number from 1 to 4096"),
    ("compare", {"prompt": PROMPT, "threshold": -1, "methods": "fp16"}, "threshold is -1"),
    (
        "compare",
        {"prompt": PROMPT, "schedule": "both"},
        "unknown schedule 'both'; choose from interleave, in-turn, parallel",
    ),
    ("compare", {"prompt": PROMPT, "device": "cuda:7"}, "device 'cuda:7' is not here"),
    ("compare", {"prompt": " "}, "the prompt is empty"),
    ("outliers", {"prompt": PROMPT, "threshold": 0}, "threshold is 0: with the decomposition off"),
    ("outliers", {"prompt": PROMPT, "model": "nope"}, "unknown model 'nope'"),
    ("agreement", {"prompt": PROMPT, "method": "fp16"}, "both methods are fp16"),
    ("quality", {"tokens": 5}, "tokens is 5; choose a whole number from 1024"),
    ("memory", {"batch": 0}, "context is 2048 and batch is 0; both must be at least 1"),
    ("memory", {"context": 10**25}, "and their product 1e+12 at most"),
    ("memory", {"device_memory": "cow"}, "device memory is 'cow'; choose a number over 0 in GB"),
    ("amplifying", {"channels": "x"}, "channel is 'x'"),
]
MISTYPED = [
    ("compare", {"prompt": 5}, "prompt is 5; give text"),
    ("compare", {"prompt": PROMPT, "methods": ["fp16"]}, 'methods is ["fp16"]; give text'),
    ("compare", {"prompt": PROMPT, "max_new_tokens": "4"}, 'max_new_tokens is "4"; give a whole number'),
    ("compare", {"prompt": PROMPT, "max_new_tokens": 2.5}, "max_new_tokens is 2.5; give a whole number"),
    ("compare", {"prompt": PROMPT, "temperature": True}, "temperature is true; give a number"),
    ("compare", {"prompt": PROMPT, "random_weights": 1}, "random_weights is 1; give true or false"),
    ("memory", {"device_memory": [15]}, "device_memory is [15]; give text or a number or null"),
    ("explain_token", {"prompt": PROMPT, "token": []}, "token is []; give a whole number or null"),
    ("quality", {"engine": {}}, "unknown engine {}; choose from auto, hf, lean"),
]
# What differs from run to run, and how long a visitor's comparison may take: less than at one's own terminal.
PASSING = {"load_seconds", "prefill_seconds", "decode_tokens_per_second", "date", "max_seconds"}


@contextmanager
def served(state: AppState, **options) -> Iterator[str]:
    host, port = app.free_address("127.0.0.1", "0")
    page = launch(state, host=host, port=port, block=False, **options)
    try:
        yield f"http://{host}:{port}"
    finally:
        page.close()


@pytest.fixture(scope="module")
def server(tiny_folder):
    options = app.parse(["--model", str(tiny_folder), "--methods", "fp16,bnb-int8", "--device", "cpu"])
    with light(), served(app.make_state(options), mcp=MCP) as address:
        yield address


def through_client(address: str, name: str, asked: dict) -> dict:
    return Client(address, verbose=False).predict(**asked, api_name=f"/{name}")


def through_http(address: str, name: str, asked: dict) -> dict:
    """As curl would: a POST with the parameters by name, then a GET of the stream; the last data are the answer."""
    event, data = messages(address, f"v2/{name}", asked)[-1]
    assert event == "complete"
    return data[0]


def messages(address: str, path: str, body: dict) -> list[tuple[str, list | dict]]:
    """Every event of the stream with its data."""
    with httpx.Client(base_url=f"{address}/gradio_api/call/", timeout=PATIENCE) as client:
        asked = client.post(path, json=body)
        assert asked.status_code == 200, asked.text
        lines = client.get(f"{path}/{asked.json()['event_id']}").text.splitlines()
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return [pair for pair in zip(events, data, strict=True) if pair[0] != "heartbeat"]


def with_mcp(address: str, ask):
    """What `ask(session)` comes to over a connection of its own."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def asking():
        async with streamablehttp_client(f"{address}/gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()
                return await ask(session)

    return asyncio.run(asking())


def called(address: str, name: str, asked: dict) -> tuple[bool, str]:
    """Whether an MCP tool failed, and its text."""
    answer = with_mcp(address, lambda session: session.call_tool(name, asked))
    (content,) = answer.content
    return answer.isError, content.text


def through_mcp(address: str, name: str, asked: dict) -> dict:
    failed, text = called(address, name, asked)
    assert not failed, text
    return json.loads(text)


WAYS = [through_client, through_http, pytest.param(through_mcp, marks=needs_mcp)]


def steady(value):
    """What two runs of one question share."""
    if isinstance(value, dict):
        return {key: steady(entry) for key, entry in value.items() if key not in PASSING}
    return [steady(entry) for entry in value] if isinstance(value, list) else value


def words_of(name: str, asked: dict) -> list:
    """The command that asks the same."""
    command = {cls.command[-1].replace("-", "_"): cls.command for cls in lab_classes().values() if cls.command}
    words = [*command.get(name, (name,)), *([asked["prompt"]] if "prompt" in asked else [])]
    for option, value in asked.items():
        if value is False:
            words.append(f"--no-{option}")
        elif option != "prompt":
            words += [f"--{option.replace('_', '-')}", value]
    return [*words, "--json"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_way_gives_the_json_of_the_command_line(name, server, run, tiny_folder):
    asked = QUESTIONS[name] | ({"model": str(tiny_folder)} if "model" in TABLE[name] else {})
    device = {"device": "cpu"} if "device" in TABLE[name] else {}
    status, out, _ = run(*words_of(name, asked | device))
    printed = steady(json.loads(out[-1]))
    assert status == 0 and len(json.dumps(printed)) > 500
    for way in (through_client, through_http, *([through_mcp] if MCP else [])):
        assert steady(way(server, name, asked)) == printed, way.__name__


@pytest.mark.parametrize(("amount", "told"), [(16, 16e9), ("16", 16e9), ("rtx-4080", 16376 * 2**20), (None, None)])
def test_device_memory_is_read_as_at_the_command_line(amount, told, server, tiny_folder):
    asked = {"model": str(tiny_folder), "context": 100, "device_memory": amount}
    assert through_http(server, "memory", asked)["device_memory"] == told


def test_the_methods_are_those_of_the_command_line(server, run):
    _, out, _ = run("models", "--json")
    assert through_client(server, "methods", {}) == {"methods": json.loads(out[-1])["methods"]}


def test_every_endpoint_has_its_parameters_and_nothing_else_is_listed(server):
    found = httpx.get(f"{server}/gradio_api/info").json()
    assert found["unnamed_endpoints"] == {}
    listed = {
        name.removeprefix("/"): {
            p["parameter_name"]: p["parameter_default"] if p["parameter_has_default"] else ...
            for p in endpoint["parameters"]
        }
        for name, endpoint in found["named_endpoints"].items()
    }
    assert listed == TABLE
    for endpoint in found["named_endpoints"].values():
        assert len(endpoint["description"]) > 20 and len(endpoint["returns"]) == 1
        told = {p["parameter_name"]: (p["label"], p["type"]) for p in endpoint["parameters"]}
        assert all(len(label) > 3 and kind for label, kind in told.values()), told


def test_the_document_lists_every_endpoint():
    text = (Path(app.__file__).parent / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.search(r"\n\n((?:    [a-z_ ]+\n)+)", text)[1]
    assert set(listed.split()) == TABLE.keys()


@pytest.mark.parametrize("name", [name for name in TABLE if name != "methods"])
def test_parameters_have_the_names_and_defaults_of_the_flags(name):
    """A switch that is on has a flag to turn it off; a text from a file is a text here; no answer is written there, and
    `bench` is no endpoint, so that advice measures nothing."""
    required = {option: "x" for option, default in TABLE[name].items() if default is ... or option == "prompt"}
    words = words_of(name, {} if name in ("decoding", "server", "silencing", "rounding") else required)
    options = vars(build_parser().parse_args([str(word) for word in words]))
    fields = {"baseline": "baseline", "read": "text", "method": "contestant", "methods": "contestants"}
    for option, default in TABLE[name].items():
        if option == "prompt" or (name, option) == ("quality", "text"):
            continue
        dest = option if option in options else fields[option]
        labs = options[dest] is None  # the command line takes a lab's defaults from its fields
        assert labs or options[dest] == default, option
    left = {
        "json",
        "run",
        "html",
        "save",
        "prompt_file",
        "text_file",
        "save_int8",
        "fetch",
        "measure",
        *fields.values(),
    }
    assert {dest for dest in options if dest not in TABLE[name]} <= left | {*fields.values()}


@pytest.mark.parametrize(("name", "asked", "word"), REFUSED + MISTYPED)
def test_what_cannot_be_done_is_one_line(server, name, asked, word):
    with pytest.raises(AppError) as refused:
        through_client(server, name, asked)
    event, data = messages(server, f"v2/{name}", asked)[-1]
    for said in (str(refused.value), data["error"]):
        assert word in said and "\n" not in said and "Traceback" not in said
    assert event == "error"


@needs_mcp
@pytest.mark.parametrize(("name", "asked", "word"), REFUSED)
def test_an_mcp_client_reads_the_same_line(server, name, asked, word):
    failed, text = called(server, name, asked)
    assert failed and word in text and "\n" not in text


@needs_mcp
def test_an_mcp_client_finds_the_endpoints_as_tools(server):
    tools = with_mcp(server, lambda session: session.list_tools()).tools
    assert {tool.name: list(tool.inputSchema["properties"]) for tool in tools} == {
        name: list(parameters) for name, parameters in TABLE.items()
    }
    for tool in tools:
        assert len(tool.description) > 20
        assert all(len(told["description"]) > 3 for told in tool.inputSchema["properties"].values())
    assert called(server, "compare", {"prompt": PROMPT, "max_new_tokens": "x"})[0]


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("v2/nope", {}, 404, "no endpoint is called 'nope'"),
        ("nope", {"data": []}, 404, "no endpoint is called 'nope'"),
        ("v2/page_compare", {}, 404, "no endpoint is called 'page_compare'"),
        ("v2/compare", {}, 400, "required argument: prompt"),
        ("v2/memory", {"modl": "demo"}, 400, "`modl` is not a valid"),
    ],
)
def test_a_request_that_fits_no_endpoint_is_refused_in_one_line(server, path, body, status, word):
    refused = httpx.post(f"{server}/gradio_api/call/{path}", json=body)
    assert refused.status_code == status and word in refused.json()["error"] and "\n" not in refused.text


def test_values_by_their_place_have_to_be_all(server):
    ((event, data),) = messages(server, "memory", {"data": ["demo"]})
    assert event == "error" and data["error"].startswith("memory takes 7 values and 1 are given")


def test_numbers_that_json_does_not_know_are_refused(server):
    for number in ("NaN", "1e999"):
        body = f'{{"prompt": "x", "temperature": {number}}}'
        headers = {"content-type": "application/json"}
        asked = httpx.post(f"{server}/gradio_api/call/v2/compare", content=body, headers=headers).json()
        text = httpx.get(f"{server}/gradio_api/call/v2/compare/{asked['event_id']}").text
        assert "choose a number from 0 to 2" in text


def test_a_comparison_tells_how_far_it_is_and_ends_with_the_whole(server, tiny_folder):
    asked = {"prompt": PROMPT, "model": str(tiny_folder), "max_new_tokens": 100}
    *before, last = Client(server, verbose=False).submit(**asked, api_name="/compare")
    assert before and all(item.keys() == {"status", "texts"} for item in before)
    whole = {contestant["method"]: contestant["text"] for contestant in last["contestants"]}
    assert all(
        whole[method].startswith(text.rstrip("\ufffd")) for item in before for method, text in item["texts"].items()
    )


def test_two_visitors_ask_at_once_and_get_the_same(server, tiny_folder):
    asked = {"prompt": PROMPT, "model": str(tiny_folder), "max_new_tokens": 20, "api_name": "/compare"}
    jobs = [Client(server, verbose=False).submit(**asked) for _ in range(2)]
    first, second = (job.result(PATIENCE) for job in jobs)
    assert steady(first) == steady(second) and len(first["contestants"][0]["token_ids"]) == 20


class Endless:
    """Jobs that go on until they are stopped or closed; `ended` says so by their owners."""

    def __init__(self):
        self.started, self.ended, self.stopped = [], [], set()
        self.state = AppState(run=self.run, stop=self.stop, device="cpu", device_label="a CPU")

    def run(self, job, owner: str) -> Iterator[object]:
        self.started.append(owner)
        try:
            yield Waiting(seconds=0.0)
            while owner not in self.stopped:
                time.sleep(0.02)
                step = Step(contestant="fp16", index=0, token_id=1, text="a", seconds=0.02, logprob=-1.0)
                yield step if isinstance(job, Comparison) else Progress("reading", 0.5)
        finally:
            self.ended.append(owner)

    def stop(self, owner: str) -> int:
        self.stopped.add(owner)
        return 1


@pytest.fixture(scope="module")
def endless():
    jobs = Endless()
    with served(jobs.state) as jobs.address:
        yield jobs


def wait_until(condition) -> None:
    for _ in range(PATIENCE * 20):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("name", ["compare", "outliers"])
def test_a_job_that_is_cancelled_ends_its_run_and_no_other(endless, name):
    ann, bob = (Client(endless.address, verbose=False) for _ in range(2))
    jobs = [visitor.submit("Hi", api_name=f"/{name}") for visitor in (ann, bob)]
    wait_until(lambda: all(len(job.outputs()) > 1 for job in jobs))
    assert {ann.session_hash, bob.session_hash} <= set(endless.started)
    jobs[0].cancel()
    wait_until(lambda: ann.session_hash in endless.ended)
    seen = len(jobs[1].outputs())
    wait_until(lambda: len(jobs[1].outputs()) > seen)
    assert bob.session_hash not in endless.ended
    jobs[1].cancel()
    wait_until(lambda: bob.session_hash in endless.ended)


def test_a_client_that_is_closed_ends_its_run(endless):
    client = Client(endless.address, verbose=False)
    job = client.submit("Hi", api_name="/compare")
    wait_until(job.outputs)
    client.close()
    wait_until(lambda: client.session_hash in endless.ended)


@pytest.mark.parametrize("name", ["compare", "outliers"])
def test_a_stream_that_is_closed_ends_its_run(endless, name):
    path = f"{endless.address}/gradio_api/call/v2/{name}"
    before = len(endless.ended)
    event = httpx.post(path, json={"prompt": "Hi"}).json()["event_id"]
    with httpx.stream("GET", f"{path}/{event}", timeout=PATIENCE) as stream:
        assert "generating" in next(stream.iter_lines())
    wait_until(lambda: len(endless.ended) > before)
    assert endless.ended[-1] == endless.started[-1]


def test_what_was_stopped_before_it_found_anything_says_so(endless):
    client = Client(endless.address, verbose=False)
    job = client.submit("Hi", api_name="/agreement")
    wait_until(job.outputs)
    endless.stop(client.session_hash)
    with pytest.raises(AppError, match="stopped before anything was found"):
        job.result(PATIENCE)


def test_what_was_found_is_the_answer_where_a_job_is_ended_early():
    """Without anything found the answer says why."""
    step = Step(contestant="fp16", index=0, token_id=1, text="a", seconds=0.02, logprob=-1.0)

    def ended(job, owner):
        yield Waiting(seconds=0.0)
        if isinstance(job, Comparison):
            yield step
        raise Ended("its 120 seconds were over, and others wait")

    state = AppState(run=ended, stop=lambda owner: 0, device="cpu", device_label="a CPU")
    with served(state) as address:
        assert through_client(address, "compare", {"prompt": "Hi"})["contestants"][0]["text"] == "a"
        with pytest.raises(AppError, match="its 120 seconds were over, and others wait"):
            through_client(address, "agreement", {"prompt": "Hi"})


def test_a_bug_is_one_line_as_well():
    def broken(job, owner):
        yield Waiting(seconds=0.0)
        raise ZeroDivisionError("by zero\nsecond line")

    state = AppState(run=broken, stop=lambda owner: 0, device="cpu", device_label="a CPU")
    with served(state) as address:
        with pytest.raises(AppError) as refused:
            through_client(address, "agreement", {"prompt": "Hi"})
    assert str(refused.value) == "ZeroDivisionError: by zero"


def test_without_the_package_the_flag_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    monkeypatch.setattr(app, "make_state", lambda *_: pytest.fail("nothing is to be loaded"))
    assert app.main(["--mcp", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--mcp needs the package mcp" in line and "pip install 'gradio[mcp]" in line


def test_mcp_beside_a_password_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: sys)
    monkeypatch.setattr(app, "make_state", lambda *_: pytest.fail("nothing is to be loaded"))
    assert app.main(["--mcp", "--auth", "a:b", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--auth" in line


def test_the_flag_reaches_gradio(monkeypatch):
    found = []
    monkeypatch.setattr(app, "find_spec", lambda name: sys)
    monkeypatch.setattr(app, "make_state", lambda *_: AppState(None, None, "cpu", "a CPU"))
    monkeypatch.setattr(app, "fetch", lambda *_: None)
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: found.append(options["mcp_server"]))
    assert app.main(["--mcp", "--port", "0"]) == app.main(["--port", "0"]) == 0
    assert found == [True, None]
