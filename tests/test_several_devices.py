"""A model over several GPUs and contestants on one each: what can be known of both without a GPU."""

from __future__ import annotations

import json
import sys
import threading
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from conftest import tiny_config, tiny_llama

from llmq import environment, memory, telemetry
from llmq.bench import tensor_parallel
from llmq.contestant import Contestant
from llmq.devices import are_several, first, parts, share_on
from llmq.engine.choice import choose_engines
from llmq.engine.loading import Key, loading_bytes
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, OutOfMemory
from llmq.events import Memory, Planned, Step
from llmq.labs import compare as compare_lab
from llmq.labs.compare import Comparison
from llmq.labs.merged import merged
from llmq.machine.door import Lease, Machine, predicted
from llmq.memory import Prediction
from llmq.methods import parse_method, swap
from llmq.models.opening import open_model
from llmq.models.skeleton import meta_model
from llmq.models.spread import device_map, device_of, even_shares
from llmq.summary import RunAnswer, Summary
from llmq.ui.parts.verdict import verdict

PAIR = "cuda:0,cuda:1"


def test_a_name_stands_for_its_parts():
    assert (parts("cpu"), first(PAIR), are_several("cuda:1"), are_several(PAIR)) == (("cpu",), "cuda:0", False, True)
    assert [share_on("cuda:0", "cuda:0"), share_on("cuda:0", PAIR), share_on("cuda:2", PAIR)] == [1.0, 0.5, 0.0]
    assert share_on(PAIR, "cuda:1") == 1.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:0,cpu", "mixes the CPU"),
        ("cuda:1,cuda:1", "names one twice"),
        ("cuda:0,cuda:7", "'cuda:7' is not here"),
        ("cuda:0,", "no device beside it"),
        (",", "no device beside it"),
    ],
)
def test_a_wrong_list_of_devices_is_said(monkeypatch, name, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadChoice, match=words):
        environment.device_named(name, several=True)


def test_several_devices_where_one_can_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert environment.device_named("cuda:0, cuda:1", several=True) == PAIR
    with pytest.raises(BadChoice, match="only compare and the page spread"):
        environment.device_named(PAIR)


def test_a_label_counts_equal_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda one: {"cuda:2": "B"}.get(one, "A"))
    assert environment.device_label("cuda:0,cuda:1,cuda:2") == "2 × A + B"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_shares_are_even_whole_layers_in_order(tied, count):
    config = tiny_config(num_hidden_layers=24, tie_word_embeddings=tied)
    model, names = meta_model(config), [f"cuda:{number}" for number in range(count)]
    places = even_shares(model, ",".join(names))
    layers = [places[f"model.layers.{i}"] for i in range(24)]
    assert layers == sorted(layers) and set(places.values()) == set(names)
    held = Counter()
    for name, tensor in model.named_parameters():
        held[device_of(name, places)] += tensor.nbytes
    layer = sum(tensor.nbytes for tensor in model.model.layers[0].parameters())
    assert max(held.values()) - min(held.values()) <= 2 * max(layer, model.model.embed_tokens.weight.nbytes)
    assert (places["lm_head"] == places["model.embed_tokens"]) == tied


def test_a_single_device_has_everything():
    assert device_map(tiny_config(), "cuda:3") == {"": "cuda:3"}
    assert device_of("model.layers.1.mlp.up_proj.weight", {"model.layers.1": "b", "model.layers.10": "c"}) == "b"


def test_a_spread_model_runs_through_transformers():
    config = tiny_config().to_dict()
    assert choose_engines("auto", [parse_method("fp16"), parse_method("llm-int8")], config, PAIR) == ["hf", "hf"]
    with pytest.raises(BadChoice, match="over several GPUs runs through transformers"):
        choose_engines("lean", [parse_method("fp16")], config, PAIR)


def test_memory_is_that_of_all_and_told_for_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", {"cuda:0": 30, "cuda:1": 12}.get)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {"cuda:0": 50, "cuda:1": 12}.get)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda one: ({"cuda:0": 100, "cuda:1": 200}[one], 1000))
    nvml = {"cuda:0": 40, "cuda:1": 20}
    fake = SimpleNamespace(for_torch_device=lambda one: SimpleNamespace(
        device_bytes=lambda: nvml[one], process_bytes=lambda: None if one == "cuda:1" else 5))  # fmt: skip
    monkeypatch.setattr(telemetry, "Nvml", fake)
    read = telemetry.MemoryReader(PAIR)()
    assert read["by_device"] == {"cuda:0": 30, "cuda:1": 12} and read["allocated_bytes"] == 42
    assert (read["device_bytes"], read["device_process_bytes"]) == (60, None)
    assert (telemetry.free_bytes(PAIR), telemetry.used_bytes(PAIR)) == (2 * 120, (42,)), "of the fullest, twice"
    assert "by_device" not in telemetry.MemoryReader("cuda:0")()


def test_the_highest_of_each_device_is_kept_and_told():
    plan = Planned(schedule="parallel", reason="", prompt_tokens=3, predicted_bytes={"fp16": 1}, free_bytes=1,
                   device=PAIR, devices={"fp16": "cuda:0"})  # fmt: skip
    samples = [Memory(at=0, by_device={"cuda:0": 3_000_000, "cuda:1": 0}), Memory(at=1, by_device={"cuda:0": 1})]
    summary = Summary([plan, *samples])
    assert summary.peak_by_device == {"cuda:0": 3_000_000, "cuda:1": 0}
    assert verdict(summary).details == ("Live tensors at their most: 3.00 MB on cuda:0, 0 B on cuda:1.",)
    told = RunAnswer(SimpleNamespace(settings={}, environment={}), summary).to_json()
    assert (told["devices"], told["peak_bytes_by_device"]["cuda:0"]) == ({"fp16": "cuda:0"}, 3_000_000)


def test_streams_are_merged_as_their_items_come():
    gate = threading.Event()

    def slow():
        assert gate.wait(60)
        yield "slow"

    def quick():
        yield "quick"
        gate.set()

    assert list(merged([slow(), quick()])) == ["quick", "slow"]


def test_what_one_stream_raises_ends_them_all():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    def broken():
        yield 2
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(merged([endless(), broken()]))
    assert closed.is_set()


def test_whoever_stops_listening_ends_every_stream():
    closed = []

    def endless(name):
        try:
            while True:
                yield name
        finally:
            closed.append(name)

    heard = merged([endless("a"), endless("b")])
    next(heard)
    heard.close()
    assert sorted(closed) == ["a", "b"]


@pytest.fixture
def abreast(monkeypatch):
    """A comparison that takes two names of the CPU for two devices, and the threads in which its lanes wrote."""
    monkeypatch.setattr(compare_lab, "are_several", lambda device: True)
    monkeypatch.setattr(compare_lab, "parts", lambda device: ("cpu", "cpu:0"))
    for owner in (telemetry,):
        monkeypatch.setattr(owner, "free_bytes", lambda device: 10**12)
    threads, original = {}, compare_lab.LoadedLane.step

    def step(lane):
        threads.setdefault(lane.name, set()).add(threading.current_thread().name)
        yield from original(lane)

    def ledger(lane):
        callers.setdefault(lane.name, set()).add(threading.current_thread().name)
        return told(lane)

    callers, told = {}, compare_lab.LoadedLane.ledger
    monkeypatch.setattr(compare_lab.LoadedLane, "step", step)
    monkeypatch.setattr(compare_lab.LoadedLane, "ledger", ledger)
    return threads, callers


def test_in_parallel_each_contestant_has_a_device_and_a_thread(abreast, tiny_folder):
    comparison = Comparison(
        prompt="Hello", model=str(tiny_folder), schedule="parallel", device="cpu", engine="hf",
        contestants=tuple(map(Contestant.parse, ("fp16", "llm-int8"))), sampling=SamplingSettings(max_new_tokens=6),
    )  # fmt: skip
    events = list(Machine().run(comparison))
    plan = next(event for event in events if isinstance(event, Planned))
    assert plan.devices == {"fp16": "cpu", "llm-int8": "cpu:0"} and plan.schedule == "parallel"
    assert "each is slower than alone" in plan.reason
    summary = Summary(events)
    assert not any(outcome.error for outcome in summary.outcomes.values())
    assert all(len(outcome.token_ids) == 6 or outcome.reason == "eos" for outcome in summary.outcomes.values())
    threads, callers = abreast
    assert len(threads["fp16"] | threads["llm-int8"]) == 2, "a thread for each"
    assert not callers["fp16"] & threads["llm-int8"] and not callers["llm-int8"] & threads["fp16"], "closed meanwhile"
    alone = Comparison(
        prompt="Hello", model=str(tiny_folder), device="cpu", engine="hf", sampling=SamplingSettings(max_new_tokens=6),
        contestants=(Contestant.parse("fp16"),),
    )  # fmt: skip
    steps = [event.token_id for event in Machine().run(alone) if isinstance(event, Step)]
    assert summary.outcomes["fp16"].token_ids == steps


def test_tensor_parallel_on_two_processes_writes_what_one_does(tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["tensor_parallel", "--gpus", "1,2"])
    assert tensor_parallel.main(["--gpus", "2,1", "--model", str(tiny_folder), "--save", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert [row["gpus"] for row in stored["results"]] == [1, 2]
    assert [row["same_tokens"] for row in stored["results"]] == [tensor_parallel.NEW_TOKENS] * 2
    assert "2 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["two", "1,", "0", "-1", ""])
def test_a_wrong_count_of_gpus_is_said(text, capsys):
    assert tensor_parallel.main(["--gpus", text]) == 1
    assert f"--gpus is {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "device", "loop", "dense"),
    [
        ("fp16", "cuda:0", "hf", False),
        ("llm-int8", "cuda:0", "hf", True),
        ("llm-int8", PAIR, "hf", True),
        ("llm-int8", "cuda:0", "lean", False),
        ("llm-int8", "cpu", "hf", False),  # where the 16-bit weights are a file's pages
        ("bnb-int8", "cuda:0", "hf", False),
    ],
)
def test_what_stands_on_a_gpu_while_a_method_is_made_of_the_dense_model(tiny_folder, method, device, loop, dense):
    model = open_model(str(tiny_folder))
    whole = sum(2 * tensor.numel() for tensor in model.shape.parameters())
    whole += sum(tensor.nbytes for tensor in model.shape.buffers())
    assert loading_bytes(Key(model, parse_method(method), device, loop)) == (whole if dense else 0)


def test_the_plan_counts_what_stands_there_while_the_next_is_loaded():
    """FP16 and a method that is made of it."""
    dense, made = Prediction(141, 0, 0, 0), Prediction(72, 0, 0, 0, loading=141)
    assert (dense.most, made.total, made.most) == (141, 72, 141)
    two = [made, Prediction(72, 1, 0, 0, loading=141)]  # the second is made beside the first
    assert memory.plan("interleave", two, 225).schedule == "interleave"
    assert memory.plan("interleave", two, 220).schedule == "in-turn", "73 + 141 of 209"
    for asked in (
        [dense, made],
        [made, dense],
    ):  # in the order that needs less: 141, then 72 + 141
        assert memory.plan("interleave", asked, 225).schedule == "interleave"
        assert memory.plan("interleave", asked, 224).schedule == "in-turn"


@pytest.mark.parametrize("hooked", [False, True])
def test_a_layer_is_freed_as_soon_as_it_is_replaced(hooked):
    """No more than one layer of 16 bit beside what is made: 70B leave no room for both models."""
    model, method, seen = tiny_llama(torch.float16), parse_method("llm-int8"), []
    for _, layer in method.layers(model) if hooked else ():
        add_hook_to_module(layer, ModelHook())  # as those of a model over several GPUs have
    dense = [weakref.ref(layer.weight) for _, layer in method.layers(model)]

    def told(share: float) -> None:
        seen.append(sum(weight() is not None for weight in dense))

    with swap.telling(told):
        method.quantize_(model, "cpu")
    behind = 0 if hooked else 1  # the one in hand
    assert [len(dense) - alive for alive in seen] == [max(0, number - behind) for number in range(len(dense))]


@pytest.mark.parametrize("tied", [False, True])
def test_hooked_ends_become_int8_and_stay_hooked(tied):
    """As those of a model over several GPUs are; what it computes is what the model without hooks does."""
    plain, hooked = (tiny_llama(torch.float16, tie_word_embeddings=tied) for _ in range(2))
    hooked.load_state_dict(plain.state_dict())
    for end in (hooked.get_input_embeddings(), hooked.get_output_embeddings()):
        add_hook_to_module(end, AlignDevicesHook("cpu", io_same_device=True))
    method, ids = parse_method("llm-int8-head"), torch.arange(12)[None]
    found = [method.quantize_(model, "cpu")(ids).logits for model in (plain, hooked)]
    assert torch.equal(*found)
    assert all(hasattr(end, "_hf_hook") for end in (hooked.get_input_embeddings(), hooked.get_output_embeddings()))


def test_one_layer_in_two_places_is_not_emptied_by_its_first():
    model, method = tiny_llama(torch.float16), parse_method("llm-int8")
    shared = model.model.layers[0].self_attn.q_proj
    kept = shared.weight
    method.quantize_(model, "cpu")
    assert shared.weight is kept


@pytest.fixture
def plans(monkeypatch, tiny_folder):
    """Plan a comparison on two GPUs that have so many bytes free, of methods that need so many; what is planned."""

    def planned(free: dict[str, int], needs: dict[str, int], schedule: str = "parallel"):
        monkeypatch.setattr(telemetry, "free_bytes", lambda device: free[device])
        monkeypatch.setattr(compare_lab, "predicted", lambda key, **_: Prediction(needs[key.method.name], 0, 0, 0))
        comparison = Comparison(
            prompt="Hello", model=str(tiny_folder), device=PAIR, schedule=schedule, engine="hf",
            contestants=tuple(map(Contestant.parse, needs)),
        )  # fmt: skip
        race = compare_lab._Race(comparison, Lease(Machine(), PAIR, threading.Event()))
        course = SimpleNamespace(model=open_model(str(tiny_folder)), prompt_ids=[1, 2])
        return next(race._plan(course))

    return planned


def test_each_device_of_those_at_the_same_time_has_a_plan(plans):
    """Three methods on two GPUs: the first and the third share one."""
    free, needs = {"cuda:0": 100, "cuda:1": 100}, {"fp16": 60, "llm-int8": 30, "int8-weight-only": 30}
    fits = plans(free, needs)
    assert fits.schedule == "parallel" and fits.free_bytes == 200
    assert fits.devices == {"fp16": "cuda:0", "llm-int8": "cuda:1", "int8-weight-only": "cuda:0"}
    short = plans(free | {"cuda:0": 90}, needs)
    assert short.schedule == "in-turn" and "loaded in turn" in short.reason
    assert plans(free | {"cuda:1": 32}, needs).schedule == "parallel"


def test_a_spread_model_is_planned_for_all_of_its_devices(plans):
    assert plans({PAIR: 100}, {"fp16": 60, "llm-int8": 30}, "interleave").schedule == "interleave"
    assert plans({PAIR: 94}, {"fp16": 60, "llm-int8": 30}, "interleave").schedule == "in-turn"


def test_a_lab_is_told_what_stands_there_while_it_loads(monkeypatch, tiny_folder):
    """Refused before anything is loaded, where the 16-bit model does not fit on the way."""
    key = Key(open_model(str(tiny_folder)), parse_method("llm-int8"), "cuda:0", "hf")
    need = predicted(key, tokens=8)
    assert need.loading > need.weights + need.scales
    monkeypatch.setattr(telemetry, "free_bytes", lambda device: need.most - 1)
    monkeypatch.setattr(telemetry, "used_bytes", lambda device: (0,))
    lease = Lease(Machine(lambda key: pytest.fail("loaded")), "cuda:0", threading.Event())
    with pytest.raises(OutOfMemory, match=f"{predicted(key, tokens=512).most:,} bytes predicted"):
        list(lease.load(key, Contestant.parse("llm-int8")))
