"""Servers beside methods in one comparison: schedules, what is known and what is not, failures, stops, and keys."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace

import pytest
from scripted_server import WORDS, Answering, chat, scripted, usage

import llmq
from llmq.contestant import entrants
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.events import Failed, Finished, Loaded, Memory, Planned, Prefilled, Run, Step
from llmq.labs.compare import Comparison
from llmq.machine.door import Machine
from llmq.models.opening import open_model
from llmq.servers.reach import Reach
from llmq.summary import RunAnswer, Summary
from llmq.ui.tabs.compare_view import CompareView, recording_of

KEY = "sk-very-secret-7f3a"


def comparison(folder, names, **more) -> Comparison:
    sampling = SamplingSettings(max_new_tokens=more.pop("max_new_tokens", 6), max_seconds=more.pop("max_seconds", 60.0))
    return Comparison(prompt="Hello", model=str(folder), contestants=entrants(names), sampling=sampling, **more)


def ask(asked: Comparison, stop=None, reach=None) -> list:
    machine = Machine()
    machine.reach = reach or machine.reach
    return list(machine.run(asked, stop))


def of(events, name, kind):
    return [event for event in events if isinstance(event, kind) and getattr(event, "contestant", name) == name]


def test_a_server_writes_alone_after_those_that_take_turns(tiny_folder):
    with scripted() as server:
        events = ask(comparison(tiny_folder, f"{server.name()},fp32,bf16"))
    (plan,) = (event for event in events if isinstance(event, Planned))
    assert plan.predicted_bytes[server.name()] is None and plan.prompt_tokens > 0
    order = [event.contestant for event in events if isinstance(event, Step)]
    assert order == ["fp32", "bf16"] * 6 + [server.name()] * 4
    assert of(events, server.name(), Loaded)[0].weight_bytes is None
    assert of(events, server.name(), Prefilled)[0].prompt_tokens is None
    end = of(events, server.name(), Finished)[0]
    assert (end.reason, end.prompt_tokens, end.tokens, end.peak_bytes) == ("eos", 9, 4, None)
    assert all(server.name() not in event.ledger for event in events if isinstance(event, Memory))


def test_in_turn_goes_by_the_order_of_the_contestants(tiny_folder):
    with scripted() as server:
        events = ask(comparison(tiny_folder, f"{server.name()},fp32", schedule="in-turn"))
    assert [event.contestant for event in events if isinstance(event, Step)] == [server.name()] * 4 + ["fp32"] * 6


def test_in_parallel_nobody_waits_for_a_server(tiny_folder):
    """It says its second word when the others have ended."""
    ended = threading.Event()

    def waits(answer: Answering, body: dict) -> None:
        answer.begin().event(chat("one"))
        assert ended.wait(60)
        answer.event(chat(" two")).event(chat(None, "stop")).event(usage(9, 2))

    with scripted(waits) as server:
        events = []
        for event in Machine().run(comparison(tiny_folder, f"{server.name()},fp32", schedule="parallel")):
            events.append(event)
            if isinstance(event, Finished) and event.contestant == "fp32":
                ended.set()
    assert [event.text for event in of(events, server.name(), Step)] == ["one", " two"]
    assert of(events, server.name(), Finished)[0].tokens == 2


def test_servers_alone_need_no_model():
    with scripted() as server:
        events = ask(comparison("no/such-model", f"{server.name()},{server.name(model='other')}"))
        assert [body["model"] for body in server.bodies] == ["m", "other"]
    assert [event.prompt_tokens for event in events if isinstance(event, Planned)] == [None]
    found = Summary(events)
    assert [outcome.text for outcome in found.outcomes.values()] == ["".join(WORDS)] * 2
    assert found.agreement() == {"first_divergence": None, "matching_prefix_tokens": 4} and found.parting() is None


def test_an_empty_prompt_is_refused_before_a_server_is_asked():
    with scripted() as server, pytest.raises(BadChoice, match="the prompt is empty"):
        ask(replace(comparison("no/such-model", server.name()), prompt=" "))
    assert server.requests == []


def test_where_texts_part_is_found_whatever_the_pieces(tiny_folder):
    """The tiny model writes bytes, the server words."""
    written = ask(comparison(tiny_folder, "fp32"))
    text = Summary(written).outcomes["fp32"].text
    same, other = text[:3], "Z" if text[3:4] != "Z" else "Y"

    def parts(answer: Answering, body: dict) -> None:
        answer.begin().event(chat(same)).event(chat(other)).event(chat(None, "stop"))

    with scripted(parts) as server:
        found = Summary(ask(comparison(tiny_folder, f"fp32,{server.name()}")))
    outcome = found.outcomes["fp32"]
    place = found.agreement()["first_divergence"]
    assert "".join(outcome.pieces[:place]) == same and found.parting().second.text == other


def test_the_page_cuts_two_texts_at_words_where_one_is_a_servers():
    def says(answer: Answering, body: dict) -> None:
        text = "A red house and a red car"
        answer.begin()
        for piece in text if body["model"] == "m" else [text.replace("red", "blue")]:
            answer.event(chat(piece))
        answer.event(chat(None, "stop"))

    with scripted(says) as server:
        names = [server.name(), server.name(model="other")]
        events = ask(comparison("no/such-model", ",".join(names), max_new_tokens=64))
    value = [*CompareView(names, "1", "cpu").updates(events)][-1]
    pieces = [["A", "prefix"], [" red", "diff"], [" house and a", "same"], [" red", "diff"], [" car", "same"]]
    assert value["pieces"][0] == pieces


def test_the_speed_is_by_the_servers_own_count():
    def several(answer: Answering, body: dict) -> None:
        answer.begin().event(chat("a b")).event(chat(" c d")).event(chat(None, "length")).event(usage(9, 41))

    with scripted(several) as server:
        events = ask(comparison("no/such-model", server.name()))
    outcome = Summary(events).outcomes[server.name()]
    assert outcome.decode_tokens_per_second == pytest.approx(40 / sum(outcome.step_seconds))
    assert outcome.prompt_tokens == 9 and outcome.token_ids == [None, None]


def test_a_speed_is_unknown_where_nobody_counts_the_tokens():
    def uncounted(answer: Answering, body: dict) -> None:
        answer.begin().event(chat("a b")).event(chat(" c d")).event(chat(None, "length"))

    with scripted(uncounted) as server:
        events = ask(comparison("no/such-model", server.name()))
    assert Summary(events).outcomes[server.name()].decode_tokens_per_second is None


def test_ids_that_a_server_tells_count_its_tokens():
    def tells(answer: Answering, body: dict) -> None:
        assert body["return_token_ids"] is True
        answer.begin().event(chat("a", token_ids=[5])).event(chat(" b c", token_ids=[6, 7])).event(chat(None, "stop"))

    with scripted(tells) as server:
        events = ask(comparison("no/such-model", server.name("vllm")))
    assert [event.tokens for event in events if isinstance(event, Step)] == [1, 2]


def test_a_server_that_fails_is_out_and_the_others_go_on(tiny_folder):
    def half(answer: Answering, body: dict) -> None:
        answer.begin().event(chat("Par")).event(chat("is"))

    with scripted(half) as server:
        events = ask(comparison(tiny_folder, f"{server.name()},fp32"))
    assert "closed the connection before its answer was over" in of(events, server.name(), Failed)[0].message
    outcomes = Summary(events).outcomes
    assert outcomes[server.name()].text == "Paris" and outcomes["fp32"].reason == "length"


def test_a_model_that_a_server_does_not_have_is_told_with_those_it_has():
    def unknown(answer: Answering, body: dict) -> None:
        answer.begin(404, "application/json").raw(b'{"error": {"message": "The model does not exist"}}')

    with scripted(unknown, models=("llama", "qwen")) as server:
        events = ask(comparison("no/such-model", f"{server.name()},{server.name(model='')}"))
    said = [event.message for event in events if isinstance(event, Failed)]
    refused = f"the server at {server.host} answers 404: The model does not exist; it lists the models llama, qwen"
    unnamed = f"the server at {server.host} has llama, qwen; name one: openai@http://{server.host}/v1#model"
    assert said == [refused, unnamed]


def test_a_prompt_can_go_as_the_text_that_is_read_here(tiny_folder):
    def written(answer: Answering, body: dict) -> None:
        event = {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}
        answer.begin().event(event)

    with scripted(written) as server:
        names = ",".join(server.name(kind) for kind in ("vllm", "openai"))
        ask(comparison(tiny_folder, names, sent="text"))
        assert [path for path, _, body in server.requests if body] == ["/v1/completions"] * 2
        assert server.bodies[0]["prompt"] == open_model(str(tiny_folder)).encode("Hello")
        assert server.bodies[1]["prompt"] == "Hello"


def test_a_stop_ends_the_answer_at_the_server():
    def endless(answer: Answering, body: dict) -> None:
        answer.begin()
        while True:
            answer.event(chat("x"))
            time.sleep(0.01)

    stop, events = threading.Event(), []
    with scripted(endless) as server:
        for event in Machine().run(comparison("no/such-model", server.name(), max_new_tokens=4096), stop):
            events.append(event)
            if isinstance(event, Step) and event.index == 3:
                stop.set()
        assert server.left.wait(10)
    assert [event.reason for event in events if isinstance(event, Finished)] == ["stopped"]


def test_the_time_of_an_answer_is_over_for_a_server_too():
    def silent(answer: Answering, body: dict) -> None:
        answer.begin().event(chat("x"))
        time.sleep(20)

    with scripted(silent) as server:
        events = ask(comparison("no/such-model", server.name(), max_seconds=0.3))
    assert [event.reason for event in events if isinstance(event, Finished)] == ["time"]


def test_strangers_ask_only_what_the_owner_names(tiny_folder):
    with scripted() as server:
        events = ask(comparison(tiny_folder, f"{server.name()},fp32"), reach=Reach(frozenset({"named.example"})))
        assert server.requests == []
    said = [event.message for event in events if isinstance(event, Failed)]
    assert said == [f"this page asks no server at {server.host}; it asks named.example"]


def test_a_key_is_in_no_output(tiny_folder, tmp_path, caplog, capfd):
    """Neither in a file, nor an event, nor a line that is logged or printed, whatever the server says of it."""
    caplog.set_level(logging.DEBUG)

    def tells(answer: Answering, body: dict) -> None:
        answer.begin().event(chat("Par")).event({"error": {"message": f"the key {KEY} is used up"}})

    with scripted(tells) as server:
        keys = {server.host: KEY}
        asked = comparison(tiny_folder, f"{server.name()},fp32", keys=keys)
        run = Run(asked.settings(), {})
        events = list(run.record(ask(asked), time.monotonic))
        answer = RunAnswer(run, Summary(events))
        found = llmq.compare("Hello", [server.name()], model=str(tiny_folder), keys=keys, verbose=True)
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
    path = run.save(tmp_path / "run.jsonl")
    outputs = [path.read_text(), repr(events), repr(asked), json.dumps(answer.to_json()), repr(found), caplog.text]
    outputs += [json.dumps(recording_of(Run.load(path), "1")), *capfd.readouterr()]
    assert "the key … is used up" in outputs[0] and not any(KEY in output for output in outputs)


def test_a_run_with_a_server_is_saved_and_replayed(tiny_folder, tmp_path):
    with scripted() as server:
        asked = comparison(tiny_folder, f"fp32,{server.name()}")
        run = Run(asked.settings(), {})
        list(run.record(ask(asked), time.monotonic))
    loaded = Run.load(run.save(tmp_path / "run.jsonl"))
    assert [timed.event for timed in loaded.events] == [timed.event for timed in run.events]
    assert "over HTTP" in json.dumps(recording_of(loaded, "1"))


def test_the_command_line_takes_a_server(run, tiny_folder):
    with scripted() as server:
        arguments = ["--methods", f"fp32,{server.name()}", "--model", str(tiny_folder), "--max-new-tokens", "6"]
        status, lines, errors = run("compare", "Hello", *arguments, "--json")
    found = json.loads(lines[-1])
    assert status == 0 and [one["engine"] for one in found["contestants"]][1] == "http"
    assert found["contestants"][1]["weight_bytes"] is None and found["contestants"][1]["text"] == "Paris is big."
    assert any("loading openai@" in line for line in errors)
