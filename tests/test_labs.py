"""Experiments on the tiny model: every figure computed once more, what is refused, and which engines are left."""

from __future__ import annotations

import gc
import math
import random
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from tiny_runs import key_of, light
from transformers import LlamaForCausalLM

from llmq.contestant import Contestant
from llmq.engine.loading import Key, load_engine
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.labs.ablation import Ablation
from llmq.labs.amplifying import Amplifying
from llmq.labs.rows import BASELINE, RowAnswer, RowLab, Workbench
from llmq.labs.silencing import Silencing, harm, strongest_channels
from llmq.labs.thresholds import Thresholds, name_of
from llmq.machine.door import Lease, Machine
from llmq.methods import METHODS
from llmq.models.edits import Silence, edit_model_
from llmq.models.loading import load_model, resolve
from llmq.models.opening import open_model

WINDOW = 128  # the tiny model's context
WIDTH = 32
SCORES = {"perplexity", "kl_to_fp16", "top1_agreement"}


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA whose blocks matter, with one loud channel: 7."""
    folder = tmp_path_factory.mktemp("loud-llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.2))
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[7] = 12.0
    model.half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


class Watching(Machine):
    """Keeps a word with every model that was loaded: how many edited ones were alive when the next one came."""

    def __init__(self):
        self.models, self.crowd = [], 0
        super().__init__(self._watch)

    def _watch(self, key: Key):
        alive = [edited for edited, model in self.models if edited and model() is not None]
        self.crowd = max(self.crowd, len(alive))
        engine = load_engine(key)
        self.models.append((key.model.source.edit is not None, weakref.ref(engine.model)))
        return engine


@pytest.fixture(scope="module")
def machine() -> Watching:
    return Watching()


def lab_of(experiment: RowLab, machine) -> Workbench:
    return Workbench(experiment, open_model(experiment.model), Lease(machine, "cpu", threading.Event()))


def run(experiment: RowLab, machine) -> dict:
    *events, last = machine.run(experiment)
    rows = [event.result["results"] for event in events if isinstance(event, RowAnswer)]
    assert [len(found) for found in rows] == list(range(1, len(last.result["results"]) + 1)), "a row at a time"
    assert last.done and not last.result["stopped"] and last.result["kind"] == experiment.kind
    shares = [event.fraction for event in events if isinstance(event, Progress) and event.fraction is not None]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] < 1
    return last.result


def softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def scored(logits, truth, texts) -> dict:
    """The three figures from (tokens, vocabulary) logits, in float64."""
    rows = []
    for own, base, ids in zip(logits, truth, texts, strict=True):
        p, q = softmax(base[:-1]), softmax(own[:-1])
        loss = -np.log(q[np.arange(len(ids) - 1), ids[1:]])
        rows.append((loss, (p * np.log(p / q)).sum(1), p.argmax(1) == q.argmax(1)))
    loss, kl, same = (np.concatenate(column) for column in zip(*rows, strict=True))
    return {"perplexity": np.exp(loss.mean()), "kl_to_fp16": kl.mean(), "top1_agreement": same.mean()}


def read(model, texts) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in texts]


def test_the_score_is_the_formula_and_windows_fit_the_context(folder, machine):
    lab = lab_of(RowLab(model=folder, windows=3), machine)
    assert [len(ids) for ids in lab.texts] == [WINDOW] * 3
    own, truth = ([torch.randn(WINDOW, 259) * 2 for _ in range(3)] for _ in range(2))
    tables = [[logits[:-1].log_softmax(-1) for logits in side] for side in (own, truth)]
    assert lab.score(*tables) == pytest.approx(scored(own, truth, lab.texts), rel=1e-5)
    assert lab.score(tables[1], tables[1])["kl_to_fp16"] == 0 and lab.score(tables[1], tables[1])["top1_agreement"] == 1


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_output_that_excludes_the_text_or_is_no_number_scores_worst(folder, machine, value):
    lab = lab_of(RowLab(model=folder), machine)
    truth = torch.randn(WINDOW - 1, 259).log_softmax(-1)
    own = truth.clone()
    own[5] = value
    found = lab.score([own], [truth])
    assert (found["perplexity"], found["kl_to_fp16"]) == (math.inf, math.inf)
    assert found["top1_agreement"] == pytest.approx((WINDOW - 2) / (WINDOW - 1))


@pytest.mark.parametrize("windows", [0, 17, True, "1", 1.0])
def test_a_number_of_windows_that_is_none_is_refused(windows):
    with pytest.raises(BadChoice, match="windows is"):
        Silencing(windows=windows)


@pytest.mark.parametrize("loop", ["hf", "lean"])
@pytest.mark.parametrize("method", ["fp16", "int8-weight-only", "llm-int8", "llm-int8@2", "llm-int8@0", "bnb-int8@2"])
def test_the_share_in_sixteen_bit_is_counted_from_the_inputs(folder, machine, method, loop):
    """Over the seven linear layers of each block: what reaches the threshold at any token, as the kernel compares."""
    if method.startswith("bnb") and loop == "lean":
        pytest.skip("bitsandbytes runs through transformers only")
    lab, contestant = lab_of(RowLab(model=folder), machine), Contestant.parse(method)
    ids, threshold = lab.texts[0], contestant.threshold
    if threshold:
        with lab.engine(contestant, loop=loop) as engine:
            low = engine.under(replace(engine.method, threshold=0.5))
            low.outlier_share(ids)  # what an earlier threshold marked must not stay
    with lab.engine(contestant, loop=loop) as engine:
        found = engine.outlier_share(ids)
    with lab.engine(contestant, loop="hf") as engine:
        inputs, handles = {}, []
        for name, module in engine.model.named_modules():
            if name.endswith("_proj"):
                keep = lambda m, args, name=name: inputs.update({name: args[0][0].half()})  # noqa: E731
                handles.append(module.register_forward_pre_hook(keep))
        read(engine.model, [ids])
        for handle in handles:
            handle.remove()
    assert len(inputs) == 14
    shares = [float((x.abs() >= threshold).any(0).float().mean()) if threshold else 0.0 for x in inputs.values()]
    # The lean loop keeps activations in float32: a value beside the threshold may fall on its other side.
    assert found == pytest.approx(np.mean(shares), abs=0.01 if loop == "lean" else 1e-6)
    assert (found > 0.02) == bool(threshold)


def test_the_ranking_is_by_the_largest_number_behind_a_norm(folder, machine):
    lab = lab_of(Silencing(model=folder), machine)
    ranking, peaks = strongest_channels(lab)
    model, seen = load_model(resolve(folder), METHODS["fp16"], "cpu"), []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "gate_proj")):
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].abs().amax(0).float()))
    read(model, [lab.texts[0][:128]])
    largest = torch.stack(seen).amax(0)
    assert peaks == sorted(largest.tolist(), reverse=True) and [largest[c] for c in ranking] == peaks
    assert ranking[0] == 7 and sorted(ranking) == list(range(WIDTH))


def test_silencing_scores_the_model_with_those_channels_zeroed(folder, machine):
    experiment = Silencing(model=folder, counts=(1, 4), draws=2, seed=3, prompt="abc")
    result = run(experiment, machine)
    lab, rows = lab_of(experiment, machine), result["results"]
    ranking, _ = strongest_channels(lab)
    drawn = random.Random(3)
    expected = [("none", 0, [])]
    for count in (1, 4):
        expected += [("strongest", count, ranking[:count])]
        expected += [("random", count, drawn.sample(range(WIDTH), count)) for _ in range(2)]
    assert [(row["silenced"], row["count"], row["channels"]) for row in rows] == expected
    assert (result["tokens"], result["conditions"]["window"]) == (WINDOW - 1, WINDOW)
    plain = load_model(resolve(folder), METHODS["fp32"], "cpu")
    truth = read(plain, lab.texts)
    for row in rows:
        model = load_model(resolve(folder), METHODS["fp32"], "cpu")
        own = read(edit_model_(model, Silence(tuple(row["channels"]))), lab.texts)
        assert {key: row[key] for key in SCORES} == pytest.approx(scored(own, truth, lab.texts), rel=0.01, abs=0.02)
    assert all(isinstance(row["text"], str) for row in rows) and len({row["text"] for row in rows}) > 1
    again = run(experiment, machine)["results"]
    assert [row["channels"] for row in again] == [row["channels"] for row in rows]
    other = run(replace(experiment, seed=4, prompt=""), machine)["results"]
    assert [r["channels"] for r in other if r["silenced"] == "random"] != [c for n, _, c in expected if n == "random"]
    assert {row["text"] for row in other} == {""}


def test_harm_is_the_rise_over_the_median_of_the_draws():
    rows = [{"silenced": "none", "count": 0, "perplexity": 10.0}]
    rows += [{"silenced": "strongest", "count": 2, "perplexity": 50.0}]
    rows += [{"silenced": "random", "count": 2, "perplexity": value} for value in (12.0, 11.0, 30.0)]
    rows += [{"silenced": "strongest", "count": 4, "perplexity": 90.0}]  # its draws are still to come
    assert harm(rows) == [{"count": 2, "strongest": 40.0, "random": 2.0, "ratio": 20.0}]
    assert harm([]) == harm(rows[:1]) == []


def test_amplifying_leaves_fp16_alone_and_hurts_what_shares_a_scale(folder, machine):
    rows = run(Amplifying(model=folder, factors=(1, 64), channels=(3, 20)), machine)["results"]
    methods = ["fp16", "llm-int8", "vectorwise", "absmax"]
    assert [(row["factor"], row["method"]) for row in rows] == [(f, m) for f in (1, 64) for m in methods]
    by = {(row["factor"], row["method"]): row for row in rows}
    assert by[1, "fp16"]["largest_logit_change"] == 0 and by[64, "fp16"]["largest_logit_change"] < 0.05
    assert by[64, "fp16"]["kl_to_fp16"] < 1e-4 and by[64, "llm-int8"]["kl_to_fp16"] < by[64, "vectorwise"]["kl_to_fp16"]
    for method in ("vectorwise", "absmax"):
        assert by[64, method]["kl_to_fp16"] > 3 * by[1, method]["kl_to_fp16"]
        assert by[64, method]["largest_logit_change"] > 10 * by[64, "fp16"]["largest_logit_change"]


@pytest.mark.parametrize("spread", [1, 2, 6, 32, 64])
def test_channels_are_spread_evenly(spread):
    found = Amplifying(spread=spread).channels_of(WIDTH)
    assert len(set(found)) == len(found) == min(spread, WIDTH) and 0 <= min(found) and max(found) < WIDTH
    gaps = np.diff([-found[0] - 1, *found, 2 * WIDTH - found[-1] - 1])
    assert max(gaps) - min(gaps) <= 2


def test_thresholds_that_nothing_reaches_are_equal_and_lower_ones_nearer(folder, machine):
    thresholds = (0.0, 1.0, 6.0, math.inf)
    for method in ("llm-int8", "bnb-int8"):
        rows = run(Thresholds(model=folder, method=method, windows=4, thresholds=thresholds), machine)["results"]
        assert [row["threshold"] for row in rows] == ["off", "1", "6", "∞"] == [name_of(t) for t in thresholds]
        off, low, usual, never = rows
        assert {key: off[key] for key in SCORES} == {key: never[key] for key in SCORES}
        assert off["outlier_share"] == never["outlier_share"] == 0 < usual["outlier_share"] < low["outlier_share"] < 1
        assert low["kl_to_fp16"] < usual["kl_to_fp16"] < off["kl_to_fp16"]
        for row in rows:
            speeds = [row[f"tokens_per_second{end}"] for end in ("_min", "", "_max")]
            assert 0 < speeds[0] <= speeds[1] <= speeds[2] < math.inf and row["method"] == method


def test_ablation_scores_every_half(folder, machine):
    experiment = Ablation(model=folder, windows=2)
    result = run(experiment, machine)
    names = ["W32A32", "W8A32", "W32A8", "W8A8", "W8A8, a scale a row", "LLM.int8()"]
    assert [row["name"] for row in result["results"]] == names and result["tokens"] == 2 * (WINDOW - 1)
    texts, source = lab_of(experiment, machine).texts, resolve(folder)
    truth = read(load_model(source, METHODS["fp32"], "cpu"), texts)
    for row in result["results"][:5]:
        own = read(load_model(source, METHODS[row["method"]], "cpu"), texts)
        assert {key: row[key] for key in SCORES} == pytest.approx(scored(own, truth, texts), rel=0.02, abs=0.01)
    kl = {row["name"]: row["kl_to_fp16"] for row in result["results"]}
    assert kl["W32A32"] < kl["W8A32"] < kl["W32A8"] and kl["LLM.int8()"] < kl["W8A8"] / 3


def test_an_edited_model_is_gone_before_the_next_one_comes(folder):
    machine = Watching()
    run(Silencing(model=folder, counts=(1, 2), draws=1), machine)
    run(Amplifying(model=folder, factors=(4,)), machine)
    assert sum(edited for edited, _ in machine.models) == 8 and machine.crowd == 0
    gc.collect()
    assert not [model for edited, model in machine.models if edited and model() is not None]
    assert {key.model.source.edit for key in machine.pool} == {None}
    base = key_of(folder, "fp16", loop="lean")
    assert base in machine.pool and replace(base, loop="hf") in machine.pool, "engines without an edit stay"


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_stop_keeps_the_rows_so_far(folder, rows):
    machine, stop, last = Watching(), threading.Event(), None
    stop.set() if not rows else None
    for event in machine.run(Silencing(model=folder, counts=(1, 2), draws=2), stop=stop):
        last = event
        if isinstance(event, RowAnswer) and len(event.result["results"]) == rows:
            stop.set()
    if not rows:
        assert not isinstance(last, RowAnswer) and machine.pool.bytes_on("cpu") == 0
        return
    assert last.done and last.result["stopped"] and len(last.result["results"]) == rows
    assert {key.model.source.edit for key in machine.pool} == {None}
    assert run(Silencing(model=folder, counts=(1,), draws=1), machine)["results"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        *(
            (lambda value=value: Silencing(counts=(1, value)), "channels to silence")
            for value in (0, 65, True, "2", 1.0)
        ),
        *((lambda value=value: Silencing(draws=value), "draws is") for value in (0, True, "2")),
        (lambda: Silencing(counts=()), "no channels to silence"),
        *((lambda value=value: Amplifying(factors=(1, value)), "factor is") for value in (0, 65, math.nan, "2")),
        (lambda: Amplifying(factors=()), "no factor"),
        (lambda: Amplifying(channels=()), "no channel"),
        *((lambda value=value: Amplifying(channels=(value,)), "channel is") for value in (-1, True, "7", 1.0)),
        *((lambda value=value: Amplifying(spread=value), "spread is") for value in (0, 65, True, "2")),
        *(
            (lambda name=name: Thresholds(method=name), "unknown method with an outlier threshold.*bnb-int8")
            for name in ("fp16", "absmax")
        ),
        (lambda: Thresholds(method="int9"), "unknown method with an outlier threshold 'int9'"),
        (lambda: Thresholds(thresholds=()), "no threshold"),
        *((lambda value=value: Thresholds(thresholds=(6.0, value)), "threshold is") for value in (-1, math.nan, "6")),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, reason):
    with pytest.raises(BadChoice, match=reason):
        make()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (Silencing(counts=(1, 33)), "channels to silence is 33.*has 32"),
        (Amplifying(channels=(3, 32)), "channel is 32.*0 to 31"),
    ],
)
def test_channels_that_the_model_has_not_are_refused_before_anything_is_measured(folder, machine, changes, reason):
    with pytest.raises(BadChoice, match=reason):
        list(machine.run(replace(changes, model=folder)))


def test_every_threshold_is_one_contestant():
    assert Thresholds().contestants()[-1] == Contestant.parse("llm-int8@inf") and BASELINE == Contestant.parse("fp16")
