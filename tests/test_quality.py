"""`llmq quality` on a tiny model: every figure of its rows from transformers' own logits, in plain float64."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_runs import light, run_cli
from transformers import AutoModelForCausalLM

from llmq.models.reference_text import WINDOW, reference_text

WINDOWS = 3


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def saved(folder, model) -> str:
    model.half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny LLaMA that reads a whole window, and whose predictions are far from uniform."""
    model = tiny_llama(max_position_embeddings=2 * WINDOW, initializer_range=0.3)
    return saved(tmp_path_factory.mktemp("quality"), model)


def quality(capsys, folder, *more) -> dict:
    arguments = ["--model", folder, "--device", "cpu", "--engine", "hf", "--tokens", WINDOWS * WINDOW, *more]
    status, out, _ = run_cli(capsys, "quality", *arguments, "--json")
    assert status == 0
    return json.loads(out[-1])


def probabilities(folder: str, dtype, ids: list[int]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    powers = logits.exp()
    return (powers / powers.sum(1, keepdim=True)).tolist()


def window_scores(own, base, ids) -> tuple[float, float, float, float]:
    rows = []
    for q, p, token in zip(own, base, ids[1:], strict=True):
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        reverse = math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        rows.append((-math.log(q[token]), kl, reverse, float(q.index(max(q)) == p.index(max(p)))))
    return tuple(statistics.fmean(column) for column in zip(*rows, strict=True))


def interval(values: list[float]) -> list[float]:
    """Mean ± Student's t at 2 degrees of freedom, 4.303, standard errors."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return [mean - 4.30265 * error, mean + 4.30265 * error]


def test_every_figure_is_computed_once_more(folder, capsys):
    row = quality(capsys, folder, "--methods", "bf16")["results"][0]
    ids = byte_tokenizer()(reference_text()[:5000], add_special_tokens=False)["input_ids"]
    scores, baseline = [], []
    for start in range(0, WINDOWS * WINDOW, WINDOW):
        window = ids[start : start + WINDOW]
        own, base = (probabilities(folder, dtype, window) for dtype in (torch.bfloat16, torch.float16))
        scores.append(window_scores(own, base, window))
        baseline.append(window_scores(base, base, window)[0])
    losses, kl, reverse, top1 = ([score[i] for score in scores] for i in range(4))
    changes = [loss - other for loss, other in zip(losses, baseline, strict=True)]
    expected = {
        "perplexity": math.exp(statistics.fmean(losses)),
        "perplexity_change": math.exp(statistics.fmean(changes)) - 1,
        "kl_to_fp16": statistics.fmean(kl),
        "reverse_kl": statistics.fmean(reverse),
        "top1_agreement": statistics.fmean(top1),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert 0 < row["top1_agreement"] < 1 and abs(row["kl_to_fp16"] / row["reverse_kl"] - 1) > 1e-4
    intervals = {
        "perplexity": [math.exp(end) for end in interval(losses)],
        "perplexity_change": [math.exp(end) - 1 for end in interval(changes)],
        "kl_to_fp16": interval(kl),
        "reverse_kl": interval(reverse),
        "top1_agreement": interval(top1),
    }
    for name, ends in intervals.items():
        assert row[f"{name}_interval"] == pytest.approx(ends, rel=1e-4), name


def test_the_baseline_differs_from_itself_in_nothing(folder, capsys):
    result = quality(capsys, folder, "--methods", "fp16,llm-int8")
    row, other, _ = result["results"]
    assert (row["kl_to_fp16"], row["perplexity_change"], row["top1_agreement"]) == (0, 0, 1)
    assert other["kl_to_fp16"] > 0 and other["method"] == "llm-int8"
    assert (result["tokens"], result["conditions"]["windows"]) == (WINDOWS * (WINDOW - 1), WINDOWS)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_model_whose_output_is_no_number_is_an_error_in_one_line(tmp_path, capsys, json_flag):
    model = tiny_llama(max_position_embeddings=2 * WINDOW)
    model.lm_head.weight.data[7] = math.nan
    folder = saved(tmp_path / "nan", model)
    status, out, err = run_cli(capsys, "quality", "--model", folder, "--device", "cpu", "--tokens", 1024, *json_flag)
    assert (status, out) == (2, []) and "not a number" in err[-1] and "Traceback" not in "\n".join(err)
