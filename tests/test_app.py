"""The composition root: flags, the wrapper for shared GPUs, and one-line refusals."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import types

import gradio
import httpx
import pytest

import app
from llmq.errors import ModelUnavailable, UserError
from llmq.ui import layout
from llmq.ui.shell import address
from llmq.ui.shell.access import Access


@pytest.fixture
def spaces(monkeypatch):
    """The package that lends a GPU; keeps the seconds it is asked for, and refuses the question 'too much'."""
    asked = []

    def gpu(duration):
        def borrow(function):
            def inside(*arguments):
                asked.append(duration(*arguments))
                if arguments[0] == "too much":
                    raise gradio.Error("You have exceeded your quota. Try again in 3:20.")
                yield from function(*arguments)

            return inside

        return borrow

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    return asked


def test_what_a_gpu_is_lent_to_is_the_decorated_function(spaces):
    ask = app.lend(lambda *arguments: iter(arguments), lambda question, number: 7 * number)
    assert (list(ask("question", 3)), spaces) == (["question", 3], [21])


def test_the_hosts_refusal_is_one_that_pages_and_programs_show(spaces):
    with pytest.raises(UserError, match="^the host of the GPU says: You have exceeded your quota. Try again in 3:20.$"):
        list(app.lend(lambda *_: iter(()), lambda *_: 1)("too much", 0))


@pytest.mark.parametrize(("said", "lent"), [(None, False), ("", False), ("false", False), ("true", True), ("1", True)])
def test_a_gpu_is_lent_where_the_host_says_so(said, lent, monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    if said is not None:
        monkeypatch.setenv("SPACES_ZERO_GPU", said)
    assert app.gpu_is_lent() == lent
    assert ("bnb-int8" in app.default_methods("cuda:0")) != lent


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nope"], ["nope", "demo", "llama-2-7b-chat"]),
        (["--methods", "fp16,int3"], ["int3", "bnb-int8"]),
        (["--device", "cuda:7"], ["cuda:7", "cpu"]),
        (["--auth", "nobody"], ["--auth", "USER:PASSWORD"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(flags, words, capsys, monkeypatch):
    assert_refused(["--port", "0", "--device", "cpu", *flags], words, capsys, monkeypatch)


def assert_refused(flags, words, capsys, monkeypatch):
    """Before anything is fetched."""
    monkeypatch.setattr(app, "fetch", lambda state: pytest.fail("nothing is to be fetched"))
    assert app.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in words if word not in line] == []


@pytest.fixture
def taken():
    """A port of this machine that another program serves."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


BOTH_FLAGS = ["--port", "--host"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "99999"], ["'99999'", "1 to 65535"]),
        (["--port", "-1"], ["'-1'", "1 to 65535"]),
        (["--port", "http"], ["'http'", "1 to 65535"]),
        (["--port", ""], ["''", "1 to 65535"]),
        (["--host", "not.a.host"], ["not.a.host", *BOTH_FLAGS]),
        (["--host", "a..b"], ["a..b", *BOTH_FLAGS]),
        (["--host", ""], BOTH_FLAGS),
        (["--host", "192.0.2.1"], ["192.0.2.1", *BOTH_FLAGS]),  # an address of nobody, for documents
    ],
)
def test_an_address_that_cannot_be_had_is_refused_before_anything_is_loaded(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(app, "make_state", lambda *_: pytest.fail("nothing is to be loaded"))
    assert_refused(flags, words, capsys, monkeypatch)


@pytest.mark.parametrize("way", ["flag", "variable"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_is_taken_is_refused_and_the_way_out_named(way, host, taken, capsys, monkeypatch):
    if way == "variable":
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(taken))
    flags = ["--host", host] + (["--port", str(taken)] if way == "flag" else [])
    assert_refused(flags, [str(taken), "already in use", *BOTH_FLAGS, "0: any free one"], capsys, monkeypatch)


def test_a_port_that_needs_more_rights_is_refused(capsys, monkeypatch):
    def bind(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(address, "socket", types.SimpleNamespace(**vars(socket) | {"socket": refusing(bind)}))
    assert_refused(["--port", "80"], ["80", "Permission denied", *BOTH_FLAGS], capsys, monkeypatch)


def refusing(bind):
    return type("Refusing", (socket.socket,), {"bind": bind})


def served(monkeypatch, *flags) -> tuple[str, int]:
    """Where the app would serve its page."""
    found = []
    monkeypatch.setattr(app, "make_state", lambda *_: types.SimpleNamespace(model="demo", methods=()))
    monkeypatch.setattr(app, "fetch", lambda *_: None)
    monkeypatch.setattr(app, "serve", lambda state, *, host, port, **_: found.append((host, port)))
    assert app.main(list(flags)) == 0
    return found[0]


def test_without_a_port_the_next_free_one_is_taken(taken, monkeypatch):
    monkeypatch.setattr(address, "DEFAULT_PORTS", range(taken, taken + 100))
    assert taken < served(monkeypatch)[1] < taken + 100


def test_port_0_is_any_free_port(monkeypatch):
    host, port = served(monkeypatch, "--port", "0")
    assert host == "127.0.0.1" and port > 0


def test_gradios_variables_hold_where_no_flag_does(taken, monkeypatch):
    free = app.free_address("127.0.0.1", "0")[1]
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(free))
    assert served(monkeypatch) == ("0.0.0.0", free)
    monkeypatch.setenv("GRADIO_SERVER_NAME", "not.a.host")
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(taken))
    assert served(monkeypatch, "--host", "localhost", "--port", str(free)) == ("localhost", free)
    assert not {"GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"} & os.environ.keys(), "Gradio would try them as well"


def test_a_space_serves_every_network_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "me/llmq")
    assert served(monkeypatch, "--port", "0")[0] == "0.0.0.0"
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.1")
    assert served(monkeypatch, "--port", "0")[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_gets_the_brackets_of_a_url(host):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        assert app.free_address(host, "0")[0] == "[::1]"
    except UserError as error:
        assert "::1" in str(error)  # compiled in, but not configured


def test_a_port_lost_while_the_model_was_fetched_is_one_line(capsys, monkeypatch):
    def launch(*_, **__):
        raise OSError("Cannot find empty port")

    monkeypatch.setattr(app, "make_state", lambda *_: types.SimpleNamespace(model="demo", methods=()))
    monkeypatch.setattr(app, "fetch", lambda *_: None)
    monkeypatch.setitem(sys.modules, "llmq.ui.launch", types.SimpleNamespace(launch=launch))
    assert app.main(["--port", "0"]) == 2
    assert "Cannot find empty port" in capsys.readouterr().err


def test_where_no_model_can_be_had_the_page_opens_in_recordings(capsys, monkeypatch):
    """A model that somebody named is another matter: that it cannot be had is all there is to say."""
    served = []

    def fails(state):
        raise ModelUnavailable("the demo model cannot be fetched: no <b>network</b>")

    monkeypatch.setattr(app, "fetch", fails)
    monkeypatch.setattr(app, "serve", lambda state, **_: served.append(state))
    assert app.main(["--device", "cpu", "--port", "0"]) == 0
    assert capsys.readouterr().err.count("\n") == 2
    (state,) = served
    assert "no &lt;b&gt;network" in layout._unable(state)
    state.access = Access.of_strangers()
    assert "network" not in layout._unable(state)
    assert app.main(["--device", "cpu", "--port", "0", "--model", "demo"]) == 2
    assert len(served) == 1


def test_an_interrupt_while_the_model_is_fetched_is_no_traceback(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "make_state", interrupted)
    assert (app.main(["--port", "0"]), capsys.readouterr().err) == (130, "llmq: stopped\n")


def test_what_the_first_run_needs_is_imported_once_the_page_has_been_opened(demo):
    """Not before: the page would wait for it."""
    code = """
import sys, threading, httpx, app
from llmq.ui.launch import launch
state = app.make_state(app.parse(["--model", "demo", "--device", "cpu"]))
app.fetch(state)
host, port = app.free_address("127.0.0.1", "0")
launch(state, host=host, port=port, block=False)
print("torch" in sys.modules, state.opened.is_set())
httpx.get(f"http://{host}:{port}/healthz")
httpx.get(f"http://{host}:{port}/")
print(state.opened.wait(60))
(warm,) = (thread for thread in threading.enumerate() if thread.name == "warm-up")
warm.join(120)
print("transformers.models.llama" in sys.modules)
app.leave(0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=app.RUNS.parents[1], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "True", "True"], done.stderr


def test_auth_is_a_name_and_a_password():
    assert app.parse_auth("class:secret:with:colons") == ("class", "secret:with:colons")
    assert app.parse_auth(None) is None
    with pytest.raises(UserError):
        app.parse_auth(":secret")


def test_the_path_of_a_proxy_is_before_every_address_of_the_page(monkeypatch):
    from llmq.ui.launch import launch
    from llmq.ui.shell.state import AppState

    monkeypatch.setenv("GRADIO_ROOT_PATH", "/classes/llmq")
    host, port = app.free_address("127.0.0.1", "0")
    state = AppState(run=lambda job, owner: iter(()), stop=lambda owner: 0, device="cpu", device_label="CPU")
    page = launch(state, host=host, port=port, block=False)
    try:
        assert httpx.get(f"http://{host}:{port}/config").json()["root"].endswith("/classes/llmq")
    finally:
        page.close()
