"""Where raw parameters go: moved through views and concatenations, cast, and back to locks on their own elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hatify.gates import Use, Value
from hatify.gates.rules import Call
from hatify.gates.rules.movement import NAMES as MOVES
from hatify.gates.rules.movement import move_tensor
from hatify.gates.value import Origin

CASTS = {"to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "float", "lift_fresh_copy"}
"""Operators that keep every element in its place."""


def moved_origins(call: Call, count: int, held: dict[str, Tensor]) -> list[Origin | None]:
    """Where the elements of a constant operator's results come from: one origin per result, None where more than movement happened."""
    values = call.values()
    sources = [v.origin for v in values if v.origin is not None]
    if not sources or (call.name not in MOVES and call.name not in CASTS):
        return [None] * count
    if call.name in CASTS:
        return [values[0].origin]
    names = tuple(dict.fromkeys(n for o in sources for n in o.names))
    sizes = tuple(held[n].numel() for n in names)
    offsets = {n: sum(sizes[:i]) for i, n in enumerate(names)}

    def positions(value: Value) -> Tensor:
        if value.origin is None:
            return value.known if not value.dtype.is_floating_point and value.known is not None else torch.full(value.shape, -1)
        own = value.origin.spread(value.shape)
        start = 0
        out = torch.full_like(own, -1)
        for name, size in zip(value.origin.names, value.origin.sizes):
            inside = (own >= start) & (own < start + size)
            out[inside] = own[inside] - start + offsets[name]
            start += size
        return out

    out = move_tensor(call, positions)
    return [Origin(names, sizes, o) for o in (out if isinstance(out, list | tuple) else [out])]


def split_use(use: Use, origin: Origin) -> Iterator[Use]:
    """A use of an effective weight, as uses of the parameters that it is made of."""
    start = 0
    for name, size in zip(origin.names, origin.sizes):
        positions = None
        if origin.positions is not None:
            inside = (origin.positions >= start) & (origin.positions < start + size)
            positions = torch.where(inside, origin.positions - start, -1)
        yield replace(use, parameter=name, positions=positions)
        start += size
