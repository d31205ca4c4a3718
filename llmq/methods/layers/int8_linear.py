"""Layers over int8 codes, for models that run through transformers."""

from __future__ import annotations

import torch
from torch import nn

from llmq.errors import BadChoice
from llmq.kernels.backend import current, kernels_for, quantizer_for
from llmq.kernels.buffers import Noting
from llmq.kernels.primitives import Int8Weight, own_outliers
from llmq.kernels.reference import linear_by_row
from llmq.methods.swap import without_hooks


class Int8Linear(nn.Linear):
    """`weight`: int8 (out, in); `absmax`: float32 (out,), no buffer, so that bytes of weights and of scales stay apart.
    `threshold` None keeps the activations in 16 bit. `by_row`: each row has outliers of its own. `outlier_marks`: int8
    (in,), 1 at the columns that the last call multiplied in 16 bit, for a row at least.

    A subclass of `nn.Linear`, so that hooks find it among the linear layers.
    """

    by_row = False

    def __init__(self, weight: Int8Weight, bias: nn.Parameter | None, threshold: float | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.codes, requires_grad=False)
        self.bias, self.absmax, self.threshold = bias, weight.absmax, threshold
        self.outlier_marks: torch.Tensor | None = None
        self._kernels, _ = kernels_for(str(weight.codes.device))

    @classmethod
    def over(cls, linear: nn.Linear, threshold: float | None) -> Int8Linear:
        """The codes of `linear`: its own where it has them, else made on its device."""
        return cls(int8_weight(linear.weight), linear.bias, threshold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out); the rows of one call pool their outlier columns, as in bitsandbytes, unless
        `by_row`."""
        if not x.is_floating_point():  # some models cast what comes to the type of the weight
            raise BadChoice(
                "this model casts activations to a weight's type, which is int8 here: choose another method"
            )
        rows = x.reshape(-1, self.in_features).contiguous()
        weight = Int8Weight(self.weight.data, self.absmax)
        self.outlier_marks = outlier_marks = torch.zeros(self.in_features, dtype=torch.int8, device=x.device)
        with current(str(x.device)):
            if self.by_row:
                y = linear_by_row(rows, weight, self.bias, self.threshold, outlier_marks)
            else:
                prepared = self._kernels.plain_rows(rows, Noting(self.threshold, outlier_marks))
                y = self._kernels.linear_rows(prepared, weight, bias=self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class ExactOutliersLinear(Int8Linear):
    """Outlier columns meet the 16-bit weights, `exact` (out, in), as in equation 8 of the paper: what rounding changed
    in those columns of the weight is added back. `exact` is a buffer: it is stored, and it is not what is converted."""

    @classmethod
    def over(cls, linear: nn.Linear, threshold: float | None) -> ExactOutliersLinear:
        if linear.weight.dtype == torch.int8:
            raise BadChoice("outlier_weights=16 needs weights of 16 bit, and this checkpoint holds int8: choose 8")
        made = super().over(linear, threshold)
        made.register_buffer("exact", linear.weight.data)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y, columns = super().forward(x), self.outlier_marks.nonzero().view(-1)
        rounded = self.weight[:, columns] * (self.absmax / 127)[:, None]
        lost, outliers = self.exact[:, columns].float() - rounded, x[..., columns]
        if self.by_row:
            return (y + own_outliers(outliers, self.threshold).double() @ lost.double().T).to(y.dtype)
        return (y + outliers.float() @ lost.T).to(y.dtype)


class Int8Embedding:
    """A table of int8 rows, each with its scale. `weight`: int8 (vocabulary, width), `absmax`: float32 (vocabulary,);
    a tied head has the same two. Mixed in before the embedding's own class, which sees the rows that are looked up, in
    16 bit, as its whole table: so whatever it does besides (a scale, a norm) is done."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)."""
        codes, padding = self._parameters["weight"], self.padding_idx
        rows = (codes[ids] * (self.absmax[ids] / 127)[..., None]).to(self.dtype)
        self._parameters["weight"], self.padding_idx = rows.view(-1, codes.shape[1]), None
        try:
            return super().forward(torch.arange(ids.numel(), device=ids.device).view(ids.shape))
        finally:
            self._parameters["weight"], self.padding_idx = codes, padding


def int8_weight(weight: nn.Parameter) -> Int8Weight:
    """Its own codes and scales where it has them, as out of an int8 checkpoint, else made on its device."""
    w = weight.data
    if w.dtype == torch.int8:
        return Int8Weight(w, weight.SCB.float().to(w.device))
    made = Int8Weight(torch.empty_like(w, dtype=torch.int8), torch.empty(w.shape[0], device=w.device))
    quantizer_for(str(w.device))(w, made)
    return made


def convert_ends_(model: nn.Module, threshold: float | None) -> None:
    """Embedding and head of `model` in int8; one table where they are tied. Raises BadChoice where they are no such."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with without_hooks(embedding), without_hooks(head, model.get_output_embeddings):
        _convert_ends_(model, embedding, head, threshold)


def _convert_ends_(model: nn.Module, embedding: nn.Module, head: nn.Module, threshold: float | None) -> None:
    plain = isinstance(embedding, nn.Embedding) and embedding.max_norm is None
    if not plain or type(head) not in (nn.Linear, Int8Linear):
        raise BadChoice(f"the embedding and head of {type(model).__name__} cannot be int8; choose llm-int8")
    tied = embedding.weight is head.weight
    made = head if isinstance(head, Int8Linear) else Int8Linear.over(head, threshold)
    model.set_output_embeddings(made)
    table = Int8Weight(made.weight, made.absmax) if tied else int8_weight(embedding.weight)
    ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)[-8:].flip(0)
    before, embedding.dtype = embedding(ids), embedding.weight.dtype
    embedding.weight = made.weight if tied else nn.Parameter(table.codes, requires_grad=False)
    embedding.absmax, own = table.absmax, type(embedding)
    embedding.__class__ = type(f"Int8{own.__name__}", (Int8Embedding, own), {})
    if ((embedding(ids) - before).abs() > 0.02 * before.abs().amax(-1, keepdim=True)).any():
        raise BadChoice(f"the embedding of {type(model).__name__} does more than look up rows; choose llm-int8")
