"""lm-eval's questions answered by our engines: against transformers' own logits, and through lm-eval where it is."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_runs import run_cli

from llmq.engine.hf import HFEngine
from llmq.methods import METHODS
from llmq.tasks import Answering, _rows

CONTEXT = 24


@pytest.fixture
def model():
    return tiny_llama(max_position_embeddings=CONTEXT, initializer_range=0.3)


@pytest.fixture
def answering(model):
    opened = SimpleNamespace(
        tokenizer=byte_tokenizer(), name="tiny", tokenize=lambda text: byte_tokenizer().encode(text)
    )
    return Answering(HFEngine(model, METHODS["fp32"], "cpu"), opened)


def log_probability(model, ids: list[int], first: int) -> float:
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return math.fsum(rows[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_a_continuation_is_scored_and_nothing_before_it(answering, model):
    context, continuation = list(b"The sky is"), list(b" blue")
    total, greedy = answering.scored(context, continuation)
    assert total == pytest.approx(log_probability(model, context + continuation, len(context)), rel=1e-5)
    assert not greedy
    with torch.inference_mode():
        likeliest = model(torch.tensor([context])).logits[0, -1].argmax().item()
    assert answering.scored(context, [likeliest])[1] and answering.scored(context, []) == (0.0, True)


def test_what_is_too_long_is_cut_off_at_the_left(answering, model):
    context, continuation = list(range(60, 110)), list(b"end.")
    kept = (context + continuation)[-CONTEXT - 1 :]
    with torch.inference_mode():
        rows = model(torch.tensor([kept[:-1]])).logits[0].double().log_softmax(-1)
    expected = math.fsum(rows[-4 + i, token].item() for i, token in enumerate(continuation))
    assert answering.scored(context, continuation)[0] == pytest.approx(expected, rel=1e-5)


def asked(*arguments) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT + 5])
def test_a_whole_text_is_scored_each_token_once(answering, model, length):
    """As lm-eval's windows: a begin first, then a context full at a time with as much before it as fits."""
    text = "".join(chr(97 + i % 23) for i in range(length))
    ids = [answering.prefix_token_id, *answering.tok_encode(text)]
    total = 0.0
    for start in range(1, len(ids), CONTEXT):
        stop = min(start + CONTEXT, len(ids))
        window = ids[max(0, stop - CONTEXT - 1) : stop]
        with torch.inference_mode():
            rows = model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
        new = stop - start
        total += math.fsum(rows[len(window) - 1 - new + i, token].item() for i, token in enumerate(ids[start:stop]))
    assert answering.loglikelihood_rolling([asked(text)]) == [pytest.approx(total, rel=1e-5)]


def test_writing_ends_at_the_first_of_the_given_texts(answering):
    (whole,) = answering.generate_until([asked("The sky", {"max_gen_toks": 12})])
    assert len(whole) > 6
    cut = answering.written("The sky", {"until": [whole[5:7], "never there"], "max_gen_toks": 12})
    assert cut == whole[: whole.find(whole[5:7])]
    assert answering.written("The sky", {"until": whole[3], "max_gen_toks": 12}) == whole[: whole.find(whole[3])]
    assert answering.written("", {"max_gen_toks": 3}) != ""


def test_rows_are_means_and_paired_differences():
    def items(*values):
        return [{"metrics": ["acc", "other"], "acc": value, "other": (1, 2)} for value in values]

    (row,) = _rows("llm-int8", {"task": items(1, 0, 1, 0)}, {"task": items(1, 1, 1, 0)})
    assert (row["method"], row["value"], row["items"], row["difference"]) == ("llm-int8", 0.5, 4, -0.25)
    reach = 3.18245 * 0.5 / 2  # t at 3 degrees of freedom; differences 0, -1, 0, 0
    assert row["difference_interval"] == pytest.approx([-0.25 - reach, -0.25 + reach], rel=1e-4)


def installed() -> bool:
    from importlib.util import find_spec

    return find_spec("lm_eval") is not None


@pytest.mark.skipif(installed(), reason="lm-eval is installed")
def test_without_the_library_one_line_says_how_to_get_it(run):
    status, out, err = run("tasks", "arc_easy", "--device", "cpu")
    assert (status, out) == (2, [])
    assert err[-1] == "llmq: tasks are asked by lm-eval, which is not installed; run: pip install '.[tasks]'"


@pytest.fixture
def folder(tmp_path):
    """A task of multiple choice from a file of three items."""
    items = [{"question": f"{a} and {b} make", "choices": ["two", "ten"], "answer": 0} for a, b in ("11", "ab", "xy")]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "items.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
""")
    return tmp_path


@pytest.mark.skipif(not installed(), reason="lm-eval is not installed")
def test_lm_eval_asks_our_engines(folder, tiny_folder, capsys):
    arguments = ["--model", tiny_folder, "--device", "cpu", "--methods", "fp16,llm-int8", "--include", folder, "--json"]
    status, out, _ = run_cli(capsys, "tasks", "sums", *arguments)
    fp16, int8 = json.loads(out[-1])["results"]
    assert status == 0 and (fp16["method"], fp16["metric"], fp16["items"]) == ("fp16", "acc", 3)
    assert fp16["difference"] == 0 and 0 <= int8["value"] <= 1
    status, _, err = run_cli(capsys, "tasks", "none_such", *arguments)
    assert status == 2 and "task is 'none_such'; choose one that" in err[-1]
