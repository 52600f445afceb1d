"""Weighted operators in the glue: which of their operands is the weight, and which rows of which parameter it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hatify.gates import Value
from hatify.gates.layers import Weighted
from hatify.gates.rules import Call
from hatify.gates.value import Part

CONV = {f"conv{k}d": k for k in (1, 2, 3)}
CONV_TRANSPOSE = {f"conv_transpose{k}d": k for k in (1, 2, 3)}
GROUPED = {"_grouped_mm", "grouped_mm"}
"""Rows of tokens, sorted by expert, times the matrix of their expert: ``(rows, in) @ (experts, in, out)``."""


@dataclass(frozen=True, eq=False)
class WeightedCall:
    """A functional weighted operator: ``shape`` is the weight's as ``meaning`` reads it; ``flip`` says that the operand is its
    transpose. ``experts`` is the number of matrices that take turns, along a first dimension of the operand: a row goes through one of
    them, whichever, so that all have the same inputs and outputs."""

    x: Value
    weight: Value
    bias: Value | None
    meaning: Weighted
    shape: tuple[int, ...]
    flip: bool = False
    experts: int = 0

    @property
    def inputs(self) -> int:
        if self.meaning.lookup:
            return self.shape[0]
        return self.shape[0] if self.meaning.transposed else self.shape[1] * self.meaning.groups

    @property
    def outputs(self) -> int:
        if self.meaning.lookup:
            return self.shape[1]
        return self.shape[1] * self.meaning.groups if self.meaning.transposed else self.shape[0]


def is_parameter(weight: Value) -> bool:
    """Whether a value is a raw parameter, or computed from raw parameters in a way that can be told."""
    return weight.origin is not None


def weighted_call(call: Call) -> WeightedCall | None:
    """The call read as a weighted operator, or None."""
    name, args = call.name, call.args
    if name == "linear":
        if args[1].rank != 2:
            return None
        return _made(args[0], args[1], call.argument(2, "bias"), Weighted())
    if name in CONV:
        groups = call.argument(6, "groups", 1)
        return _made(args[0], args[1], call.argument(2, "bias"), Weighted(spatial=CONV[name], groups=groups))
    if name in CONV_TRANSPOSE:
        meaning = Weighted(spatial=CONV_TRANSPOSE[name], groups=call.argument(6, "groups", 1), transposed=True)
        return _made(args[0], args[1], call.argument(2, "bias"), meaning)
    if name == "addmm" and call.kwargs.get("beta", 1) == 1 and call.kwargs.get("alpha", 1) == 1:
        return _made(args[1], args[2], args[0], Weighted(), flip=True)
    product = name in ("matmul", "mm")
    if product and _is_matrix(args[1]) and args[0].rank >= 1 and (is_parameter(args[1]) or not args[0].constant):
        return _made(args[0], args[1], None, Weighted(bias=None), flip=True)
    if product and _is_matrix(args[0]) and args[1].rank >= 2:
        return _made(args[1], args[0], None, Weighted(spatial=1, bias=None))  # W @ x: channels are the last dimension but one
    if name in GROUPED:
        return _grouped(call)
    if name == "embedding":
        return WeightedCall(args[1], args[0], None, Weighted(bias=None, lookup=True), args[0].shape)
    return None


def _made(x: Value, weight: Value, bias: Value | None, meaning: Weighted, flip: bool = False) -> WeightedCall | None:
    if weight.constant and x.origin is None:
        shape = weight.shape[::-1] if flip else weight.shape
        return WeightedCall(x, weight, bias, meaning, tuple(shape), flip)
    return None


def _is_matrix(operand: Value) -> bool:
    return operand.rank == 2 and operand.constant


def _grouped(call: Call) -> WeightedCall | None:
    """A grouped product with one matrix per expert and no bias."""
    x, weight = call.args[:2]
    if call.kwargs.get("bias") is not None or len(call.args) > 3 or not weight.constant or (x.rank, weight.rank) != (2, 3):
        return None
    experts, inputs, outputs = weight.shape
    if x.origin is not None or x.shape[1] != inputs:
        return None
    return WeightedCall(x, weight, None, Weighted(bias=None), (outputs, inputs), flip=True, experts=experts)


def main_part(weight: Value) -> Part:
    """The parameter that gives a weight its rows: the largest of those that it is computed from."""
    return max(weight.origin.parts, key=lambda part: part.numel)


def row_sources(found: WeightedCall, held: dict[str, Tensor]) -> tuple[str, int, Tensor | None] | None:
    """The masker for the outputs of a weight: its name, its size, and which of its channels each output is.

    The masker belongs to a dimension of the parameter, so that two slices of one parameter have disjoint channels of one
    masker; None where no dimension fits and the operator gets a masker of its own.
    """
    origin = main_part(found.weight)
    name = origin.name
    out_dim = 1 if (found.flip or found.meaning.transposed or found.meaning.lookup) else 0
    out_dim += bool(found.experts)
    if found.meaning.groups > 1 and found.meaning.transposed:
        return None
    path = name.removesuffix(".weight")
    if origin.positions is None:
        shape = tuple(held[name].shape)
        return (path if out_dim == 0 else f"{path}.{out_dim}", shape[out_dim], None)
    shape = tuple(held[name].shape)
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    rows = origin.positions.movedim(out_dim, 0).reshape(origin.positions.shape[out_dim], -1)
    for d in range(len(shape)):
        coordinates = torch.div(rows, strides[d], rounding_mode="floor") % shape[d]
        alike = bool((rows >= 0).all()) and bool((coordinates == coordinates[:, :1]).all())
        if alike and not (
            origin.derived and coordinates[:, 0].unique().numel() < len(rows)
        ):  # coupled over outputs: not one channel
            return (path if d == 0 else f"{path}.{d}", shape[d], coordinates[:, 0])
    return None
