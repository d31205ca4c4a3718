"""What stands in front of the page: headers, foreign pages, guesses, failures; on the real server where Gradio is."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from browser_support import compare_inputs
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, StreamingResponse
from starlette.routing import Route
from test_api import served

import app
from llmq.ui.shell.access import Access
from llmq.ui.shell.guard import HEADERS, Answers, Door, policy
from llmq.ui.shell.guesses import AT_ONCE, EVERY_SECONDS, Guesses
from llmq.ui.shell.state import AppState

SECRET = "/opt/somewhere/secret.py"


def state(**more) -> AppState:
    return AppState(run=lambda job, owner: iter(()), stop=lambda owner: 0, device="cpu", device_label="CPU", **more)


@contextmanager
def asked(**options) -> Iterator[httpx.Client]:
    with served(state(access=Access.of_strangers()), **options) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture(scope="module")
def client():
    with asked() as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/config", "/nothing", "/theme.css", "/gradio_api/call/v2/nothing"])
def test_every_answer_has_its_headers(client, path):
    method = "POST" if "call" in path else "GET"
    headers = client.request(method, path, **({"json": {}} if method == "POST" else {})).headers
    assert {name: headers[name] for name in HEADERS if name != "Content-Security-Policy"} == {
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
    }  # fmt: skip
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'self'" and rules["object-src"] == "'none'" and "connect-src" not in rules
    assert "unsafe-inline" not in rules["script-src"] and "*" not in rules["script-src"]
    assert "https://huggingface.co" in rules["frame-ancestors"]
    assert ("sha256" in rules["script-src"]) == (path == "/")


def ancestors(answer: httpx.Response) -> list[str]:
    """Who may show an answer in a frame."""
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    return rules["frame-ancestors"].split()


def test_the_owner_names_sites_that_may_show_the_page(client):
    named = ["https://school.example", "http://*.uni.example:8000"]
    options = app.parse(["--model", "demo", "--device", "cpu", "--allow-frames", ", ".join(named)])
    with served(app.make_state(options)) as address:
        assert ancestors(httpx.get(address)) == [*ancestors(client.get("/")), *named]


@pytest.mark.parametrize(
    "site", ["school.example", "https://a b", "https://x; script-src *", "'none'", "*", "https://x/y"]
)
def test_what_is_no_site_is_refused_in_a_line(site, capsys):
    assert app.main(["--allow-frames", f"https://school.example,{site}", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--allow-frames is {site!r}; choose sites such as https://" in line


def test_a_page_may_run_the_scripts_that_it_has_and_no_other():
    assert policy(b"<script>a</script><script type=module src=x></script>").count("sha256") == 1
    assert policy(b"<script>a</script>") != policy(b"<script>b</script>") != policy()


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "x"])
@pytest.mark.parametrize("sign", [{}, {"X-Forwarded-For": "127.0.0.1"}])
def test_a_foreign_page_reaches_nothing(client, origin, sign):
    headers = {"Origin": origin, **sign}
    for path, sent in (
        ("/gradio_api/upload", {"files": {"files": ("x.jsonl", b"x")}}),
        ("/gradio_api/queue/join", {"json": {"data": [], "fn_index": 0, "session_hash": "x"}}),
        ("/gradio_api/reset", {"json": {}}), ("/login", {"data": {"username": "a", "password": "b"}}),
    ):  # fmt: skip
        answer = client.post(path, headers=headers, **sent)
        assert answer.status_code == 403 and "its own address" in answer.json()["error"]
    asks = headers | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-forwarded-host"}
    refused = client.options("/gradio_api/upload", headers=asks)
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


def test_the_page_itself_and_whoever_serves_it_further_are_let_in(client, monkeypatch):
    own = str(client.base_url).rstrip("/")
    for headers in (
        {"Origin": own}, {}, {"Origin": "https://class.example", "X-Forwarded-Host": "class.example"},
        {"Origin": "https://CLASS.example", "Host": "class.example"},
    ):  # fmt: skip
        assert client.get("/config", headers=headers).status_code == 200
    monkeypatch.setenv("SPACE_HOST", "me-llmq.hf.space")
    monkeypatch.setenv("GRADIO_ROOT_PATH", "https://school.example/llmq")
    for origin in ("https://me-llmq.hf.space", "https://school.example"):
        assert client.post("/gradio_api/reset", headers={"Origin": origin}, json={}).status_code == 422


def test_an_address_is_forwarded_by_a_trusted_proxy_only(monkeypatch):
    """As docs/security.md says: the proxy's word counts, anybody else keeps his own address."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.1.0.0/16")
    seen = []
    kept = state()
    kept.run = lambda job, owner: iter(seen.append(owner.address) or ())
    with served(kept) as address:
        for sender in ("127.1.0.5", "127.2.0.5"):
            with httpx.Client(base_url=address, transport=httpx.HTTPTransport(local_address=sender)) as client:
                said = {"X-Forwarded-For": "203.0.113.7"}
                event = client.post("/gradio_api/call/v2/quality", json={}, headers=said).json()["event_id"]
                client.get(f"/gradio_api/call/quality/{event}", timeout=60)
    assert seen == ["203.0.113.7", "127.2.0.5"]


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "words"),
    [
        ("POST", "call/v2/nothing", {"json": {}}, 404, "no endpoint is called 'nothing'"),
        ("POST", "call/nothing", {"json": {"data": []}}, 404, "no endpoint is called 'nothing'"),
        ("POST", "run/nothing", {"json": {"data": []}}, 404, "no endpoint is called 'nothing'"),
        ("POST", "call/v2/memory", {"json": {"nope": 1}}, 400, "`nope` is not a valid key-word argument"),
        ("POST", "queue/join", {"json": {"data": [], "fn_index": 10**6, "session_hash": "x"}}, 400, "reload the page"),
        ("POST", "component_server", {"json": {"component_id": -1, "fn_name": "x", "data": 0, "session_hash": "x"}},
         400, "reload the page"),
        ("POST", "run/memory", {"json": {"data": [5]}}, 400, "takes 7 values and 1 are given"),
        ("GET", "proxy=http://169.254.169.254/", {}, 404, "no such address"),
        ("GET", "../monitoring/summary", {}, 404, "no such address"),
        ("GET", f"../static/{'x' * 3000}", {}, 404, "no such file"),
    ],
)  # fmt: skip
def test_what_gradio_cannot_answer_is_a_sentence_and_a_line(client, caplog, capfd, method, path, sent, status, words):
    answer = client.request(method, f"/gradio_api/{path}", **sent)
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text
    assert len(caplog.records) <= 1 and not any(record.exc_info for record in caplog.records)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_value_that_a_slider_refuses_is_no_stack_in_the_log(client, capfd):
    config = client.get("/config").json()
    (pressed,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "generate")
    event = next(d["id"] for d in config["dependencies"] if [pressed, "click"] in d["targets"])
    body = {"data": compare_inputs("x", tokens=10**6), "fn_index": event, "session_hash": "x"}
    answer = client.post("/gradio_api/run/predict", json=body)
    assert answer.status_code == 400 and "1000000" in answer.json()["error"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyError(SECRET), 400), (OSError(errno.ENOSPC, SECRET), 507), (OSError(errno.EACCES, SECRET), 500),
     (RuntimeError(SECRET), 500), (RecursionError(SECRET), 400), (FileNotFoundError(errno.ENOENT, SECRET), 404)],
)  # fmt: skip
def test_no_failure_tells_a_place_on_the_server(error, status, caplog):
    async def fail(request):
        raise error

    asgi = Starlette(routes=[Route("/x", fail)], middleware=[Middleware(Answers)])
    answer = ask(asgi, "/x")
    assert answer.status_code == status and list(answer.json()) == ["error"] and SECRET not in answer.text
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()


def test_a_stream_that_breaks_ends_and_is_one_line(caplog):
    async def lines():
        yield "data: 1\n\n"
        raise RuntimeError(SECRET)

    async def stream(request):
        return StreamingResponse(lines())

    answer = ask(Starlette(routes=[Route("/x", stream)], middleware=[Middleware(Answers)]), "/x")
    assert (answer.status_code, answer.text) == (200, "data: 1\n\n") and len(caplog.records) == 1


def test_a_page_in_pieces_is_whole_and_named_by_all_its_scripts():
    async def page(request):
        return StreamingResponse(iter(["<script>a</scr", "ipt><script>b</script>"]), media_type="text/html")

    answer = ask(Starlette(routes=[Route("/x", page)], middleware=[Middleware(Answers)]), "/x")
    assert answer.text.endswith("b</script>") and answer.headers["content-security-policy"].count("sha256") == 2


def test_an_event_that_fails_is_a_sentence_and_a_line(caplog, capfd, monkeypatch):
    def fail():
        raise RuntimeError(f"in {SECRET}")

    monkeypatch.setattr("llmq.face.names", fail)
    with asked() as client:
        answer = client.post("/gradio_api/run/models", json={"data": []})
        told = client.post("/gradio_api/run/memory", json={"data": ["demo", "fp16", "x", 1, 0, 1, None]})
    assert answer.status_code == told.status_code == 400
    assert "threshold" in told.json()["error"]
    assert "Traceback" not in capfd.readouterr().err


def ask(asgi, path: str, method: str = "GET", address: str = "1.1.1.1", **headers) -> httpx.Response:
    async def asking():
        transport = httpx.ASGITransport(asgi, client=(address, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=headers)

    with ThreadPoolExecutor(1) as elsewhere:  # the main thread's loop may be a browser test's
        return elsewhere.submit(asyncio.run, asking()).result()


def test_guesses_are_slowed_an_address_and_the_right_one_costs_none():
    now = [0.0]
    guesses = Guesses(lambda: now[0])
    assert [guesses.take("a") for _ in range(AT_ONCE)] == [0.0] * AT_ONCE
    assert guesses.take("a") == EVERY_SECONDS and guesses.take("b") == 0.0
    now[0] += EVERY_SECONDS
    assert guesses.take("a") == 0.0 < guesses.take("a")
    guesses.give_back("a")
    assert guesses.take("a") == 0.0, "a right password is not counted"


@pytest.mark.parametrize(
    ("path", "method", "refusal"), [("/login", "POST", 400), ("/jobs", "GET", 401), ("/jobs/7/end", "POST", 401)]
)
def test_whoever_guesses_waits_and_another_address_gets_in(path, method, refusal):
    """300 guesses took 5 seconds once."""

    async def asked_for(request):
        return HTMLResponse("", 200 if request.query_params["password"] == "right" else refusal)

    door = Door(Starlette(routes=[Route(path, asked_for, methods=[method])]), list, Guesses())

    def guess(password: str, address: str) -> httpx.Response:
        return ask(door, f"{path}?password={password}", method, address, Authorization="Basic ...")

    wrong = [guess("wrong", "6.6.6.6") for _ in range(60)]
    assert sum(answer.status_code == refusal for answer in wrong) == AT_ONCE
    assert wrong[-1].status_code == 429 and re.search(r"again in \d+ s", wrong[-1].json()["error"])
    assert int(wrong[-1].headers["retry-after"]) >= 1
    assert [guess("right", "1.1.1.1").status_code for _ in range(3 * AT_ONCE)] == [200] * 3 * AT_ONCE


def test_the_password_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("LLMQ_AUTH", "class:secret")
    assert app.parse_auth(app.parse([]).auth) == ("class", "secret")
    assert app.parse(["--auth", "a:b"]).auth == "a:b"
    with asked(auth=("class", "secret")) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "class", "password": "secret"}).status_code == 200


def test_an_upload_is_as_large_as_a_visitor_s_may_be():
    small = Access(models=("demo",), upload_bytes=1000)
    with served(state(access=small)) as address:
        sizes = {"x.jsonl": 900, "y.jsonl": 5000}
        statuses = [
            httpx.post(f"{address}/gradio_api/upload", files={"files": (name, b"x" * size)}).status_code
            for name, size in sizes.items()
        ]
    assert statuses == [200, 413]
