"""The lean loop on a real GPU: graphs, the instructions an interpreter does not have, and bitsandbytes' own kernels.

Run with LLMQ_TEST_GPU=1, so that Triton compiles instead of interpreting.
"""

from __future__ import annotations

import os

import pytest
import torch
from tiny_runs import key_of

from llmq.contestant import Contestant
from llmq.engine.sampling import SamplingSettings
from llmq.kernels import reference
from llmq.kernels.buffers import COUNTERS, Noting, SplitVector
from llmq.kernels.primitives import Int8Weight
from llmq.machine.door import Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not os.environ.get("LLMQ_TEST_GPU"), reason="Triton interprets without LLMQ_TEST_GPU=1"),
]
GPU = "cuda:0"
SHAPES = [(12288, 4096), (4096, 11008), (576, 1536), (192, 576)]


@pytest.fixture(scope="module")
def kernels():
    from llmq.kernels.backend import kernels_for

    found, slower = kernels_for(GPU)
    assert slower == ""
    return found


@pytest.fixture(scope="module")
def machine():
    return Machine()


def engine(machine, source, method: str, loop: str):
    found, _ = machine.pool.get(key_of(source, method, GPU, loop))
    return found


def generate(engine, ids: list[int], tokens: int, **sampling) -> list[int]:
    generation = engine.start(ids, SamplingSettings(max_new_tokens=tokens, **sampling))
    found = [generation.prefill().token_id, *(generation.step().token_id for _ in range(tokens - 1))]
    generation.close()
    return found


def best_two(engine, ids: list[int], tokens: int) -> list[list[float]]:
    """The probabilities of the two likeliest tokens at each place of a greedy generation, the larger first."""
    generation = engine.start(ids, SamplingSettings(max_new_tokens=tokens))
    found = [generation.best(generation.step() if place else generation.prefill(), 2) for place in range(tokens)]
    generation.close()
    return [sorted(best.values(), reverse=True) for best in found]


@pytest.mark.demo
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_was_likeliest_is_known_while_the_next_step_runs(temperature, machine, demo):
    from tiny_runs import best_of

    lean, ids = engine(machine, demo, "fp16", "lean"), reference_ids(demo, 40)
    generation = lean.start(ids, SamplingSettings(max_new_tokens=8, temperature=temperature))
    for place in range(6):
        token = generation.step() if place else generation.prefill()
        assert generation.best(token, 5) == pytest.approx(best_of(lean, ids, 5), abs=5e-3)
        ids = [*ids, token.token_id]
    generation.close()


def reference_ids(source, tokens: int) -> list[int]:
    from llmq.bench.setup import fixed_prompt
    from llmq.models.opening import Model

    return fixed_prompt(Model(source), tokens)


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_bitsandbytes_layer(shape, rows, kernels):
    """Weight codes and scales bit for bit, activation codes bit for bit, outlier sets, and the output."""
    import bitsandbytes as bnb

    generator = torch.Generator(GPU).manual_seed(rows)
    weight = (0.02 * torch.randn(shape, device=GPU, generator=generator)).half()
    made = Int8Weight(torch.empty(shape, dtype=torch.int8, device=GPU), torch.empty(shape[0], device=GPU))
    kernels.quantize_rows(weight, made)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    assert torch.equal(made.codes, codes) and torch.equal(made.absmax, scales)
    linear = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    linear.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    linear = linear.to(GPU).eval()
    x = torch.randn(rows, shape[1], device=GPU, generator=generator).half()
    x[:, [3, 77, shape[1] - 1]] *= 20
    x[-1, 100] = 6.0
    expected, own = linear(x), multiply(kernels, x, made)
    assert set(linear.state.idx.tolist()) == outliers(kernels, x, made)
    assert (own.float() - expected.float()).norm() / expected.float().norm() < 2e-3
    if rows == 1:
        exact = torch.empty(1, shape[0], device=GPU)
        reference.product(split_vector(kernels, x), made, exact[0])
        assert (own.float() - exact).norm() / exact.norm() < 3e-4  # FP16 rounding of the output


def noted(kernels, x):
    return kernels.plain_rows(x, Noting(6.0, torch.zeros(x.shape[1], dtype=torch.int8, device=GPU)))


def multiply(kernels, x, weight) -> torch.Tensor:
    """One row the way decode does it, several the way a prompt goes."""
    if len(x) > 1:
        return kernels.linear_rows(noted(kernels, x), weight)
    out = torch.empty(1, weight.shape[0], dtype=torch.float16, device=GPU)
    kernels.product(split_vector(kernels, x), weight, out[0])
    return out


def split_vector(kernels, x):
    made = SplitVector.empty(x.shape[1], GPU)
    kernels.split(x[0], 6.0, made)
    return made


def outliers(kernels, x, weight) -> set[int]:
    if len(x) == 1:
        made = split_vector(kernels, x)
        return set(made.index[: int(made.count)].tolist())
    return set(noted(kernels, x).outlier_marks.nonzero().view(-1).tolist())


@pytest.mark.demo
@pytest.mark.parametrize("method", ["fp16", "llm-int8", "llm-int8-head"])
def test_the_graph_replays_what_the_kernels_compute_for_500_tokens(method, demo, machine, monkeypatch):
    from llmq.engine.cuda_graph import StepGraph

    lean, ids = engine(machine, demo, method, "lean"), reference_ids(demo, 40)
    replayed = generate(lean, ids, 500)
    monkeypatch.setattr(StepGraph, "step", StepGraph._step)
    assert replayed == generate(lean, ids, 500)


@pytest.mark.demo
@pytest.mark.parametrize("tokens", [1, 7, 512])
def test_every_layer_of_a_model_is_bitsandbytes_layer(tokens, demo, machine, kernels):
    """Each linear layer fed what it gets in bitsandbytes' model: the same outlier columns, the same output."""
    import bitsandbytes as bnb

    model = engine(machine, demo, "bnb-int8", "hf").model
    seen = []

    def check(module, inputs, output):
        x, state = inputs[0].reshape(-1, inputs[0].shape[-1]), module.state
        weight = Int8Weight(state.CB if state.CB is not None else module.weight.data, state.SCB)
        expected = set(state.idx.tolist()) if state.idx is not None else set()
        wrong = (multiply(kernels, x, weight).float() - output.view(len(x), -1).float()).norm() / output.float().norm()
        seen.append((outliers(kernels, x, weight) == expected, wrong.item(), len(expected)))

    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    with torch.inference_mode():
        model(torch.tensor([reference_ids(demo, tokens)], device=GPU))
    for hook in hooks:
        hook.remove()
    equal, wrong, columns = zip(*seen, strict=True)
    print(f"{tokens} rows: {sum(equal)} of {len(layers)} sets equal, {sum(columns)} columns, worst {max(wrong):.1e}")
    assert len(seen) == len(layers) and all(equal) and max(wrong) < 2e-3 and any(columns)


@pytest.mark.demo
@pytest.mark.parametrize("method", ["fp16", "llm-int8"])
def test_without_triton_or_a_graph_the_tokens_come_slower_and_one_line_says_so(method, demo, monkeypatch, caplog):
    """torch's own operations ask the host, so they cannot be captured either: both fall-backs at once."""
    from llmq.kernels import backend
    from llmq.models.opening import Model

    ids = Model(demo).encode("One, two, three, four,")
    triton = engine(Machine(), demo, method, "lean")
    ids += generate(triton, ids, 1)  # from here on it counts, and is sure of it
    expected = generate(triton, ids, 7)
    assert all(first > 3 * second for first, second in best_two(triton, ids, 7)), "no near tie that rounding turns"
    monkeypatch.setattr(backend, "_why_not_triton", lambda device: "triton is not installed")
    assert generate(engine(Machine(), demo, method, "lean"), ids, 7) == expected
    assert [record.message.split(",")[0] for record in caplog.records] == ["triton is not installed", "no CUDA graph"]
    torch.cuda.synchronize()


@pytest.mark.demo
def test_out_of_memory_in_capture_fails_its_contestants_alone(demo, monkeypatch):
    from llmq.engine.cuda_graph import StepGraph
    from llmq.events import Failed, Finished
    from llmq.labs.compare import Comparison

    def capture(step_graph):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StepGraph, "_capture", capture)
    contestants = tuple(map(Contestant.parse, ("fp16", "bnb-int8", "llm-int8")))
    few = SamplingSettings(max_new_tokens=3)
    comparison = Comparison(model="demo", prompt="Hello", contestants=contestants, device=GPU, sampling=few)
    events = list(Machine().run(comparison))
    failed, finished = ([e for e in events if isinstance(e, kind)] for kind in (Failed, Finished))
    assert [e.contestant for e in failed] == ["fp16", "llm-int8"]
    assert all(e.message.startswith(f"out of memory: {e.contestant}") for e in failed)
    assert [e.contestant for e in finished] == ["bnb-int8"]


@pytest.mark.demo
def test_a_generation_ends_with_the_context(demo, machine):
    """The room of a captured graph ends where the context does."""
    lean = engine(machine, demo, "llm-int8", "lean")
    ids = (reference_ids(demo, 512) * 16)[: lean.context - 3]
    generation = lean.start(ids, SamplingSettings(max_new_tokens=50))
    tokens = [generation.prefill(), *(generation.step() for _ in range(3))]
    generation.close()
    assert all(0 <= t.token_id < lean.architecture.vocab_size for t in tokens)
    lean.warm_up((reference_ids(demo, 512) * 16)[: lean.context - 1])


@pytest.mark.demo
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("loop", ["lean", "hf"])
@pytest.mark.parametrize("method", ["fp16", "llm-int8"])
def test_a_second_gpu_is_chosen_by_its_name(method, loop, demo, machine):
    ids, before = reference_ids(demo, 40), torch.cuda.memory_allocated("cuda:1")
    second, _ = Machine().pool.get(key_of(demo, method, "cuda:1", loop))
    assert torch.cuda.memory_allocated("cuda:1") - before >= second.weight_bytes
    assert generate(second, ids, 40) == generate(engine(machine, demo, method, loop), ids, 40)


@pytest.mark.demo
def test_sampling_draws_what_transformers_engine_draws(demo, machine):
    """The same generator, the same filter: captured or not. FP16 rounds differently, so texts may part later."""
    ids = reference_ids(demo, 40)
    drawing = {"temperature": 0.8, "top_k": 20, "seed": 3}
    drawn = [generate(engine(machine, demo, "fp16", loop), ids, 8, **drawing) for loop in ("lean", "hf")]
    assert drawn[0] == drawn[1]


@pytest.mark.demo
def test_sampling_in_the_graph_repeats_with_its_seed(demo, machine):
    lean, ids = engine(machine, demo, "fp16", "lean"), reference_ids(demo, 40)
    drawn = [generate(lean, ids, 40, temperature=0.9, top_k=50, top_p=0.95, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.demo
def test_fp16_agrees_with_transformers_under_teacher_forcing(demo, machine):
    """Mean KL of at most 1e-3 and the same likeliest token at 99 % of positions, over 2,048 tokens."""
    ids = reference_ids(demo, 2048)
    scores = []
    for start in range(0, len(ids), 512):
        hf, lean = (
            engine(machine, demo, "fp16", loop).logits(ids[start : start + 512]).float().log_softmax(-1)
            for loop in ("hf", "lean")
        )
        scores.append(torch.stack(((hf.exp() * (hf - lean)).sum(-1), (hf.argmax(-1) == lean.argmax(-1)).float())))
    divergence, agreement = torch.cat(scores, 1).mean(1).tolist()
    print(f"KL {divergence:.2e}, top-1 agreement {agreement:.4f}")
    assert divergence <= 1e-3 and agreement >= 0.99


@pytest.mark.demo
@pytest.mark.parametrize("loop", ["lean", "hf"])
def test_reading_by_the_decode_step_is_reading_in_one_call(loop, demo, machine):
    """Also after a generation has used the graph."""
    ids, found = reference_ids(demo, 128), engine(machine, demo, "fp16", loop)
    generate(found, ids[:32], 8)
    pooled, decode = found.logits(ids).float(), found.decode_logits(ids).float()
    assert pooled.shape == decode.shape and (pooled.argmax(-1) == decode.argmax(-1)).float().mean() > 0.97
    assert (pooled.softmax(-1) - decode.softmax(-1)).abs().max() < 0.05


@pytest.mark.demo
def test_decode_steps_agree_with_the_prompt_path(demo, machine):
    """Step by step through DP4A and split attention, or all at once: the same distributions up to rounding."""
    ids, lean = reference_ids(demo, 300), engine(machine, demo, "fp16", "lean")
    generation = lean.start(ids[:200], SamplingSettings(max_new_tokens=100))
    generation.prefill()
    expected, decoder = lean.logits(ids).float(), generation._workspace.decoder
    for place in range(200, 299):
        decoder.token.fill_(ids[place])
        generation._workspace.step()
        p, q = decoder.logits.log_softmax(-1), expected[place].log_softmax(-1)
        assert (q.exp() * (q - p)).sum() < 5e-3


@pytest.mark.demo
@pytest.mark.parametrize("method", ["fp16", "llm-int8", "llm-int8-head", "int8-weight-only"])
def test_a_captured_prompt_is_a_prompt(method, demo, machine, monkeypatch):
    """Rows that only fill the graph's shape change nothing: same likelihoods, same text, whatever was there before."""
    from llmq.engine.cuda_graph import StepGraph

    lean, ids = engine(machine, demo, method, "lean"), reference_ids(demo, 1100)
    lengths = [300, 5, 64, 65, 1, 1100, 200]
    captured = [first_token(lean, ids[:n]) for n in lengths]
    monkeypatch.setattr(StepGraph, "prompt_of", lambda step_graph, tokens: None)
    for (token, logprob), n in zip(captured, lengths, strict=True):
        expected, expected_logprob = first_token(lean, ids[:n])
        assert token == expected and abs(logprob - expected_logprob) < 0.02, n


def first_token(lean, ids: list[int]) -> tuple[int, float]:
    generation = lean.start(ids, SamplingSettings(max_new_tokens=4))
    made = generation.prefill()
    generation.close()
    return made.token_id, made.logprob


@pytest.mark.parametrize("rows", [2, 16, 33, 64, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rows_product_is_that_of_the_row_alone(shape, rows, kernels):
    """Bit for bit: decomposition, product, gate and residual of several sequences."""
    generator = torch.Generator(GPU).manual_seed(rows)
    weight = Int8Weight(torch.empty(shape, dtype=torch.int8, device=GPU), torch.empty(shape[0], device=GPU))
    kernels.quantize_rows((0.02 * torch.randn(shape, device=GPU, generator=generator)).half(), weight)
    x = torch.randn(rows, shape[1], device=GPU, generator=generator).half()
    x[:, [3, 77]] *= 20
    x[0, 100], x[-1, ::9] = 6.0, 30000.0
    gain = torch.rand(shape[1], device=GPU, generator=generator).half()
    noting = Noting(6.0, torch.zeros(shape[1] + COUNTERS, dtype=torch.int32, device=GPU), by_row=True)
    normed = kernels.norm_rows(x, gain, 1e-5, noting)
    before = torch.randn(rows, shape[0], device=GPU, generator=generator).half()
    found = kernels.linear_rows(normed, weight, residual=before.clone())
    gated = kernels.gated_rows(normed, weight, Noting()).x
    for row, alone in enumerate(x):
        split = SplitVector.empty(shape[1], GPU)
        kernels.norm_split(alone, gain, 1e-5, 6.0, split)
        own = torch.empty_like(alone)
        kernels.norm(alone, gain, 1e-5, own)
        assert torch.equal(normed.x[row], own)
        assert torch.equal(normed.codes[row], split.codes) and normed.absmax[row] == split.absmax
        for made, given in ((found, {"residual": before[row]}), (gated, {"gated": True})):
            expected = torch.empty_like(made[row])
            kernels.product(split, weight, expected, **given)
            assert torch.equal(made[row], expected), (row, (made[row] != expected).sum())


@pytest.mark.demo
@pytest.mark.parametrize("method", ["fp16", "llm-int8", "llm-int8-head", "int8-weight-only"])
def test_sequences_decoded_together_are_what_each_is_alone(method, demo, machine):
    lean, ids = engine(machine, demo, method, "lean"), reference_ids(demo, 900)
    prompts = [ids[start : start + 20 + start % 37] for start in range(0, 800, 47)] + [ids[:500]]
    generation = lean.start_several(prompts, SamplingSettings(max_new_tokens=60))
    steps = [generation.step() if place else generation.prefill() for place in range(60)]
    generation.close()
    agreed = 0
    for prompt, row in zip(prompts, zip(*steps, strict=True), strict=True):
        found, expected = [token.token_id for token in row], generate(lean, prompt, 60)
        agreed += found == expected
    assert agreed == len(prompts) if method.startswith("llm-int8") else agreed > 0.7 * len(prompts)
