"""The engine against the plain model: same tokens, exact bytes, exact seconds, and nothing left behind."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from tiny_runs import best_of, light
from torch import nn

from llmq.engine.base import WARM_UP_TOKENS
from llmq.engine.hf import HFEngine, Interrupted, cache_name
from llmq.engine.sampling import SamplingSettings
from llmq.errors import UserError
from llmq.methods import METHODS

PROMPT = list(b"The quick brown fox")
GREEDY = SamplingSettings()
HOT = SamplingSettings(temperature=1.5, seed=11)
LINEARS = 2 * 7 + 1  # seven in each layer, and the head


def engine_for(method: str = "fp32", *, model=None, clock=None, **shape) -> HFEngine:
    method = METHODS[method]
    model = method.quantize_(model or tiny_llama(**shape), "cpu")
    return HFEngine(model, method, "cpu", **({"clock": clock} if clock else {}))


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture
def engine() -> HFEngine:
    return engine_for()


def generated(engine: HFEngine, settings=GREEDY, steps: int = 12, prompt=PROMPT) -> list[int]:
    generation = engine.start(prompt, settings)
    return [generation.prefill().token_id, *(generation.step().token_id for _ in range(steps))]


def hooks_left(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("prompt", [PROMPT, [65]], ids=["sentence", "one token"])
def test_cached_decode_equals_full_forwards(kv_heads, prompt):
    """Token for token, and every log-probability, against the whole sequence read again without a cache."""
    engine = engine_for(num_key_value_heads=kv_heads)
    generation = engine.start(prompt, GREEDY)
    tokens = [generation.prefill(), *(generation.step() for _ in range(30))]
    ids = list(prompt)
    for token in tokens:
        with torch.inference_mode():
            logits = engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert token.token_id == logits.argmax().item()
        assert token.logprob == pytest.approx(logits.log_softmax(-1)[token.token_id].item(), abs=1e-5)
        ids.append(token.token_id)


def test_the_cache_holds_every_token_read():
    """A cache that `forward` does not know by its name would stay empty, without a word."""
    generation = engine_for().start(PROMPT, GREEDY)
    generation.prefill()
    lengths = [generation._cache.get_seq_length()]
    for _ in range(3):
        generation.step()
        lengths.append(generation._cache.get_seq_length())
    assert lengths == [len(PROMPT) + step for step in range(4)]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_forward_has(name):
    class Model(nn.Module):
        pass

    exec(f"def forward(self, input_ids, {name}=None, **kwargs): ...", scope := {})
    Model.forward = scope["forward"]
    assert cache_name(Model()) == name


def test_a_model_without_a_cache_is_refused(engine):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    engine.model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="OpenAIGPTLMHeadModel takes no KV cache"):
        engine.start(PROMPT, GREEDY)


def test_log_probability_is_that_of_the_unfiltered_distribution(engine):
    """Temperature and filters choose the token; its log-probability is the model's own."""
    token = engine.start(PROMPT, SamplingSettings(temperature=2.0, top_k=40, seed=4)).prefill()
    with torch.inference_mode():
        expected = engine.model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)[token.token_id].item()
    assert token.logprob == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(temperature=2.0, seed=4)])
def test_what_was_likeliest_is_known_of_every_token(settings, engine):
    generation, ids = engine.start(PROMPT, settings), list(PROMPT)
    for place in range(3):
        token = generation.step() if place else generation.prefill()
        assert generation.best(token, 4) == pytest.approx(best_of(engine, ids, 4), abs=1e-4)
        ids.append(token.token_id)


def test_a_seed_repeats_its_tokens(engine):
    assert generated(engine, HOT) == generated(engine, HOT)


def test_another_seed_gives_other_tokens(engine):
    others = [generated(engine, SamplingSettings(temperature=1.5, seed=seed)) for seed in (11, 12, 13)]
    assert len({tuple(tokens) for tokens in others}) == 3


def test_greedy_ignores_the_seed(engine):
    assert generated(engine, SamplingSettings(seed=1)) == generated(engine, SamplingSettings(seed=2))


def test_top_k_one_is_greedy(engine):
    assert generated(engine, SamplingSettings(temperature=2.0, top_k=1, seed=9)) == generated(engine)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_output_that_is_not_a_number_is_said(value, engine):
    engine.model.lm_head.weight[7].fill_(value)
    with pytest.raises(UserError, match="not a number.*bf16 or fp32"):
        engine.start(PROMPT, GREEDY).prefill()


@pytest.mark.parametrize("asked", [1, 2, 8, LINEARS])
def test_a_stop_during_prefill_interrupts_before_the_next_linear_layer(asked, engine):
    questions = itertools.count(1)
    generation = engine.start(PROMPT, GREEDY)
    with pytest.raises(Interrupted):
        generation.prefill(lambda: next(questions) >= asked)
    assert next(questions) == asked + 1
    assert hooks_left(engine.model) == 0


def test_a_prefill_that_nobody_stops_asks_once_a_linear_layer_and_leaves_no_hook(engine):
    questions = []
    token = engine.start(PROMPT, GREEDY).prefill(lambda: bool(questions.append(1)))
    assert len(questions) == LINEARS
    assert hooks_left(engine.model) == 0
    assert token.token_id == generated(engine, steps=0)[0]


def test_a_prefill_that_breaks_leaves_no_hook(engine, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken layer")

    monkeypatch.setattr(engine.model.model.layers[1].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        engine.start(PROMPT, GREEDY).prefill(lambda: False)
    assert hooks_left(engine.model) == 0


def test_a_prefill_asks_as_often_as_the_engine_says(engine):
    asked = []
    engine.start(PROMPT, GREEDY).prefill(lambda: bool(asked.append(1)))
    assert len(asked) == engine.prompt_checks == LINEARS


@pytest.mark.parametrize(("stopped", "hooks"), [(None, 0), (lambda: False, LINEARS)])
def test_hooks_are_there_only_when_someone_may_stop(stopped, hooks, engine, monkeypatch):
    seen, forward = [], engine.model.forward

    def counting(*args, **named):
        seen.append(hooks_left(engine.model))
        return forward(*args, **named)

    monkeypatch.setattr(engine.model, "forward", counting)
    generation = engine.start(PROMPT, GREEDY)
    generation.prefill(stopped)
    generation.step()
    assert seen == [hooks, 0]


def test_an_interruption_does_not_change_the_next_generation(engine):
    expected, questions = generated(engine, HOT), itertools.count()
    with pytest.raises(Interrupted):
        engine.start(PROMPT, HOT).prefill(lambda: next(questions) > 5)
    assert generated(engine, HOT) == expected


@pytest.mark.parametrize(("method", "itemsize"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("bnb-int8", 2)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_kv_bytes_are_exact_at_every_step(method, itemsize, kv_heads):
    generation = engine_for(method, num_key_value_heads=kv_heads).start(PROMPT, GREEDY)
    levels = [generation.kv_bytes]
    generation.prefill()
    levels.append(generation.kv_bytes)
    for _ in range(2):
        generation.step()
        levels.append(generation.kv_bytes)
    peak = generation.peak_bytes
    generation.close()
    a_token = 2 * 2 * kv_heads * 8 * itemsize  # keys and values · layers · heads · width
    assert levels == [0] + [a_token * (len(PROMPT) + steps) for steps in range(3)]
    assert (peak, generation.workspace_bytes, generation.kv_bytes) == (levels[-1], 0, 0)


def test_seconds_are_those_of_the_clock():
    """The clock is read as each call begins and as it ends, and at no other time."""
    ticks = iter([100.0, 102.5, 200.0, 200.25, 300.0, 300.125])
    generation = engine_for(clock=lambda: next(ticks)).start(PROMPT, GREEDY)
    assert [generation.prefill().seconds, generation.step().seconds, generation.step().seconds] == [2.5, 0.25, 0.125]
    assert next(ticks, None) is None


@pytest.mark.parametrize("settings", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_warm_up_changes_no_token(settings, engine):
    expected = generated(engine, settings)
    engine.warm_up(PROMPT)
    assert generated(engine, settings) == expected


@pytest.mark.parametrize("length", [1, 5, WARM_UP_TOKENS, 60])
def test_warm_up_reads_the_start_of_the_prompt_once(length, engine, monkeypatch):
    widths, forward = [], engine.model.forward

    def counting(tokens, **named):
        widths.append(tokens.shape[1])
        return forward(tokens, **named)

    monkeypatch.setattr(engine.model, "forward", counting)
    engine.warm_up(list(range(length)))
    engine.warm_up(list(range(length)))
    assert widths == [min(length, WARM_UP_TOKENS), 1, 1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["fp32", "fp16", "bnb-int8"])
def test_weight_bytes_count_every_stored_byte_once(tied, method):
    engine = engine_for(method, tie_word_embeddings=tied)
    model, by_storage = engine.model, {}
    for _, tensor in itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        by_storage[tensor.data_ptr()] = tensor.nbytes
    assert engine.weight_bytes == sum(by_storage.values())
    assert engine.scale_bytes == (4 * 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32) if method == "bnb-int8" else 0)


@pytest.mark.parametrize(("method", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_a_tied_head_weighs_nothing(method, itemsize):
    sizes = [engine_for(method, tie_word_embeddings=tied).weight_bytes for tied in (False, True)]
    assert sizes[0] - sizes[1] == 259 * 32 * itemsize


@pytest.mark.parametrize(("eos", "expected"), [(257, {257}), ([257, 3], {257, 3}), (None, set())])
def test_every_end_of_text_token_is_known(eos, expected, engine):
    engine.model.generation_config.eos_token_id = eos
    assert engine.eos_ids == expected


def test_context_is_the_models(engine):
    assert engine.context == 128


def test_a_view_has_its_own_threshold_over_the_same_weights():
    """Two generations in turn, each as if it were alone; and one that is never asked again changes nothing."""
    usual = engine_for("llm-int8", initializer_range=0.3)
    low = usual.under(replace(usual.method, threshold=0.05))
    assert low.model is usual.model and low.weight_bytes == usual.weight_bytes
    alone = {}
    for view in (usual, low):
        alone[view] = [(t.token_id, t.logprob) for t in tokens_of(view)]
    assert alone[usual] != alone[low]
    generations = {view: view.start(PROMPT, GREEDY) for view in (usual, low)}
    turns = {view: [generation.prefill()] for view, generation in generations.items()}
    for _ in range(3):
        for view, generation in generations.items():
            turns[view].append(generation.step())
    assert {view: [(t.token_id, t.logprob) for t in found] for view, found in turns.items()} == alone


def tokens_of(engine, steps: int = 3):
    generation = engine.start(PROMPT, GREEDY)
    return [generation.prefill(), *(generation.step() for _ in range(steps))]


def test_misuse_is_refused(engine):
    with pytest.raises(AssertionError, match="at least one prompt token"):
        engine.start([], GREEDY)
    with pytest.raises(AssertionError, match="prefill before the first step"):
        engine.start(PROMPT, GREEDY).step()
