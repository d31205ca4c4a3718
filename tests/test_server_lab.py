"""How near a server is: what it tells is held against every method, and what it does not tell is unknown."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scripted_server import Answering, chat, scripted, usage

import llmq
from llmq.contestant import Contestant
from llmq.engine.loading import Key, load_engine
from llmq.errors import BadChoice, UserError
from llmq.labs import load_answer, save_answer
from llmq.labs.rows import RowAnswer
from llmq.labs.server import ServerLab
from llmq.machine.door import Machine
from llmq.models.opening import open_model
from llmq.scores import lumped_divergence
from llmq.servers.reach import Reach
from llmq.servers.served import Served

ANSWER = "Hello, you."


def ask(server, folder, **more) -> RowAnswer:
    more = {"contestants": Contestant.parse_all("fp32,absmax"), "prompt": "Hi", "tokens": 16} | more
    *_, last = Machine().run(ServerLab(server=Served.parse(server.name()), model=str(folder), **more))
    return last


@pytest.fixture(scope="module")
def truth(tiny_folder):
    """The tiny model's FP32 log-probabilities of ANSWER after the prompt: (tokens, vocabulary)."""
    model = open_model(str(tiny_folder))
    method = Contestant.parse("fp32").method
    ids, text = model.encode("Hi"), model.tokenize(ANSWER)
    logits = load_engine(Key.of(model, method, "cpu")).logits([*ids, *text])
    return model, ids, text, logits[len(ids) - 1 : -1].double().log_softmax(1)


def tells(truth, prompt_tokens=None, most=20):
    """A server that writes ANSWER a byte at a time with the log-probabilities of `truth`."""
    model, ids, text, logs = truth
    alphabet = {model.tokenize(chr(code))[0]: bytes([code]) for code in range(32, 127)}

    def entry(place: int, token: int) -> dict:
        data = alphabet.get(token, b"\xff")
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": logs[place, token].item()}

    def say(answer: Answering, body: dict) -> None:
        answer.begin()
        for place, token in enumerate(text):
            top = logs[place].topk(min(most, body.get("top_logprobs", 0))).indices.tolist()
            told = entry(place, token) | {"top_logprobs": [entry(place, one) for one in top]}
            answer.event(chat(ANSWER[place], logprobs={"content": [told]} if top else None))
        answer.event(chat(None, "stop")).event(usage(prompt_tokens or len(ids), len(text)))

    return say


def test_a_server_is_nearest_to_what_it_computes(tiny_folder, truth, tmp_path):
    with scripted(tells(truth)) as server:
        found = ask(server, tiny_folder)
    own, rounded = found.rows
    assert own["kl_lower_bound"] < 1e-9 and own["logprob_difference"] < 1e-6 and own["tokens"] == len(ANSWER)
    assert rounded["kl_lower_bound"] > 100 * own["kl_lower_bound"] and rounded["logprob_difference"] > 1e-4
    assert found.lab.finding(found.rows).startswith("The server is nearest to **FP32**")
    assert found.result["conditions"]["answer"] == ANSWER and found.result["conditions"]["likeliest"] == 5
    save_answer(found, tmp_path / "answer.json")
    again = load_answer(tmp_path / "answer.json")
    assert again.rows == json.loads(json.dumps(found.rows)) and list(again.blocks())


def test_a_server_that_tells_no_log_probabilities_is_held_by_its_choices(tiny_folder, truth):
    with scripted(tells(truth, most=0)) as server:
        found = ask(server, tiny_folder)
    assert [row["kl_lower_bound"] for row in found.rows] == [None, None]
    assert 0 <= found.rows[0]["top1_agreement"] <= 1
    first = found.rows[0]["first_difference"]
    assert first is None or ANSWER[first["place"]] == first["server"]
    assert "of the server's tokens" in found.lab.finding(found.rows)


def test_a_server_that_refuses_to_tell_is_asked_without(tiny_folder, truth):
    def refuses(answer: Answering, body: dict) -> None:
        if "logprobs" in body:
            answer.begin(422, "application/json").raw(b'{"detail": "no logprobs"}')
        else:
            tells(truth, most=0)(answer, body)

    with scripted(refuses) as server:
        assert len(ask(server, tiny_folder).rows) == 2
        assert ["logprobs" in body for body in server.bodies] == [True, False]


def test_another_prompt_is_no_comparison(tiny_folder, truth):
    with scripted(tells(truth, prompt_tokens=99)) as server:
        with pytest.raises(UserError, match="the server read 99 tokens of prompt where .* reads 2: another model"):
            ask(server, tiny_folder)


def test_another_tokenizer_is_no_comparison(tiny_folder):
    def words(answer: Answering, body: dict) -> None:
        told = {"token": "Hello", "bytes": None, "logprob": -1.0, "top_logprobs": []}
        answer.begin().event(chat("Hello", logprobs={"content": [told]})).event(chat(None, "stop")).event(usage(2, 1))

    with scripted(words) as server, pytest.raises(UserError, match="into other tokens than the model here"):
        ask(server, tiny_folder)


def test_an_answer_without_a_word_is_said(tiny_folder):
    def silent(answer: Answering, body: dict) -> None:
        answer.begin().event(chat(None, "stop"))

    with scripted(silent) as server, pytest.raises(UserError, match="ended its text at once"):
        ask(server, tiny_folder)


def test_nobody_is_asked_who_may_not_be(tiny_folder):
    machine = Machine()
    machine.reach = Reach(frozenset())
    with scripted() as server, pytest.raises(UserError, match="this page asks no server"):
        list(machine.run(ServerLab(server=Served.parse(server.name()), model=str(tiny_folder))))
    assert server.requests == []


def test_a_key_of_the_environment_goes_with_the_question(tiny_folder, truth, monkeypatch):
    with scripted(tells(truth)) as server:
        monkeypatch.setenv("LLMQ_SERVER_KEYS", f"{server.host}=secret")
        asked = {"server": server.name(), "prompt": "Hi", "methods": "fp32", "tokens": 16, "model": str(tiny_folder)}
        found = llmq.ask("server", **asked)
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer secret"}
    assert "secret" not in json.dumps(found.to_json())


def test_lumping_hides_and_never_adds():
    torch.manual_seed(0)
    for _ in range(20):
        p, q = (torch.randn(50, dtype=torch.float64).mul(3).log_softmax(0) for _ in range(2))
        whole = (p.exp() * (p - q)).sum().item()
        parts = [lumped_divergence(p, {i: q[i].item() for i in q.topk(count).indices.tolist()}) for count in (1, 5, 20)]
        assert 0 <= parts[0] <= parts[1] + 1e-12 <= parts[2] + 2e-12 <= whole + 1e-9
        assert lumped_divergence(p, {i: p[i].item() for i in range(10)}) == pytest.approx(0, abs=1e-12)
    assert math.isfinite(lumped_divergence(p, {0: 0.0}))


TEXT = "Hello, you two."


@pytest.fixture(scope="module")
def reading(tiny_folder):
    """The tiny model's FP32 log-probabilities of TEXT read from its first token on: (tokens - 1, vocabulary)."""
    model = open_model(str(tiny_folder))
    ids = model.tokenizer(TEXT)["input_ids"]
    logits = load_engine(Key.of(model, Contestant.parse("fp32").method, "cpu")).logits(ids)
    return model, ids, logits[:-1].double().log_softmax(1)


def echoes(reading, most=5, extra=1, prompt_tokens=None, **changes):
    """A server of OpenAI's older form: the text comes back with its log-probabilities, and `extra` tokens after it."""
    model, ids, logs = reading
    names = [model.tokenizer.decode([token]) for token in ids]

    def likeliest(place: int) -> dict:
        top = logs[place].topk(most).indices.tolist()
        return {model.tokenizer.decode([token]): logs[place, token].item() for token in top}

    own = [logs[place, token].item() for place, token in enumerate(ids[1:])]
    told = {
        "tokens": names + ["!"] * extra,
        "token_logprobs": [None, *own] + [-1.0] * extra,
        "top_logprobs": [None, *map(likeliest, range(len(ids) - 1))] + [{"!": -1.0}] * extra,
    }
    used = {"prompt_tokens": prompt_tokens or len(ids), "completion_tokens": extra}
    return says({"choices": [{"text": TEXT, "logprobs": told | changes}], "usage": used})


def says(answer: object):
    return lambda server, body: server.begin(200, "application/json").raw(json.dumps(answer).encode())


def lists_by_ids(reading, count=20):
    """As vLLM tells of a prompt: by ids, its own token among them, wherever that comes."""
    model, ids, logs = reading
    places = [None]
    for place, token in enumerate(ids[1:]):
        named = dict.fromkeys([token, *logs[place].topk(count).indices.tolist()])
        entry = {str(one): {"logprob": logs[place, one].item(), "rank": 1, "decoded_token": "?"} for one in named}
        entry[str(token)]["decoded_token"] = model.tokenizer.decode([token])
        places.append(entry)
    usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
    return says({"choices": [{"text": "!", "logprobs": None, "prompt_logprobs": places}], "usage": usage})


def read_by(server, folder, kind="openai", **more) -> RowAnswer:
    asked = {"contestants": Contestant.parse_all("fp32,absmax"), "prompt": TEXT, "read": "text"} | more
    *_, last = Machine().run(ServerLab(server=Served.parse(server.name(kind)), model=str(folder), **asked))
    return last


@pytest.mark.parametrize(("kind", "asked"), [("openai", "echo"), ("vllm", "prompt_logprobs")])
def test_a_server_and_the_methods_read_the_same_text(kind, asked, tiny_folder, reading):
    _, ids, logs = reading
    # By its text a part of a character hides others, and most tokens here are such: only the likeliest is told.
    with scripted(echoes(reading, most=1) if kind == "openai" else lists_by_ids(reading)) as server:
        found = read_by(server, tiny_folder, kind)
        (body,) = server.bodies
    assert body[asked] and body["prompt"] == (ids if kind == "vllm" else TEXT) and not body.get("stream")
    own, rounded = found.rows
    assert own["tokens"] == len(ids) - 1 and own["top1_agreement"] == 1 and own["first_difference"] is None
    assert own["choices"] == own["tokens"] if kind == "vllm" else 0 < own["choices"] <= own["tokens"]
    assert own["kl_lower_bound"] < 1e-6 and own["logprob_difference"] < 1e-5
    assert rounded["kl_lower_bound"] > 100 * own["kl_lower_bound"]
    assert found.result["conditions"]["read"] == "text" and "answer" not in found.result["conditions"]


def test_a_text_is_read_as_far_as_is_asked(tiny_folder, reading):
    model, ids, logs = reading
    with scripted(echoes((model, ids[:6], logs), extra=0)) as server:
        found = read_by(server, tiny_folder, tokens=6)
        assert server.bodies[0]["prompt"] == TEXT[:6] and found.rows[0]["tokens"] == 5


def refuses(server: Answering, body: dict) -> None:
    server.begin(400, "application/json").raw(b'{"error": "no echo"}')


@pytest.mark.parametrize(
    ("say", "told"),
    [
        (lambda found: echoes(found, tokens=["H"] * 3), "tells no log-probabilities of what it read"),
        (lambda found: echoes(found, extra=4), "read 19 tokens where 15 were sent"),
        (lambda found: echoes(found, token_logprobs=[-1.0] * 16), "tells no log-probabilities of what it read"),
        (lambda found: echoes(found, top_logprobs=[None] * 16), "does not tell the likeliest tokens of what it reads"),
        (lambda found: echoes(found, tokens=["H", "x"] + ["l"] * 14), "into other tokens than the model here"),
        (lambda found: says({"choices": [{"text": "!", "logprobs": None}]}), "tells no log-probabilities"),
        (lambda found: says({"choices": [{"prompt_logprobs": [None, {}]}]}), "read 2 tokens where 15 were sent"),
        (lambda found: says({"choices": [{"prompt_logprobs": [None] + [{}] * 14}]}), "tells no log-probabilities"),
        (lambda found: says([]), "tells no log-probabilities"),
        (lambda found: refuses, "answers 400: no echo"),
    ],
)
def test_what_tells_nothing_of_a_text_is_said_in_one_line(say, told, tiny_folder, reading):
    with scripted(say(reading)) as server:
        with pytest.raises(UserError, match=told) as caught:
            read_by(server, tiny_folder)
    assert "\n" not in str(caught.value)


def test_log_probabilities_that_come_one_place_late_are_none_of_the_text(tiny_folder, monkeypatch):
    """As llama-cpp-python 0.3.36 tells them (its issue 1983): those after a token stand at the token."""
    model = open_model(str(tiny_folder))
    ids = model.tokenizer(TEXT)["input_ids"]
    sure = torch.full((len(ids), 259), -20.0, dtype=torch.float64)  # of every next token
    sure[range(len(ids) - 1), ids[1:]] = -0.01
    sure[-1, ids[0]] = -0.01
    with scripted(echoes((model, ids, sure[:-1]), most=1)) as server:
        assert read_by(server, tiny_folder).rows[0]["choices"] > 0
    with scripted(echoes((model, ids, sure[1:]), most=1)) as server, pytest.raises(UserError, match="one place late"):
        read_by(server, tiny_folder)


def test_another_count_of_the_text_is_another_model(tiny_folder, reading):
    with (
        scripted(echoes(reading, prompt_tokens=99)) as server,
        pytest.raises(UserError, match="the server read 99 tokens"),
    ):
        read_by(server, tiny_folder)


@pytest.mark.parametrize("kind", ["llama.cpp", "tgi", "ollama", "transformers"])
def test_servers_that_tell_nothing_of_a_text_are_not_asked(kind, tiny_folder):
    with scripted() as server:
        with pytest.raises(BadChoice, match="tells no log-probabilities of what it reads; let it answer"):
            read_by(server, tiny_folder, kind)
        assert not server.bodies


def test_one_token_is_no_text_to_read(tiny_folder):
    with scripted() as server, pytest.raises(BadChoice, match="give a longer text"):
        read_by(server, tiny_folder, prompt="H")
