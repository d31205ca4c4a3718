"""REPORT's arithmetic: what its text works out comes out, from the formulas as they are printed there."""

from __future__ import annotations

import math

import pytest
import torch
from test_documents import REPORT, rows_of, stored

from llmq.inspect.caching import Operations
from llmq.models.opening import describe_model
from llmq.scores import t_quantile

TEXT = " ".join(REPORT.split())
D, F, LAYERS, HEADS = 4096, 11008, 32, 32  # of Llama-2-7B
KV = 2 * D * LAYERS * 2  # bytes of a token's keys and values in FP16

SUMS = {
    "training took 21 days": ((1.4e12 / (2048 * 380)) / 86400, ".1f", "s = {} days"),
    "keys and values of a token": (KV, ",", "that is {} bytes per token for Llama-2-7B"),
    "of the demo model": (2 * 3 * 64 * 30 * 2, ",", "and {} for the demo model"),
    "tokens that weigh as much as 7B": (13_476_831_232 / KV, ",.0f", "takes {} tokens"),
    "a step with an outlier": (60 / 127, ".2f", "$60/127 \\approx {}$"),
    "linear layers of a token": (LAYERS * (8 * D * D + 6 * D * F) / 1e9, ".2f", "take {} billion operations a token"),
    "attention of a token": (LAYERS * 4 * 4096 * D / 1e9, ".2f", "attention at 4,096 tokens adds {} billion"),
    "activations of 2,048 tokens": ((2048 * 2 * (8 * D + 5 * F) + 8 * 32000) / 1e9, ".3f", "logits are {} GB"),
    "reserved": (20 * 4096 * KV / 1e9, ".1f", "bytes = {} GB, of which 12 % hold tokens"),
    "paged": (20 * math.ceil(500 / 16) * 16 * KV / 1e9, ".1f", "bytes = {} GB, of which 98 % do"),
    "greedy": (0.6 * 0.4, ".2f", "0.6 \\cdot 0.4 = {}$"),
    "beam": (0.4 * 0.9, ".2f", "0.4 \\cdot 0.9 = {}$"),
    "zero-point": (round(0.5 / (1.3 / 255)), "d", "\\mathrm{{rn}}(0.5 / 0.0051) = {}$"),
    "int32": ((2**31 - 1) // 127**2, ",", "safe up to {} terms"),
    "T4 FP16": (13_476_831_232 / 2**30, ".2f", "13,476,831,232 bytes are {} GiB"),
    "T4 int8": (7_006_265_344 / 2**30, ".2f", "7,006,265,344 bytes are {} GiB"),
    "T4 speeds": (6.77 / 16.58, ".2f", "The speed ratio, {}x,"),
    "T4 perplexities": (100 * (8.25 / 8.12 - 1), ".1f", "| 8.12 | 8.25 | +{} %"),
    "gpt-fast": (155.58 / 104.9, ".2f", "the gain is {}x, not 2x"),
    "1B megakernel": (1.236e9 * 2 / 979.51e-6 / 1e12, ".2f", "in 979.51 µs are {} TB/s"),
    "the embedding of the demo model": (100 * 49152 * 576 / 134_515_008, ".0f", "holds {} % of the parameters"),
    "positions of 64 windows": (64 * 511, ",", "average over {} positions"),
    "t of 8 windows": (t_quantile(7), ".2f", "({} for eight windows"),
    "t of 64 windows": (t_quantile(63), ".2f", "{} for 64)"),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_comes_out_as_it_is_told(name):
    value, form, said = SUMS[name]
    assert said.format(format(value, form)) in TEXT


def test_the_table_of_operations_is_the_formula_that_is_counted():
    """Rows new to the model meet every weight; each pair of a row and a token two products of width d."""
    operations = Operations.of(describe_model("llama-2-7b-chat").shape, HEADS, D // HEADS)
    head = 2 * operations.head
    for tokens in (1, 100, 4096):
        cached = LAYERS * (8 * D * D + 4 * tokens * D + 6 * D * F)
        whole = LAYERS * (8 * tokens * D * D + 4 * tokens**2 * D + 6 * tokens * D * F)
        assert (operations.of_token(tokens, 1), operations.of_token(tokens, tokens)) == (cached + head, whole + head)
    for row in ("| $8 d^2$ | $8 s d^2$ |", "| $4 s d$ | $4 s^2 d$ |", "| $6 d f$ | $6 s d f$ |"):
        assert row in REPORT


def test_flash_attentions_update_is_softmax():
    """m, l and the output, tile by tile, as section 4 has them."""
    scores, values = torch.randn(12, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    m, sums, out = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(5)
    for s, v in zip(scores.split(4), values.split(4), strict=True):
        new = torch.maximum(m, s.max())
        total = (m - new).exp() * sums + (s - new).exp().sum()
        out = ((m - new).exp() * sums * out + (s - new).exp() @ v) / total
        m, sums = new, total
    torch.testing.assert_close(out, scores.softmax(0) @ values)
    assert "o' = \\frac{e^{m - m'} \\ell\\, o + \\sum_j e^{S_j - m'} V_j}{\\ell'}" in REPORT


def test_norms_and_rotations_have_the_property_that_is_told():
    """LayerNorm as PyTorch's; a rotated dot product depends on the distance alone; d_h terms have variance d_h."""
    x = torch.randn(16, dtype=torch.float64)
    by_hand = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()
    torch.testing.assert_close(by_hand, torch.nn.functional.layer_norm(x, (16,), eps=1e-5))

    def rotated(pairs: torch.Tensor, place: int) -> torch.Tensor:
        angles = place * 10000 ** (-2 * torch.arange(8, dtype=torch.float64) / 16)
        even, odd = pairs[::2], pairs[1::2]
        return torch.stack((even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()), 1)

    y = torch.randn(16, dtype=torch.float64)
    near, far = ((rotated(x, 3 + at) * rotated(y, 10 + at)).sum() for at in (0, 5000))
    torch.testing.assert_close(near, far)
    products = (torch.randn(20_000, 64) * torch.randn(20_000, 64)).sum(1)
    assert products.var().item() == pytest.approx(64, rel=0.05)


def test_berts_scores_are_the_means_of_its_tasks():
    """As their source prints both."""
    for name, single in {
        "83.06": (57.27, 93.12, 88.36, 89.09, 89.72, 84.91, 91.58, 70.40),
        "71.03": (54.74, 92.55, 88.53, 81.02, 83.81, 50.31, 52.32, 64.98),
        "70.25": (56.70, 92.43, 86.98, 82.87, 84.70, 52.80, 52.44, 53.07),
        "83.23": (58.63, 92.55, 88.74, 89.05, 89.72, 84.58, 91.43, 71.12),
    }.items():
        assert f"{sum(single) / 8:.2f}" == name and f"| {name} |" in REPORT


def test_sentences_that_a_mark_cannot_hold():
    """Of two figures of one row, or in another unit."""
    stages = {(row["method"], row["case"]): row for row in stored("gpu-7b-stages")["results"]}
    case = "4096x4096 rows=1 outliers=0"
    own, fp16 = stages["bnb-int8", case], stages["fp16", case]
    said = f"of the {own['seconds'] * 1e6:.0f} µs of a 4,096 × 4,096 layer at one row its kernels take "
    said += f"{own['kernel_seconds'] * 1e6:.1f}, where FP16's take {fp16['kernel_seconds'] * 1e6:.1f} of "
    assert said + f"{fp16['seconds'] * 1e6:.1f}" in TEXT
    rows = stored("gpu-7b-batch-compiled")["results"]
    off = {(row["method"], row["batch"]): row["predicted_bytes"] / row["peak_bytes"] - 1 for row in rows}
    assert max(map(abs, off.values())) < 0.07 and "within 7 % of the measured peak" in TEXT
    high = " and ".join(f"{100 * off[name, 64]:.0f}" for name in ("fp16", "llm-int8"))
    assert f"at 64 sequences they are {high} % high" in TEXT
    eager = [row for name in ("gpu-7b", "gpu-demo") for row in rows_of(name).values()]
    widths = sorted((row["tokens_per_second_spread"], row["method"]) for row in eager)
    assert f"spread by {100 * widths[0][0]:.0f} to {100 * widths[-1][0]:.0f} %" in TEXT
    assert {method for _, method in widths[-2:]} == {"fp16"}
    bnb = rows_of("gpu-7b")["bnb-int8"]
    assert f"{100 * (bnb['allocated_bytes'] / bnb['predicted_bytes'] - 1):.1f} % more, which the library keeps" in TEXT
    speeds, kls = rows_of("gpu-7b-lean"), rows_of("gpu-methods-quality")
    behind = 1 - speeds["int8-weight-only"]["tokens_per_second"] / speeds["llm-int8"]["tokens_per_second"]
    assert f"int8 *weights alone* are within {math.ceil(100 * behind)} % of LLM.int8()'s speed" in TEXT
    assert kls["llm-int8"]["kl_to_fp16"] > 6 * kls["int8-weight-only"]["kl_to_fp16"]
    times = {"llm-int8": [], "int8-weight-only": []}  # FP16's, at 64, 300 and 512 tokens and of LLM.int8() at 2,048
    for length in ("-64", "-300", "-512", ""):
        seconds = {row["method"]: row["seconds"] for row in stored(f"gpu-7b-prefill{length}")["results"]}
        for method, found in times.items():
            found += [seconds[method] / seconds["fp16"]] if method in seconds else []
    low, high = min(times["llm-int8"]), max(times["llm-int8"])
    assert f"it takes [{low:.1f} to {high:.1f} times FP16's time]" in TEXT
    assert 1.75 < max(w / i for w, i in zip(times["int8-weight-only"], times["llm-int8"], strict=False)) < 2
    assert "and weight-only up to twice that" in TEXT
    assert [round(found) for found in times["int8-weight-only"][1:]] == [2, 2]
    assert "takes twice as long at 300 tokens and more" in TEXT
    assert f"reads 300 tokens {100 * (times['llm-int8'][1] - 1):.0f} % slower than FP16" in TEXT
    assert f"and 512 tokens {100 * (times['llm-int8'][2] - 1):.0f} % slower" in TEXT
    lost = [row for row in stored("gpu-amplifying-507")["results"] if row["method"] == "llm-int8"]
    assert f"loses {lost[1]['perplexity'] / lost[0]['perplexity'] - 1:.0%} perplexity".replace("%", " %") in TEXT


def test_what_is_said_of_sizes_and_prototypes():
    def share(name: str, method: str) -> float:
        sizes = {row["method"]: row["weight_bytes"] + row["scale_bytes"] for row in stored(name)["results"]}
        return 100 * sizes[method] / sizes["fp16"]

    whole, head, demo = share("gpu-7b-head", "llm-int8"), share("gpu-7b-head", "llm-int8-head"), "gpu-demo-lean"
    assert f"is really {whole:.0f} % of LLaMA-2-7B's FP16 weights" in TEXT and f"brings it to {head:.1f} %" in TEXT
    assert f"save {100 - share(demo, 'llm-int8'):.0f} % of the weights' memory" in TEXT
    assert f"**Memory.** {whole:.0f} % of FP16's weights at 7B, {share(demo, 'llm-int8'):.0f} % with the demo" in TEXT
    kernels = stored("gpu-kernels")
    square = [row for row in kernels["products"] if (row["outputs"], row["inputs"]) == (4096, 4096)]
    best = {row["arithmetic"]: row["microseconds"] for row in square if row["dependent_launch"]}
    int8 = [value for name, value in best.items() if name.startswith("int8")]
    assert f"product in {sorted(int8)[1]:.1f} µs instead of {min(int8):.1f}" in TEXT
    lists: dict[str, list[float]] = {}
    for row in kernels["splits"]:
        lists.setdefault(row["list"], []).append(row["microseconds"])
    assert f"({lists['prefix sum'][-1]:.2f} µs instead of {lists['atomic counter'][-1]:.2f} for 11,008 values)" in TEXT
    more = [a - b for a, b in zip(lists["atomic counter"], lists["none"], strict=True)]
    assert f"costs {min(more):.1f} to {max(more):.1f} µs a vector more than none" in TEXT


def test_what_is_said_of_ablation_and_amplifying():
    rows = rows_of("gpu-ablation")
    fp32, weights, activations = (rows[name]["perplexity"] for name in ("fp32", "absmax-w8a32", "absmax-w32a8"))
    said = f"weights alone cost {weights - fp32:.1f} of perplexity, 8-bit activations alone {activations - fp32:.0f}."
    assert said in TEXT

    def lost(name: str, method: str) -> float:
        before, *_, after = (row["perplexity"] for row in stored(name)["results"] if row["method"] == method)
        return 100 * (after / before - 1)

    methods = "gpu-amplifying-methods"
    groups, a_row = lost(methods, "groupwise"), lost(methods, "vectorwise")
    assert f"LLM.int8() loses {lost(methods, 'llm-int8'):.0f} %, one scale a group {groups:.0f} %" in TEXT
    assert 20 <= a_row < 25 and "one scale a row a fifth" in TEXT
    assert abs(lost(methods, "fp8")) < 1 and lost("gpu-amplifying-507", "llm-int8@outlier_weights=16") < 0.1
    assert f"the perplexity hides that ({lost('gpu-amplifying', 'llm-int8'):.1f} % more)" in TEXT
    kls = {(row["factor"], row["method"]): row["kl_to_fp16"] for row in stored("gpu-amplifying")["results"]}
    assert kls[64, "llm-int8"] > kls[1, "vectorwise"]
    quality = [row for name in ("cpu-quality", "gpu-methods-quality") for row in stored(name)["results"]]
    int8 = [row for row in quality if row["method"] in ("llm-int8", "bnb-int8")]
    assert len(int8) == 3 and all(row["perplexity_change_interval"][0] > 0 for row in int8)
    low, high = rows_of("cpu-quality")["llm-int8"]["perplexity_change_interval"]
    assert f"1.4 % perplexity ({100 * low:.1f} to {100 * high:.1f}, [in pairs]" in TEXT
    kl = {row["method"]: row["kl_to_fp16"] for row in quality}
    nearer = [name for name in ("smoothquant@auto", "groupwise", "int8-weight-only") if kl[name] < kl["llm-int8"]]
    rounded = stored("cpu-rounded-cache")["results"][1]
    assert len(nearer) == 3 and 3 * rounded["kl_to_fp16"] < kl["int8-weight-only"]
    peers = stored("cpu-peers")
    names = ("bytes_per_second", "bytes_per_second_min", "bytes_per_second_max")
    read, lowest, highest = (f"{peers[f'read_bandwidth_{name}'] / 1e9:.0f}" for name in names)
    assert f"of which the median is {read} GB/s, the lowest {lowest} and the highest {highest}" in TEXT
    assert peers["conditions"]["cpu_capability"] in TEXT
    ours = [row for row in peers["results"] if not row["method"].startswith("llama.cpp")]
    widest = max(row[f"{name}_spread"] for row in ours for name in ("tokens_per_second", "decode_ratio"))
    assert f"up to {100 * widest:.0f} % for our methods" in TEXT
