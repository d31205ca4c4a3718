"""The load script of a class, in seconds: it finds nothing on a server that is right, and what a wrong one forgets."""

from __future__ import annotations

from collections.abc import Iterator

import load_class
import pytest
from load_server import Visitor
from test_api import served
from tiny_runs import light

import app
from llmq.classroom.classes import Classes

KEY = "the key of a load script"
QUESTIONS = {"quiz-1": ("left", "right"), "quiz-2": ("left", "right"), "outliers": ("random", "same")}


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory) -> Iterator[str]:
    state = app.make_state(app.parse(["--model", str(tiny_folder), "--methods", "fp16,bnb-int8", "--device", "cpu"]))
    state.classes = Classes(tmp_path_factory.mktemp("class") / "x.sqlite3", QUESTIONS, ("quiz", "outliers"), key=KEY)
    before = Visitor.model, Visitor.methods
    Visitor.model, Visitor.methods = str(tiny_folder), ("fp16", "bnb-int8")
    with light(), served(state) as address:
        yield address
    Visitor.model, Visitor.methods = before
    state.classes.close()


def test_a_class_sees_no_error_and_its_tallies_are_what_was_cast(server, monkeypatch):
    monkeypatch.setattr(load_class, "EVERY_SECONDS", 0.2)
    told = load_class.lesson(server, KEY, clients=5, seconds=5)
    assert (told["errors"], told["said"]) == (0, [])
    assert (told["wrong_tallies"], told["votes_lost"], told["mixed"]) == (0, 0, 0)
    assert told["votes"] == 5 * len(QUESTIONS) and told["polls"] > 20 and told["runs"] and told["reloads"]


def test_a_vote_that_a_server_forgets_is_found(server, monkeypatch):
    monkeypatch.setattr(load_class, "EVERY_SECONDS", 0.2)
    count = Classes.vote

    def forget(classes: Classes, code: str, token: str, question: str, choice: str):
        """Acknowledge what is not counted."""
        if question == "outliers":
            voted = classes.__dict__.setdefault("forgotten", set())
            first = token not in voted
            voted.add(token)
            return first, "same"
        return count(classes, code, token, question, choice)

    monkeypatch.setattr(Classes, "vote", forget)
    monkeypatch.setattr(load_class, "asked_in", lambda teacher: QUESTIONS | {"outliers": ("same",)})
    told = load_class.lesson(server, KEY, clients=2, seconds=1)
    assert told["wrong_tallies"] == 1 and told["votes_lost"] >= 2


def test_a_server_that_is_killed_amid_votes_has_lost_none(tiny_folder):
    told = load_class.kill(1, 2.0, "--model", str(tiny_folder), "--methods", "fp16,bnb-int8")
    assert told["lost"] == 0 and told["acknowledged"] > load_class.VOTERS
    assert 0 <= told["unacknowledged"] <= load_class.VOTERS
