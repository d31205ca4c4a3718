"""The composition root: flags, the wrapper for shared GPUs, and one-line refusals."""

from __future__ import annotations

import sys
import types

import pytest

import app
from llmq.errors import UserError


def test_without_the_package_the_function_stays_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert app.on_shared_gpu(app.run_job) is app.run_job


def test_with_the_package_everything_on_the_gpu_is_inside_the_decorated_function(monkeypatch):
    calls = []

    def gpu(duration):
        def wrap(function):
            def inside(*arguments):
                calls.append((duration, arguments))
                yield from function(*arguments)

            return inside

        return wrap

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    monkeypatch.setattr(app.JOBS, "run", lambda job, owner: iter([job, owner]))
    assert list(app.on_shared_gpu(app.run_job)("job", "me")) == ["job", "me"]
    assert calls == [(app.GPU_SECONDS, ("job", "me"))]


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
    monkeypatch.setattr(app, "fetch", lambda model, methods: None)
    assert app.main(["--device", "cpu", *flags] if "--device" not in flags else flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words)


def test_auth_is_a_name_and_a_password():
    assert app.parse_auth("class:secret:with:colons") == ("class", "secret:with:colons")
    assert app.parse_auth(None) is None
    with pytest.raises(UserError):
        app.parse_auth(":secret")
