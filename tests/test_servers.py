"""Servers as they are named, asked and read, and whatever can be wrong with one: one line that says what happened."""

from __future__ import annotations

import json
import pickle
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from scripted_server import WORDS, Answering, chat, scripted, usage, whole

from llmq.contestant import Contestant, entrant, entrants, shown_about, shown_name
from llmq.errors import BadChoice, UserError
from llmq.servers import reach
from llmq.servers.connection import PATIENCE, Connection, Patience
from llmq.servers.dialects import DIALECTS
from llmq.servers.limits import MOST_EVENT
from llmq.servers.protocol import Broken, Piece, Refused, Request, Stopped, Told, Usage, models_of, piece_of
from llmq.servers.reach import ANYWHERE, Reach, keys_of_environment
from llmq.servers.served import Served

SHORT = Patience(between=0.5, usage=0.5)  # for what hangs
HELLO = Request("Hello", max_tokens=8)
KEY = "sk-very-secret-7f3a"


def heard(server, reach=ANYWHERE, patience=PATIENCE) -> list[Piece]:
    """Every piece of one answer."""
    pieces = []
    with closing(Connection(Served.parse(server.name()), reach, patience)) as connection:
        reply = connection.ask(HELLO, "m")
        while not reply.over:
            if arrived := reply.get(0.05):
                pieces.append(arrived.piece)
        reply.get(0)
    return pieces


def text_before_failing(say, patience) -> tuple[str, str]:
    """The text that came, and the error that ended it."""
    with scripted(say) as server, closing(Connection(Served.parse(server.name()), ANYWHERE, patience)) as connection:
        reply, text = connection.ask(HELLO, "m"), ""
        with pytest.raises(UserError) as error:
            while not reply.over:
                if arrived := reply.get(0.05):
                    text += arrived.piece.text
            reply.get(0)
        return text, str(error.value)


# Names


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("vllm@http://host:8000/v1#a/b", "vllm@http://host:8000/v1#a/b"),
        (" openai@https://host/api/v1/ ", "openai@https://host/api/v1"),
        ("llama.cpp@http://localhost:8080", "llama.cpp@http://localhost:8080/v1"),
        ("tgi@http://[::1]:80/v1#tgi", "tgi@http://[::1]:80/v1#tgi"),
    ],
)
def test_a_server_has_one_name(text, label):
    served = Served.parse(text)
    assert served.label == label and Served.parse(label) == served == entrant(text)
    assert shown_name(label) == served.title and shown_about(label) and served.threshold is None


def test_titles_are_short():
    assert shown_name("vllm@http://host:8000/v1#meta-llama/Llama-3.1-8B") == "vLLM at host:8000, Llama-3.1-8B"
    assert shown_name("ollama@http://host/v1") == "Ollama at host"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp@http://host/v1", "unknown kind of server 'ftp'; choose from openai, vllm"),
        ("http://host/v1", "name one as kind@address#model"),
        ("vllm@file:///etc/passwd", "begins with http:// or https://"),
        ("vllm@http://", "begins with http://"),
        ("vllm@http://host:99999/v1", "no address of a server"),
        ("vllm@http://[::1/v1", "no address of a server"),
        (f"vllm@http://me:{KEY}@host/v1", "holds no key"),
        (f"vllm@http://{KEY}@host/v1", "holds no key"),
        (f"vllm@http://host/v1?api_key={KEY}", "ends before its '?'"),
        ("vllm@http://host/v1#" + "m" * 500, "is no server"),
        ("vllm@http://host/v1\n#m", "is no server"),
    ],
)
def test_what_names_no_server_is_refused(text, said):
    with pytest.raises(BadChoice) as error:
        Served.parse(text)
    assert said in str(error.value) and KEY not in str(error.value)


def test_methods_and_servers_stand_beside_each_other():
    first, second = entrants("llm-int8@4,vllm@http://host:8000/v1#m", 6.0)
    assert first == Contestant.parse("llm-int8@4") and second == Served.parse("vllm@http://host:8000/v1#m")


def test_only_a_comparison_takes_servers(run):
    status, _, errors = run("quality", "--methods", "fp16,vllm@http://host:8000/v1", "--model", "demo")
    assert status == 2 and "vllm@http://host:8000/v1 is a server, which can be compared" in errors[-1]


# Who may be asked, and with which key


def test_keys_are_their_hosts_own():
    keys = keys_of_environment({"LLMQ_SERVER_KEYS": f" host:8000={KEY}  other=a=b "})
    assert keys == {"host:8000": KEY, "other": "a=b"}
    asked = Reach(keys=keys).with_keys({"third": "c"})
    assert asked.key(Served.parse("vllm@http://host:8000/v1")) == KEY
    assert asked.key(Served.parse("vllm@http://host:8001/v1")) is None
    assert KEY not in repr(asked) and pickle.loads(pickle.dumps(asked)) == asked and hash(asked)
    with pytest.raises(UserError, match="entry 2 of LLMQ_SERVER_KEYS is not host=KEY") as error:
        keys_of_environment({"LLMQ_SERVER_KEYS": f"host=a {KEY}"})
    assert KEY not in str(error.value)


def test_strangers_reach_what_the_owner_names_and_nothing_private(monkeypatch):
    addresses = {"a.example": "93.184.216.34", "b.example": "10.0.0.7", "c.example": "::ffff:127.0.0.1"}
    addresses |= {"d.example": "169.254.169.254", "e.example": "fd00::1", "f.example": "2002:7f00:1::"}

    def looked_up(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], port))]

    monkeypatch.setattr(reach.socket, "getaddrinfo", looked_up)
    limited = Reach(frozenset(addresses))
    assert limited.address(Served.parse("vllm@https://a.example/v1")) == "93.184.216.34"
    for host in list(addresses)[1:]:
        with pytest.raises(BadChoice, match="is at a private address, which this page does not ask"):
            limited.address(Served.parse(f"vllm@https://{host}/v1"))
    with pytest.raises(BadChoice, match="asks no server at other.example; it asks a.example, b.example"):
        limited.check(Served.parse("vllm@https://other.example/v1"))
    with pytest.raises(BadChoice, match="asks no server at a.example:8000"):
        limited.check(Served.parse("vllm@https://a.example:8000/v1"))
    with pytest.raises(BadChoice, match="this page asks no server at a.example$"):
        Reach(frozenset()).check(Served.parse("vllm@https://a.example/v1"))


def test_what_was_looked_up_is_what_is_connected_to(monkeypatch):
    """A name that means something else the next time leads nowhere else."""
    with scripted() as server:
        monkeypatch.setattr(Reach, "address", lambda self, served: "127.0.0.1")
        served = Served.parse(f"vllm@http://no.such.host.example:{server.port}/v1#m")
        with closing(Connection(served, Reach(frozenset({served.host})))) as connection:
            assert connection.models() == ("m",)
        assert server.requests[0][1]["Host"] == served.host


# What is sent


def test_every_kind_is_sent_what_it_takes():
    asked = Request("Hi", max_tokens=7, temperature=0.5, top_k=4, top_p=0.9, seed=3, likeliest=9)
    body = asked.body(DIALECTS["vllm"], "m")
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 7, "temperature": 0.5,
        "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, "repetition_penalty": 1.0,
        "seed": 3, "top_p": 0.9,
        "top_k": 4, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    raw = replace(asked, prompt=[1, 2], raw=True, top_k=0).body(DIALECTS["sglang"], "m")
    assert raw["prompt"] == [1, 2] and raw["logprobs"] == 5 and "messages" not in raw and "top_k" not in raw
    greedy = Request("Hi").body(DIALECTS["transformers"], "m")
    assert greedy.keys() == {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    with pytest.raises(BadChoice, match="transformers takes no top-k; choose 0"):
        asked.body(DIALECTS["transformers"], "m")


# What comes back


def test_an_answer_is_heard_whole():
    with scripted() as server:
        pieces = heard(server)
    assert [piece.text for piece in pieces if piece.text] == list(WORDS)
    assert [piece.end for piece in pieces if piece.end] == ["eos"] and pieces[-1].usage == Usage(9, 4)
    assert server.requests[-1][1]["Accept-Encoding"] == "identity"


def test_each_dialects_events_are_read():
    """As each documents its own, cut down to what is read."""
    vllm = {"choices": [{"index": 0, "delta": {"content": " is"}, "token_ids": [318], "finish_reason": None}]}
    assert piece_of(json.dumps(vllm)) == Piece(" is", ids=(318,))
    thinking = {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm"}, "finish_reason": None}]}
    assert piece_of(json.dumps(thinking)).text == "Hm"
    top = [
        {"token": " is", "logprob": -0.1, "bytes": [32, 105, 115]},
        {"token": " was", "logprob": -2.5, "bytes": None},
    ]
    told = {"content": [{"token": " is", "logprob": -0.1, "bytes": [32, 105, 115], "top_logprobs": top}]}
    llama = {"choices": [{"index": 0, "delta": {"content": " is"}, "logprobs": told, "finish_reason": None}]}
    assert piece_of(json.dumps(llama)).tokens == (Told(b" is", -0.1, ((b" is", -0.1), (b" was", -2.5))),)
    older = {"tokens": [" is"], "token_logprobs": [-0.1], "top_logprobs": [{" is": -0.1}], "text_offset": [5]}
    sglang = {"choices": [{"index": 0, "text": " is", "logprobs": older, "finish_reason": "length"}]}
    assert piece_of(json.dumps(sglang)) == Piece(" is", (Told(b" is", -0.1, ((b" is", -0.1),)),), (), 5, "length")
    last = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None}}
    assert piece_of(json.dumps(last)) == Piece(usage=Usage(3, 2))
    transformers = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": last["usage"]}
    assert piece_of(json.dumps(transformers)) == Piece(end="eos", usage=Usage(3, 2))


@pytest.mark.parametrize(
    "event",
    ["7", "[]", '"text"', "null", "{}", '{"choices": 7}', '{"choices": [{}]}', '{"choices": [{"delta": 7}]}']
    + ['{"choices": [{"delta": {"content": 7}}]}', '{"choices": [{"text": ["a"]}]}', "{nope", '{"a": NaN}']
    + ['{"choices": [{"index": 1, "text": "a"}]}', '{"choices": [{"text": "a"}, {"text": "b"}]}', "[" * 100_000]
    + ['{"choices": [{"text": "a", "token_ids": ["x"]}]}', '{"choices": [], "usage": {"prompt_tokens": -1}}']
    + ['{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [0.5]}}]}']
    + ['{"choices": [{"text": "a", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1]}}]}'],
)  # fmt: skip
def test_an_event_that_is_none_breaks_the_answer(event):
    with pytest.raises(Broken):
        piece_of(event)


@pytest.mark.parametrize("text", ["<html>", "7", "[]", '{"data": 7}', '{"data": [{"id": 7}]}', '{"data": [{}]}'])
def test_what_is_no_list_of_models_is_refused(text):
    with pytest.raises(Broken):
        models_of(text)


# What goes wrong


def said(*events: object, status: int = 200, kind: str = "text/event-stream", then: float = 0.0, **headers: str):
    """What a server says that sends `events` and waits."""

    def say(answer: Answering, body: dict) -> None:
        answer.begin(status, kind, **headers)
        for event in events:
            answer.raw(event) if isinstance(event, bytes) else answer.event(event)
        time.sleep(then)

    return say


TOLD_TWICE = {"tokens": ["A"], "token_logprobs": [-1.0], "top_logprobs": None, "text_offset": [0]}
A = {"choices": [{"index": 0, "text": "A", "logprobs": TOLD_TWICE, "finish_reason": None}]}


@pytest.mark.parametrize(
    ("say", "text", "line"),
    [
        (said(b"<html>hello", kind="text/html"), "", "sends no stream of events; is that the address of an API?"),
        (said(b'{"object": "list"}', kind="application/json"), "", "sends no stream of events"),
        (said(chat("A"), then=5.0), "A", "has sent nothing for 0.5 s, and was given up"),
        (said(chat("A"), "{nope"), "A", "sent an event that is not JSON"),
        (said(chat("A"), chat(" b")), "A b", "closed the connection before its answer was over, after 2 pieces of it"),
        (said(chat("A"), {"error": {"message": "CUDA out of memory"}}), "A", "the server says: CUDA out of memory"),
        (said(b'event: error\ndata: {"detail": "gone"}\n\n'), "", "the server says:"),
        (said(chat("A"), chat("B", index=1)), "A", "writes several texts where one was asked for"),
        (said(A, A), "A", "sent a part of its text twice"),
        (said(*[chat("x")] * 9), "x" * 8, "writes on after the 8 tokens that it was asked for"),
        (said(*[b"x" * 2**20] * 50), "", f"sent more than {MOST_EVENT // 10**6} MB as one event"),
        (said(b'{"error": {"message": "No key"}}', status=401), "", "wants a key (401): No key"),
        (said(b'{"message": "no model m"}', status=404), "", "answers 404: no model m"),
        (said(b"<html>Bad gateway", status=502), "", "answers 502: no reason given"),
        (said(status=307, Location="http://10.0.0.1/v1"), "", "sends on to 10.0.0.1; give that address if"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_one_line_and_what_came_stays(say, text, line):
    came, error = text_before_failing(say, SHORT if "given up" in line else PATIENCE)
    assert came == text and line in error and "\n" not in error


def test_an_answer_may_end_without_usage_and_without_its_last_word():
    with scripted(said(chat("A"), chat(None, "stop"))) as server:
        assert [piece.text for piece in heard(server)] == ["A", ""]
    with scripted(said(chat("A"), chat(None, "length"), then=5.0)) as server:
        assert heard(server, patience=SHORT)[-1].end == "length"


def test_a_server_that_is_not_there():
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with closing(Connection(Served.parse(f"vllm@http://127.0.0.1:{port}/v1"), ANYWHERE)) as connection:
            with pytest.raises(UserError, match=f"no server answers at http://127.0.0.1:{port}/v1 "):
                connection.models()


def test_a_server_that_never_answers_is_given_up():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        served = Served.parse(f"vllm@http://127.0.0.1:{silent.getsockname()[1]}/v1")
        with closing(Connection(served, ANYWHERE, Patience(first=0.4))) as connection:
            with pytest.raises(UserError, match="has not answered for 0.4 s, and was given up"):
                connection.models()


def test_what_is_stopped_waits_for_nothing():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        served = Served.parse(f"vllm@http://127.0.0.1:{silent.getsockname()[1]}/v1")
        with closing(Connection(served, ANYWHERE)) as connection, pytest.raises(Stopped):
            connection.models(lambda: True)


def test_closing_ends_the_answer_at_the_server():
    def endless(answer: Answering, body: dict) -> None:
        answer.begin()
        while True:
            answer.event(chat("x"))
            time.sleep(0.01)

    with scripted(endless) as server:
        connection = Connection(Served.parse(server.name()), ANYWHERE)
        reply = connection.ask(Request("Hello", max_tokens=10**6), "m")
        while not reply.get(0.05):
            pass
        connection.close()
        assert server.left.wait(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "server"]


@contextmanager
def with_certificate(folder):
    """A server of HTTPS with a certificate that nobody signed."""
    files = [str(folder / name) for name in ("key.pem", "certificate.pem")]
    subject = ["-subj", "/CN=localhost", "-days", "1", "-keyout", files[0], "-out", files[1]]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve() -> None:
            try:
                while True:
                    context.wrap_socket(listening.accept()[0], server_side=True)
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


def test_a_certificate_that_does_not_fit(tmp_path):
    with with_certificate(tmp_path) as port:
        served = Served.parse(f"vllm@https://localhost:{port}/v1")
        with closing(Connection(served, ANYWHERE)) as connection:
            with pytest.raises(UserError, match="the certificate of the server at localhost:[0-9]+ does not fit: self"):
                connection.models()


def test_a_key_goes_to_its_host_and_into_no_error():
    def tells(answer: Answering, body: dict) -> None:
        answer.begin(400, "application/json").raw(json.dumps({"detail": f"bad key {KEY}"}).encode())

    with scripted(tells) as server:
        asked = Reach(keys={server.host: KEY})
        with pytest.raises(Refused) as error:
            heard(server, reach=asked)
        assert server.requests[-1][1]["Authorization"] == f"Bearer {KEY}"
        assert KEY not in str(error.value) and "bad key …" in str(error.value)
    with scripted(whole) as other:
        heard(other, reach=asked)
        assert "Authorization" not in other.requests[-1][1]


def test_a_refused_key_is_told_from_a_missing_one():
    with scripted(said(b"{}", status=403)) as server, pytest.raises(UserError, match="refuses the key it was given"):
        heard(server, reach=Reach(keys={server.host: KEY}))


def test_memory_is_what_the_server_tells():
    page = '# HELP x y\nvllm:kv_cache_usage_perc{model_name="m"} 0.25\nvllm:other 7\n'
    with scripted(pages={"/metrics": page}) as server:
        with closing(Connection(Served.parse(server.name("vllm")), ANYWHERE)) as connection:
            assert connection.gauge(DIALECTS["vllm"].metrics).result(60) == 0.25
            assert connection.gauge("sglang:token_usage").result(60) is None
    with scripted() as server, closing(Connection(Served.parse(server.name("vllm")), ANYWHERE)) as connection:
        assert connection.gauge(DIALECTS["vllm"].metrics).result(60) is None


def test_times_are_those_of_arrival_whenever_somebody_looks():
    def paced(answer: Answering, body: dict) -> None:
        whole(answer, body, pause=0.2)

    with scripted(paced) as server, closing(Connection(Served.parse(server.name()), ANYWHERE)) as connection:
        reply = connection.ask(Request("Hello"), "m")
        while not reply._running.done():
            time.sleep(0.01)
        times = []
        while arrived := reply.get(0):
            times += [arrived.seconds] if arrived.piece.text else []
    assert len(times) == 4 and times == sorted(times) and times[-1] - times[0] > 0.3


def test_usage_of_the_scripted_server_is_of_the_protocol():
    assert piece_of(json.dumps(usage())).usage == Usage(9, 4)
