"""Where raw parameters go: moved, cast, computed into other weights, and back to locks on their own elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hatify.analysis.coupling import derived, merged
from hatify.gates import Use, Value
from hatify.gates.rules import Call
from hatify.gates.rules.movement import NAMES as MOVES
from hatify.gates.rules.movement import move_tensor
from hatify.gates.table import TOP
from hatify.gates.value import Origin, Part

CASTS = {"to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "float", "lift_fresh_copy"}
"""Operators that keep every element in its place."""


def result_origins(call: Call, shapes: list[tuple[int, ...]]) -> list[Origin | None]:
    """Where the elements of a constant operator's results come from: one origin per result, None where that cannot be told."""
    values = call.values()
    names = dict.fromkeys(n for v in values if v.origin is not None for n in v.origin.names)
    if not names:
        return [None] * len(shapes)
    if call.name in CASTS:
        return [values[0].origin]
    made = [_moved(call, name) if call.name in MOVES else derived(call, name, shapes) for name in names]
    if any(parts is None or len(parts) != len(shapes) for parts in made):
        return [None] * len(shapes)
    return [Origin(parts) for parts in zip(*made)]


def part_of(value: Value, name: str) -> Part | None:
    """What a value is computed from, of one parameter."""
    return next((p for p in value.origin.parts if p.name == name), None) if value.origin is not None else None


def _moved(call: Call, name: str) -> list[Part]:
    """Movement: the operator run on the positions."""
    parts = [part for v in call.values() if (part := part_of(v, name)) is not None]
    groups, numel = None, parts[0].numel
    for part in parts:
        if part.groups is not None:
            groups = merged(groups, torch.arange(numel), part.groups, numel)

    def positions(value: Value) -> Tensor:
        part = part_of(value, name)
        if part is None:
            return value.known if not value.dtype.is_floating_point and value.known is not None else torch.full(value.shape, -1)
        found = part.spread(value.shape)
        return found if groups is None else torch.where(found < 0, found, groups[found])

    out = move_tensor(call, positions)
    moved = any(part.derived for part in parts)
    return [Part(name, numel, o, groups, moved) for o in (out if isinstance(out, list | tuple) else [out])]


def split_use(use: Use, origin: Origin, shapes: dict[str, tuple[int, ...]]) -> Iterator[Use | None]:
    """A use of an effective weight, as uses of the parameters that it is made of, in their order; None where one is spread over rows
    and columns alike, so that nothing of it would be left after a single task."""
    for part in origin.parts:
        if part.derived and not _lockable(part, use.shape):
            yield None
        elif part.groups is not None and use.rows[0].numel() == 1 and _whole_rows(part, use.shape, shapes[part.name]):
            yield replace(use, parameter=part.name, cols=torch.full((1,) * len(use.shape), TOP), grouped=True)
        else:
            grouped = use.grouped or part.groups is not None
            yield replace(use, parameter=part.name, positions=part.positions, groups=part.groups, grouped=grouped)


def by_rows(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether one element (or group) of the parameter has to do with several elements of the weight."""
    return part.groups is not None or part.derived and part.numel < torch.Size(shape).numel()


def _lockable(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether each group of elements has to do with one row of the weight, or each with one column."""
    positions = part.spread(shape)
    used = positions >= 0
    for dim in range(min(len(shape), 2)):
        index = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)[used]
        low = torch.full((part.numel,), shape[dim]).scatter_reduce_(0, positions[used], index, "amin")
        high = torch.full((part.numel,), -1).scatter_reduce_(0, positions[used], index, "amax")
        if bool((low >= high).all()):
            return True
    return False


def _whole_rows(part: Part, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Whether the parameter has the weight's layout and is coupled by whole rows, which takes no tables to say."""
    if own != shape:
        return False
    firsts = torch.arange(part.numel).view(shape[0], -1)[:, :1].expand(shape[0], part.numel // shape[0]).reshape(-1)
    return torch.equal(part.groups, firsts) and torch.equal(part.spread(shape).reshape(-1), firsts)
