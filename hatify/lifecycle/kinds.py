"""What each node of a plain graph does to positions: the families that zeros, needs and slimming are told by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.analysis import functional
from hatify.analysis.leaf_calls import channels_of
from hatify.analysis.operators import FRESH
from hatify.analysis.plan import Ratio, Size
from hatify.gates import Value
from hatify.gates.layers import ChannelNorm, Elementwise, MixingNorm, Moving, Spatial, Weighted
from hatify.gates.rules import RULES, Call, contractions, elementwise, movement, norms, reductions
from hatify.gates.rules.contractions import letters_of_einsum, letters_of_matmul
from hatify.gates.value import constants, ones
from hatify.lifecycle.picture import Picture, operator_of
from hatify.lifecycle.plain import LIVE_NORMS, Plain, is_mask
from hatify.modules import live_norms
from hatify.registry import describe

_BY_RULE = {
    elementwise.unary: "elementwise", elementwise.partial: "elementwise", elementwise.additive: "elementwise",
    elementwise.product: "elementwise", elementwise.quotient: "elementwise", elementwise.power: "elementwise",
    elementwise.masked_fill: "elementwise", elementwise.divides: "elementwise", elementwise.prelu: "prelu",
    movement.movement: "movement", reductions.reduce: "reduction", reductions.along: "mixing", reductions.spatial: "spatial",
    contractions.contracted: "contraction", contractions.attention: "attention",
    norms.layer_norm: "mixing", norms.group_norm: "mixing",
}  # fmt: skip
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "isnan", "isinf", "bitwise_not"}


@dataclass(frozen=True, eq=False)
class Kind:
    """``family``: mask, weighted, elementwise, prelu, movement, reduction, mixing, spatial, contraction, attention,
    channel norm, norm, live norm, pick, source, number, output or unknown.

    ``dims`` are the dimensions that are mixed, counted from the front; ``keep`` says that a reduction keeps them. ``sides`` are the
    tensor operands of a contraction with one letter per dimension, ``out`` the result's letters.
    """

    family: str
    dims: tuple[int, ...] = ()
    keep: bool = True
    site: Site | None = None
    sides: tuple[tuple[fx.Node, str], ...] = ()
    out: str = ""


@dataclass(frozen=True, eq=False)
class Site:
    """One use of a weight: ``path`` of the layer, or None where the weight is used by function."""

    node: fx.Node
    x: fx.Node
    meaning: Weighted
    inputs: int
    outputs: int
    path: str | None = None
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    flip: bool = False

    @property
    def normalised(self) -> bool:
        """Whether the weight goes through a normaliser of its own before it is used."""
        return self.meaning.row_locked or self.meaning.column_grouped

    def row_gains(self, leaf: nn.Module) -> tuple[str, ...]:
        """Gains with one element per output."""
        if not self.meaning.row_locked:
            return ()
        return tuple(n for n in self.meaning.gains if leaf.get_parameter(n).numel() == self.outputs)

    def channel_dim(self, rank: int) -> int:
        return rank - self.meaning.spatial - 1

    def pattern(self, dead: Tensor) -> Tensor:
        """Which outputs read which inputs: bool ``(outputs, inputs)``, from the dead elements of the weight as it is used."""
        alive = (~dead).reshape(dead.shape[0], dead.shape[1], -1).any(-1)
        if self.flip or self.meaning.lookup:
            alive = alive.t()
        groups = self.meaning.groups
        if self.meaning.transposed:
            blocks = alive.reshape(groups, -1, alive.shape[1]).transpose(1, 2)  # (groups, out / groups, in / groups)
        else:
            blocks = alive.reshape(groups, -1, alive.shape[1])
        return torch.block_diag(*blocks) if groups > 1 else blocks[0]


def value_of(node: fx.Node, picture: Picture, ids: Tensor | None = None) -> Value:
    """A node's tensor as the rules see it."""
    seen = picture[node]
    rank = len(seen.shape)
    ids = (constants(rank) if seen.constant else ones(rank)) if ids is None else ids
    return Value(seen.shape, ids, data=node, dtype=seen.dtype, known=seen.known if isinstance(seen.known, Tensor) else None)


def call_of(node: fx.Node, picture: Picture, value: Any = value_of, training: bool = False) -> Call:
    """A node's call with values for its tensors and actual numbers for its sizes."""

    def operand(n: fx.Node) -> Any:
        seen = picture[n]
        if n.op == "get_attr" and n.target == "training":
            return training
        if seen.shape is not None:
            return value(n, picture)
        if seen.size is None:
            return seen.other
        if isinstance(seen.size, bool):
            return seen.size
        return Ratio(seen.size, n) if isinstance(seen.size, float) else Size(seen.size, n)

    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    return Call(operator_of(node), node.target, tuple(args), dict(kwargs))


def kind_of(node: fx.Node, plain: Plain, picture: Picture) -> Kind:
    """The family of a node; unknown where nothing is known."""
    if node.op in ("placeholder", "get_attr"):
        return Kind("source")
    if node.op == "output":
        return Kind("output")
    if node.op == "call_module":
        return _layer(node, plain, picture)
    if is_mask(node):
        return Kind("mask")
    if node.target in LIVE_NORMS:
        rank = len(picture[node].shape)
        first = 1 if node.target is live_norms.group_norm else rank - len(node.args[1])
        return Kind("live norm", tuple(range(first, rank)))
    seen = picture[node]
    if seen.size is not None:
        return Kind("number")
    name = operator_of(node)
    if name == "getitem" and isinstance(node.args[0], fx.Node) and picture[node.args[0]].parts:
        return Kind("pick")
    if name in FRESH or (seen.shape is None and not seen.parts):
        return Kind("unknown")
    call = call_of(node, picture)
    site = _functional(node, call)
    if site is not None:
        return Kind("weighted", site=site)
    if name in _COMPARISONS or name == "detach":
        return Kind("elementwise")
    family = _BY_RULE.get(RULES.rules.get(name), "unknown")
    rank = len(call.values()[0].shape) if call.values() else 0
    if family == "reduction":
        keep = bool(call.argument(reductions.KEEP.get(name, 2), "keepdim", False))
        return Kind(family, tuple(reductions.dims_of(call, rank)), keep)
    if family == "mixing":
        return _mixing(name, call, rank)
    if family == "spatial":
        return Kind(family, tuple(range(rank - reductions.POOLS[name], rank)))
    if family == "contraction":
        return _contraction(name, call)
    return Kind(family)


def _layer(node: fx.Node, plain: Plain, picture: Picture) -> Kind:
    leaf = plain.leaves[node.target]
    meaning = describe(leaf)
    operands = [n for n in node.all_input_nodes if picture[n].shape is not None]
    if not operands or picture[node].shape is None:
        return Kind("unknown")
    rank = len(picture[node].shape)
    if isinstance(meaning, Weighted) and len(operands) == 1:
        inputs, outputs = channels_of(leaf, meaning)
        return Kind("weighted", site=Site(node, operands[0], meaning, inputs, outputs, path=node.target))
    if isinstance(meaning, ChannelNorm):
        return Kind("channel norm", tuple(d for d in range(0 if meaning.batch else 2, rank) if d != 1))
    if isinstance(meaning, MixingNorm):
        first = 1 if meaning.kind == "group" else rank - len(leaf.normalized_shape)
        return Kind("norm", tuple(range(first, rank)))
    if isinstance(meaning, Elementwise):
        return Kind("elementwise")
    if isinstance(meaning, Spatial):
        return Kind("spatial", tuple(range(rank - meaning.dims, rank)))
    if isinstance(meaning, Moving):
        return Kind("movement")
    return Kind("unknown")


def _functional(node: fx.Node, call: Call) -> Site | None:
    values = call.values()
    if len(values) < 2 or call.name not in _WEIGHTED or not any(v.constant for v in values):
        return None
    found = functional.weighted_call(call)
    if found is None or found.weight.constant is False or found.x.constant:
        return None
    bias = found.bias.data if isinstance(found.bias, Value) and found.bias.constant else None
    if found.bias is not None and bias is None:
        return None
    return Site(node, found.x.data, found.meaning, found.inputs, found.outputs, None, found.weight.data, bias, found.flip)


_WEIGHTED = {"linear", "addmm", "matmul", "mm", "embedding", *functional.CONV, *functional.CONV_TRANSPOSE}


def _mixing(name: str, call: Call, rank: int) -> Kind:
    if name in ("layer_norm", "rms_norm"):
        return Kind("mixing", tuple(range(rank - len(call.argument(1, "normalized_shape")), rank)))
    if name == "group_norm":
        return Kind("mixing", tuple(range(1, rank)))
    return Kind("mixing", (call.argument(1, "dim") % rank,))


def _contraction(name: str, call: Call) -> Kind:
    values = call.values()
    if name == "einsum":
        letters = letters_of_einsum(call.args[0])
    else:
        letters = letters_of_matmul(*(v.rank for v in values)) if len(values) == 2 else None
    if letters is None or len(letters[0]) != len(values) or any(len(set(side)) != len(side) for side in letters[0]):
        return Kind("unknown")
    return Kind("contraction", sides=tuple((v.data, side) for v, side in zip(values, letters[0])), out=letters[1])
