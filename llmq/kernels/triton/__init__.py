"""The operations of `kernels.reference` in Triton. No `tl.dot` in any decode kernel, so a T4 (sm_75) runs them too."""

from llmq.kernels.triton.attention import attend
from llmq.kernels.triton.choice import likeliest
from llmq.kernels.triton.matrix import gated_rows, linear_rows, scores
from llmq.kernels.triton.norm import norm, norm_split, split
from llmq.kernels.triton.product import product, products
from llmq.kernels.triton.rows import append_rows, gate_rows, norm_rows, plain_rows
from llmq.kernels.triton.weights import embed, quantize_rows

__all__ = [
    "append_rows",
    "attend",
    "embed",
    "gate_rows",
    "gated_rows",
    "likeliest",
    "linear_rows",
    "norm",
    "norm_rows",
    "norm_split",
    "plain_rows",
    "product",
    "products",
    "quantize_rows",
    "scores",
    "split",
]
