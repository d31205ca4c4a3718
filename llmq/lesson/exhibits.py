"""What each step of the lesson shows: plain values out of recorded answers and stored results.

Nothing is typed in that could be read from a recording, so a new recording changes drawings, numbers and right answers
alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from llmq.cards import CARDS
from llmq.contestant import Contestant, shown_name
from llmq.events import Run
from llmq.files import read_text
from llmq.labs import load_answer
from llmq.labs.agreement import Read
from llmq.lesson.by_hand import MATRIX, absmax, round_by_hand, vectorwise
from llmq.lesson.exhibit import Exhibit
from llmq.lesson.steps import QUIZ, RACERS, RECORDED_PROMPT
from llmq.memory import HEADROOM, forecast
from llmq.models.opening import describe_model
from llmq.models.presets import model_title
from llmq.summary import RunAnswer, Summary

RECORDED = Path(__file__).with_name("recorded")
RESULTS = Path(__file__).parents[1] / "results"
SHOWN_TOKENS = 16  # of the text whose continuations are shown
MODEL_7B, MODEL_8B = "llama-2-7b-chat", "llama-3.1-8b-instruct"
FITTED = ("llama-3.2-1b-instruct", MODEL_7B, MODEL_8B)
FITTED_CARDS = ("t4", "rtx-4090", "a100-40gb", "h100")
FITTED_METHODS = Contestant.parse_all("fp16,llm-int8,nf4")
BITS = [["fp16", 16], ["llm-int8", 8], ["nf4", 4]]  # of a weight, by method
FITTED_TOKENS = 8192
NEAR_CERTAIN, LIKELY = 0.9, 0.5  # how sure a model was of its choice


@cache
def exhibits() -> dict[str, Exhibit]:
    """The exhibit of every step, by the step's name."""
    return {name: make() for name, make in MAKERS.items()}


def right_choices() -> dict[str, str]:
    """The choice of every question that turned out right."""
    return {question: choice for exhibit in exhibits().values() for question, choice in exhibit.right.items()}


def quiz() -> Exhibit:
    """Pairs of texts, FP16's and int8's; which side is int8's depends on nothing but the pair's number."""
    pairs, right, asked = [], {}, {}
    for number, name in enumerate(QUIZ):
        run = _run(name)
        texts = [outcome.text for outcome in run.summary.outcomes.values()]
        swapped = (number * number) % 3 == 1
        pairs.append({"prompt": run.run.settings["prompt"], "texts": texts[::-1] if swapped else texts})
        right[name] = "left" if swapped else "right"
        asked = _asked_run(run) | {"prompt": ""}
    dense, int8 = (outcome.weight_bytes for outcome in run.summary.outcomes.values())
    return Exhibit({"pairs": pairs}, {"pairs": len(pairs)}, right, (dense, int8), asked)


def transformer() -> Exhibit:
    """The last tokens of a chat prompt and the first of its answer, and what the model would write after each."""
    read = _answer("agreement")
    config = describe_model(read.reading.model).shape.config
    first = read.agreement.continuation - SHOWN_TOKENS // 2
    shown = [
        {"text": read.texts[place], "next": _likeliest(read, place)} for place in range(first, first + SHOWN_TOKENS)
    ]
    shape = {
        "layers": config.num_hidden_layers, "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "width": config.hidden_size, "inner": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }  # fmt: skip
    best = shown[SHOWN_TOKENS // 2 - 1]["next"][0]
    values = shape | {"first": best["text"], "first_share": best["share"], "tokens": SHOWN_TOKENS}
    asked = _asked(read.reading.model, [read.reading.contestant.label], read.reading.prompt, _file("agreement"))
    looked_at = (1, first + SHOWN_TOKENS)  # by the first token of the prompt, by the last one shown
    return Exhibit({"tokens": shown, "shape": shape}, values, {"transformer": "before"}, looked_at, asked)


def fp16() -> Exhibit:
    """Bytes of the weights of models that have names, by method."""
    rows = []
    for name in ("demo", *FITTED):
        model = describe_model(name)
        found = forecast(model, FITTED_METHODS, tokens=1)["results"]
        bytes_by = {row["method"]: row["weights"] + row["scales"] for row in found}
        rows.append({"model": model_title(name), "parameters": bytes_by["fp16"] / 2, "bytes": bytes_by})
    row = next(row for row in rows if row["model"] == model_title(MODEL_7B))
    before, after = row["bytes"]["fp16"], row["bytes"]["llm-int8"]
    right = min(("7", "14", "28"), key=lambda gigabytes: abs(float(gigabytes) * 1e9 - before))
    values = {"parameters": row["parameters"], "fp16": before, "int8": after, "model": row["model"]}
    asked = _asked(MODEL_7B, ["fp16", "llm-int8"])
    return Exhibit({"rows": rows, "bits": BITS}, values, {"fp16": right}, (before, after), asked)


def decomposition() -> Exhibit:
    """The same matrix with a loud column, and the share of columns that a real model keeps in 16 bit."""
    found = json.loads(read_text(RECORDED / "outliers.json"))
    share = found["kept"] / found["columns"]
    right = min(("1", "10", "50"), key=lambda percent: abs(float(percent) / 100 - share))
    values = {"kept": found["kept"], "columns": found["columns"], "share": share, "threshold": found["threshold"]}
    data = {"matrix": MATRIX, "column": 2, "loud": 60.0, "threshold": found["threshold"]}
    return Exhibit(data, values, {"decomposition": right}, (found["columns"], found["kept"]), _asked_outliers(found))


def outliers() -> Exhibit:
    """The largest |x| of every channel in what each layer reads behind a norm."""
    found = json.loads(read_text(RECORDED / "outliers.json"))
    told = {name: found[name] for name in ("channel", "largest", "typical", "reads", "strongest", "loud_channels")}
    values = told | {"times": found["largest"] / found["typical"], "threshold": found["threshold"]}
    values |= {"width": found["width"], "layers": found["layers"]}
    right = "few" if found["strongest"] < found["reads"] / 4 else "many"
    data = {name: found[name] for name in ("width", "names", "sixteenths", "threshold", "tokens")}
    return Exhibit(data, values, {"outliers": right}, (found["largest"], found["typical"]), _asked_outliers(found))


def silence() -> Exhibit:
    """What is left of the model without its strongest channel, and without one drawn at random."""
    answer = _file("silencing")
    rows = [row for row in answer["results"] if row["count"] <= 1]
    whole = next(row for row in rows if row["silenced"] == "none")
    strongest = next(row for row in rows if row["silenced"] == "strongest")
    drawn = sorted((row for row in rows if row["silenced"] == "random"), key=lambda row: row["perplexity"])
    random = drawn[len(drawn) // 2]
    before, after = whole["perplexity"], strongest["perplexity"]
    right = "same" if after < 1.2 * before else "doubles" if after < 1000 else "thousands"
    values = {"before": before, "after": after, "random": random["perplexity"], "channel": strongest["channels"][0]}
    values |= {"times": after / before, "width": describe_model(answer["model"]).shape.config.hidden_size}
    texts = [
        {"name": name, "perplexity": row["perplexity"], "text": row["text"], "channels": row["channels"]}
        for name, row in (("whole", whole), ("random", random), ("strongest", strongest))
    ]
    asked = _asked(answer["model"], ["fp16"], RECORDED_PROMPT, answer)
    return Exhibit({"texts": texts}, values, {"silence": right}, (before, after), asked)


def parting() -> Exhibit:
    """One prompt through FP16 and int8: both texts, where they part, and how sure FP16 was."""
    run = _run("parting")
    summary = run.summary
    found, first = summary.parting(), summary.agreement()["first_divergence"]
    outcomes = list(summary.outcomes.values())
    sure = found.first.probability
    texts = [
        {"method": label, "title": shown_name(label), "before": text[:same], "after": text[same:]}
        for label, text, same in _parted(summary)
    ]
    right = "sure" if sure >= NEAR_CERTAIN else "likely" if sure >= LIKELY else "open"
    other = found.second.probability
    values = {"first": _word(found.first), "first_share": sure, "second": _word(found.second), "place": first + 1}
    values |= {"second_share": other, "tie": found.nearly_a_tie}
    values |= {"fp16": outcomes[0].weight_bytes, "int8": outcomes[1].weight_bytes}
    data = {"texts": texts, "choices": [[found.first.text, sure], [found.second.text, other]]}
    return Exhibit(data, values, {"parting": right}, (sure, other or 0.0), _asked_run(run))


def time() -> Exhibit:
    """Tokens a second of a model of 7 billion weights on one GPU, in two loops, and where a layer's time goes."""
    rows = []
    for name in ("gpu-7b", "gpu-7b-lean"):
        result = _result(name)
        fp16_speed = next(row["tokens_per_second"] for row in result["results"] if row["method"] == "fp16")
        for row in result["results"]:
            speed = row["tokens_per_second"]
            named = {"method": row["method"], "title": shown_name(row["method"]), "loop": row["engine"]}
            rows.append(named | {"speed": speed, "over": speed / fp16_speed, "spread": row["tokens_per_second_spread"]})
    by = {(row["loop"], row["method"]): row for row in rows}
    library, own = by["hf", "bnb-int8"], by["lean", "llm-int8"]
    stages = _result("gpu-7b-stages")
    case = next(
        row
        for row in stages["results"]
        if row["method"] == "bnb-int8" and row["rows"] == 1 and row["outlier_columns"] and row["shape"] == "4096x4096"
    )
    dense = next(row for row in stages["results"] if row["method"] == "fp16" and row["case"] == case["case"])
    right = "slower" if library["over"] < 0.9 else "faster" if library["over"] > 1.1 else "same"
    values = {"library": library["over"], "own": own["over"], "launches": case["kernel_launches"]}
    values |= {"dense_launches": dense["kernel_launches"], "syncs": case["host_syncs"]}
    values |= {"device": _result("gpu-7b")["conditions"]["device_name"], "spread": max(row["spread"] for row in rows)}
    data = {"rows": rows, "stages": case["stages"]}
    asked = _asked(MODEL_7B, ["fp16", "bnb-int8", "llm-int8"], "", _result("gpu-7b-lean"))
    return Exhibit(data, values, {"time": right}, (library["over"], own["over"]), asked)


def race() -> Exhibit:
    """Methods by the bytes that they leave and by the KL to FP16."""
    answer = _file("race")
    rows = [
        {"method": row["method"], "title": shown_name(row["method"]), "bytes": row["bytes"], "kl": row["kl_to_fp16"],
         "change": row["perplexity_change"]}
        for row in answer["results"] if row["method"] != "fp16"
    ]  # fmt: skip
    offered = {name: next(row for row in rows if row["method"] == name) for name in RACERS}
    best = min(offered.values(), key=lambda row: row["kl"])
    llm_int8 = offered["llm-int8"]
    values = {"best_kl": best["kl"], "kl": llm_int8["kl"], "times": llm_int8["kl"] / best["kl"]}
    values |= {"methods": len(rows)}
    asked = _asked(answer["model"], [row["method"] for row in rows], "", answer)
    return Exhibit({"rows": rows}, values, {"race": best["method"]}, (llm_int8["kl"], best["kl"]), asked)


def fit() -> Exhibit:
    """Which model fits which card, by method, with a context of FITTED_TOKENS."""
    cells = []
    for name in FITTED:
        model = describe_model(name)
        tokens = min(FITTED_TOKENS, model.context)
        for card in FITTED_CARDS:
            found = forecast(model, FITTED_METHODS, tokens=tokens, device_bytes=CARDS[card].bytes)
            cells.append({
                "model": model_title(name), "card": CARDS[card].title, "tokens": tokens,
                "needs": {row["method"]: [row["total"], row["fits"]] for row in found["results"]},
            })  # fmt: skip
    cell = next(one for one in cells if one["model"] == model_title(MODEL_8B) and one["card"] == CARDS["t4"].title)
    (dense, dense_fits), (int8, int8_fits) = cell["needs"]["fp16"], cell["needs"]["llm-int8"]
    usable = HEADROOM * CARDS["t4"].bytes
    right = "both" if dense_fits else "int8" if int8_fits else "none"
    values = {"fp16": dense, "int8": int8, "usable": usable, "model": cell["model"], "card": cell["card"]}
    values["tokens"] = cell["tokens"]
    data = {"cells": cells, "bits": BITS}
    return Exhibit(data, values, {"fit": right}, (dense, int8), _asked(MODEL_8B, ["fp16", "llm-int8"]))


MAKERS: dict[str, Callable[[], Exhibit]] = {
    "quiz": quiz, "transformer": transformer, "fp16": fp16, "round": round_by_hand, "absmax": absmax,
    "vectorwise": vectorwise, "decomposition": decomposition, "outliers": outliers, "silence": silence,
    "parting": parting, "time": time, "race": race, "fit": fit,
}  # fmt: skip


def _likeliest(read: Read, place: int) -> list[dict]:
    """What the first method held likeliest after the token at `place`."""
    (token,) = (token for token in read.agreement.tokens if token.position == place + 1)
    return [{"text": read.names[guess.token_id], "share": guess.probability} for guess in token.baseline]


def _word(choice) -> str:
    """A chosen token as it stands in a sentence."""
    return choice.text.strip() if choice.text and choice.text.strip() else choice.quoted


def _parted(summary: Summary):
    """(label, text, how many of its characters all share) of each contestant."""
    outcomes = summary.outcomes
    texts = [outcome.text for outcome in outcomes.values()]
    shortest = min(map(len, texts))
    same = next((place for place in range(shortest) if len({text[place] for text in texts}) > 1), shortest)
    return [(label, text, same) for label, text in zip(outcomes, texts, strict=True)]


@cache
def _run(name: str) -> RunAnswer:
    run = Run.load(RECORDED / f"{name}.jsonl")
    return RunAnswer(run, Summary(run.replay()))


@cache
def _file(name: str) -> dict:
    return json.loads(read_text(RECORDED / f"{name}.json"))


@cache
def _answer(name: str):
    return load_answer(RECORDED / f"{name}.json")


@cache
def _result(name: str) -> dict:
    return json.loads(read_text(RESULTS / f"{name}.json"))


def _asked_run(run: RunAnswer) -> dict:
    settings = run.run.settings
    tokens = {"max_new_tokens": settings["sampling"]["max_new_tokens"]}
    made = {"conditions": run.run.environment}
    return _asked(settings["model"], settings["contestants"], settings["prompt"], made) | tokens


def _asked_outliers(found: dict) -> dict:
    return _asked(found["model"], [found["method"]], found["prompt"], found) | {"threshold": found["threshold"]}


def _asked(model: str, methods: list[str], prompt: str = "", found: Mapping | None = None) -> dict:
    """What a visitor would ask to see this, and what the recording was made on."""
    asked = {"model": model, "methods": methods, "prompt": prompt}
    made = (found or {}).get("conditions", {})
    return asked | {name: made[name] for name in ("date", "device_name") if name in made}
