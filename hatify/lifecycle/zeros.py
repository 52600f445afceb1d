"""Which positions of which values are exactly zero, whatever the input: proved from the zeros in the parameters.

The rules are those of the gate algebra with a single gate, «zero»: dead, hence zero, positions are the clean ones. A position
about which nothing is proved counts as live. Products take it that what multiplies a zero is finite.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.gates import GateTable, State, Value
from hatify.gates.layers import MixingNorm, other_layer
from hatify.gates.rules import RULES, Call
from hatify.gates.rules.elementwise import additive
from hatify.gates.table import TOP
from hatify.gates.value import constants, ones
from hatify.lifecycle.kinds import Kind, Site, call_of, kind_of, value_of
from hatify.lifecycle.picture import Picture, operator_of
from hatify.lifecycle.plain import Plain
from hatify.registry import describe


class Zeros:
    """``zeros[node]``: bool, True where the value is zero, of the value's rank and broadcastable to it; a list for a node with
    several results; None for a node without tensors."""

    def __init__(self, plain: Plain, picture: Picture) -> None:
        self.plain, self.picture = plain, picture
        self.table = GateTable()
        self.zero = int(self.table.atoms("zero", 1)[0])
        self.found: dict[fx.Node, Any] = {}
        self.kinds: dict[fx.Node, Kind] = {}
        for node in plain.graph.nodes:
            self.kinds[node] = kind_of(node, plain, picture)
            self.found[node] = self._visit(node, self.kinds[node])

    def __getitem__(self, node: fx.Node) -> Any:
        return self.found[node]

    def masked(self, value: Value, *, soft: bool, fill: float) -> Value:
        """What the rules ask for where a zero must not be; nothing is claimed of it."""
        return replace(value, ids=ones(value.rank), state=State.CLEAN)

    def _visit(self, node: fx.Node, kind: Kind) -> Any:
        seen = self.picture[node]
        if kind.family == "output" or (seen.shape is None and not seen.parts):
            return None
        if any(p.shape is None for p in seen.parts):
            return None
        none = [_nothing(p.shape) for p in seen.parts] if seen.parts else _nothing(seen.shape)
        if kind.family == "source":
            return compressed(self.plain.dead[node.target]) if self._has_dead(node) else none
        if kind.family == "mask":
            live = self.picture[node.args[0]].known
            live = live.reshape((1,) * (len(seen.shape) - live.dim()) + tuple(live.shape))
            x = self.found[node.args[1]]
            return compressed(x & live) if node.args[2] else compressed(x | ~live)
        if kind.family == "pick":
            held = self.found[node.args[0]]
            return held[node.args[1]] if isinstance(held, list) else none
        if kind.family == "weighted":
            return self._weighted(node, kind.site)
        if kind.family in ("channel norm", "norm"):
            return self._norm(node, kind, none)
        if kind.family == "live norm":
            return self._live_norm(node)
        operands = [n for n in node.all_input_nodes if self.picture[n].shape is not None]
        if not any(bool(self.found[n].any()) for n in operands if isinstance(self.found[n], Tensor)):
            return none
        return self._ruled(node, kind, none)

    def _has_dead(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and node.target in self.plain.dead and bool(self.plain.dead[node.target].any())

    def weight_dead(self, site: Site) -> Tensor:
        """The dead elements of a site's weight, as it is used."""
        if site.path is not None:
            leaf = self.plain.leaves[site.path]
            dead = torch.zeros(leaf.get_parameter(site.meaning.weight).shape, dtype=torch.bool)
            if site.normalised:  # a zero of the raw weight is none of the normalised; a zero gain is
                for gain in site.row_gains(leaf):
                    rows = self.plain.dead.get(self.plain.parameter_name(site.path, gain))
                    if rows is not None:
                        dead |= rows.reshape(-1, *[1] * (dead.dim() - 1))
                return dead
            return self.plain.dead.get(self.plain.parameter_name(site.path, site.meaning.weight), dead)
        return self.found[site.weight].expand(self.picture[site.weight].shape)

    def bias_dead(self, site: Site) -> Tensor:
        """Which outputs get no bias: bool ``(outputs,)``."""
        if site.path is None:
            if site.bias is None:
                return torch.ones(site.outputs, dtype=torch.bool)
            return self.found[site.bias].expand(self.picture[site.bias].shape).reshape(-1).expand(site.outputs)
        name = site.meaning.bias
        if name is None or getattr(self.plain.leaves[site.path], name, None) is None:
            return torch.ones(site.outputs, dtype=torch.bool)
        dead = self.plain.dead.get(self.plain.parameter_name(site.path, name))
        return torch.zeros(site.outputs, dtype=torch.bool) if dead is None else dead

    def _weighted(self, node: fx.Node, site: Site) -> Tensor:
        pattern, silent = site.pattern(self.weight_dead(site)), self.bias_dead(site)
        rank = len(self.picture[node].shape)
        if site.meaning.lookup:
            return compressed((~pattern.any(1) & silent).reshape((1,) * (rank - 1) + (-1,)))
        zero = self.found[site.x]
        dim = site.channel_dim(rank)
        for d in range(dim + 1, rank):
            zero = zero.all(d, keepdim=True)
        read = (~zero).movedim(dim, -1)
        read = read.expand(*read.shape[:-1], site.inputs).float()
        return compressed((read @ pattern.t().float() == 0).logical_and(silent).movedim(-1, dim))

    def _norm(self, node: fx.Node, kind: Kind, none: Tensor) -> Tensor:
        """Zero where its own scale and shift are; a root-mean-square norm also keeps zeros."""
        leaf = self.plain.leaves[node.target]
        meaning = describe(leaf)
        rank = len(self.picture[node].shape)
        weight, bias = (self._affine(node.target, n, rank, kind) for n in ("weight", "bias"))
        keeps = isinstance(meaning, MixingNorm) and meaning.kind == "rms"
        scaled = weight if weight is not None else none
        if keeps:
            scaled = scaled | self.found[node.args[0]]
        out = scaled if bias is None else scaled & bias
        return compressed(out) if bool(out.any()) and zero_stays(leaf) else none

    def _affine(self, path: str, name: str, rank: int, kind: Kind) -> Tensor | None:
        parameter = getattr(self.plain.leaves[path], name, None)
        if parameter is None:
            return None
        dead = self.plain.dead.get(self.plain.parameter_name(path, name))
        dead = torch.zeros(parameter.shape, dtype=torch.bool) if dead is None else dead
        if kind.family == "channel norm" or isinstance(self.plain.leaves[path], nn.GroupNorm):
            return dead.reshape(1, -1, *[1] * (rank - 2))
        return dead.reshape((1,) * (rank - dead.dim()) + tuple(dead.shape))

    def _live_norm(self, node: fx.Node) -> Tensor:
        x = self.found[node.args[0]]
        rank = len(self.picture[node].shape)
        live = self.picture[node.kwargs["live"]].known
        zero = x & ~live.reshape((1,) * (rank - live.dim()) + tuple(live.shape))
        affine = [n for n in node.args[2:4] if isinstance(n, fx.Node)]
        along = [self._along(n, node, rank) for n in affine]
        if along:
            zero = zero | along[0]
        return compressed(zero & along[1] if len(along) > 1 else zero)

    def _along(self, parameter: fx.Node, node: fx.Node, rank: int) -> Tensor:
        dead = self.found[parameter].expand(self.picture[parameter].shape)
        if node.target.__name__ == "group_norm":
            return dead.reshape(1, -1, *[1] * (rank - 2))
        return dead.reshape((1,) * (rank - dead.dim()) + tuple(dead.shape))

    def _ruled(self, node: fx.Node, kind: Kind, none: Any) -> Any:
        modes = (False, True) if any(n.op == "get_attr" and n.target == "training" for n in node.all_input_nodes) else (False,)
        outs = [self._by_rule(node, kind, none, mode) for mode in modes]
        if len(outs) == 1 or isinstance(none, list):
            return outs[0]
        return compressed(outs[0] & outs[1])

    def _by_rule(self, node: fx.Node, kind: Kind, none: Any, training: bool) -> Any:
        sums = node.op == "call_function" and RULES.rules.get(operator_of(node)) is additive
        exact = kind.family == "movement" or sums  # position by position; elsewhere rules ask for constants as such

        def value(n: fx.Node, picture: Picture) -> Value:
            zero = self.found[n]
            if bool(zero.any()):
                return replace(value_of(n, picture, torch.where(zero, self.zero, TOP)), known=None)
            rank = len(picture[n].shape)
            index = picture[n].dtype is not None and not picture[n].dtype.is_floating_point
            return value_of(n, picture, ones(rank) if exact and not index or not picture[n].constant else constants(rank))

        call = call_of(node, self.picture, value, training)
        if node.op == "call_module":
            return self._layer(node, call, none)
        rule = RULES[call.name]
        return self._results(rule(self, call).out, none)

    def _layer(self, node: fx.Node, call: Call, none: Any) -> Any:
        leaf = self.plain.leaves[node.target]
        meaning = describe(leaf)
        if meaning is None:
            return none
        zero = None
        for training in (True, False):
            twin = copy.deepcopy(leaf).train(training)
            if hasattr(twin, "inplace"):
                twin.inplace = False
            out = self._results(other_layer(self, meaning, replace(call, func=twin)).out, none)
            zero = out if zero is None or isinstance(out, list) else zero & out
        return zero

    def _results(self, outs: Any, none: Any) -> Any:
        if isinstance(none, list):
            outs = outs if isinstance(outs, list) else [outs] * len(none)
            return [self._zero(o, n) for o, n in zip(outs, none)] if len(outs) == len(none) else none
        return self._zero(outs[0] if isinstance(outs, list) else outs, none)

    def _zero(self, gates: Any, none: Tensor) -> Tensor:
        if gates.ids is None or gates.state is not State.CLEAN or gates.ids.dim() != none.dim():
            return none
        return gates.ids == self.zero


def zero_stays(norm: nn.Module) -> bool:
    """Whether a normalisation whose scale and shift are zero gives zero: a fused activation may not."""
    if type(norm).__module__.startswith("torch.nn"):
        return True
    twin = copy.deepcopy(norm).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        channels = next((p.numel() for p in twin.parameters()), 1)
        layer = isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        out = twin(torch.randn(2, *norm.normalized_shape) if layer else torch.randn(2, channels, 4, 4))
    return bool((out == 0).all())


def compressed(zero: Tensor) -> Tensor:
    """The same with size 1 along each dimension where all are alike."""
    for dim in range(zero.dim()):
        if zero.shape[dim] > 1:
            first = zero.narrow(dim, 0, 1)
            if zero.stride(dim) == 0 or bool((zero == first).all()):
                zero = first
    return zero.contiguous()


def _nothing(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros((1,) * len(shape), dtype=torch.bool)


__all__ = ["Zeros", "compressed", "zero_stays"]
