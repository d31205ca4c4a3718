"""Compile every kernel for GPUs that are not here. A program of its own: a process that interprets cannot compile.

Prints one line a kernel and capability; ends with an error when one does not compile.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmq.kernels.triton import attention, by_row, choice, matrix, norm, product, rows, weights  # noqa: E402,F401
from llmq.kernels.triton.launch import UNFUSED  # noqa: E402
from llmq.kernels.triton.tiles import rows_tile  # noqa: E402

MODULES = {name: sys.modules[f"llmq.kernels.triton.{name}"] for name in (
    "attention", "by_row", "choice", "matrix", "norm", "product", "rows", "weights")}  # fmt: skip
DECODE, TENSOR_CORES = (75, 80, 90), (80, 90)  # int8 `tl.dot` does not compile for sm_75
SHARED = {75: 65_536, 80: 166_912, 90: 232_448}  # bytes of shared memory that a program may have
ALIGNED = {"width", "n_out", "n_out2", "n_out3"}  # multiples of 16 in every model the lean loop takes
F16, F32, F64, I8, I32, I64 = "*fp16", "*fp32", "*fp64", "*i8", "*i32", "*i64"
SPLIT = {"codes_ptr": I8, "absmax_ptr": F32, "count_ptr": I32, "index_ptr": I32, "value_ptr": F32}
NOTES = {"tally_ptr": I32, "threshold": "fp32"}
PRODUCT = {"w_ptr": F16, "out_ptr": F16, "n_out": "i32", "width": "i32"}
PRODUCT8 = {"x_ptr": I32, "x_absmax_ptr": F32, "packed_ptr": I32, "threshold": "fp32"} | SPLIT | PRODUCT
PRODUCT8 = {name: kind for name, kind in PRODUCT8.items() if name != "codes_ptr"} | {"w_ptr": I8}
NOTES_OUT = {"tally_ptr": I32, "out_index_ptr": I32, "out_value_ptr": F32}
SEVERAL = {"x_absmax_ptr": F32, "width": "i32"} | SPLIT | {"codes_ptr": I32}
for _n in ("", "2", "3"):
    SEVERAL |= {f"w{_n}_ptr": I8, f"packed{_n}_ptr": I32, f"absmax{_n}_ptr": F32, f"out{_n}_ptr": F16}
    SEVERAL |= {f"n_out{_n}": "i32"}
PART = dict.fromkeys(("heads", "groups", "width", "capacity", "parts", "part"), "i32") | {"scale": "fp32"}
PART |= {"qkv_ptr": F16, "keys_ptr": F16, "values_ptr": F16, "rope_ptr": F32, "position_ptr": I64, "out_ptr": F16}
PART |= {"sums_ptr": F32, "peaks_ptr": F32, "weights_ptr": F32, "arrived_ptr": I32}
NORM = {"x_ptr": F16, "gain_ptr": F16, "out_ptr": F16, "width": "i32", "eps": "fp32", "threshold": "fp32"}
VECTOR = {"BLOCK": 4096, "SLICE": 128, "NORM": True, "SPLIT": True, "EMPTIED": 0}
ROWS8 = {"x_ptr": F16, "codes_ptr": I8, "x_absmax_ptr": F32, "w_ptr": I8, "absmax_ptr": F32, "columns_ptr": I32}
ROWS8 |= {"count_ptr": I32, "xo_ptr": F16, "wo_ptr": F16, "out_ptr": F16, "rows": "i32", "n_out": "i32"}
NOTED = {"x_ptr": F16, "marks_ptr": I8, "absmax_ptr": F32, "width": "i32"}
BY_ROW = {"codes_ptr": I8, "absmax_ptr": F32, "columns_ptr": I32, "marks_ptr": I32, "count_ptr": I32}
OWN = {"OUTLIERS": by_row.OUTLIERS, "BIAS": False}
PLAIN = {"ROWS": 2, "COLUMNS": 2048, "BIAS": False, "RESIDUAL": False}
DOT4 = {"ROWS": 2, "COLUMNS": 512, "OUTLIERS": 32, "DP4A": True, "BIAS": False, "RESIDUAL": False}


def constants_of(tile) -> dict:
    """What a kernel is compiled with, of a tile of `by_row`; 'stages' and 'warps' are options."""
    return {name if name in ("stages", "warps") else name.upper(): size for name, size in tile._asdict().items()}


# (module, kernel, argument types, constants, warps, compute capabilities); arguments in neither are None
KERNELS = [
    ("norm", "_vector", NORM, VECTOR | {"SPLIT": False}, 8, DECODE),
    ("norm", "_vector", NORM | SPLIT | {"empty_ptr": I32}, VECTOR | {"EMPTIED": 128}, 8, DECODE),
    ("norm", "_vector", {"x_ptr": F16, "width": "i32", "threshold": "fp32"} | SPLIT,
     VECTOR | {"BLOCK": 16384, "NORM": False}, 8, DECODE),
    ("product", "_plain", PRODUCT | {"x_ptr": F16}, PLAIN | {"INT8": False, "GATED": False}, 8, DECODE),
    ("product", "_plain", PRODUCT | NOTES | {"index_ptr": I32, "value_ptr": F32, "x_ptr": F16, "w_ptr": I8,
     "absmax_ptr": F32}, PLAIN | {"INT8": True, "GATED": True, "NOTE": True}, 4, DECODE),
    ("product", "_split", PRODUCT8, DOT4 | {"GATED": False}, 1, DECODE),
    ("product", "_split", PRODUCT8 | NOTES_OUT, DOT4 | {"GATED": True, "NOTE": True}, 4, DECODE),
    ("product", "_split", PRODUCT8 | {"x_ptr": F16, "x_absmax_ptr": I32, "residual_ptr": F16},
     DOT4 | {"ROWS": 8, "RESIDUAL": True, "NOTED": True}, 2, DECODE),
    ("product", "_split", PRODUCT8 | {"x_ptr": I8, "packed_ptr": I8}, DOT4 | {"GATED": False, "DP4A": False}, 1, (90,)),
    ("product", "_split_several", SEVERAL, DOT4, 1, DECODE),
    ("attention", "_part", PART | NOTES | {"index_ptr": I32, "value_ptr": F32}, {"HALF": 64, "WIDTH": 128, "BLOCK": 32,
     "COMBINED": 16, "NOTE": True}, 2, DECODE),
    ("attention", "_part", PART | {"part_ptr": I32}, {"HALF": 64, "WIDTH": 128, "BLOCK": 32, "COMBINED": 16,
     "SEVERAL": True, "OVERLAP": False}, 2, DECODE),
    ("choice", "_part", {"logits_ptr": F32, "peaks_ptr": F32, "places_ptr": I32, "sums_ptr": F32, "vocabulary": "i32"},
     {"BLOCK": 1024}, 4, DECODE),
    ("choice", "_settle", {"peaks_ptr": F32, "places_ptr": I32, "sums_ptr": F32, "token_ptr": I64, "chosen_ptr": F64,
     "parts": "i32"}, {"PARTS": 32}, 4, DECODE),
    ("weights", "_embed", {"table_ptr": I8, "absmax_ptr": F32, "tokens_ptr": I64, "out_ptr": F16, "width": "i32"},
     {"BLOCK": 1024, "INT8": True}, 4, DECODE),
    ("weights", "_quantize", {"w_ptr": F16, "codes_ptr": I8, "absmax_ptr": F32, "width": "i32"}, {"BLOCK": 2048}, 8,
     DECODE),
    ("rows", "_append", {"qkv_ptr": F16, "rope_ptr": F32, "queries_ptr": F16, "keys_ptr": F16, "values_ptr": F16}
     | dict.fromkeys(("rows", "heads", "groups", "width", "capacity", "start"), "i32"), {"HEADS": 16, "HALF": 64}, 4,
     DECODE),
    ("rows", "_gate", {"x_ptr": F16, "out_ptr": F16, "marks_ptr": I8, "absmax_ptr": F32, "used_ptr": I32,
     "inner": "i32", "threshold": "fp32"}, {"BLOCK": 2048, "NOTE": True}, 8, DECODE),
    ("rows", "_norm", NORM | {"marks_ptr": I8, "absmax_ptr": F32, "used_ptr": I32}, {"BLOCK": 4096, "NOTE": True}, 8,
     DECODE),
    ("rows", "_survey", NOTED | {"threshold": "fp32"}, {"BLOCK": 4096}, 4, DECODE),
    ("rows", "_code", NOTED | {"codes_ptr": I8, "columns_ptr": I32, "count_ptr": I32, "rows": "i32"},
     {"BLOCK": 4096, "WHOLE": 16384}, 8, DECODE),
    ("rows", "_gather", {"x_ptr": F16, "w_ptr": I8, "columns_ptr": I32, "count_ptr": I32, "xo_ptr": F16,
     "wo_ptr": F16, "rows": "i32", "n_out": "i32", "width": "i32"},
     {"ROWS": 16, "GATHERED": 128, "OUTLIERS": 32}, 4, DECODE),
    ("matrix", "_codes_linear", {"x_ptr": F16, "w_ptr": I8, "absmax_ptr": F32, "out_ptr": F16, "rows": "i32",
     "n_out": "i32", "width": "i32"}, {"ROWS": 128, "OUTPUTS": 128, "INPUTS": 64, "NEIGHBOURS": 8, "BIAS": False,
     "RESIDUAL": True}, 8, TENSOR_CORES),
    ("matrix", "_int8_linear", ROWS8 | {"width": "i32"}, {"ROWS": 128, "OUTPUTS": 256, "INPUTS": 128, "OUTLIERS": 32,
     "GATHERED": 128, "NEIGHBOURS": 8, "BIAS": False, "RESIDUAL": True}, 8, TENSOR_CORES),
    ("by_row", "_norm", NORM | BY_ROW, {"BLOCK": 4096}, 8, DECODE),
    ("by_row", "_plain", {"x_ptr": F16, "width": "i32", "threshold": "fp32"} | BY_ROW, {"BLOCK": 4096, "BLOCKS": 3}, 16,
     DECODE),
    *(("by_row", "_product", ROWS8 | {"sums_ptr": I32, "width": "i32", "threshold": "fp32"},
       OWN | constants_of(rows_tile(height, n_out, width, gated)) | {"GATED": gated, "RESIDUAL": not gated}, 4,
       TENSOR_CORES)
      for height, n_out, width, gated in ((8, 12288, 4096, False), (64, 11008, 4096, True), (64, 4096, 11008, False))),
]  # fmt: skip


def compiled(kernel, types: dict, constants: dict, warps: int, capability: int):
    """What Triton makes of the kernel."""
    constants = {
        "USED": "used_ptr" in types,
        "PTX": True,
        "NOTE": False,
        "NOTED": False,
        "SEVERAL": False,
        "OVERLAP": capability >= 90,
    } | constants
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(i,): constants.get(name) for i, name in enumerate(names) if name not in types},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name, "").startswith("*") or (name in ALIGNED and name in types)
        },
    )
    options = {"num_warps": constants.get("warps", warps), "num_stages": constants.get("stages", 3)} | UNFUSED
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made


def sums(ttgir: str) -> list[str]:
    """How many neighbours of a sum or maximum over whole vectors one thread has: 'each8' for 8."""
    layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[(\d+)\]", ttgir))
    found = re.findall(r"\}\) : \(tensor<\d+xf32, (#\w+)>\)", ttgir)
    return sorted({f"each{layouts[one]}" for one in found if one in layouts})


def main() -> None:
    for module, name, types, constants, warps, capabilities in KERNELS:
        for capability in capabilities:
            made = compiled(getattr(MODULES[module], name), types, constants, warps, capability)
            assert made.metadata.shared <= SHARED[capability], (name, made.metadata.shared)
            ptx = made.asm["ptx"]
            marks = [mark for mark in ("dp4a", "griddepcontrol.wait", "wgmma.mma", "mma.sync") if mark in ptx]
            marks += ["unpacked"] if constants.get("DP4A") is False else []
            marks += sums(made.asm["ttgir"]) if name in ("_vector", "_norm") else []
            print(f"{module}.{name} sm_{capability} {' '.join(marks)}")


if __name__ == "__main__":
    main()
