"""Predicted bytes against models that are really there, and the edge at which a plan changes."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from conftest import byte_tokenizer, tiny_config, tiny_llama
from planted import seen_ones
from tiny_runs import engine_of, light, source_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

from llmq import formulas, memory
from llmq.cli import main
from llmq.engine.hf import HFEngine, cache_name
from llmq.machine.door import Machine
from llmq.memory import Prediction
from llmq.methods import METHODS
from llmq.models.loading import load_config, load_model, resolve
from llmq.models.presets import PRESETS, Preset, Shape
from llmq.models.skeleton import meta_model

GB = 10**9


@pytest.fixture(autouse=True, scope="module")
def lightly(tmp_path_factory):
    """In a cache of its own, where the statistics of calibrated methods go."""
    with light(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 16}, {"num_hidden_layers": 3}])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 33), (3, 7)])
def test_kv_formula_equals_a_real_cache(kv_heads, changes, batch, tokens):
    model = tiny_llama(torch.float16, num_key_value_heads=kv_heads, **changes)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.ones(batch, tokens, dtype=torch.long), **{cache_name(model): cache}, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert formulas.kv_bytes(model.config, tokens=tokens, batch=batch, itemsize=2) == real


def test_grouped_queries_divide_the_cache():
    """LLaMA-3.1-8B keeps 8 of 32 heads: 131,072 bytes a token in 16 bit, a quarter of what LLaMA-2-7B's 32 need."""
    sizes = {}
    for name in ("llama-3.1-8b-instruct", "llama-2-7b-chat"):
        shape = PRESETS[name].shape
        config = tiny_config(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
        )
        sizes[name] = formulas.kv_bytes(config, tokens=1)
    assert sizes == {"llama-3.1-8b-instruct": 131_072, "llama-2-7b-chat": 524_288}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of other shapes, saved: tied head, biases, odd widths."""
    shapes = {
        "tied": {"tie_word_embeddings": True},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "odd": {"intermediate_size": 77, "vocab_size": 261, "num_key_value_heads": 1, "num_hidden_layers": 3},
    }
    made = {}
    for name, changes in shapes.items():
        made[name] = tmp_path_factory.mktemp(name)
        tiny_llama(torch.float16, **changes).save_pretrained(made[name])
        byte_tokenizer().save_pretrained(made[name])
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["plain", "tied", "biased", "odd"])
def test_predicted_weights_are_those_of_the_loaded_model(shape, method, folders, tiny_folder):
    folder = (folders | {"plain": tiny_folder})[shape]
    predicted = memory.predict(meta_model(load_config(source_of(folder))), METHODS[method], tokens=10)
    engine = engine_of(Machine(), folder, method)
    assert (predicted.weights, predicted.scales) == (engine.weight_bytes, engine.scale_bytes)
    assert (predicted.scales > 0) == (method not in ("fp16", "bf16", "fp32", "absmax-w32a8"))


@pytest.mark.parametrize("method", METHODS)
def test_predicted_weights_are_those_of_a_model_with_random_weights(method, monkeypatch):
    """Without a checkpoint the model is converted in place: the same bytes, and the same types, as a loaded one."""
    shape = Shape(32, 64, 2, 4, 2, 259, 128)
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "Tiny", "nobody/tiny", "", "", shape))
    source, method = resolve("tiny", random_weights=True), METHODS[method]
    predicted = memory.predict(meta_model(load_config(source)), method, tokens=10)
    dense = load_model(source, METHODS["fp16"], "cpu")
    layers = (named for named in dense.named_modules() if named[0].endswith("_proj") and method.calibrated)
    statistics = {name: seen_ones(method, layer) for name, layer in layers}
    engine = HFEngine(load_model(source, method, "cpu", statistics), method, "cpu")
    assert (predicted.weights, predicted.scales) == (engine.weight_bytes, engine.scale_bytes)
    assert {buffer.dtype for buffer in engine.model.buffers()} == {torch.float32}  # rotary frequencies stay exact


def test_a_shape_takes_no_memory():
    """Seventy billion parameters, in an instant."""
    shape = meta_model(tiny_config(hidden_size=8192, intermediate_size=28672, num_hidden_layers=8))
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert memory.predict(shape, METHODS["fp16"], tokens=1).weights > 10 * GB


def test_a_prediction_grows_with_tokens_and_batch():
    shape, handler = meta_model(tiny_config()), METHODS["fp16"]
    small, long, wide = (
        memory.predict(shape, handler, tokens=tokens, batch=batch) for tokens, batch in [(10, 1), (20, 1), (10, 2)]
    )
    assert small.weights == long.weights == wide.weights
    assert (long.kv, wide.kv) == (2 * small.kv, 2 * small.kv)
    assert min(long.workspace, wide.workspace) > small.workspace > 0
    assert small.total == small.weights + small.scales + small.kv + small.workspace


def test_what_is_not_known_is_said_and_is_no_zero(tmp_path, capsys):
    """A model that keeps latents: the total is unknown with them, and a plan counts the rest."""
    from transformers import MiniCPM3Config

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MiniCPM3Config(**small, kv_lora_rank=16, q_lora_rank=16, vocab_size=259)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    predicted = memory.predict(meta_model(config), METHODS["fp16"], tokens=10)
    assert predicted.kv is None and predicted.total == predicted.weights + predicted.scales + predicted.workspace > 0
    assert main(["memory", "--model", str(tmp_path), "--methods", "fp16", "--device-memory", "15", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["kv"], row["total"], row["fits"]) == (None, None, None)
    assert main(["memory", "--model", str(tmp_path), "--methods", "fp16", "--device-memory", "15"]) == 0
    assert capsys.readouterr().out.count("not known") == 2


@pytest.mark.parametrize(("tokens", "largest"), [(0, 0), (1, 1), (50, 50), (128, 128), (999, 128)])
def test_the_largest_context_is_the_last_that_fits(tokens, largest, tiny_folder, capsys):
    """At most as many tokens as the model reads, in at most 95 % of the device, which the command says."""
    shape, method = meta_model(tiny_config()), METHODS["fp16"]
    device = memory.predict(shape, method, tokens=tokens).total / 0.95
    options = ["memory", "--model", str(tiny_folder), "--methods", "fp16", "--context", "50"]
    options += ["--device-memory", repr((device + 1) / 1e9)]
    assert main([*options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["largest_context"], row["fits"]) == (largest, tokens >= 50)
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert "at most 95% of" in shown and (f"; at most {largest} tokens do" in shown) == bool(largest)


class Live(TorchDispatchMode):
    """While inside: the most bytes that tensors made in it held at once."""

    def __init__(self, *there: torch.Tensor):
        super().__init__()
        self.level = self.peak = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.level += size
            self.peak = max(self.peak, self.level)
            weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.level -= size


@pytest.mark.parametrize("method", ["fp16", "fp32"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (1, 300), (4, 64)])
@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 2),
        ({"hidden_size": 64, "intermediate_size": 180, "num_attention_heads": 8, "num_key_value_heads": 1}, 2),
        ({"hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 8, "num_key_value_heads": 8}, 2),
        ({"intermediate_size": 512}, 2),  # hardly anything but gate, up and down
        ({"hidden_size": 256, "intermediate_size": 32}, 2),  # hardly anything but attention
        ({"head_dim": 64, "intermediate_size": 16}, 2),  # heads that are wider together than the residual stream
        ({"vocab_size": 40_000}, 5),  # the logits, which sampling copies into wider numbers
    ],
    ids=["plain", "one kv head", "many kv heads", "wide mlp", "narrow mlp", "wide heads", "large vocabulary"],
)
def test_the_workspace_is_an_upper_estimate_of_a_real_prefill(changes, most, batch, tokens, method):
    """And at most twice what a dense model's tensors, the cache's apart, really take at once."""
    model = tiny_llama(getattr(torch, METHODS[method].dtype), max_position_embeddings=512, **changes)
    predicted = memory.predict(meta_model(model.config), METHODS[method], tokens=tokens, batch=batch)
    cache, ids = DynamicCache(config=model.config), torch.ones(batch, tokens, dtype=torch.long)
    with torch.inference_mode(), Live(ids, *model.parameters(), *model.buffers()) as live:
        model(ids, **{cache_name(model): cache}, use_cache=True, logits_to_keep=1)
    real = live.peak - predicted.kv
    assert real <= predicted.workspace <= most * real


def need(*totals: int) -> list[Prediction]:
    return [Prediction(weights=total - 3, scales=1, kv=1, workspace=1) for total in totals]


@pytest.mark.parametrize(
    ("asked", "totals", "free", "chosen"),
    [
        ("interleave", (950, 950), 2000, "interleave"),  # 1900 is 95 % of 2000
        ("interleave", (950, 951), 2000, "in-turn"),
        ("interleave", (950,), 1000, "interleave"),
        ("interleave", (951,), 1000, "in-turn"),
        ("interleave", (600, 600, 700), 2000, "interleave"),
        ("interleave", (600, 600, 701), 2000, "in-turn"),
        ("in-turn", (950, 950), 2000, "in-turn"),
        ("in-turn", (9999,), 10, "in-turn"),
    ],
)
def test_a_plan_changes_where_memory_ends(asked, totals, free, chosen):
    plan = memory.plan(asked, need(*totals), free)
    assert (plan.schedule, plan.free_bytes) == (chosen, free)
    assert bool(plan.reason) == (asked != chosen)
    assert memory.fit_together(need(*totals), free) == (sum(totals) <= 0.95 * free)


@pytest.mark.parametrize(
    ("totals", "needed"),
    [((17,), "17.00 GB"), ((13, 7), "20.00 GB"), ((5, 6, 9.5), "20.50 GB")],
    ids=["one", "two", "three"],
)
def test_a_changed_plan_says_why_in_bytes(totals, needed):
    """The need of all of them together, however many they are."""
    reason = memory.plan("interleave", need(*(int(total * GB) for total in totals)), 16 * GB).reason
    assert f"need {needed} and 16.00 GB are free" in reason and "in turn" in reason
