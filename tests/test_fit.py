"""Does it fit? The page's answer against the command line's, against arithmetic by hand, and in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_config

from llmq.cards import CARDS, device_bytes
from llmq.cli import main
from llmq.contestant import Contestant
from llmq.errors import BadChoice, ModelUnavailable
from llmq.formatting import format_bytes
from llmq.memory import forecast
from llmq.methods import METHODS
from llmq.models import described
from llmq.models.opening import describe_model, open_model
from llmq.models.presets import PRESETS
from llmq.ui.shell.link import fit_wishes_of
from llmq.ui.tabs.fit_tab import OTHER, answer
from llmq.ui.tabs.fit_view import METHODS_SHOWN, fit_view

LLAMA = "llama-3.1-8b-instruct"
GIB = 2**30


def commanded(capsys, *options) -> dict:
    assert main(["memory", *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16", 16e9), ("16GB", 16e9), ("16 gb", 16e9), ("16GiB", 16 * GIB), (" 16 GiB ", 16 * GIB), ("0.5gib", GIB / 2),
        ("16376MiB", 16376 * 2**20), ("1e1", 10e9), ("rtx-4080", 16376 * 2**20), ("RTX-4080", 16376 * 2**20),
    ],
)  # fmt: skip
def test_gib_and_gb_are_told_apart(text, size):
    assert device_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-3", "nan", "inf", "16 cows", "16GB2", "1e30", "rtx-9999", "1.2.3"])
def test_what_is_no_amount_is_refused_by_name(text):
    with pytest.raises(BadChoice, match="device memory is .*16GiB"):
        device_bytes(text)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_has_what_it_is_sold_with_but_for_what_driver_and_ecc_take(card):
    """In GiB: of 16 GB, ECC takes a sixteenth."""
    assert 0.93 <= card.bytes / (card.gigabytes * GIB) <= 1
    assert device_bytes(card.name) == card.bytes


@pytest.mark.parametrize(("context", "batch"), [(2048, 1), (8192, 1), (4096, 3)])
def test_the_page_says_what_the_command_line_says(context, batch, capsys):
    asked = ("--model", LLAMA, "--context", context, "--batch", batch, "--device-memory", "rtx-4080")
    told = commanded(capsys, *asked, "--methods", ",".join(METHODS_SHOWN))
    assert told["device_memory"] == 16376 * 2**20 and told["usable_memory"] == pytest.approx(0.95 * 16376 * 2**20)
    shown = answer(LLAMA, "rtx-4080", "", context, batch)
    for row in told["results"]:
        label = METHODS[row["method"].partition("@")[0]].label
        (mine,) = [r for r in shown["rows"] if label == r["method"] or label in r["others"]]
        figures = {"kv": row["kv"], "workspace": row["workspace"], "total": row["total"]}
        figures |= {"weights": row["weights"] + row["scales"]}
        assert figures.keys() < mine["figures"].keys()
        assert {name: mine["figures"][name] for name in figures} == {n: format_bytes(v) for n, v in figures.items()}
        assert mine["fits"] == row["fits"] and mine["largest"] == f"{row['largest_context']:,} tokens"
        assert mine["batch"] == f"{row['largest_batch']:,}" and row["largest_batch"] >= batch * row["fits"]
    assert len(shown["rows"]) == 4, "methods that weigh the same share a row"


def linear_weights(hidden: int, ffn: int, layers: int, kv: int) -> tuple[int, int]:
    """Numbers and rows of the linear layers between embedding and head."""
    shapes = 2 * [(hidden, hidden)] + 2 * [(kv, hidden)] + 2 * [(ffn, hidden)] + [(hidden, ffn)]
    return layers * sum(a * b for a, b in shapes), layers * sum(a for a, _ in shapes)


def test_an_8b_model_on_a_card_with_16_gb_by_hand(capsys):
    """FP16 at 2,048 tokens takes 16.76e9 bytes: more than 16 GB, less than 16 GiB, and more than 95 % of either."""
    numbers, _ = linear_weights(4096, 14336, 32, 1024)
    ends = 2 * 128256 * 4096
    norms, frequencies = (2 * 32 + 1) * 4096, 2 * 64 * 4
    weights = 2 * (numbers + ends + norms) + frequencies
    kv = 2 * 32 * 8 * 128 * 2 * 2048
    workspace = 2048 * 2 * (8 * 4096 + 5 * 14336) + 8 * 128256
    total = weights + kv + workspace
    assert 16e9 < 16.7e9 < total < 16 * GIB
    for amount, fits in (("16", False), ("16GiB", False), ("18", True), ("17.5", False), ("17.5GiB", True)):
        asked = ("--model", LLAMA, "--methods", "fp16", "--device-memory", amount)
        (row,) = commanded(capsys, *asked)["results"]
        assert (row["weights"], row["kv"], row["workspace"], row["total"]) == (weights, kv, workspace, total)
        assert row["fits"] is fits
    assert "does not fit 16GiB of memory in FP16 at 2,048 tokens" in answer(LLAMA, OTHER, "16GiB", 2048, 1)["headline"]


def test_a_7b_model_in_int8_by_hand(capsys):
    """int8 is one byte a weight and four bytes a row; embedding, head and norms stay in 16 bit."""
    numbers, rows = linear_weights(4096, 11008, 32, 4096)
    weights = numbers + 2 * (2 * 32000 * 4096 + (2 * 32 + 1) * 4096) + 2 * 64 * 4
    kv = 2 * 32 * 32 * 128 * 2 * 1000 * 2
    asked = ("--model", "llama-2-7b-chat", "--methods", "bnb-int8", "--context", 1000, "--batch", 2)
    (row,) = commanded(capsys, *asked)["results"]
    workspace = 2 * 1000 * 2 * (8 * 4096 + 5 * 11008) + 8 * 2 * 32000
    assert (row["weights"], row["scales"], row["kv"], row["workspace"]) == (weights, 4 * rows, kv, workspace)
    assert row["fits"] is row["largest_context"] is None, "no device, no verdict"


def test_more_context_or_batch_never_needs_less_nor_reaches_further():
    model, contestants = describe_model(LLAMA), [Contestant.parse(name) for name in METHODS_SHOWN]
    for way in ("tokens", "batch"):
        last = None
        for number in (1, 2, 7, 64, 999, 4096, 50_000):
            asked = {"tokens": 512, "batch": 1} | {way: number}
            rows = forecast(model, contestants, **asked, device_bytes=24e9)["results"]
            for row, before in zip(rows, last or [], strict=False):
                assert row["total"] > before["total"] and row["largest_context"] <= before["largest_context"]
                assert before["fits"] or not row["fits"]
            last = rows


def test_the_largest_context_fits_and_the_next_does_not():
    model, (contestant,) = describe_model(LLAMA), [Contestant.parse("bnb-int8")]
    largest = forecast(model, [contestant], tokens=1, device_bytes=16 * GIB)["results"][0]["largest_context"]
    fits = [
        forecast(model, [contestant], tokens=tokens, device_bytes=16 * GIB)["results"][0]["fits"]
        for tokens in (largest, largest + 1)
    ]
    assert fits == [True, False]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_described_weighs_what_its_transformers_model_weighs(name):
    contestants = [Contestant.parse(method) for method in ("fp16", "bnb-int8", "llm-int8-head")]
    built = open_model(name, random_weights=True)
    rows = [forecast(model, contestants, tokens=777, device_bytes=16e9) for model in (describe_model(name), built)]
    assert rows[0] == rows[1] and rows[0]["model_context"] == PRESETS[name].shape.max_position_embeddings


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((LLAMA, "rtx-4080", "", 8192, 1), "does not fit an RTX 4080 (16 GB) in FP16 at 8,192 tokens, only up to 739 "
         "tokens; with int8 it does, up to 21,000 tokens."),
        ((LLAMA, "rtx-4090", "", 8192, 1), "fits an RTX 4090 (24 GB) in FP16 at 8,192 tokens, up to 24,000 tokens; "
         "with int8, up to 45,000 tokens."),
        ((LLAMA, "rtx-3060", "", 16384, 1), "does not fit an RTX 3060 (12 GB) in FP16 at 16,384 tokens; with NF4 · "
         "bitsandbytes it does, up to 18,000 tokens."),
        ((LLAMA, "rtx-3060", "", 65536, 1), "does not fit an RTX 3060 (12 GB) at 65,536 tokens: NF4 · bitsandbytes "
         "fits up to 18,000 tokens, FP16 not at all."),
        ((LLAMA, OTHER, "8", 1, 1), "does not fit 8 GB of memory in FP16 at 1 token; with NF4 · bitsandbytes it does, "
         "up to 4,600 tokens."),
        ((LLAMA, OTHER, "4", 1, 1), "does not fit 4 GB of memory by any method here, however short the text: weights "
         "alone take 6.03 GB."),
        ((LLAMA, OTHER, "9.5GB", 1, 1), "does not fit 9.5GB of memory in FP16 at 1 token; with int8 · ours, head too "
         "it does, up to 2,900 tokens."),
        (("llama-2-7b-chat", "t4", "", 8192, 1), "does not fit a T4 (16 GB) in FP16 at 4,096 tokens, the most it "
         "reads, only up to 2,600 tokens; with int8 it does, up to all 4,096 tokens it reads."),
        (("demo", "t4", "", 100, 4), "fits a T4 (16 GB) in FP16 with 4 texts of 100 tokens, up to all 8,192 tokens it "
         "reads. Int8 would leave 106 MB more free."),
    ],
)  # fmt: skip
def test_the_answer_is_one_sentence(asked, words):
    shown = answer(*asked)
    assert shown["headline"].endswith(f" {words}") and not shown.get("failed")
    assert "5%" in shown["note"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("nope", "t4", "", 1, 1), "unknown model 'nope'"),
        ((None, "t4", "", 1, 1), "unknown model ''"),
        (("demo", "t5", "", 1, 1), "device memory is 't5'"),
        (("demo", OTHER, None, 1, 1), "device memory is ''"),
        (("demo", "t4", "", None, 1), "context is empty"),
        (("demo", "t4", "", 0, 1), "context is 0"),
        (("demo", "t4", "", float("nan"), 1), "context is nan"),
        (("demo", "t4", "", 1, 1.5), "batch is 1.5"),
        (("demo", "t4", "", 1, 1e30), "batch is 1e+30"),
        (("demo", "t4", "", 1, "x"), "batch is x"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(asked, words):
    shown = answer(*asked)
    assert shown["failed"] and shown["rows"] == [] and shown["headline"].startswith(f"Not counted: {words}")
    assert "\n" not in shown["headline"]


def configured(folder: Path, **changes) -> Path:
    tiny_config(**changes).save_pretrained(folder)
    return folder


def test_a_folder_with_a_configuration_and_no_weights_is_enough(tmp_path):
    shown = answer(str(configured(tmp_path)), "t4", "", 64, 1)
    assert "fits a T4" in shown["headline"] and shown["rows"][0]["fits"]
    configured(tmp_path, hidden_size=64)
    assert answer(str(tmp_path), "t4", "", 64, 1) != shown, "a changed configuration is read again"


def test_what_is_not_known_is_never_a_zero(tmp_path):
    from transformers import MiniCPM3Config

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    MiniCPM3Config(**small, kv_lora_rank=16, q_lora_rank=16, vocab_size=259).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MiniCPM3ForCausalLM"]}))
    shown = answer(str(tmp_path), "t4", "", 64, 1)
    assert "is not known" in shown["headline"] and "weights alone take" in shown["headline"]
    for row in shown["rows"]:
        assert row["fits"] is None and row["largest"] == "not known"
        assert {row["figures"][name] for name in ("kv", "total", "left")} == {"not known"}


def test_a_model_without_layers_for_int8_says_so(tmp_path):
    """Its methods share one row, because they weigh the same."""
    result = forecast(describe_model(str(configured(tmp_path))), [Contestant.parse("fp16")], tokens=9, device_bytes=1e9)
    shown = fit_view(result, title="x", place="a T4", asked=9)
    assert shown["headline"].startswith("x fits a T4 at 9 tokens, up to all 128 tokens it reads; it has no layers that")


def test_a_configuration_from_anywhere_cannot_keep_the_server_busy(tmp_path):
    shown = answer(str(configured(tmp_path, num_hidden_layers=1001)), "t4", "", 1, 1)
    assert shown["failed"] and "1,001 layers" in shown["headline"]


def test_an_error_names_no_place_on_the_server(tmp_path, monkeypatch):
    def broken(source):
        raise ModelUnavailable(f"cannot read the configuration of {source.name}: no file /srv/cache/hub/x.json")

    monkeypatch.setattr(described, "described_config", broken)
    said = answer("somebody/else", "t4", "", 1, 1)["headline"]
    assert "somebody/else" in said and "/srv" not in said


@pytest.mark.parametrize(
    "written",
    ["", "{}", '{"model_type": "nope"}', '{"model_type": "llama", "hidden_size": "x"}',
     '{"model_type": "llama", "hidden_act": "nope"}', '{"model_type": "llama", "num_hidden_layers": -3}'],
)  # fmt: skip
def test_a_configuration_of_no_model_is_said_in_our_words(written, tmp_path):
    (tmp_path / "config.json").write_text(written)
    told = f"the configuration of {tmp_path} makes no model; choose another one, or mend its config.json"
    assert answer(str(tmp_path), "t4", "", 1, 1)["headline"] == f"Not counted: {told}"


def test_a_link_asks_for_what_is_possible_and_for_nothing_else():
    link = {"view": "fit", "model": LLAMA, "card": "RTX-4090", "context": "4096", "batch": "2"}
    assert fit_wishes_of(link) == {"model": LLAMA, "card": "rtx-4090", "context": 4096, "batch": 2}
    assert fit_wishes_of(link | {"card": "12GiB"}) == fit_wishes_of(link) | {"card": "other", "memory": "12GiB"}
    wrong = {"view": "fit", "card": "cow", "context": "-1", "batch": "many"}
    assert fit_wishes_of(wrong) == {}
    assert fit_wishes_of(link | {"view": "compare"}) == {}


def test_bars_share_one_scale_on_which_the_card_ends():
    result = forecast(describe_model(LLAMA), [Contestant.parse("fp16"), Contestant.parse("bnb-int8")], tokens=8192,
                      device_bytes=16e9)  # fmt: skip
    shown = fit_view(result, title="x", place="y", asked=8192)
    fp16, int8 = shown["rows"]
    assert sum(fp16["shares"]) == pytest.approx(1, abs=1e-3) and shown["end"] < 1
    assert sum(int8["shares"]) == pytest.approx(result["results"][1]["total"] / result["results"][0]["total"], abs=1e-3)
    assert shown["usable"] == pytest.approx(0.95 * shown["end"], abs=1e-3)
    assert fp16["figures"]["left"].endswith(" short") and not int8["figures"]["left"].endswith(" short")


@pytest.mark.parametrize("wrong", [{"max_position_embeddings": 10**30}])
def test_a_configuration_that_no_model_has_is_refused_and_takes_the_answer_before_it_away(tmp_path, wrong):
    config = tiny_config().to_dict() | wrong
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = answer(str(tmp_path), "rtx-4080", "", 64, 1)
    assert told["headline"].startswith("Not counted: ") and not told["rows"]


def test_a_card_typed_as_its_memory_is_the_card():
    typed, chosen = answer("demo", OTHER, " RTX-4080", 64, 1), answer("demo", "rtx-4080", "", 64, 1)
    assert typed == chosen and "an RTX 4080 (16 GB)" in typed["headline"]
