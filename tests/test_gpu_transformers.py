"""The drop-in for transformers on a real GPU: no host in a step, CUDA graphs, bitsandbytes' own kernels beside it.

Run with LLMQ_TEST_GPU=1, so that Triton compiles instead of interpreting.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import tiny_llama

from llmq.kernels.primitives import int8_linear, quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not os.environ.get("LLMQ_TEST_GPU"), reason="Triton interprets without LLMQ_TEST_GPU=1"),
]
GPU = "cuda:0"
SHAPE = dict(hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=4)
LENGTH = dict(max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("origin")
    tiny_llama(torch.float16, **SHAPE).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    from llmq.transformers import Int8Config

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config(threshold=3.0), device_map=GPU)


def prompt() -> torch.Tensor:
    return torch.tensor([list(b"Hello LLaMA, how are you?")], device=GPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 11008), (192, 576), (50, 97)])
def test_the_operations_are_the_definition(shape, dtype):
    from llmq.kernels import registered  # noqa: F401 makes torch.ops.llmq

    weight = quantize_rows(torch.randn(shape, device=GPU))
    x = torch.randn(3, shape[1], device=GPU).to(dtype)
    x[:, 7] *= 40
    expected = int8_linear(x[:1], weight, 6.0)
    one, half, again = torch.ops.llmq.linear_token(
        x[0], [weight.codes, weight.codes[::2].contiguous(), weight.codes],
        [weight.absmax, weight.absmax[::2].contiguous(), weight.absmax], [], 6.0
    )  # fmt: skip
    assert torch.equal(again, one) and torch.equal(half, one[::2])
    several = torch.ops.llmq.linear_rows(x, weight.codes, weight.absmax, None, 6.0)
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-3
    assert (one.float() - expected[0]).norm() < tolerance * expected.norm()
    exact = int8_linear(x, weight, 6.0)
    assert (several.float() - exact).norm() < tolerance * exact.norm()


def test_nothing_in_a_layer_waits_for_the_host(model):
    layer = model.model.layers[0].mlp.gate_proj
    x = 4 * torch.randn(9, layer.in_features, device=GPU, dtype=torch.float16)
    with torch.inference_mode():
        expected = [layer(x), layer(x[:1])]
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [layer(x), layer(x[:1])]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_call_can_be_captured_and_replayed(model):
    ids = prompt()[:, :1].contiguous()
    with torch.inference_mode():
        model(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(ids, use_cache=False).logits
        for token in (3, 200, 77):
            ids.fill_(token)
            graph.replay()
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=0, atol=1e-3)


def test_a_compiled_static_cache_writes_what_eager_writes(model):
    from torch._dynamo.utils import counters

    counters.clear()
    eager = model.generate(prompt(), **LENGTH)
    compiled = [model.generate(prompt(), cache_implementation="static", **LENGTH) for _ in range(2)]
    assert sum(counters["graph_break"].values()) == counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] > 0 and torch.equal(*compiled)
    assert torch.equal(compiled[0][:, :32], eager[:, :32])  # later a near tie may fall to either side


def test_bitsandbytes_opens_what_was_saved_and_writes_the_same(model, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model.save_pretrained(tmp_path)
    theirs = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=theirs, device_map=GPU)
    with torch.inference_mode():
        ours, bnb = model(prompt()).logits.float(), other(prompt()).logits.float()
    assert (ours - bnb).norm() < 2e-2 * bnb.norm()
