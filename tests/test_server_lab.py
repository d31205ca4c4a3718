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
from llmq.errors import UserError
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
