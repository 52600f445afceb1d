"""Weights that are computed before they are used: which elements of the parameter each result depends on.

The positions of a parameter's elements go through the same operators as the parameter: an element-wise function keeps them,
a reduction couples what it reduces. Coupled elements form a group, and count as one for locks. An operator that is not here says
nothing, and the parameter becomes task-indexed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hatify.gates import Value
from hatify.gates.layers import Elementwise
from hatify.gates.rules import Call
from hatify.gates.rules.elementwise import ADDITIVE, PARTIAL, PRODUCT, QUOTIENT, UNARY
from hatify.gates.rules.reductions import ALONG, REDUCE, dims_of
from hatify.gates.value import Part
from hatify.registry import describe

ELEMENTWISE = {*UNARY, *PARTIAL, *ADDITIVE, *PRODUCT, *QUOTIENT, "pow", "addcmul", "addcdiv", "lerp", "masked_fill"} - {"polygamma"}
LAYER = "elementwise layer"
"""The name under which calls of layers are seen here that act on each element alone."""
NORMS = {"batch_norm", "layer_norm"}
WEIGHT_NORM = "_weight_norm"
PRODUCTS = {"mm", "matmul"}
DERIVABLE = {*ELEMENTWISE, *REDUCE, *ALONG, *NORMS, WEIGHT_NORM, *PRODUCTS}
"""Operators whose results depend on parameters in a way that can be told."""


def keeps_places(leaf: nn.Module) -> bool:
    """Whether a layer acts on each element alone, with no tensors of its own: it may compute a weight."""
    own = next(leaf.parameters(), None) is not None or next(leaf.buffers(), None) is not None
    return not own and isinstance(describe(leaf), Elementwise)


def derived(call: Call, name: str, shapes: list[tuple[int, ...]]) -> list[Part] | None:
    """What the results of an operator on constants are computed from, of the parameter ``name``; None where that cannot be told."""
    if call.name in ELEMENTWISE or call.name == LAYER:
        found = [(v, p) for v in call.values() if v.origin is not None for p in v.origin.parts if p.name == name]
        return _joined(found, shapes[0]) if len(shapes) == 1 else None
    if call.name in NORMS:
        return _normalised(call, name, shapes[0])
    if call.name == WEIGHT_NORM:
        return _with_own_norm(call, name, shapes[0])
    if call.name in PRODUCTS:
        return _multiplied(call, name, shapes[0])
    if call.name not in DERIVABLE or len(call.values()) != 1:
        return None
    value = call.values()[0]
    part = next(p for p in value.origin.parts if p.name == name)
    dims = dims_of(call, value.rank)
    if call.name in REDUCE:
        reduced = _coupled(part, value.shape, dims)
        return [Part(name, part.numel, reduced.positions.amax(dims, keepdim=True).reshape(s), reduced.groups, True) for s in shapes]
    return [_coupled(part, value.shape, dims)] if len(shapes) == 1 else None


def _joined(found: list[tuple[Value, Part]], shape: tuple[int, ...]) -> list[Part]:
    """Operands of one element-wise operator: where they depend on different elements, these are coupled."""
    name, numel = found[0][1].name, found[0][1].numel
    positions, groups = None, None
    for value, part in found:
        own = part.spread(value.shape).expand(shape)
        if part.groups is not None:
            groups = merged(groups, torch.arange(numel), part.groups, numel)
        if positions is None:
            positions = own
            continue
        both = (positions >= 0) & (own >= 0) & (positions != own)
        if bool(both.any()):
            groups = merged(groups, positions[both], own[both], numel)
        positions = torch.maximum(positions, own)
    if groups is not None:
        positions = torch.where(positions < 0, positions, groups[positions])
    identity = groups is None and positions.numel() == numel and torch.equal(positions.reshape(-1), torch.arange(numel))
    return [Part(name, numel, None if identity else positions, groups, True)]


def _coupled(part: Part, shape: tuple[int, ...], dims: list[int]) -> Part:
    """All that lies along ``dims`` coupled."""
    positions = part.spread(shape)
    highest = positions.amax(dims, keepdim=True).expand(shape) if dims else positions
    used = positions >= 0
    groups = merged(part.groups, positions[used], highest[used], part.numel)
    positions = torch.where(highest < 0, highest, groups[highest])  # a result along ``dims`` depends on all of it
    return Part(part.name, part.numel, positions, groups, True)


def _normalised(call: Call, name: str, shape: tuple[int, ...]) -> list[Part] | None:
    """A normalisation of a weight by its own statistics, with a gain and a shift that may be parameters too."""
    value = call.argument(0, "input")
    if call.name == "batch_norm":
        statistics = [call.argument(3, "running_mean"), call.argument(4, "running_var")]
        if call.argument(5, "training") is not True or statistics != [None, None]:
            return None
        dims, gains = [d for d in range(value.rank) if d != 1], [1 if d == 1 else 0 for d in range(value.rank)]
        first = 1
    else:
        first = value.rank - len(call.argument(1, "normalized_shape"))
        dims, gains = list(range(first, value.rank)), None
    found: list[tuple[Value, Part]] = []
    for operand in call.values():
        part = next((p for p in operand.origin.parts if p.name == name), None) if operand.origin is not None else None
        if part is None:
            continue
        if operand is value:
            found.append((value, _coupled(part, value.shape, dims)))
            continue
        along = tuple(-1 if g else 1 for g in gains) if gains else (1,) * first + operand.shape
        spread = part.spread(operand.shape).reshape(along).expand(shape)
        found.append((value, Part(name, part.numel, spread, part.groups, True)))
    return _joined(found, shape)


def _with_own_norm(call: Call, name: str, shape: tuple[int, ...]) -> list[Part]:
    """Weight normalisation, ``g v / |v|`` with a norm for each slice along ``dim`` (-1: one for all)."""
    direction, dim = call.argument(0, "v"), call.argument(2, "dim", 0)
    dims = [d for d in range(direction.rank) if d != dim]
    found: list[tuple[Value, Part]] = []
    for operand in call.values():
        part = next((p for p in operand.origin.parts if p.name == name), None) if operand.origin is not None else None
        if part is not None:
            found.append((operand, _coupled(part, operand.shape, dims) if operand is direction else part))
    return _joined(found, shape)


def _multiplied(call: Call, name: str, shape: tuple[int, ...]) -> list[Part] | None:
    """A product of two matrices: each element depends on a row of the one and a column of the other."""
    if any(v.rank != 2 for v in call.values()):
        return None
    found: list[tuple[Value, Part]] = []
    for dim, operand in ((1, call.args[0]), (0, call.args[1])):
        part = next((p for p in operand.origin.parts if p.name == name), None) if operand.origin is not None else None
        if part is not None:
            reduced = _coupled(part, operand.shape, [dim])
            along = reduced.positions.amax(dim, keepdim=True).expand(shape)
            found.append((replace(operand, shape=shape), Part(name, part.numel, along, reduced.groups, True)))
    return _joined(found, shape)


def merged(groups: Tensor | None, a: Tensor, b: Tensor, numel: int) -> Tensor:
    """The groups of ``numel`` elements once ``a[i]`` and ``b[i]`` are coupled for every ``i``: for each element the first element of
    its group. ``a`` and ``b`` are int64 positions of one shape."""
    found = torch.arange(numel) if groups is None else groups.clone()
    while True:
        left, right = found[a], found[b]
        if torch.equal(left, right):
            return found
        low = torch.minimum(left, right)
        found.scatter_reduce_(0, left.reshape(-1), low.reshape(-1), "amin")
        found.scatter_reduce_(0, right.reshape(-1), low.reshape(-1), "amin")
        jumped = found[found]
        while not torch.equal(jumped, found):
            found, jumped = jumped, jumped[jumped]
