"""The CPU library against its definition in torch, against bitsandbytes, and against transformers; and its cache."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from test_llama_cuda import KINDS, PROMPT, ModelTensors, generate
from tiny_runs import best_of

from llmq.engine.base import Interrupted, capacity_for
from llmq.engine.choice import choose_engines
from llmq.engine.llama import rope_table
from llmq.engine.llama_cuda import CudaLlama
from llmq.engine.llama_weights import load_weights
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.kernels import primitives, reference
from llmq.kernels.cpu import build
from llmq.kernels.cpu.build import opened_library, why_not_native
from llmq.kernels.primitives import Int8Weight
from llmq.methods import METHODS, parse_method
from llmq.models.architecture import Architecture, Rope, architecture_of

if reason := why_not_native():
    pytest.skip(reason, allow_module_level=True)

from llmq.engine.llama_cpu import CpuLlama  # noqa: E402
from llmq.kernels.cpu import library  # noqa: E402
from llmq.kernels.cpu.library import Matrix, Packing, open_library, quantize_rows  # noqa: E402

STORED = ("packed", "int8_head", "kept")  # what of a method decides how weights are stored
LEAN_METHODS = [name for name, method in METHODS.items() if method.packed]


@dataclass
class Rounded:
    """Tensors as a method stores them, in float32, so that the reference computes in float32 too."""

    source: object
    dtype: torch.dtype

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def get(self, name: str, device: str) -> torch.Tensor:
        return self.source.get(name, device).to(self.dtype).float()


def with_cache_of(dtype: torch.dtype) -> SimpleNamespace:
    """The reference operations with keys and values rounded as the library stores them."""

    def append_rows(qkv, cache, rope, start):
        found = reference.append_rows(qkv, cache, rope, start)
        for cached in (cache.keys, cache.values):
            cached[:, : start + len(qkv)] = cached[:, : start + len(qkv)].to(dtype)
        return found

    return SimpleNamespace(**{**vars(reference), "append_rows": append_rows})


def built(source, architecture, method: str, *, packed: bool, threads: int = 2, quantizer: bool = False):
    method = parse_method(method)
    dtype = getattr(torch, method.dtype)
    weights = load_weights(
        source if packed else Rounded(source, dtype),
        architecture,
        method if packed else SimpleNamespace(**{name: getattr(method, name) for name in STORED}, dtype="float32"),
        "cpu",
        kernels=library if quantizer else reference,
        form=Packing() if packed else None,
    )
    if packed:
        return CpuLlama(weights, method, threads=threads)
    return CudaLlama(weights, method, "cpu", kernels=with_cache_of(dtype))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("method", LEAN_METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_llama_and_method_computes_what_the_reference_computes(kind, method):
    model = tiny_llama(torch.float32, intermediate_size=64, **KINDS[kind])
    source, architecture = ModelTensors(model), architecture_of(model.config.to_dict())
    expected = built(source, architecture, method, packed=False)
    native = built(source, architecture, method, packed=True)
    assert difference(native.logits(PROMPT), expected.logits(PROMPT)) < close(method)
    assert generate(native, 8) == generate(expected, 8)


def close(method: str) -> float:
    """Sums in another order differ by 1e-5; where that moves a value over the edge between two int8 codes, by more."""
    return 2e-2 if method.startswith("llm-int8") else 1e-4


class DrawnTensors:
    """Weights of any shape, each drawn from its name."""

    def __init__(self, a: Architecture):
        q, kv, n, m = a.heads * a.head_dim, a.kv_heads * a.head_dim, a.hidden_size, a.intermediate_size
        self.shapes = {"q_proj": (q, n), "k_proj": (kv, n), "v_proj": (kv, n), "o_proj": (n, q)}
        self.shapes |= {"gate_proj": (m, n), "up_proj": (m, n), "down_proj": (n, m), "embed_tokens": (a.vocab_size, n)}
        self.shapes["lm_head"] = self.shapes["embed_tokens"]
        self.other = (n,)

    def __contains__(self, name: str) -> bool:
        return True

    def get(self, name: str, device: str) -> torch.Tensor:
        shape = self.shapes.get(name.split(".")[-2], self.other)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))
        return (x / shape[1] ** 0.5 if len(shape) == 2 else 1 + x / 4).half()


UGLY = [
    (13, 7, 1, 1, 2, 3),
    (17, 31, 3, 1, 6, 101),
    (97, 101, 5, 5, 10, 61),
    (1, 1, 1, 1, 2, 2),
    (64, 40, 4, 2, 24, 259),
]


@pytest.mark.parametrize("method", LEAN_METHODS)
@pytest.mark.parametrize("shape", UGLY, ids=str)
def test_ugly_shapes(shape, method):
    hidden, inner, heads, groups, width, vocabulary = shape
    a = Architecture(
        layers=2, hidden_size=hidden, intermediate_size=inner, heads=heads, kv_heads=groups, head_dim=width,
        vocab_size=vocabulary, context=64, eps=1e-5, rope=Rope(10000.0), tied=True, qkv_bias=False, output_bias=False,
    )  # fmt: skip
    ids = [i % vocabulary for i in range(21)]
    expected = built(DrawnTensors(a), a, method, packed=False).logits(ids)
    found = [built(DrawnTensors(a), a, method, packed=True, threads=threads) for threads in (1, 3)]
    logits = [engine.logits(ids) for engine in found]
    assert torch.equal(*logits) and difference(logits[0], expected) < close(method)
    answers = [generate_from(engine, ids, 6) for engine in found]
    assert answers[0] == answers[1]


def generate_from(engine, ids: list[int], tokens: int) -> list[int]:
    generation = engine.start(ids, SamplingSettings(max_new_tokens=tokens))
    found = [generation.prefill().token_id, *(generation.step().token_id for _ in range(tokens - 1))]
    generation.close()
    return found


class Split(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_float),
        ("count", ctypes.c_int32),
        ("index", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
    ]


def split(x: torch.Tensor, threshold: float) -> tuple[Split, tuple]:
    room = (
        torch.zeros(-(-len(x) // 8) * 8, dtype=torch.int8),
        torch.zeros(len(x), dtype=torch.int32),
        torch.zeros(len(x)),
    )
    made = Split(room[0].data_ptr(), 0.0, 0, room[1].data_ptr(), room[2].data_ptr())
    library = open_library()
    library.decompose.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.POINTER(Split)]
    library.decompose(x.data_ptr(), len(x), threshold, made)
    return made, room


def activations(width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(width, generator=torch.Generator().manual_seed(seed)).half().float()
    x[width // 3], x[width // 2], x[width - 1] = 50.0, 4.69921875, -6.0  # the middle one is 4.7 in half precision
    return x


@pytest.mark.parametrize("threshold", [6.0, 4.7, 1.0, 0.0])
@pytest.mark.parametrize("width", [5, 97, 576, 1536])
def test_one_token_is_decomposed_as_bitsandbytes_does(width, threshold):
    import bitsandbytes as bnb

    x = activations(width)
    made, (codes, index, value) = split(x, threshold)
    expected, absmax, columns = bnb.functional.int8_vectorwise_quant(x.half()[None], threshold=threshold)
    columns = [] if columns is None else columns.tolist()
    assert index[: made.count].tolist() == columns and value[: made.count].tolist() == x[columns].tolist()
    assert made.absmax == absmax.item()
    # With one row bitsandbytes leaves codes in outlier columns, which its product then does not use.
    assert torch.equal(codes[:width], expected[0].index_fill(0, torch.tensor(columns, dtype=torch.int64), 0))


@pytest.mark.parametrize("threshold", [6.0, 0.5, 0.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 5), (96, 576), (50, 1531)])
def test_a_layer_is_an_exact_computation_of_the_same_operands(rows, width, threshold):
    weight = primitives.quantize_rows(torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).half())
    packed, x, out = Packing().matrix(weight), activations(width), torch.zeros(-(-rows // 8) * 8)
    made, room = split(x, threshold)
    library = open_library()
    library.multiply.argtypes = [ctypes.POINTER(Matrix), ctypes.c_void_p, ctypes.POINTER(Split), *[ctypes.c_int] * 3]
    library.multiply.argtypes += [ctypes.c_void_p]
    library.multiply(packed.matrix(), None, made, 0, len(out) // 8, 0, out.data_ptr())
    expected = primitives.int8_linear(x[None].half(), weight, threshold)[0]
    assert difference(out[:rows], expected) < 1e-5 and not out[rows:].any()
    library.multiply(packed.matrix(), x.data_ptr(), None, 0, len(out) // 8, 1, out.data_ptr())
    assert difference(out[:rows] - expected, weight.dequantized() @ x) < 1e-4


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 7), (64, 576), (9, 1531)])
def test_weights_get_bitsandbytes_codes_and_scales(rows, width):
    import bitsandbytes as bnb

    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(2)).half()
    weight[0] = 0
    weight[-1, 0] = 60000
    made = Int8Weight(torch.empty(rows, width, dtype=torch.int8), torch.empty(rows))
    quantize_rows(weight, made)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight)
    assert torch.equal(made.codes, codes) and torch.equal(made.absmax, absmax)


def test_gate_rows_and_up_rows_alternate_in_blocks():
    weight = Int8Weight(torch.arange(20, dtype=torch.int8)[:, None].contiguous(), torch.arange(20.0))
    packed = Packing().matrix(weight, paired=True)
    blocks = packed.data.view(4, 8, 4)[:, :, 0].tolist()
    assert blocks == [[*range(8)], [*range(10, 18)], [8, 9, *[0] * 6], [18, 19, *[0] * 6]]
    assert packed.absmax.tolist() == [float(n) for block in blocks for n in block]


def tiny(method: str = "llm-int8", **changes) -> CpuLlama:
    model = tiny_llama(torch.float32, intermediate_size=64, **changes)
    return built(ModelTensors(model), architecture_of(model.config.to_dict()), method, packed=True)


def test_the_threshold_moves_on_the_loaded_model():
    native = tiny()
    before = native.logits(PROMPT)
    low = native.under(replace(native.method, threshold=0.01))
    assert not torch.equal(low.logits(PROMPT), before)
    assert all(len(columns) > 10 for columns in low.outlier_columns(PROMPT))
    assert torch.equal(native.logits(PROMPT), before) and not any(native.outlier_columns(PROMPT))


@pytest.mark.parametrize("method", ["llm-int8", "int8-weight-only"])
def test_a_weight_that_is_not_a_number_stops_the_run(method):
    model = tiny_llama(torch.float32, intermediate_size=64)
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] = torch.nan
    native = built(ModelTensors(model), architecture_of(model.config.to_dict()), method, packed=True, quantizer=True)
    with pytest.raises(UserError, match="not a number"):
        generate(native, 2)


def test_what_has_no_room_never_reaches_the_library():
    native = tiny("fp16", max_position_embeddings=64)
    native.warm_up([1] * 63)  # one step less than usual: the context ends
    workspace = native.workspace(64)
    for ids in ([], [1] * 65, [259], [-1]):
        with pytest.raises(IndexError):
            workspace.read(ids, workspace.logits, every=False)
    for token, position in ((1, 64), (1, -1), (259, 3)):
        with pytest.raises(IndexError):
            workspace.step(token, position)


def test_a_matrix_may_lie_the_other_way():
    weight = torch.randn(24, 40).half()
    assert torch.equal(Packing().matrix(weight.T).data, Packing().matrix(weight.T.contiguous()).data)


def test_norms_and_biases_have_the_sizes_the_configuration_says():
    model = tiny_llama(torch.float32, intermediate_size=64)
    model.model.norm.weight.data = torch.ones(31)
    with pytest.raises(ModelUnavailable, match="model.norm.weight: 31 numbers; the configuration says 32"):
        built(ModelTensors(model), architecture_of(model.config.to_dict()), "fp16", packed=True)


def test_a_fork_ends_without_the_threads_it_does_not_have():
    native = tiny("fp16")
    expected = generate(native, 2)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # waiting for them would never end
        try:
            del native
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert generate(native, 2) == expected


def test_a_decoded_token_is_a_prefilled_token():
    native = tiny("fp16")
    tokens = generate(native, 4)
    longer = native.start(PROMPT + tokens[:3], SamplingSettings(max_new_tokens=1))
    assert longer.prefill().token_id == tokens[3]


@pytest.mark.parametrize("method", ["fp16", "int8-weight-only"])
def test_reading_by_the_decode_step_is_reading_in_one_call(method):
    engine = tiny(method)
    assert difference(engine.decode_logits(PROMPT), engine.logits(PROMPT)) < 1e-3
    with pytest.raises(Interrupted):
        engine.decode_logits(PROMPT, lambda: True)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_was_likeliest_is_known_of_every_token(temperature):
    engine, ids = tiny("fp16"), list(PROMPT)
    generation = engine.start(PROMPT, SamplingSettings(max_new_tokens=4, temperature=temperature))
    for place in range(3):
        token = generation.step() if place else generation.prefill()
        assert generation.best(token, 4) == pytest.approx(best_of(engine, ids, 4), abs=1e-3)
        ids.append(token.token_id)


def test_sampling_repeats_with_its_seed():
    native = tiny("fp16")
    drawn = [generate(native, 12, temperature=0.9, top_k=40, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_peak_is_everything_that_was_held_at_once():
    native = tiny("llm-int8")
    generation = native.start(PROMPT, SamplingSettings(max_new_tokens=4))
    generation.prefill()
    longest, cache = generation.peak_bytes, generation.kv_bytes
    generation.close()
    a, held, capacity = native.architecture, native.reserved_bytes, capacity_for(len(PROMPT) + 4, native.context)

    def buffers(rows: int) -> int:
        return native.library.llmq_workspace_bytes(native.shape, native.threads, capacity, rows, True)

    logits = 4 * -(-a.vocab_size // 8) * 8
    assert held == cache + rope_table(a, capacity, "cpu").nbytes + logits + buffers(0)
    assert cache == 2 * a.layers * a.kv_heads * capacity * a.head_dim * 2 and longest == held + buffers(len(PROMPT))
    shorter = native.start(PROMPT[:3], SamplingSettings(max_new_tokens=4))
    shorter.prefill()
    assert held < shorter.peak_bytes < longest


def test_a_prompt_can_be_given_up_between_layers():
    native, asked = tiny("fp16"), []
    generation = native.start(PROMPT, SamplingSettings())
    with pytest.raises(Interrupted):
        generation.prefill(lambda: asked.append(1) or len(asked) > 1)
    assert len(asked) == 2
    asked.clear()
    native.start(PROMPT, SamplingSettings()).prefill(lambda: bool(asked.append(1)))
    assert len(asked) == native.prompt_checks == native.architecture.layers
    assert generate(native, 4) == generate(tiny("fp16"), 4)  # nothing is left behind


@pytest.mark.parametrize("method", ["fp16", "llm-int8"])
def test_what_is_not_a_number_stops_the_run(method):
    model = tiny_llama(torch.float32, intermediate_size=64)
    model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.inf
    native = built(ModelTensors(model), architecture_of(model.config.to_dict()), method, packed=True)
    with pytest.raises(UserError, match="not a number"):
        generate(native, 2)


def test_threads_go_with_the_engine():
    def running() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    before = running()
    a = architecture_of(tiny_llama().config.to_dict())
    engine = built(DrawnTensors(a), a, "fp16", packed=True, threads=5)
    own = running() - before
    assert len(own) == 4
    del engine
    gc.collect()
    assert not own & running()


def test_engines_on_several_threads_do_not_disturb_each_other():
    engines = [tiny("fp16"), tiny("llm-int8")]
    expected = [generate(engine, 20) for engine in engines]
    found = [None, None]

    def work(i: int) -> None:
        found[i] = generate(engines[i], 20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def forget() -> None:
    for cached in (why_not_native, opened_library, open_library):
        cached.cache_clear()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def test_a_damaged_library_is_built_again_and_a_whole_one_is_not(empty_cache):
    path = build.library_path()
    made, whole = path.stat().st_mtime_ns, path.read_bytes()
    assert build.library_path() == path and path.stat().st_mtime_ns == made
    path.write_bytes(whole[: len(whole) // 2])
    time.sleep(0.01)
    assert build.library_path().read_bytes()[:4] == whole[:4] and path.stat().st_size == len(whole)
    path.with_suffix(".sha256").unlink()
    (path.parent / ".build-0123").mkdir()  # of a process that was killed
    built_again = path.stat().st_mtime_ns
    assert build.library_path().stat().st_mtime_ns > built_again
    assert {file.suffix for file in path.parent.iterdir()} == {".so", ".sha256", ".lock"}


LEAN_CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
LEAN_CONFIG |= {"num_hidden_layers": 1, "vocab_size": 9}


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-compiler", "no C compiler was found"), ("false", "could not compile")],
)
def test_without_a_working_compiler_transformers_runs_and_one_line_says_so(
    compiler, said, empty_cache, monkeypatch, caplog
):
    monkeypatch.setenv("CC", compiler)
    assert choose_engines("auto", [METHODS["fp16"], METHODS["llm-int8"]], LEAN_CONFIG, "cpu") == ["hf", "hf"]
    assert len(caplog.messages) == 1 and said in caplog.messages[0] and "slower" in caplog.messages[0]
    caplog.clear()
    assert choose_engines("auto", [METHODS["fp32"]], LEAN_CONFIG, "cpu") == ["hf"] and not caplog.messages
    with pytest.raises(BadChoice, match=said):
        choose_engines("lean", [METHODS["fp16"]], LEAN_CONFIG, "cpu")


def test_a_library_that_cannot_be_opened_is_no_library(empty_cache, monkeypatch):
    def refuse(path):
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert "cannot be opened" in why_not_native()


def test_a_compiler_may_have_arguments(empty_cache, monkeypatch):
    monkeypatch.setenv("CC", "env gcc")
    assert build.library_path().exists()


def test_a_cache_that_cannot_be_written_is_no_library(empty_cache, monkeypatch):
    (empty_cache / "cpu").write_text("in the way")
    assert "cannot be written" in why_not_native()


def test_a_library_in_a_cache_that_may_only_be_read_is_used(private_folder, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(private_folder))
    path = build.library_path()
    private_folder.chmod(0o555)
    path.parent.chmod(0o555)
    monkeypatch.setattr(build, "FileLock", lambda *_, **__: pytest.fail("a lock would have to be written"))
    assert build.library_path() == path
    path.parent.chmod(0o755)


@pytest.mark.demo
def test_fp16_chooses_the_tokens_that_transformers_chooses_in_float32(demo):
    """128 greedy tokens of five prompts; where one differs, the two likeliest are closer than 0.01."""
    from tiny_runs import key_of

    from llmq.machine.door import Machine
    from llmq.models.loading import load_tokenizer
    from llmq.models.text import encode_prompt

    prompts = ["Plan a 3-day itinerary in Paris.", "Why is the sky blue?", "Write a haiku about rain.",
               "List three uses of a paper clip.", "Explain recursion to a child."]  # fmt: skip
    tokenizer, machine = load_tokenizer(demo), Machine()
    keys = (key_of(demo, m, loop=loop) for m, loop in (("fp16", "lean"), ("fp32", "hf")))
    native, exact = (machine.pool.get(key)[0] for key in keys)
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt, context=native.context)
        chosen = generate_from(native, ids, 128)
        logits = exact.logits(ids + chosen[:-1])[len(ids) - 1 :]
        best, likeliest = logits.topk(2)
        for place, token in enumerate(chosen):
            if token != likeliest[place, 0]:
                margin = (best[place, 0] - logits[place, token]).item()
                print(f"{prompt} token {place}: margin {margin:.4f}")
                assert margin < 0.01


@pytest.mark.demo
def test_every_layer_of_a_model_is_bitsandbytes_layer(demo):
    """Each linear layer fed what it gets in bitsandbytes' model: the same outlier columns, the same output."""
    import bitsandbytes as bnb
    from tiny_runs import key_of

    from llmq.bench.setup import fixed_prompt
    from llmq.engine.loading import load_engine
    from llmq.models.opening import Model

    model = load_engine(key_of(demo, "bnb-int8")).model
    seen = []

    def check(module, inputs, output):
        x, state = inputs[0].reshape(-1, inputs[0].shape[-1]), module.state
        weight = Int8Weight(state.CB if state.CB is not None else module.weight.data, state.SCB)
        expected = set(state.idx.tolist()) if state.idx is not None else set()
        columns, y = multiplied(x.float().contiguous(), weight)
        exact = primitives.int8_linear(x, weight, 6.0)
        seen.append((columns == expected, difference(y, exact), len(expected)))

    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    ids = fixed_prompt(Model(demo), 48)
    with torch.inference_mode():
        for count in (1, 7, 48):
            model(torch.tensor([ids[:count]]))
    for hook in hooks:
        hook.remove()
    equal, wrong, columns = zip(*seen, strict=True)
    print(f"{sum(equal)} of {len(seen)} sets equal, {sum(columns)} columns, worst {max(wrong):.1e}")
    assert len(seen) == 3 * len(layers) and all(equal) and max(wrong) < 1e-5 and any(columns)


class Batch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "codes", "absmax", "outliers", "index")]
    _fields_ += [(name, ctypes.c_int32) for name in ("rows", "stride", "code_stride", "count")]


def multiplied(x: torch.Tensor, weight: Int8Weight) -> tuple[set[int], torch.Tensor]:
    """The outlier columns that the library finds in several rows, and its product."""
    library, packed, (rows, width) = open_library(), Packing().matrix(weight), x.shape
    padded, outputs = -(-width // 8) * 8, -(-len(weight.codes) // 8) * 8
    library.survey.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_void_p]
    library.survey.restype = ctypes.c_float
    library.encode.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 2, *[ctypes.c_float] * 2, *[ctypes.c_void_p] * 2]
    x, marks, codes = x.clone(), torch.zeros(padded, dtype=torch.uint8), torch.zeros(rows, padded, dtype=torch.int8)
    absmax = torch.tensor([library.survey(row.data_ptr(), width, 6.0, marks.data_ptr()) for row in x])
    for row, place, peak in zip(x, codes, absmax.tolist(), strict=True):
        library.encode(row.data_ptr(), width, padded, peak, 0.0, marks.data_ptr(), place.data_ptr())
    columns = marks.nonzero().view(-1)
    assert torch.equal(codes[:, :width], primitives.split_rows(x.half(), 6.0).codes)
    outliers, index = x[:, columns].contiguous(), columns.int()
    parts = [t.data_ptr() for t in (x, codes, absmax, outliers, index)]
    batch = Batch(*parts, rows, len(columns), padded, len(columns))
    out, panel = torch.zeros(rows, outputs), torch.zeros(16 * width)
    library.multiply_rows.argtypes = [ctypes.POINTER(Matrix), ctypes.POINTER(Batch), *[ctypes.c_int] * 3]
    library.multiply_rows.argtypes += [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    library.multiply_rows(packed.matrix(), batch, 0, outputs // 8, 0, out.data_ptr(), outputs, panel.data_ptr())
    return set(columns.tolist()), out[:, : len(weight.codes)]


@pytest.mark.parametrize("schedule", ["interleave", "in-turn"])
def test_a_comparison_on_a_cpu_runs_through_the_library(schedule, tiny_folder):
    from tiny_runs import comparison, reasons

    from llmq.events import Finished, Loaded, Memory
    from llmq.machine.door import Machine

    events = list(Machine().run(comparison(tiny_folder, "fp16,llm-int8,int8-weight-only", schedule=schedule)))
    assert {event.engine for event in events if isinstance(event, Loaded)} == {"lean"}
    assert set(reasons(events).values()) == {"length"}
    held = {name: sum(parts.values()) for e in events if isinstance(e, Memory) for name, parts in e.ledger.items()}
    finished = [event for event in events if isinstance(event, Finished)]
    assert all(event.peak_bytes > event.kv_bytes > 0 for event in finished)
    assert all(event.peak_bytes >= held.get(event.contestant, 0) for event in finished)
