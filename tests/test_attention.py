"""The attention lab: the exact result by the formula, kernels within rounding of it, memory counted, what is absent."""

from __future__ import annotations

import json
import math
import warnings
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from tiny_runs import light

from llmq import telemetry
from llmq.errors import BadChoice
from llmq.inspect import attention
from llmq.inspect.attention import (
    EAGER,
    Heads,
    Inputs,
    Kernel,
    exact,
    kernels,
    peak_bytes,
    refusal,
    units_apart,
)
from llmq.labs import load_answer, save_answer
from llmq.labs.attention import Attention
from llmq.levels import highest_level
from llmq.machine.door import Machine
from llmq.ui.shell.state import AppState
from llmq.ui.tabs.lab_tab import LabTab

HEADS = Heads(6, 2, 16)


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's configuration without its weights."""
    folder = tmp_path_factory.mktemp("shape")
    shape = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 2}))
    return str(folder)


def ask(folder: str, **settings):
    *_, last = Machine().run(Attention(model=folder, **{"longest": 256, "dtype": "float32"} | settings))
    return last


def naive(inputs: Inputs) -> torch.Tensor:
    """(heads, tokens, width): softmax(QKᵀ/√d + mask)V in float64, with keys and values repeated for every head."""
    q = inputs.q[0].double()
    k, v = (x[0].double().repeat_interleave(inputs.groups, 0) for x in (inputs.k, inputs.v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    above = torch.ones(inputs.tokens, inputs.tokens).triu(1).bool()
    return scores.masked_fill(above, -math.inf).softmax(-1) @ v


def test_the_exact_result_is_the_formula():
    inputs = Inputs.random(HEADS, 40, torch.float32, "cpu")
    found, terms = exact(inputs)
    assert inputs.checked.tolist() == list(range(40)), "a short text is compared whole"
    torch.testing.assert_close(found, naive(inputs), rtol=1e-12, atol=1e-12)
    assert (terms >= found.abs()).all() and torch.equal(found[:, 0], inputs.v[0].double().repeat_interleave(3, 0)[:, 0])
    long = Inputs.random(HEADS, 700, torch.float32, "cpu")
    assert len(long.checked) == 256 and (long.checked[0], long.checked[-1]) == (0, 699)
    torch.testing.assert_close(exact(long)[0], naive(long)[:, long.checked], rtol=1e-12, atol=1e-12)


def test_a_unit_is_a_rounding_of_every_term():
    inputs = Inputs.random(HEADS, 40, torch.float16, "cpu")
    truth, terms = exact(inputs)
    assert units_apart(truth, truth, terms, torch.float16) == 0
    assert units_apart(truth + 3 * 2**-11 * terms, truth, terms, torch.float16) == pytest.approx(3)
    rounded = truth.half()
    assert 0.1 < units_apart(rounded, truth, terms, torch.float16) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel_gives_the_same_and_only_some_keep_the_scores(folder, dtype):
    answer = ask(folder, dtype=dtype, longest=512)
    absent = [row for row in answer.rows if row["tokens"] is None]
    assert [row["kernel"] for row in absent] == ["memory-efficient", "cuDNN"]
    assert {row["absent"] for row in absent} == {"PyTorch has it for CUDA devices alone"}
    measured = [row for row in answer.rows if row["tokens"]]
    assert [(row["tokens"], row["kernel"]) for row in measured] == [
        (tokens, kernel) for tokens in (16, 32, 64, 128, 256, 512) for kernel in ("eager", "math", "flash")
    ]
    for row in measured:
        assert row["within_rounding"] and row["units_to_eager"] <= 32 and row["seconds_min"] <= row["seconds"]
        assert row["units_to_eager"] > 0 or row["kernel"] != "flash", "not one kernel under two names"
    memory = {row["kernel"]: row["peak_bytes"] for row in measured if row["tokens"] == 512}
    scores = 6 * 512**2 * (8 if dtype == "float32" else 10)
    assert memory["eager"] == pytest.approx(scores, rel=0.1) and memory["flash"] < memory["eager"] / 10
    assert "times as fast as eager" in answer.lab.finding(answer.rows) and "N^1.9" in answer.lab.finding(answer.rows)
    assert "same result within rounding" in answer.lab.finding(answer.rows)
    assert answer.result["conditions"]["head_dim"] == 16 and answer.result["model"] == folder


def test_a_kernel_that_looks_ahead_is_told(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "fused", lambda inputs, repeated: naive(inputs)[None].float().flip(2))
    answer = ask(folder)
    wrong = {row["kernel"] for row in answer.rows if row.get("within_rounding") is False}
    assert wrong == {"math", "flash"} and "More than rounding" in answer.lab.finding(answer.rows)
    save_answer(answer, tmp_path / "a.json")
    assert [*load_answer(tmp_path / "a.json").blocks()][0] == [*answer.blocks()][0]


def test_memory_on_the_way_counts_and_what_is_there_before_does_not():
    there = torch.ones(1000)
    assert highest_level(lambda: there.add_(1)) < 100
    assert highest_level(lambda: (torch.ones(250_000) + 1).sum()) == pytest.approx(2_000_000, abs=1000)
    inputs = Inputs.random(HEADS, 64, torch.float32, "cpu")
    with pytest.raises(RuntimeError):
        peak_bytes(Kernel("wrong", lambda inputs: inputs.q @ inputs.q), inputs, "cpu")
    assert peak_bytes(EAGER, inputs, "cpu") >= 6 * 64 * 64 * 8, "counting goes on after a failure"


def test_what_does_not_fit_is_told_and_not_tried(folder, monkeypatch):
    monkeypatch.setattr(telemetry, "free_bytes", lambda device: 2_000_000)
    rows = {(row["tokens"], row["kernel"]): row for row in ask(folder).rows}
    absent = rows[256, "eager"]["absent"]
    assert absent.startswith("needs 3.") and absent.endswith("and 1.90 MB may be used")
    assert rows[128, "eager"]["seconds"] > 0 and rows[256, "flash"]["units_to_eager"] is None
    assert rows[256, "flash"]["within_rounding"] and rows[256, "flash"]["over_eager"] is None
    monkeypatch.setattr(telemetry, "free_bytes", lambda device: 10)
    none = [row for row in ask(folder).rows if row["tokens"]]
    assert [row["kernel"] for row in none if "absent" not in row] == ["flash"] * 6
    assert all(row["within_rounding"] is None for row in none if row["kernel"] == "flash")


def test_a_refusal_is_in_the_words_of_pytorch():
    def refuses(inputs):
        for text in ("Flash kernel not used because:", "it is Monday. (Triggered internally at x.cpp:1)",
                     "cuDNN has been runtime disabled."):  # fmt: skip
            warnings.warn(text, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    inputs = Inputs.random(HEADS, 8, torch.float32, "cpu")
    assert refusal(Kernel("flash", refuses), inputs) == "it is Monday." and refusal(EAGER, inputs) == ""
    wide = Inputs.random(Heads(2, 2, 2**16), 2, torch.float64, "cpu")
    assert {kernel.name: why for kernel, why in kernels(wide)}["math"] == ""
    with pytest.raises(RuntimeError, match="allocate memory"):
        refusal(Kernel("large", lambda inputs: torch.empty(2**60)), inputs)


def test_a_model_without_one_set_of_heads_is_refused(tmp_path):
    shape = {"model_type": "deepseek_v3", "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(BadChoice, match="one set of heads"):
        ask(str(tmp_path))


def test_the_figure_has_the_lines_of_n_and_n_squared(folder):
    answer = ask(folder)
    (drawn,) = (drawing.make() for drawing in answer.lab.figures(answer.rows))
    lines = {trace.name: trace for trace in drawn.data if trace.yaxis == "y2"}
    assert list(lines) == ["eager", "math", "flash", "memory ∝ N²", "memory ∝ N"]
    for name, of, power in (("memory ∝ N²", "eager", 2), ("memory ∝ N", "flash", 1)):
        assert lines[name].y[-1] == lines[of].y[-1] and lines[name].y[0] == pytest.approx(lines[of].y[-1] / 32**power)
    assert answer.lab.figures([row for row in answer.rows if "absent" in row]) == []


def test_the_page_asks_and_shows_it(folder):
    machine = Machine()
    state = AppState(
        run=lambda question, owner: machine.run(question), stop=lambda owner: 0, device="cpu", device_label="",
        model=folder,
    )  # fmt: skip
    with gr.Blocks():
        tab = LabTab(state)
        tab.build()
    panel = tab.parts["Attention"].panel
    section = panel.section(Attention)
    handler = panel.handler(section)
    *_, last = handler(folder, "", [], SimpleNamespace(session_hash="ann", client=None), 64, "float32")
    shown = [update for update in [*_, last] if section.table in update][-1]
    assert len(shown[section.table].value["data"]) == 2 + 6 * 3 and shown[section.figure]["data"]
    assert last[section.status] == ""
    state.close()
