"""README and REPORT say what the stored results and the commands say."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_runs import engine_of, run_cli

from llmq.bench import tables
from llmq.bench.checks import plain
from llmq.bench.stages import TOLERANCE
from llmq.cli import build_parser
from llmq.machine.door import Machine
from llmq.methods import METHODS
from llmq.models.opening import open_model
from llmq.scores import mean_interval

README, REPORT = (plain((tables.ROOT / name).read_text()) for name in tables.DOCUMENTS)
WITHOUT_COMMIT = {"gpu-kernels", "paris"}  # prototypes, and a judgement by hand; REPORT says so


def stored(name: str) -> dict:
    return json.loads((tables.RESULTS / f"{name}.json").read_text())


def rows_of(name: str) -> dict[str, dict]:
    return {row["method"]: row for row in stored(name)["results"]}


def test_every_table_is_made_from_the_stored_results(capsys):
    assert tables.main(["--check"]) == 0, "run python -m llmq.bench.tables"
    assert "up to date" in capsys.readouterr().out


def test_every_stored_result_is_in_a_table(monkeypatch):
    """Those too that are less flattering."""
    opened, read_text = set(), Path.read_text

    def noting(path: Path, *arguments, **more) -> str:
        opened.add(path)
        return read_text(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", noting)
    for document in (README, REPORT):
        tables.filled(document)
    assert {path.name for path in tables.RESULTS.iterdir()} == {p.name for p in opened if p.parent == tables.RESULTS}


def test_results_have_what_is_needed_to_repeat_them():
    without = set()
    for path in tables.RESULTS.iterdir():
        result = json.loads(path.read_text())
        conditions = result["conditions"] if isinstance(result["conditions"], dict) else result
        conditions = next(iter(conditions.values())) if result["kind"] == "sweep" else conditions
        assert {"date", "device_name"} <= conditions.keys(), path.name
        if not {"versions", "commit"} <= conditions.keys():
            without.add(path.stem)
    assert without == WITHOUT_COMMIT and all(f"`{name}.json`" in REPORT for name in WITHOUT_COMMIT)


def ratio(name: str, method: str = "llm-int8") -> str:
    rows = rows_of(name)
    return f"{rows[method]['tokens_per_second'] / rows['fp16']['tokens_per_second']:.2f} times"


def test_the_sentences_about_speed_are_the_stored_results():
    """Where int8 gains, where it does not, and what a threshold costs."""
    on_cpu = rows_of("cpu-peers")["llm-int8"]["over_fp16"]
    ratios = {ratio("gpu-7b-lean"), ratio("gpu-demo-lean"), f"{on_cpu:.2f} times"}
    sentences = re.sub(r"<!-- table:.*?<!-- /table -->", "", README, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\d.])\d\.\d\d times", sentences)) == ratios
    fp16, weight_only = (rows_of("gpu-demo-lean")[name] for name in ("fp16", "int8-weight-only"))
    assert f"only {fp16['bandwidth_fraction']:.0%}".replace("%", " %") in REPORT
    assert f"gains {weight_only['tokens_per_second'] / fp16['tokens_per_second'] - 1:.0%}".replace("%", " %") in REPORT
    speeds = {row["threshold"]: row["tokens_per_second"] for row in stored("gpu-thresholds")["results"]}
    assert f"decodes {1 - speeds['2'] / speeds['off']:.0%} slower".replace("%", " %") in " ".join(REPORT.split())
    assert 1 - speeds["6"] / speeds["off"] < 0.01


def test_the_sentences_about_watching_are_the_stored_results():
    def span(phase: str, *names: str, methods=("fp16", "bnb-int8")) -> str:
        ratios = [rows_of(name)[method][f"{phase}_ratio"] for name in names for method in methods]
        return f"{min(ratios):.1f} to {max(ratios):.1f} times"

    text, cpu, gpu = " ".join(REPORT.split()), ("cpu-hooks", "cpu-hooks-512"), ("gpu-hooks-512", "gpu-7b-hooks-2048")
    assert f"{span('prefill', *cpu)} the prefill, {span('decode', *cpu)} the decode" in text
    assert f"{span('prefill', *gpu, methods=['fp16'])} in FP16" in text
    assert f"{span('prefill', *gpu, methods=['bnb-int8'])} through bitsandbytes" in text
    assert f"decode takes {span('decode', *gpu)} as long" in text


def test_the_sentences_about_layers_are_the_stored_results():
    rows, text = stored("cpu-sensitivity")["results"], " ".join(REPORT.split())
    modules, together = [row for row in rows if row["part"] == "module"], rows[-2:]
    kl = sum(row["kl_to_fp16"] for row in modules)
    worst = max(row["kl_to_fp16"] for row in modules) / kl
    v = [row for row in modules if row["module"] == "v_proj"]
    of_kl = sum(row["kl_to_fp16"] for row in v) / kl
    of_bytes = sum(row["bytes_saved"] for row in v) / sum(row["bytes_saved"] for row in modules)
    said = (
        f"the worst module has {worst:.0%} of it, and only v stands out, with {of_kl:.0%} of the KL in {of_bytes:.0%}"
    )
    assert said.replace("%", " %") in text
    assert all(abs(row["sum_of_parts"] / row["kl_to_fp16"] - 1) < 0.06 for row in together) and "within 6 %" in text
    kept, plain = (rows_of("cpu-keep-v")[name]["kl_to_fp16"] for name in ("llm-int8@keep=v_proj", "llm-int8"))
    more = sum(row["bytes_saved"] for row in v) / together[0]["memory_bytes"]
    assert f"KL {kept:.4f} against {plain:.4f}, for {100 * more:.1f} % more memory" in text
    *layers, whole, recipe = stored("cpu-sensitivity-absmax")["results"]
    kls = sorted((row["kl_to_fp16"] for row in layers), reverse=True)
    assert len(kls) == 30 and len(recipe["skip_modules"]) == 5 * 7 + 1
    assert f"five of the 30 layers have {sum(kls[:5]) / sum(kls):.0%} of the KL".replace("%", " %") in text
    assert f"takes it from {whole['kl_to_fp16']:.3g} to {recipe['kl_to_fp16']:.3g}." in text


def test_the_sentences_about_later_tokens_are_the_stored_results():
    rows, text = stored("cpu-causal")["results"], " ".join(REPORT.split())
    assert {row["method"] for row in rows} == {"fp16", "bnb-int8", "llm-int8", "llm-int8@outliers=row"}
    for row in rows:
        causal = row["method"] in ("fp16", "llm-int8@outliers=row")
        assert row["asked"] >= 282 and (row["largest_logit_change"] == 0 == row["flipped"]) == causal
    pooled, own = (rows_of("cpu-row-quality")[name] for name in ("llm-int8", "llm-int8@outliers=row"))
    assert f"{own['kl_to_fp16']:.4f} beside {pooled['kl_to_fp16']:.4f} on the same eight windows" in text
    low, high = mean_interval([b - a for a, b in zip(pooled["window_kls"], own["window_kls"], strict=True)])
    assert low < 0 < high and len(own["window_kls"]) == 8


def test_the_cost_in_quality_is_certain_and_mostly_that_of_activations():
    """Of 64 windows, in pairs: LLM.int8() costs perplexity, 8-bit weights alone less than half of its KL, and sums in
    another order hardly anything."""
    result, rows = stored("cpu-quality"), rows_of("cpu-quality")
    assert result["conditions"]["windows"] >= tables.HEADLINE_WINDOWS and result["conditions"]["reading"] == "pooled"
    assert rows["llm-int8"]["perplexity_change_interval"][0] > 0
    int8, weights = (rows[name]["window_kls"] for name in ("llm-int8", "int8-weight-only"))
    assert mean_interval([a / 2 - b for a, b in zip(int8, weights, strict=True)])[0] > 0
    assert rows[tables.FLOOR]["equivalent_within"] < rows["int8-weight-only"]["equivalent_within"] / 5
    assert rows[tables.FLOOR]["kl_to_fp16"] < rows["int8-weight-only"]["kl_to_fp16"] / 100
    assert "most of it the rounding of activations" in " ".join(README.split())


def paired(rows: dict[str, dict], more: str, less: str, digits: int = 1) -> str:
    """By how much the perplexity of one is over the other's, in per cent, with its interval."""
    pairs = zip(rows[more]["window_losses"], rows[less]["window_losses"], strict=True)
    found = [a - b for a, b in pairs]
    mean, low, high = (100 * math.expm1(x) for x in (sum(found) / len(found), *mean_interval(found)))
    return f"{mean:.{digits}f} % ({low:.{digits}f} to {high:.{digits}f})".replace("-", "−")


def lower(rows: dict[str, dict], less: str, more: str) -> str:
    """By how much one's KL is under the other's, in per cent, with its interval: of the windows' ratios."""
    found = [math.log(a / b) for a, b in zip(rows[less]["window_kls"], rows[more]["window_kls"], strict=True)]
    mean, high, low = (-100 * math.expm1(x) for x in (sum(found) / len(found), *mean_interval(found)))
    return f"{mean:.0f} % ({low:.0f} to {high:.0f})"


def test_the_sentences_about_methods_are_of_paired_windows():
    rows, text = rows_of("gpu-methods-quality"), " ".join(REPORT.split())

    for more, less, digits, words in (
        ("llm-int8", "int8-weight-only", 1, "LLM.int8() costs {} more than they do"),
        ("vectorwise", "llm-int8", 1, "vector-wise int8 {} more than LLM.int8()"),
        ("absmax", "vectorwise", 0, "one scale a tensor {} more than vector-wise"),
        ("vectorwise", "smoothquant", 1, "Vector-wise costs {} more than SmoothQuant,"),
        ("vectorwise", "smoothquant@auto", 1, "and {} more than SmoothQuant with an α searched"),
        ("llm-int8", "smoothquant@auto", 1, "LLM.int8() costs {} more than the latter"),
        ("llm-int8", "llm-int8@outlier_weights=16", 1, "for its outliers it costs {} more"),
        ("rtn@group=64", "awq@group=64", 1, "rounding to nearest costs {} more than AWQ"),
        ("rtn@group=64", "gptq@group=64", 1, "and {} more than GPTQ; between"),
        ("awq@group=64", "gptq@group=64", 1, "(AWQ {} more)"),
        ("rtn@3:group=64", "gptq@3:group=64", 1, "rounding to nearest costs {} more than GPTQ, and"),
        ("gptq@3:group=64", "awq@3:group=64", 1, "GPTQ {} more than AWQ"),
        ("gptq@group=64:act_order=off:even=off", "rtn@group=64", 1, "it costs {} more than rounding to nearest: the"),
        ("gptq@group=64:act_order=off", "rtn@group=64", 1, "counted alike it still costs {} more"),
    ):
        assert words.format(paired(rows, more, less, digits)) in text
    assert rows["int8-weight-only"]["perplexity_change_interval"][0] < 0 < rows["int8-weight-only"]["equivalent_within"]


def test_the_sentences_about_a_second_model_are_of_paired_windows():
    rows, text = rows_of("gpu-qwen-methods"), " ".join(REPORT.split())
    for more, less, words in (
        ("llm-int8", "int8-weight-only", "what LLM.int8() costs over int8 weights alone is {},"),
        ("vectorwise", "llm-int8", "vector-wise int8 costs {} more than LLM.int8() and"),
        ("vectorwise", "smoothquant@auto", "and {} more than SmoothQuant with an α searched for each layer. At 4 bits"),
        ("gptq@group=64", "rtn@group=64", "GPTQ changes that of rounding to nearest by {},"),
        ("awq@group=64", "rtn@group=64", "AWQ by {},"),
    ):
        assert words.format(paired(rows, more, less)) in text
    assert f"window by window GPTQ's is {lower(rows, 'gptq@group=64', 'rtn@group=64')} lower than" in text
    assert f"and AWQ's {lower(rows, 'awq@group=64', 'rtn@group=64')}." in text


def test_the_sentences_about_steps_and_batches_are_the_stored_results():
    sums = sorted(row["stages_over_whole"] for row in stored("gpu-7b-stages")["results"] if row["stages"])
    said = f"add up to {100 * sums[0]:.0f} to {100 * sums[-1]:.0f} % of the layer without marks"
    assert said in " ".join(REPORT.split()) and max(abs(share - 1) for share in sums) < TOLERANCE
    ratios = {
        row["batch"]: row["over_fp16"] for row in stored("gpu-7b-batch-compiled")["results"] if row["method"] != "fp16"
    }
    assert ratios[1] > 1 > max(ratios[batch] for batch in ratios if batch > 1)
    assert f"from batch {min(batch for batch in ratios if batch > 1)} on FP16" in " ".join(README.split())


def commands() -> list[str]:
    """Every command that REPORT section 8 and docs/commands.md tell a reader to run, without `python -m llmq`."""
    section = REPORT.partition("## 8. ")[2].partition("## 9. ")[0]
    told = re.findall(r"`((?:bench|compare|memory|outliers) [^`]*)`", section.replace('"…"', '"text"'))
    listed = (tables.ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    return told + re.findall(r"^    python -m llmq (.*)$", listed, re.MULTILINE)


def test_every_command_that_is_told_is_understood():
    found = commands()
    assert len(found) > 20
    for command in found:
        build_parser().parse_args(shlex.split(command))


def memory(capsys, command: str) -> dict[str, dict]:
    assert command in REPORT
    status, out, _ = run_cli(capsys, *shlex.split(command.removesuffix(" --json")), "--json")
    assert status == 0
    return {row["method"]: row for row in json.loads(out[-1])["results"]}


def test_weights_and_scales_shrink_by_what_is_said(capsys):
    rows = memory(capsys, "memory --model llama-2-7b-chat --methods fp32,fp16,bnb-int8")
    sizes = {name: row["weights"] + row["scales"] for name, row in rows.items()}
    for name, said in (("fp32", "26.954"), ("fp16", "13.477"), ("bnb-int8", "7.006")):
        assert f"{sizes[name] / 1e9:.3f}" == said and said in REPORT
    assert f"{sizes['fp16'] / sizes['bnb-int8']:.2f}x (7B)" in REPORT
    assert f"{sizes['fp32'] / sizes['bnb-int8']:.2f}x smaller" in REPORT


@pytest.mark.demo
def test_the_ledger_has_a_byte_a_weight_and_four_a_row(demo, capsys):
    found = memory(capsys, "memory --model demo --methods bnb-int8 --json")["bnb-int8"]
    text = " ".join(REPORT.split())
    shape = open_model("demo").shape
    linears = {m for m in shape.modules() if isinstance(m, torch.nn.Linear)} - {shape.get_output_embeddings()}
    rows, converted = sum(m.out_features for m in linears), sum(m.weight.numel() for m in linears)
    assert found["scales"] == 4 * rows and f"{4 * rows:,} bytes of scales, 4 for each of {rows:,} output rows" in text
    others = sum(p.numel() for p in shape.parameters()) - converted
    assert f"each of {converted:,} converted weights and two for each of {others:,} others" in text
    assert found["weights"] == pytest.approx(converted + 2 * others, abs=1000)  # and the rotary frequencies
    assert f"The weights are {found['weights'] / 1e6:.2f} MB" in text


@pytest.mark.demo
def test_the_cache_grows_with_the_context(demo, capsys):
    assert "then `--context 4096`: the cache grows 8x" in " ".join(REPORT.split())
    short = memory(capsys, "memory --model demo --context 512")
    status, out, _ = run_cli(capsys, *shlex.split("memory --model demo --context 4096 --json"))
    assert status == 0
    for row in json.loads(out[-1])["results"]:
        assert row["kv"] == 8 * short[row["method"]]["kv"]


def test_only_fp16_keeps_later_tokens_out_of_earlier_logits(tmp_path):
    tiny_llama(torch.float16, initializer_range=0.2).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.randint(0, 256, (40,)).tolist()
    machine, moved = Machine(), {}
    for method in ("fp16", "llm-int8@3", "bnb-int8@3"):
        engine = engine_of(machine, tmp_path, method)
        before = engine.logits(ids)[:-1].float()
        changed = [engine.logits([*ids[:-1], other])[:-1].float() for other in range(0, 256, 8)]
        moved[method] = max(float((after - before).abs().max()) for after in changed)
    assert moved["fp16"] == 0 < min(moved["llm-int8@3"], moved["bnb-int8@3"])


def test_the_worked_example_is_what_the_methods_compute():
    """Section 3: the outputs of each method, and section 8: what a floor does to the smallest input."""
    x = torch.tensor([[0.1, -2.0, 24.0, 0.5]])
    linear = torch.nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[0.6, -0.4, 0.1, 0.2], [-0.2, 0.5, 0.3, -0.5]])
    found = {}
    for name in ("fp32", "vectorwise", "llm-int8"):
        method = METHODS[name]
        dtype = getattr(torch, method.dtype)
        layer = linear if method.dense else method.quantize(copy.deepcopy(linear).to(dtype))
        found[name] = layer(x.to(dtype))[0].tolist()
    assert found["fp32"] == pytest.approx([3.36, 5.93])
    for name, outputs, rounding in (("vectorwise", [3.4418, 5.8203], 1e-4), ("llm-int8", [3.3409, 5.9102], 4e-3)):
        assert found[name] == pytest.approx(outputs, abs=rounding)
        assert f"| {outputs[0]}, {outputs[1]} | " in REPORT
    assert "(0.53 is cut to 0). With decomposition it is 6 either way (6.35)" in " ".join(REPORT.split())
    alone, apart = 127 * 0.1 / 24, 127 * 0.1 / 2  # by the scale with the outlier, and without
    assert (f"{alone:.2f}", math.floor(alone), round(alone)) == ("0.53", 0, 1)
    assert (f"{apart:.2f}", math.floor(apart), round(apart)) == ("6.35", 6, 6)


@pytest.mark.parametrize("script", ["take_screenshots", "take_film", "load_server", "load_class", "fuzz_server"])
def test_a_script_beside_the_tests_runs_from_a_checkout(script):
    """`python tests/…` has the folder of the tests on its path, and the package only where it is installed."""
    run = [sys.executable, "-c", f"import sys; sys.modules['llmq'] = None; import {script}"]
    done = subprocess.run(run, cwd=tables.ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
