"""What must hold in every architecture that transformers knows: replaced modules, and the forecast of keys and values.

A module that a method puts in the place of another does everything the other did. To see it, the weights lie on the
int8 grid, so that rounding them changes nothing, and no activation is rounded: then the replaced model is the dense
one, and a scale, a bias or a norm that gets lost on the way shows at once.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from planted import seen_ones
from test_llama_cuda import pair
from tiny_runs import light
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from llmq import formulas
from llmq.engine.hf import HFEngine, cache_name
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, UserError
from llmq.methods import METHODS
from llmq.methods.base import WeightBytes
from llmq.methods.coverage import Coverage, coverage, predicted_coverage
from llmq.methods.swap import linear_layers, stored_bytes

LARGEST = 1_000_000  # parameters: above that an architecture is not made small by these numbers
WIDTHS = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32)
WIDTHS |= dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48)
WIDTHS |= dict.fromkeys(("head_dim", "v_head_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 16)
WIDTHS |= dict.fromkeys(("kv_channels", "kv_lora_rank", "q_lora_rank", "sliding_window"), 16)
WIDTHS |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "state_size"), 8)
COUNTS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2)
COUNTS |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 2)
COUNTS |= dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 2)
COUNTS |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 2)
COUNTS |= dict.fromkeys(("num_experts_per_tok", "n_shared_experts", "n_group", "topk_group"), 1)
SMALL = WIDTHS | COUNTS | {"vocab_size": 64, "max_position_embeddings": 64, "n_positions": 64}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
EXACT = ("int8-weight-only", "llm-int8", "llm-int8-head", "bnb-int8", "absmax-w8a32")
REFUSED = {("dory", "llm-int8-head"): "cannot be int8", ("hy_v4", "llm-int8-head"): "casts activations"}
IDS = torch.tensor([[3, 4, 5, 9, 11]])
NEW = 12  # tokens, past the small sliding window


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def small(kind: type):
    """A configuration with the usual sizes small, whatever they are called."""
    usual = kind()
    values = {name: value for name, value in SMALL.items() if not isinstance(getattr(usual, name, []), list)}
    if layers := getattr(usual, "layer_types", None):
        values["layer_types"] = list(dict.fromkeys(layers))[:2] if len(set(layers)) > 1 else layers[:2]
    return kind(**values)


def on_grid(model: nn.Module) -> nn.Module:
    """Every matrix as codes of one scale for all of them, 127 in each row and column."""
    drawn = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            codes = torch.randint(-127, 128, parameter.shape, generator=drawn)
            codes[:, 0], codes[0] = 127, 127
            parameter.data = codes * 2.0**-10
    return model


@functools.cache
def dense(model_type: str, folder) -> dict[torch.dtype, nn.Module] | None:
    """The small model in FP32 and FP16, as it is out of a checkpoint; None where it cannot be made or does not run."""
    try:
        config = small(CONFIGS[model_type])
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in shape.parameters()) > LARGEST:
            return None
        torch.manual_seed(0)
        on_grid(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
        dtypes = (torch.float32, torch.float16)
        made = {dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in dtypes}
        return made if all(logits(model).isfinite().all() for model in made.values()) else None
    except Exception:  # one of 200 architectures that wants more than small numbers; the last test counts
        return None


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits[0].float()


def converted(model_type: str, folder, method: str) -> nn.Module:
    """The model under a method that rounds no activation: all columns are outliers where it has a threshold."""
    method, models = METHODS[method], dense(model_type, folder)
    model = copy.deepcopy(models.get(getattr(torch, method.dtype), models[torch.float32]))
    statistics = {name: seen_ones(method, layer) for name, layer in linear_layers(model) if method.calibrated}
    model = method.quantize_(model, "cpu", statistics)
    if "threshold" in method.live:
        replace(method, threshold=1e-6).apply_(model)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    return lambda model_type: root / model_type


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_replaced_model_is_the_dense_model(model_type, folders):
    if (models := dense(model_type, folders(model_type))) is None:
        pytest.skip("not made small by these numbers")
    for method in EXACT:
        expected = logits(models[getattr(torch, METHODS[method].dtype)])
        try:
            found = logits(converted(model_type, folders(model_type), method))
        except BadChoice as refusal:
            assert REFUSED[model_type, method] in str(refusal)
            continue
        except RuntimeError as error:  # bitsandbytes' kernel on CPUs, in attention with a latent: loud, and its own
            assert method == "bnb-int8" and "view size is not compatible" in str(error)
            continue
        assert (model_type, method) not in REFUSED
        assert (found - expected).abs().max() <= 0.05 * expected.std(), method


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_layers_are_those_of_transformers(model_type, folders):
    """What transformers' own LLM.int8() replaces, but for layers that the model keeps in FP32 always."""
    if (models := dense(model_type, folders(model_type))) is None:
        pytest.skip("not made small by these numbers")
    model = models[torch.float32]
    kept = [*get_keys_to_not_convert(model), *model._keep_in_fp32_modules]
    linear = {name for name, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}
    always = {name for name in linear if any(part in f"{name}.weight" for part in model._keep_in_fp32_modules_strict)}
    theirs = {name for name in linear - always if should_convert_module(name, kept)}
    assert {name for name, _ in linear_layers(model)} == theirs


# Latents, linear attention, recurrent blocks, loops: none of them is two numbers a token and head.
UNKNOWN = {"recurrent_gemma", "deepseek_v2", "minicpm3", "glm_moe_dsa", "qwen3_next", "lfm3", "dory"}


@pytest.mark.parametrize("tokens", [7, 40])  # below and above the small sliding window
@pytest.mark.parametrize("model_type", CONFIGS)
def test_keys_and_values_are_forecast_or_unknown(model_type, tokens, folders):
    model = (dense(model_type, folders(model_type)) or {}).get(torch.float32)
    if model is None or not {"cache", "past_key_values"} & {*inspect.signature(type(model).forward).parameters}:
        pytest.skip("not made small by these numbers, or without a cache")
    forecast = formulas.kv_bytes(model.config.get_text_config(), tokens=tokens, itemsize=4)
    assert forecast is None if model_type in UNKNOWN else True
    if forecast is not None:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.ones(1, tokens, dtype=torch.long), **{cache_name(model): cache}, use_cache=True)
        assert forecast == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# Encoders, whose positions `generate` counts from another number than the model by itself; and caches of another kind.
NO_WRITERS = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm", "minimax"}


@pytest.mark.parametrize("model_type", sorted(CONFIGS.keys() - NO_WRITERS))
def test_greedy_tokens_are_those_of_generate(model_type, folders):
    """Token by token through the cache: one that stays empty, or lost positions, would write another text."""
    model = (dense(model_type, folders(model_type)) or {}).get(torch.float32)
    if model is None:
        pytest.skip("not made small by these numbers")
    try:
        generation = HFEngine(model, METHODS["fp32"], "cpu").start(IDS[0].tolist(), SamplingSettings())
    except UserError as refusal:
        assert "takes no KV cache" in str(refusal)
        return
    found = [generation.prefill().token_id, *(generation.step().token_id for _ in range(NEW - 1))]
    # RecurrentGemma's state lay in its layers, and not in a cache, up to transformers 5.22.
    assert generation.kv_bytes > 0 or model_type == "recurrent_gemma"
    made = model.generate(IDS, max_new_tokens=NEW, do_sample=False, eos_token_id=None, forced_eos_token_id=None)
    assert found == made[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", ["gemma4_text", "mamba", "deepseek_v4"])
def test_a_setting_of_each_layer_is_not_known(model_type):
    assert formulas.kv_bytes(CONFIGS[model_type]().get_text_config(), tokens=10) is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma", "mixtral", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_coverage_counts_what_is_stored_in_a_byte_or_less(model_type, method, folders):
    dense(model_type, folders(model_type))
    model = converted(model_type, folders(model_type), method)
    found, plain = coverage(model), dense(model_type, folders(model_type))[torch.float32]
    assert found.all_weights == sum(p.numel() for p in plain.parameters())
    small = {name for name, p in model.named_parameters() if p.element_size() == 1}
    assert found.converted_weights == sum(p.numel() for name, p in plain.named_parameters() if name in small)
    assert (found.share > 0) == (method not in ("fp16", "bf16", "fp32", "absmax-w32a8"))


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_gpt2_are_predicted(method, folders):
    """Its linear layers are (in, out), and have a scale for every column of theirs."""
    handler, shape = METHODS[method], copy.deepcopy(dense("gpt2", folders("gpt2"))[torch.float32]).to("meta")
    shape.tie_weights()
    model = converted("gpt2", folders("gpt2"), method)
    assert handler.predict(shape) == WeightBytes(stored_bytes(model), handler.scale_bytes(model))


def test_coverage_says_what_is_left(folders):
    def found(model_type: str, method: str) -> Coverage:
        dense(model_type, folders(model_type))
        return coverage(converted(model_type, folders(model_type), method))

    llama, whole = found("llama", "llm-int8"), found("llama", "llm-int8-head")
    assert llama.left == ("lm_head.weight",) and 0.5 < llama.linear_share < 1
    assert whole.left == () and whole.linear_share == 1 > whole.share > llama.share
    assert found("gpt2", "llm-int8").left == ("transformer.wte.weight",)  # its Conv1D are converted, its tied head not
    experts = [name for name in found("mixtral", "llm-int8").left if "experts" in name]
    assert experts == ["model.layers.N.mlp.experts.gate_up_proj", "model.layers.N.mlp.experts.down_proj"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_coverage_is_predicted_from_the_shape(model_type, method, folders):
    shape = copy.deepcopy(dense(model_type, folders(model_type))[torch.float32]).to("meta")
    shape.tie_weights()
    assert predicted_coverage(shape, METHODS[method]) == coverage(converted(model_type, folders(model_type), method))


@pytest.mark.parametrize("method", ["fp16", "llm-int8", "llm-int8-head"])
@pytest.mark.parametrize("tied", [False, True])
def test_both_loops_cover_the_same(tied, method):
    hf, lean = pair(method, tie_word_embeddings=tied)
    assert replace(coverage(lean.model), left=()) == replace(coverage(hf.model), left=())


class Bare(nn.Module):
    """A model that keeps its matrices as parameters."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.ParameterList([torch.ones(4, 4)])

    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8", "int8-weight-only", "llm-int8-head", "absmax"])
def test_nothing_converted_is_refused(method):
    with pytest.raises(BadChoice, match="Bare keeps its weights in ParameterList: no linear layer to replace"):
        METHODS[method].quantize_(Bare(), "cpu")


def test_an_embedding_that_looks_at_its_ids_is_refused():
    """It would see other ids: those of the rows that were looked up."""

    class Odd(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * (1 + (ids[..., None] > 100))

    model = tiny_llama(torch.float16)
    table = Odd(*model.model.embed_tokens.weight.shape, dtype=torch.float16)
    model.set_input_embeddings(table)
    with pytest.raises(BadChoice, match="embedding of LlamaForCausalLM does more than look up rows"):
        METHODS["llm-int8-head"].quantize_(model, "cpu")


def test_an_embedding_keeps_its_padding_and_its_class():
    model = tiny_llama(torch.float16, pad_token_id=258)
    table = METHODS["llm-int8-head"].quantize_(model, "cpu").get_input_embeddings()
    assert isinstance(table, nn.Embedding) and table.padding_idx == 258
    assert table(torch.tensor([[258]])).shape == (1, 1, 32) and table.weight.dtype == torch.int8


def test_the_architectures_are_many(folders):
    assert sum(dense(model_type, folders(model_type)) is not None for model_type in CONFIGS) >= 110
