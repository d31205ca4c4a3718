"""The lean loop against transformers: tiny LLaMAs of every supported kind, on a CPU, with the reference operations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from tiny_runs import best_of

from llmq.engine import llama_cuda
from llmq.engine.base import Interrupted, capacity_for
from llmq.engine.choice import choose_engines
from llmq.engine.cuda_graph import LONGEST_PROMPT_GRAPH, graph_rows
from llmq.engine.hf import HFEngine
from llmq.engine.llama_cuda import CudaGeneration, CudaLlama
from llmq.engine.llama_weights import load_weights
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.kernels import integers, reference
from llmq.methods import METHODS, parse_method
from llmq.models.architecture import Unsupported, architecture_of

PROMPT = list(b"Hello LLaMA, how are you?")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 1},
    "biased": {"attention_bias": True},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


class ModelTensors:
    """A transformers model as a source of tensors, or the tensors themselves."""

    def __init__(self, model):
        self.tensors = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else model

    def __contains__(self, name):
        return name in self.tensors

    def get(self, name, device):
        if name not in self.tensors:
            raise ModelUnavailable(f"the checkpoint has no tensor {name!r}")
        return self.tensors[name].detach()


def pair(method: str = "fp32", **changes) -> tuple[HFEngine, CudaLlama]:
    """The same weights in both loops; FP32 for the dense methods, so that differences are bugs and not rounding."""
    model = tiny_llama(torch.float32, intermediate_size=64, **changes)
    method, architecture = METHODS[method], architecture_of(model.config.to_dict())
    weights = load_weights(ModelTensors(model), architecture, method, "cpu", kernels=reference)
    lean = CudaLlama(weights, method, "cpu", kernels=reference)
    return HFEngine(method.quantize_(model, "cpu").requires_grad_(False).eval(), method, "cpu"), lean


def generate(engine, tokens: int = 12, **sampling) -> list[int]:
    generation = engine.start(PROMPT, SamplingSettings(max_new_tokens=tokens, **sampling))
    found = [generation.prefill().token_id, *(generation.step().token_id for _ in range(tokens - 1))]
    generation.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_llama_computes_what_transformers_computes(kind):
    hf, lean = pair(**KINDS[kind])
    torch.testing.assert_close(lean.logits(PROMPT), hf.logits(PROMPT), rtol=1e-4, atol=1e-4)
    assert generate(lean) == generate(hf)


def test_a_prompts_graph_has_few_rows_more_and_few_sizes():
    sizes = [graph_rows(tokens) for tokens in range(1, LONGEST_PROMPT_GRAPH + 1)]
    assert len(set(sizes)) == 16 and sizes[-1] == LONGEST_PROMPT_GRAPH and sizes == sorted(sizes)
    assert all(0 <= size - tokens < max(64, tokens / 4) for tokens, size in enumerate(sizes, 1))


def test_a_gpu_begins_no_step_ahead_that_nobody_asks_for(monkeypatch):
    """Two under way while more are wanted, one at the end; whoever goes on regardless gets one at a time."""
    event = SimpleNamespace(synchronize=lambda: None, elapsed_time=lambda _: 1.0)
    done = SimpleNamespace(chosen=torch.tensor([3.0, -1.0]), logits=None, begun=event, ended=event, kept=event)
    under_way = []

    class OnGPU(CudaGeneration):
        def _begin(self):
            self._begun += 1
            self._in_flight.append(done)
            under_way.append(len(self._in_flight))

    monkeypatch.setattr(llama_cuda, "allocated_bytes", lambda device: (0, 0))
    engine = SimpleNamespace(context=100, device="cuda:0", beside=SimpleNamespace(wait_event=lambda _: None))
    generation = OnGPU(engine, [1, 2], SamplingSettings(max_new_tokens=5))
    generation._workspace = SimpleNamespace(slots=[None, None], decoder=SimpleNamespace(capacity=100))
    counts = []
    for _ in range(6):
        generation._next()
        counts.append(generation._begun)
    assert counts == [2, 3, 4, 4, 5, 6] and max(under_way) == 2 and under_way[-2:] == [1, 1]


def ends(tied: bool, tensors: dict) -> tuple:
    """Embedding and head that the loop makes of `tensors`."""
    architecture = architecture_of(tiny_llama(torch.float32, tie_word_embeddings=tied).config.to_dict())
    made = load_weights(ModelTensors(tensors), architecture, METHODS["fp32"], "cpu", kernels=reference)
    return made.embedding, made.head


def test_a_tied_head_is_what_the_file_holds():
    """As in transformers: under either name, and not tied where two that differ are there."""
    tensors = dict(tiny_llama(torch.float32).named_parameters())
    embedding, head = tensors["model.embed_tokens.weight"], tensors.pop("lm_head.weight")
    same = ends(True, tensors)
    assert same[0] is same[1] and torch.equal(same[0], embedding)
    copied = ends(True, tensors | {"lm_head.weight": embedding.clone()})
    assert copied[0] is copied[1]
    apart = ends(True, tensors | {"lm_head.weight": head})
    assert torch.equal(apart[0], embedding) and torch.equal(apart[1], head)
    del tensors["model.embed_tokens.weight"]
    alone = ends(True, tensors | {"lm_head.weight": head})
    assert alone[0] is alone[1] and torch.equal(alone[0], head)
    with pytest.raises(ModelUnavailable, match="no tensor 'model.embed_tokens.weight'"):
        ends(True, tensors)


def test_a_head_that_is_not_there_is_not_made_up():
    tensors = dict(tiny_llama(torch.float32).named_parameters())
    del tensors["lm_head.weight"]
    with pytest.raises(ModelUnavailable, match="no tensor 'lm_head.weight'"):
        ends(False, tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["llm-int8", "int8-weight-only", "llm-int8-head"])
def test_int8_in_the_lean_loop_is_int8_in_transformers(method, tied):
    hf, lean = pair(method, tie_word_embeddings=tied)
    rotary_buffers = 2 * 4 * 4
    assert (lean.weight_bytes, lean.scale_bytes) == (hf.weight_bytes - rotary_buffers, hf.scale_bytes)
    torch.testing.assert_close(lean.logits(PROMPT).float(), hf.logits(PROMPT).float(), rtol=0.02, atol=0.02)
    assert generate(lean, 6) == generate(hf, 6)


def test_sampling_draws_the_same_tokens_in_both_loops():
    hf, lean = pair()
    settings = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 5}
    assert generate(lean, **settings) == generate(hf, **settings) != generate(lean, temperature=0.9, seed=6)


def test_what_was_likeliest_is_known_of_every_token():
    _, lean = pair()
    generation, ids = lean.start(PROMPT, SamplingSettings(max_new_tokens=4)), list(PROMPT)
    for place in range(3):
        token = generation.step() if place else generation.prefill()
        assert generation.best(token, 4) == pytest.approx(best_of(lean, ids, 4), abs=1e-3)
        ids.append(token.token_id)


def test_a_decoded_token_is_a_prefilled_token():
    """The cache after a prompt and steps is the cache after the longer prompt."""
    _, lean = pair("llm-int8")
    tokens = generate(lean, 4)
    longer = lean.start(PROMPT + tokens[:3], SamplingSettings(max_new_tokens=1))
    assert longer.prefill().token_id == tokens[3]


def test_the_threshold_moves_on_the_loaded_model():
    _, lean = pair("llm-int8")
    before = lean.logits(PROMPT)
    assert not torch.equal(lean.under(replace(lean.method, threshold=0.01)).logits(PROMPT), before)
    assert torch.equal(lean.logits(PROMPT), before)
    for name in ("fp16", "int8-weight-only"):
        with pytest.raises(BadChoice, match=f"{name} cannot be set to '3'; it has no settings"):
            parse_method(f"{name}@3")


def test_products_are_summed_in_integers_as_it_says():
    """So they are exact where float32 no longer counts, and rounded once."""
    for rows in (3, 40):
        x, weight = (torch.randint(100, 128, (count, 5001), dtype=torch.int8) for count in (rows, 7))
        exact = x.double() @ weight.double().T
        assert exact.min() > 2**24
        assert torch.equal(integers.integer_product(x, weight), exact.float())
        assert torch.equal(integers.float_product(x, weight), exact.float())
    lowest = torch.full((5, 1024), -128, dtype=torch.int8)  # the largest sum there is
    assert integers.float_product(lowest, lowest).eq(2**24).all()
    assert all("exactly in integers" in METHODS["llm-int8"].arithmetic(device) for device in ("cpu", "cuda:0"))


def test_a_prompt_up_to_the_last_position_can_be_warmed_up():
    _, lean = pair("llm-int8")
    lean.warm_up([1] * (lean.context - 1))
    lean.warm_up([1] * (lean.context - 2))


def test_a_long_prompt_can_be_given_up():
    _, lean = pair()
    asked = []
    generation = lean.start(PROMPT, SamplingSettings())
    with pytest.raises(Interrupted):
        generation.prefill(lambda: asked.append(1) or len(asked) > 1)
    assert len(asked) == 2


def test_output_that_is_not_a_number_is_an_error_with_advice():
    _, lean = pair()
    lean.model.norm.fill_(float("nan"))
    with pytest.raises(UserError, match="not a number.*bf16"):
        lean.start(PROMPT, SamplingSettings()).prefill()


def test_bytes_are_those_of_the_tensors():
    _, lean = pair()
    generation = lean.start(PROMPT, SamplingSettings(max_new_tokens=300))
    assert generation.kv_bytes == 0
    generation.prefill()
    a = lean.architecture
    capacity = capacity_for(len(PROMPT) + 300, a.context)
    assert generation.kv_bytes == 2 * a.layers * a.kv_heads * a.head_dim * capacity * 4
    held = generation.kv_bytes
    generation.close()
    assert generation.kv_bytes == 0
    assert lean.reserved_bytes > held  # cache and buffers stay with the engine, and are counted there
    assert lean.read_bytes_per_token == lean.weight_bytes - lean.model.embedding.nbytes


@pytest.mark.parametrize(("tokens", "room"), [(1, 256), (256, 256), (257, 512), (1000, 1000), (9000, 1000)])
def test_room_doubles_up_to_the_context(tokens, room):
    assert capacity_for(tokens, 1000) == room


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen3"}, "models of type 'qwen3'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"mlp_bias": True}, "a bias in the MLP"),
        ({"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 128}, "a sliding attention window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary embedding 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary embedding 'dynamic'"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "rotary embedding of 0.5 of each head"),
        ({"rope_parameters": {"full_attention": {}}}, "a rotary embedding for each kind of layer"),
        ({"intermediate_size": 77}, r"sizes that are not multiples of 16 \(intermediate 77\)"),
        ({"head_dim": 18}, r"sizes that are not multiples of 16 \(heads times width 72\)"),
        ({"num_attention_heads": 3, "head_dim": 16}, "3 heads of width 16 over 2 groups"),
        ({"num_attention_heads": 6, "head_dim": 16}, "a hidden size of 32 for 6 heads"),
        ({"transformers_weights": "other.safetensors"}, "weights in a file of another name"),
        ({"quantization_config": {"llm_int8_skip_modules": []}}, "an int8 checkpoint with its own list of layers"),
    ],
)
def test_what_the_lean_loop_cannot_compute_it_says(changes, reason):
    config = tiny_llama(torch.float32).config.to_dict() | changes
    with pytest.raises(Unsupported, match=f"^{reason}"):
        architecture_of(config)
    assert choose_engines("auto", [METHODS["fp16"]], config, "cuda:0") == ["hf"]
    with pytest.raises(BadChoice, match=f"^engine 'lean': the lean loop does not compute {reason}"):
        choose_engines("lean", [METHODS["fp16"]], config, "cuda:0")


def test_old_configurations_are_read_too():
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 99,
    }
    old = shape | {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    found = architecture_of(old)
    assert (found.rope.theta, found.rope.factor, found.kv_heads, found.head_dim) == (5e5, 8.0, 4, 16)
    assert architecture_of(shape | {"model_type": "qwen2"}).qkv_bias
    both = shape | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 7.0}}
    assert architecture_of(both).rope.factor == 2.0  # transformers' order where a file has both


def test_what_a_family_ignores_is_ignored():
    """Mistral has no biases, whatever its configuration says."""
    shape = tiny_llama(torch.float32).config.to_dict() | {"attention_bias": True, "sliding_window": None}
    assert architecture_of(shape).qkv_bias and architecture_of(shape).output_bias
    mistral = architecture_of(shape | {"model_type": "mistral"})
    assert not mistral.qkv_bias and not mistral.output_bias


LEAN_CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
LEAN_CONFIG |= {"num_hidden_layers": 1, "vocab_size": 9}


@pytest.mark.parametrize(
    ("methods", "device", "expected"),
    [
        ("fp16,llm-int8", "cuda:0", "lean,lean"),
        ("fp16,bnb-int8", "cuda:0", "hf,hf"),  # the same loop for both, so that their ratio means something
        ("fp16,bnb-int8,llm-int8", "cuda:0", "lean,hf,lean"),
        ("bf16,int8-weight-only,fp32", "cuda:0", "lean,lean,hf"),
        ("fp16,llm-int8", "cpu", "lean,lean"),
        ("fp16,bnb-int8", "cpu", "hf,hf"),
        ("fp32,llm-int8", "cpu", "hf,hf"),
        ("llm-int8", "cuda:1", "lean"),
    ],
)
def test_each_takes_the_best_loop_that_is_fair(methods, device, expected):
    assert choose_engines(
        "auto", [parse_method(name) for name in methods.split(",")], LEAN_CONFIG, device
    ) == expected.split(",")


def test_an_engine_by_hand():
    assert choose_engines("hf", [METHODS["fp16"], METHODS["llm-int8"]], LEAN_CONFIG, "cuda:0") == ["hf", "hf"]
    assert choose_engines("lean", [METHODS["fp16"], METHODS["llm-int8"]], LEAN_CONFIG, "cpu") == ["lean", "lean"]
    with pytest.raises(BadChoice, match="bnb-int8 runs through transformers"):
        choose_engines("lean", [METHODS["fp16"], METHODS["bnb-int8"]], LEAN_CONFIG, "cpu")
    with pytest.raises(BadChoice, match="'fast'.*auto"):
        choose_engines("fast", [METHODS["fp16"]], LEAN_CONFIG, "cpu")


def test_a_bf16_checkpoint_in_fp16_says_what_that_means(tmp_path):
    from conftest import byte_tokenizer

    from llmq.contestant import Contestant
    from llmq.events import Failed, Loading
    from llmq.labs.compare import Comparison
    from llmq.machine.door import Machine

    tiny_llama(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    contestants = tuple(map(Contestant.parse, ("bf16", "fp16")))
    few = SamplingSettings(max_new_tokens=2)
    comparison = Comparison(model=str(tmp_path), prompt="Hi", contestants=contestants, sampling=few)
    events = list(Machine().run(comparison))
    notes = {event.contestant: event.message for event in events if isinstance(event, Loading) and event.contestant}
    assert not any(isinstance(event, Failed) for event in events)
    assert notes["bf16"] == "" and "65,504" in notes["fp16"]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_by_the_decode_step_is_reading_in_one_call(kind):
    """In both loops, also twice: the second time in a workspace that has been used."""
    for engine in pair(**KINDS[kind]):
        for ids in (PROMPT, PROMPT[5:]):
            torch.testing.assert_close(engine.decode_logits(ids), engine.logits(ids), rtol=1e-4, atol=1e-4)
        with pytest.raises(Interrupted):
            engine.decode_logits(PROMPT, lambda: True)
        assert len(generate(engine)) == 12
