"""`llmq quality` on a tiny model: every figure of its rows from transformers' own logits, in plain float64."""

from __future__ import annotations

import json
import math
import statistics
import threading

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_runs import light, run_cli
from transformers import AutoModelForCausalLM

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.labs import load_answer
from llmq.labs.quality import FLOOR, Quality, summarised
from llmq.labs.rows import RowAnswer
from llmq.machine.door import Machine
from llmq.models.reference_text import TEXTS, WINDOW, reference_text

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


def test_how_the_kl_is_spread_and_the_margin(folder, capsys):
    row = quality(capsys, folder, "--methods", "bf16", "--no-floor")["results"][0]
    ids = byte_tokenizer()(reference_text()[:5000], add_special_tokens=False)["input_ids"]
    kls, nats = [], 0.0
    for start in range(0, WINDOWS * WINDOW, WINDOW):
        window = ids[start : start + WINDOW]
        own, base = (probabilities(folder, dtype, window) for dtype in (torch.bfloat16, torch.float16))
        rows = [list(zip(p, q, strict=True)) for p, q in zip(base, own, strict=True)]
        kls += [math.fsum(a * math.log(a / b) for a, b in row) for row in rows]
        nats -= math.fsum(math.log(q[token]) for q, token in zip(own, window[1:], strict=True))
    kls.sort()
    assert row["kl_max"] == pytest.approx(kls[-1], rel=1e-4)
    assert row["kl_median"] == pytest.approx(kls[len(kls) // 2], rel=1e-4)
    assert row["kl_p90"] == pytest.approx(kls[round(0.9 * (len(kls) - 1))], rel=0.02)
    assert row["kl_median"] < row["kl_p90"] < row["kl_p99"] < row["kl_max"]
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(kls), rel=1e-6), "here a token is a byte"
    assert len(row["window_losses"]) == len(row["window_kls"]) == WINDOWS
    assert math.exp(statistics.fmean(row["window_losses"])) == pytest.approx(row["perplexity"], rel=1e-7)
    low, high = row["perplexity_change_interval"]
    assert abs(row["perplexity_change"]) < row["equivalent_within"] < max(abs(low), abs(high)) * 1.1


def test_the_floor_is_fp16_itself_and_far_below_a_method(folder, capsys):
    rows = {row["method"]: row for row in quality(capsys, folder, "--methods", "fp16,llm-int8")["results"]}
    assert list(rows) == ["fp16", "llm-int8", FLOOR]
    assert 0 < rows[FLOOR]["kl_to_fp16"] < rows["llm-int8"]["kl_to_fp16"] / 10
    assert rows["fp16"]["equivalent_within"] == rows["fp16"]["kl_max"] == 0 < rows[FLOOR]["equivalent_within"]
    assert rows["fp16"]["perplexity_change_interval"] == [0, 0]
    left_out = quality(capsys, folder, "--methods", "fp16", "--no-floor")["results"]
    assert [row["method"] for row in left_out] == ["fp16"] and left_out[0] == rows["fp16"]


def test_a_model_whose_channels_cannot_move_has_no_floor_and_says_so(tmp_path, capsys):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=259)
    folder = saved(tmp_path / "neox", GPTNeoXForCausalLM(GPTNeoXConfig(**shape, max_position_embeddings=WINDOW)))
    result = quality(capsys, folder, "--methods", "fp16")
    assert [row["method"] for row in result["results"]] == ["fp16"] and "gpt_neox" in result["missing"][FLOOR]


def read(capsys, folder, reading: str, engine: str) -> dict:
    arguments = ["--reading", reading, "--engine", engine, "--no-floor"]
    result = quality(capsys, folder, "--methods", "fp16,int8-weight-only,llm-int8", *arguments)
    assert result["conditions"]["reading"] == reading
    return {row["method"]: row for row in result["results"]}


@pytest.mark.parametrize("engine", ["hf", "lean"])
def test_reading_token_by_token_matters_where_a_call_has_statistics_of_its_own(folder, capsys, engine):
    """FP16 and 8-bit weights agree within rounding; LLM.int8() pools outlier columns over the rows of a call."""
    pooled, decode = (read(capsys, folder, reading, engine) for reading in ("pooled", "decode"))
    apart = {method: abs(pooled[method]["perplexity"] / decode[method]["perplexity"] - 1) for method in pooled}
    assert 0 < apart["fp16"] < 1e-3 and apart["int8-weight-only"] < 1e-3
    kl = {method: abs(pooled[method]["kl_to_fp16"] - decode[method]["kl_to_fp16"]) for method in pooled}
    assert kl["llm-int8"] > 20 * kl["int8-weight-only"]


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_by_name_and_the_command_that_asks_again(folder, capsys, name):
    more = ["--text", name, "--methods", "fp16", "--no-floor"]
    result = quality(capsys, folder, *more)
    assert result["text"] == TEXTS[name]
    command = (
        f"python -m llmq quality --model {folder} --methods fp16 --engine hf --text {name} --tokens 1536 --no-floor"
    )
    assert result["conditions"]["command"] == f"{command} --device cpu"
    _, *again = command.split()[2:]
    status, out, _ = run_cli(capsys, *again, "--device", "cpu", "--json")
    assert status == 0 and json.loads(out[-1])["results"] == result["results"]


def test_a_text_from_a_file(folder, capsys, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(reference_text("french")[:4000])
    found = quality(capsys, folder, "--methods", "fp16", "--no-floor", "--text", file)
    named = quality(capsys, folder, "--methods", "fp16", "--no-floor", "--text", "french")
    assert found["results"] == named["results"] and found["text"] == "a given text"
    assert "--text FILE" in found["conditions"]["command"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "frensh"], "text is 'frensh'; choose english, french, code or a file"),
        (["--text", "{short}"], "the text has 600 tokens; at least 1024 are needed"),
        (["--tokens", "600"], "tokens is 600; choose a whole number from 1024"),
        (["--reading", "twice"], "unknown reading 'twice'; choose from pooled, decode"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(folder, capsys, tmp_path, arguments, said):
    (tmp_path / "short.txt").write_text("a" * 600)
    arguments = [word.replace("{short}", str(tmp_path / "short.txt")) for word in arguments]
    status, out, err = run_cli(capsys, "quality", "--model", folder, "--device", "cpu", *arguments)
    assert (status, out) == (2, []) and said in err[-1] and "Traceback" not in "\n".join(err)


def test_a_second_checkpoint_is_measured_against_the_first(folder, capsys, tmp_path):
    other = saved(tmp_path / "other", tiny_llama(max_position_embeddings=2 * WINDOW, initializer_range=0.31))
    arguments = ["--device", "cpu", "--tokens", 1024, "--methods", "fp16", "--no-floor", "--json"]
    status, out, _ = run_cli(capsys, "quality", folder, other, *arguments)
    first, second = json.loads(out[-1])["results"]
    assert status == 0 and (first["method"], second["method"]) == (f"{folder}#fp16", f"{other}#fp16")
    assert first["kl_to_fp16"] == 0 < second["kl_to_fp16"]
    alone = json.loads(run_cli(capsys, "quality", other, *arguments)[1][-1])["results"]
    assert alone[0]["perplexity"] == second["perplexity"]


def test_checkpoints_of_different_vocabularies_are_refused(folder, capsys, tmp_path):
    other = saved(tmp_path / "wide", tiny_llama(max_position_embeddings=2 * WINDOW, vocab_size=300))
    status, _, err = run_cli(capsys, "quality", folder, other, "--device", "cpu", "--methods", "fp16")
    assert status == 2 and "have different vocabularies; only bits per byte can be compared" in err[-1]


@pytest.mark.parametrize(("whole", "kept"), [(1, None), (2, 2)])
def test_stopped_early_what_all_have_read_stays(folder, whole, kept):
    stop, answer, seen = threading.Event(), None, 0
    question = Quality(model=folder, contestants=Contestant.parse_all("fp16,bf16"), engine="hf", tokens=4 * WINDOW)
    for item in Machine().run(question, stop):
        seen += isinstance(item, Progress)
        answer = item if isinstance(item, RowAnswer) else answer
        if seen == whole:
            stop.set()
    assert (answer is None) == (kept is None)
    if kept:
        assert answer.result["stopped"] and answer.result["conditions"]["windows"] == kept
        assert [len(row["window_kls"]) for row in answer.rows] == [kept] * 3


def test_a_checkpoint_and_another_model_exclude_each_other():
    with pytest.raises(BadChoice, match="give either 'a' or --model 'b'"):
        Quality(checkpoint="a", model="b")
    assert Quality(model="b", other="c d").typed() == "python -m llmq quality b 'c d' --device cpu"
    assert Quality(checkpoint="a").names == ["a"] and Quality(model="b", other="c").names == ["b", "c"]


def test_one_window_and_one_token_have_no_interval():
    with pytest.raises(BadChoice, match="tokens is 512"):
        Quality(tokens=WINDOW)


def test_windows_that_agree_have_intervals_of_no_width():
    scores = [torch.tensor([[2.0, 2.0], [0.5, 0.5], [0.25, 0.25], [1.0, 1.0]], dtype=torch.float64)] * 4
    row = summarised(scores, [score - torch.tensor([[0.5], [0], [0], [0]]) for score in scores], bytes_read=16)
    assert row["perplexity_change_interval"] == pytest.approx([math.expm1(0.5)] * 2)
    assert row["equivalent_within"] == pytest.approx(math.expm1(0.5)) and row["kl_to_fp16_interval"] == [0.5, 0.5]
    assert row["bits_per_byte"] == pytest.approx(16 / math.log(2) / 16)


def test_an_answer_is_saved_opened_and_told(folder, capsys, tmp_path):
    file = tmp_path / "answer.json"
    quality(capsys, folder, "--methods", "llm-int8", "--save", file)
    answer = load_answer(file)
    said, read_text, table = answer.blocks()
    assert said.startswith("Perplexity against FP16, with its 95 % interval: llm-int8 ") and "English" in read_text
    assert [row[0] for row in table.rows] == ["llm-int8", FLOOR] and all("±" in row[4] for row in table.rows)
