"""The tables of README and REPORT, each line of them, from results made for the purpose."""

from __future__ import annotations

import json

import pytest

from llmq.bench import tables

CONDITIONS = {
    "device_name": "Abacus",
    "random_weights": False,
    "model_revision": "r1",
    "prompt_tokens": 64,
    "new_tokens": 32,
    "repeats": 5,
    "torch_threads": 2,
    "python": "3.12.3",
    "date": "2026-11-22T09:30:56+00:00",
    "versions": {"torch": "2.1", "transformers": "5.1", "bitsandbytes": "0.5"},
    "llama_cpp_python": "0.3",
    "kernel_cache": "cold",
    "windows": 8,
    "commit": "0123456789ab",
}
SPREAD = " Spread: the highest less the lowest, over the median, from 10 % on."


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The lines of a table, where these results are stored under their names."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def lines(table: str, **results: dict) -> list[str]:
        for name, result in results.items():
            (tmp_path / f"{name.replace('_', '-')}.json").write_text(json.dumps(result))
        return tables.table(table).splitlines()

    return lines


def result(kind: str, *rows: dict, **more) -> dict:
    bandwidth = {"read_bandwidth_bytes_per_second": 23.4e9}
    return {"kind": kind, "model": "demo", "conditions": CONDITIONS, "results": list(rows), **bandwidth, **more}


def speed(method: str, low: float, middle: float, high: float, **more) -> dict:
    sizes = {"weight_bytes": 1_000_000, "scale_bytes": 500_000, "peak_bytes": 2_000_000, "prefill_seconds": 0.25}
    names = ("tokens_per_second_min", "tokens_per_second", "tokens_per_second_max")
    return {"method": method, **dict(zip(names, (low, middle, high), strict=True)), **sizes, **more}


def test_speeds_stand_against_fp16_in_whatever_row_it_is(made):
    rows = speed("bnb-int8", 20, 25, 30), speed("fp16", 90, 100, 110), speed("llm-int8", 140, 150, 160)
    assert made("one", one=result("decode", *rows)) == [
        "| method | first token | decode, tok/s (lowest–highest) | against FP16 | weights | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
        "| `bnb-int8` | 250 ms | 25.0 (20.0–30.0, spread 40 %) | 0.25× | 1.50 MB | 2.00 MB |",
        "| `fp16` | 250 ms | 100.0 (90.0–110.0, spread 20 %) | 1.00× | 1.50 MB | 2.00 MB |",
        "| `llm-int8` | 250 ms | 150.0 (140.0–160.0, spread 13 %) | 1.50× | 1.50 MB | 2.00 MB |",
        "",
        "*Abacus, demo (r1); batch 1, 64 prompt tokens, 32 new tokens, median of 5 runs, one method after the other; "
        "reading memory at 23 GB/s in the same run; torch 2.1, transformers 5.1, bitsandbytes 0.5; 2026-11-22, commit "
        f"0123456.{SPREAD}*",
    ]


def test_rounds_have_their_own_ratio_and_what_speaks_against_them_stands_below(made):
    fair = CONDITIONS | {"rounds": True, "commit": "0123456789ab-dirty"}
    rows = speed("fp16", 99, 100, 101, over_fp16=1.0), speed("absmax", 198, 200, 202, over_fp16=1.7)
    rows += (speed("bnb-int8", 10, 10, 10, over_fp16=None),)
    doubts = ["no rounds, and no ratio within one: too large", "other processes on the GPU: 2"]
    lines = made("one", one=result("decode", *rows, notes=doubts) | {"conditions": fair})
    assert [line.split(" | ")[3] for line in lines[2:5]] == ["1.00×", "1.70×", ""]
    assert (
        "; batch 1, 64 prompt tokens, 32 new tokens, medians of 5 rounds in which everybody ran in turn, ratios "
        in (lines[-1])
    )
    assert lines[-1].endswith(
        "commit 0123456 and changes not in it. No rounds, and no ratio within one: too large. Other processes on the "
        "GPU: 2.*"
    )


def test_what_was_not_measured_or_not_believed_is_no_figure(made):
    row = speed("fp16", 1, 1, 1, bandwidth_fraction=None, bandwidth_refused="not believable: 1.57 of")
    short = result("decode", row, row | {"method": "bf16", "bandwidth_refused": ""})
    empty = result("prefill")
    lines = made("lean", gpu_7b_lean=short, gpu_7b_lean_2000=result("decode"), gpu_7b_prefill=empty)
    assert [line.split(" | ")[3] for line in lines[2:4]] == ["not believable", "–"]
    unmeasured = speed("fp16", 1, None, 1, mode="eager", over_fp16=None, over_bnb=None) | {"prefill_seconds": None}
    assert made("one", one=result("transformers", unmeasured))[2] == "| `fp16` | eager | – |  |  | – | 2.00 MB |"


def test_random_weights_are_said(made):
    conditions = CONDITIONS | {"random_weights": True}
    *_, note = made("one", one=result("decode", speed("fp16", 1, 1, 1)) | {"conditions": conditions})
    assert "demo (random weights, so the text means nothing)" in note


def test_the_lean_table_joins_two_contexts_and_a_prefill(made):
    short = (
        speed("fp16", 90, 100, 110, bandwidth_fraction=0.5),
        speed("llm-int8", 140, 150, 160, bandwidth_fraction=0.25),
    )
    long = result("decode", speed("llm-int8", 60, 70, 79))
    prefill = result("prefill", {"method": "fp16", "seconds": 0.04})
    lines = made("lean", gpu_7b_lean=result("decode", *short), gpu_7b_lean_2000=long, gpu_7b_prefill=prefill)
    assert lines[2:4] == [
        "| `fp16` | 100.0 (90.0–110.0, spread 20 %) | 1.00× | 50% |  | 40.0 ms | 1.50 MB | 2.00 MB |",
        "| `llm-int8` | 150.0 (140.0–160.0, spread 13 %) | 1.50× | 25% | 70.0 tok/s (spread 27 %) |  "
        "| 1.50 MB | 2.00 MB |",
    ]


def test_the_peers_table_has_each_ratio_in_its_column(made):
    def row(method: str, engine: str, rival: str) -> dict:
        ratios = {"decode_ratio": 1.1, "prefill_ratio": 1.2, "over_fp16": 1.3, "bandwidth_fraction": 0.9}
        prefill = {"prefill_tokens_per_second": 480.6, "against": f"llama.cpp {rival}", "engine": engine}
        return speed(method, 90, 100, 110, **ratios, **prefill)

    quiet = row("fp16", "lean", "F16"), row("llm-int8", "lean", "Q8_0"), row("llama.cpp F16", "llama.cpp", "F16")
    lines = made("peers", cpu_peers=result("peers", *quiet), cpu_peers_busy=result("peers", speed("fp16", 40, 60, 70)))
    assert lines[2:5] == [
        "| `fp16` | 100.0 (90.0–110.0, spread 20 %) | 1.10× F16 | 1.30× | 90% | 481 | 1.20× F16 | 1.00 MB "
        "| 60.0 (spread 50 %), 60% |",
        "| `llm-int8` | 100.0 (90.0–110.0, spread 20 %) | 1.10× Q8_0 | 1.30× | 90% | 481 | 1.20× Q8_0 | 1.00 MB |  |",
        "| llama.cpp F16 | 100.0 (90.0–110.0, spread 20 %) |  |  | 90% | 481 |  | 1.00 MB |  |",
    ]


def test_loading_and_prompts_have_a_row_a_method_and_a_column_a_length(made):
    def loaded(seconds: float) -> dict:
        sizes = {"weight_bytes": 1_000_000, "scale_bytes": 500_000, "peak_load_bytes": 3_000_000}
        return result("load", {"method": "fp16", "load_seconds": seconds, "ready_seconds": 2 * seconds, **sizes})

    names = ("cold", "warm", "file", "int8")
    lines = made("load", **{f"gpu_7b_load_{name}": loaded(number) for number, name in enumerate(names, 1)})
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["drawn", "drawn", "FP16 file", "int8 file"]
    assert lines[3] == "| drawn | none yet | `fp16` | 2.00 s | 4.00 s | 1.50 MB | 3.00 MB |"

    def read(tokens: int, factor: float) -> dict:
        rows = ({"method": m, "seconds": s * factor} for m, s in (("fp16", 0.01), ("bf16", 0.02)))
        return result("prefill", *rows) | {"conditions": CONDITIONS | {"prompt_tokens": tokens}}

    lines = made("prompts", **{f"gpu_7b_prefill_{n}": read(n, factor) for n, factor in ((64, 1), (300, 2), (512, 4))})
    assert lines[0] == "| method | 64 tokens | 300 tokens | 512 tokens |"
    assert lines[2:4] == ["| `fp16` | 10.0 ms | 20.0 ms | 40.0 ms |", "| `bf16` | 20.0 ms | 40.0 ms | 80.0 ms |"]


def scored(method: str, **more) -> dict:
    row = {"method": method, "engine": "lean", "perplexity": 14.944, "perplexity_interval": [11.9, 18.6]}
    return row | {"kl_to_fp16": 0.01734, "top1_agreement": 0.9231, **more}


NEW = {"perplexity_change": 0.0204, "perplexity_change_interval": [0.0151, 0.0257], "equivalent_within": 0.02488}
NEW |= {"kl_median": 0.008, "kl_p99": 0.14, "kl_max": 2.5}


def test_quality_of_every_device_stands_in_one_table_and_each_method_once(made):
    old = result("quality", scored("bnb-int8"), text="CPython pydoc_data.topics")
    new = result("quality", scored("llm-int8", **NEW), scored("fp16"), text="English prose")
    lines = made("quality", cpu_quality=new, cpu_two_quality=new, gpu_quality=old)
    assert lines[0].startswith("| Device and text | Method | Loop |")
    assert lines[2] == (
        "| Abacus: English prose, 8 windows | `llm-int8` | lean | 14.94 (11.90–18.60) | +2.0 % (+1.5 to +2.6) | ±2.5 % "
        "| 0.0173 | 0.008, 0.14, 2.5 | 92% |"
    )
    assert lines[4] == (
        "| Abacus: CPython pydoc_data.topics of 3.12.3, 8 windows | `bnb-int8` | lean | 14.94 (11.90–18.60) | – | – "
        "| 0.0173 | – | 92% |"
    )
    assert len(lines) == 7 and made("gpu-quality")[2] == lines[4]


def test_the_headline_is_of_many_windows_and_known_methods(made):
    conditions = CONDITIONS | {"windows": 64}
    many = result("quality", scored("llm-int8", **NEW), scored("absmax", **NEW), text="English prose")
    few = result("quality", scored("bnb-int8", **NEW), text="English prose")
    lines = made("headline", cpu_quality=many | {"conditions": conditions}, gpu_quality=few)
    assert lines[2:4] == [
        "| `llm-int8` | +2.0 % (+1.5 to +2.6) | ±2.5 % | 0.017 | 92.3% | Abacus: English prose, 64 windows |",
        "",
    ]
    assert lines[4].startswith("*`llm-int8` costs 2.0 % perplexity (95 %: 1.5 to 2.6) on Abacus. ")


def test_what_watching_costs(made):
    row = {"method": "fp16", "held_bytes": 13_800_000}
    for phase, low, middle, high in (("prefill", 1.1, 1.5, 2.2), ("decode", 1.0, 1.25, 1.75)):
        row |= {f"{phase}_ratio_min": low, f"{phase}_ratio": middle, f"{phase}_ratio_max": high}
    lines = made("hooks", hooks=result("hooks", row))
    assert lines[2] == ("| `fp16` | 1.50× (1.10–2.20, spread 73 %) | 1.25× (1.00–1.75, spread 60 %) | 13.8 MB |")
    assert "64 prompt tokens, 32 new tokens; medians of 5 rounds" in lines[-1]


def test_loops_of_others_stand_beside_ours_with_how_they_were_noted(made):
    row = {"method": "gpt-slow int8", "weight_bytes": 7_000_000, "start": 1, "about": "head too"}
    rows = [row | {"tokens_per_second": 226.06, "compile_seconds": 139}]
    rows[0] |= {"tokens_per_second_min": 226.0, "tokens_per_second_max": 226.1}
    rows += [row | {"tokens_per_second": 14.0, "compile_seconds": None, "about": "", "start": 2}]
    lines = made("one", one=result("others", *rows) | {"conditions": CONDITIONS | {"batch": 1, "how": "by hand"}})
    assert lines[2:4] == [
        "| gpt-slow int8 | 226.1 (226.0–226.1) | 7.00 MB | 139 s | head too |",
        "| gpt-slow int8 | 14.0 | 7.00 MB |  | another start of the machine |",
    ]
    assert lines[-1].startswith("*Abacus, demo (r1); batch 1, 64 prompt tokens, 32 new tokens; torch 2.1, transform")
    assert lines[-1].endswith("2026-11-22, commit 0123456; by hand.*")


def test_kernels_have_a_row_a_kind_and_a_column_a_shape(made):
    def product(outputs: int, arithmetic: str, launch: bool, microseconds: float) -> dict:
        shape = {"outputs": outputs, "inputs": 4096, "arithmetic": arithmetic}
        return shape | {"dependent_launch": launch, "microseconds": microseconds}

    products = [product(12288, "DP4A", False, 17.57), product(12288, "DP4A", True, 16.7), product(64, "DP4A", True, 1)]
    splits = [{"values": 4096, "norm": norm, "list": "none", "microseconds": 1.25 + norm} for norm in (False, True)]
    conditions = {"device_name": "Abacus", "torch": "2.1", "triton": "3.1", "date": "2026-11-22", "how": "by hand"}
    found = {"kind": "kernels", "conditions": conditions, "products": products, "splits": splits}
    assert made("kernels", kernels=found) == [
        "| microseconds | 12,288 × 4,096 | 64 × 4,096 | 4,096 values | 4,096 values, norm first |",
        "|---|---:|---:|---:|---:|",
        "| DP4A | 17.57 |  |  |  |",
        "| DP4A, dependent launch | 16.70 | 1.00 |  |  |",
        "| outlier list: none |  |  | 1.25 | 2.25 |",
        "",
        "*Abacus, torch 2.1, triton 3.1, 2026-11-22; by hand.*",
    ]


def test_an_experiment_is_its_rows_without_texts_and_what_they_say(made):
    rows = [
        {"silenced": "none", "count": 0, "channels": [], "perplexity": 10.0, "kl_to_fp16": 0.0, "text": "a"},
        {"silenced": "strongest", "count": 1, "channels": [7], "perplexity": 50.0, "kl_to_fp16": 2.0, "text": "b"},
        {"silenced": "random", "count": 1, "channels": [3], "perplexity": 12.0, "kl_to_fp16": 0.25, "text": "c"},
    ]
    lines = made("silencing", silencing=result("silencing", *rows, tokens=2044, text="Python code"))
    assert lines[0] == "| Silenced | Channels | Perplexity | KL to FP16 |"
    assert lines[3:5] == ["| 1 strongest | 7 | 50.00 | 2 |", "| 1 random | 3 | 12.00 | 0.25 |"]
    assert lines[-1].startswith(
        "*Without channel 7 perplexity goes from 10 to 50; without a random channel to 12 (median of the draws)."
    )
    assert lines[-1].endswith("Abacus, Python 3.12.3, demo model; 2,044 tokens of Python code; 2026-11-22.*")


def test_a_judged_text_counts_its_slips(made):
    rows = [{"method": "a", "keeps_the_request": "yes", "factual_slips": ["x", "y"], "other": "-"}]
    rows += [{"method": "b", "keeps_the_request": "no", "factual_slips": [], "other": "-"}]
    about = {"kind": "paris", "prompt": "Plan", "model": "demo", "device_name": "Abacus", "date": "2026-11-22"}
    lines = made("paris", paris=about | {"conditions": "greedy", "results": rows})
    assert lines[2:4] == ["| `a` | yes | 2: x; y | - |", "| `b` | no | none | - |"]


def test_a_document_is_filled_between_its_marks_and_nowhere_else(made, tmp_path, monkeypatch, capsys):
    text = "before\n<!-- table:one -->\nold\n<!-- /table -->\nafter\n"
    expected = "\n".join(made("one", one=result("decode", speed("fp16", 1, 2, 3))))
    filled = text.replace("old", expected)
    assert tables.filled(text) == filled == tables.filled(filled)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "one.json").rename(tmp_path / "results" / "one.json")
    for name, content in zip(tables.DOCUMENTS, (text, filled), strict=True):
        (tmp_path / name).write_text(content)
    assert tables.main(["--check"]) == 1 and "out of date: README.md\n" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == text, "looking changes nothing"
    assert tables.main([]) == 0 and (tmp_path / "README.md").read_text() == filled
    assert tables.main(["--check"]) == 0


def test_generate_stands_against_fp16_and_bitsandbytes(made):
    more = {"mode": "compiled", "over_fp16": 1.5, "over_bnb": 20.04}
    turns = CONDITIONS | {"schedule": "everybody in turn, round by round"}  # as older results say it
    found = result("transformers", speed("llm-int8", 140, 150, 160, **more)) | {"conditions": turns}
    assert made("one", one=found) == [
        "| method | `generate` | decode, tok/s (lowest–highest) | against FP16 | against bitsandbytes "
        "| first token | peak memory |",
        "|---|---|---:|---:|---:|---:|---:|",
        "| `llm-int8` | compiled | 150.0 (140.0–160.0, spread 13 %) | 1.50× | 20.0× | 250 ms | 2.00 MB |",
        "",
        "*Abacus, demo (r1); batch 1, 64 prompt tokens, 32 new tokens, greedy; medians of 5 rounds in which everybody "
        "ran in turn, ratios within a round, against FP16 of the same mode and eager bitsandbytes; torch 2.1, "
        f"transformers 5.1, bitsandbytes 0.5; 2026-11-22, commit 0123456.{SPREAD}*",
    ]


def test_a_layer_has_a_row_a_case_and_bitsandbytes_steps_in_it(made):
    def row(method: str, case: str, microseconds: float, **more) -> dict:
        ends = dict.fromkeys(("seconds", "seconds_min", "seconds_max"), microseconds / 1e6)
        place = {"shape": "8x4", "rows": 2, "outlier_columns": 1, "host_syncs": None, "kernel_launches": None}
        place["kernel_seconds"] = None
        return {"method": method, "case": case, **place, **ends, "stages": None, "stages_over_whole": None, **more}

    steps = {"search": 20e-6, "quantize": 5e-6, "gather": 0.0, "int8_product": 1e-5, "scale": 1e-6}
    steps |= {"outlier_product": 0.0, "dispatch": 4e-6}
    told = {"stages": steps, "stages_over_whole": 0.97, "host_syncs": 2, "kernel_launches": 14}
    told["kernel_seconds"] = 31.25e-6
    rows = row("fp16", "a", 11.25, host_syncs=0, kernel_launches=1), row("bnb-int8", "a", 1234.5, **told)
    conditions = CONDITIONS | {"device": "cuda:0", "layers": 8, "steps": {"search": "look", "scale": "back to FP16"}}
    lines = made("one", one=result("stages", *rows) | {"conditions": conditions, "notes": ["a note"]})
    header = "| layer | rows | outlier columns | `fp16` | `bnb-int8` | waits | launches | GPU computes "
    header += "| search, wait | quantize | gather | int8 product | scale | FP16 product | dispatch | sum of the steps |"
    steps = "20.0 | 5.0 |  | 10.0 | 1.0 |  | 4.0 | 97% |"
    assert lines[0] == header
    assert lines[2] == f"| 8x4 | 2 | 1 | 11.2 | 1,234.5 | 0; 2 | 1; 14 | –; 31.2 | {steps}"
    assert "(search, wait: look; scale: back to FP16)" in lines[-1] and lines[-1].endswith("A note.*")
    on_cpu = row("fp16", "a", 1.0)
    lines = made("one", one=result("stages", on_cpu) | {"conditions": conditions | {"device": "cpu"}})
    assert lines[2] == f"| 8x4 | 2 | 1 | 1.0 | – | – | – |{'  |' * 8}" and "a CPU has none of it" in lines[-1]


def test_batches_stand_with_what_each_sequence_gets_and_what_failed(made):
    more = {"mode": "eager", "error": "", "predicted_bytes": 3_000_000, "over_fp16": 0.5}
    fine = speed("bnb-int8", 40, 41, 42, batch=4, row_tokens_per_second=10.25, **more)
    failed = fine | {"batch": 64, "error": "CUDA out of memory.", "peak_bytes": None, "prefill_seconds": None}
    failed |= {"row_tokens_per_second": None, "over_fp16": None}
    lines = made("one", one=result("batch", fine, failed, findings=["fp16 overtakes it."], notes=[]))
    assert lines[2:4] == [
        "| 4 | `bnb-int8` | eager | 41.0 (40.0–42.0) | 10.2 | 0.50× | 250 ms | 2.00 MB | 3.00 MB |",
        "| 64 | `bnb-int8` | eager | CUDA out of memory. | – |  | – | – | 3.00 MB |",
    ]
    assert "64 prompt tokens, 32 new tokens for every sequence" in lines[-1] and "fp16 overtakes it." in lines[-1]


def test_energy_stands_beside_what_idle_takes(made):
    def row(method: str, spread: float = 0.0) -> dict:
        found = {"method": method}
        for phase, joules, ratio in (("prefill", 0.0112, 1.0), ("decode", 2.5, 0.6)):
            for name, value in (("_joules_per_token", joules), ("_joules_per_token_over_idle", joules / 2)):
                found |= {f"{phase}{name}": value, f"{phase}{name}_min": value, f"{phase}{name}_max": value}
            found |= {f"{phase}_watts": 512.4, f"{phase}_joules_over_fp16": ratio}
        return found | {"decode_joules_per_token_max": 2.5 * (1 + spread)}

    idle = {f"idle_watts{end}": 119.6 for end in ("", "_min", "_max")}
    measured = result("energy", row("fp16"), row("llm-int8", spread=0.2), **idle)
    counter = {"seconds": 3, "counter": "NVML's joules of the whole GPU", "counter_step_seconds": 0.1}
    lines = made("one", one=measured | {"conditions": CONDITIONS | counter})
    assert lines[0] == (
        "| method | prefill, a token | against FP16 | over idle | power "
        "| decode, a token | against FP16 | over idle | power |"
    )
    assert lines[3] == (
        "| `llm-int8` | 11.2 mJ | 1.00× | 5.60 mJ | 512 W | 2.50 J (spread 20 %) | 0.60× | 1.25 J | 512 W |"
    )
    assert "NVML's joules of the whole GPU, over stretches of 3 s or longer" in lines[-1]
    assert "a step of the counter (100 ms apart). Over idle: without the 120 W that are drawn while all" in lines[-1]
    assert "64 prompt tokens, 32 new tokens" in lines[-1]
