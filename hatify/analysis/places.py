"""Movements and reductions backwards: what is needed of results, at the places of the operand that their elements came from."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from hatify.analysis.sizes import concrete, is_open_size, period, repeats, same_size
from hatify.gates import GateTable, Value
from hatify.gates.rules import Call
from hatify.gates.rules.movement import MULTIPLE, REGROUPING, is_index, move_tensor, open_places, pads_with_value
from hatify.gates.rules.reductions import dims_along
from hatify.gates.table import CONST
from hatify.gates.value import compress


def moved_back(
    table: GateTable, call: Call, results: list[tuple[tuple[int, ...], Tensor]], value: Value, sizes: Sequence, after: Sequence
) -> Tensor:
    """Where the results of a movement are needed, at the places that their elements came from; CONST where none of them comes from.

    ``results`` are shapes and needs, ``sizes`` the operand's sizes as captured, ``after`` those of each result. Along a dimension that has
    other sizes in other calls, a place is needed where any is: which of them a movement shows depends on the size.
    """
    indices = [v for v in call.values() if is_index(call, v)]
    if (
        pads_with_value(call)
        or any(v.known is None for v in indices)
        or value in indices
        or any(_only_here_empty(shape, captured) for (shape, _), captured in zip(results, after))
    ):
        return value.ids  # of such a result there may be more at another size
    views = _views(call, value)
    need = _gathered(call, results, value) if views is None else _needs_of_views(value, views, [need for _, need in results])
    moving = [*open_places(call), *(_regrouped(value, sizes, after[0], results[0][1]) if call.name in REGROUPING else ())]
    for dim, size in enumerate(sizes):
        if dim in moving:
            need = table.or_along(need, dim)
        elif is_open_size(size):
            need = _or_of_repeats(table, need, dim, period(size))
    return need


def _only_here_empty(shape: tuple[int, ...], captured: Sequence) -> bool:
    """Whether a result has no elements at the example's sizes, and may have some at others."""
    return 0 in shape and not any(same_size(size, 0) for size in captured)


def _or_of_repeats(table: GateTable, need: Tensor, dim: int, length: int) -> Tensor:
    """The OR of all parts of that length along a dimension, for each part: where one is needed, all are."""
    count = need.shape[dim]
    if length == 1 or count % length:
        return table.or_along(need, dim)
    parts = table.or_along(need.unflatten(dim, (-1, length)), dim)
    return parts.expand([count // length if d == dim else -1 for d in range(parts.dim())]).flatten(dim, dim + 1)


def reduced_back(table: GateTable, call: Call, need: Tensor, value: Value) -> Tensor:
    """Where the result of a reduction, a softmax or a pooling is needed, at the places of its only operand: all that is reduced into it."""
    if call.values() != [value]:
        return value.ids
    dims = dims_along(call, value.rank)
    if need.dim() < value.rank:
        for dim in sorted(dims):
            need = need.unsqueeze(dim)
    for dim in dims:
        need = table.or_along(need, dim)
    return need if all(n in (1, size) for n, size in zip(need.shape, value.shape)) else value.ids


def _regrouped(value: Value, before: Sequence, after: Sequence, need: Tensor) -> list[int]:
    """The dimensions that a reshape takes apart or puts together with one whose size is open: what was next to what depends on it.

    It does not where what is needed repeats in the parts that both sides count in: heads that are put next to the batch. Those
    dimensions stay apart along which gates differ.
    """
    found, left, right = [], list(enumerate(before)), list(enumerate(after))
    while left or right:
        dims, sizes, others, places = [], [], [], []
        while True:  # the smallest groups of the same size, at any size
            here, there = prod(sizes), prod(others)
            if sizes and others and same_size(here, there):
                break
            if left and (not right or concrete(here) <= concrete(there)):
                dim, size = left.pop(0)
                dims.append(dim)
                sizes.append(size)
            elif right:
                dim, size = right.pop(0)
                places.append(dim)
                others.append(size)
            else:
                break
        if any(is_open_size(size) for size in (*sizes, *others)):
            apart = _counts_alike(sizes, others, places, need)
            found += [dim for dim in dims if not (apart and value.varies(dim))]
    return found


def _counts_alike(sizes: list, others: list, places: list[int], need: Tensor) -> bool:
    """Whether what is needed of a result's dimensions depends on the number of an element in a part of fixed length alone, and the
    operand's dimensions, which hold the same elements in the same order, are open outside of such parts."""
    own, length = _part(sizes), _part(others)
    if own is None or length is None or own % length:
        return False
    *outer, last = [dim for dim, size in zip(places, others) if is_open_size(size)]
    return all(need.shape[dim] == 1 for dim in outer) and repeats(need, last, others[places.index(last)])


def _part(sizes: list) -> int | None:
    """The length of the part that repeats, whatever the open sizes: those are outside of all others. None where they are not."""
    opened = [i for i, size in enumerate(sizes) if is_open_size(size)]
    if not opened or any(concrete(size) != 1 for size in sizes[: opened[-1]] if not is_open_size(size)):
        return None
    return period(sizes[opened[-1]]) * prod(concrete(size) for size in sizes[opened[-1] + 1 :])


def _gathered(call: Call, results: list[tuple[tuple[int, ...], Tensor]], value: Value) -> Tensor:
    """For a movement of any kind, by moving numbers of places."""
    indices = [v for v in call.values() if is_index(call, v)]
    count = torch.Size(value.shape).numel()
    places = torch.arange(1, count + 1, dtype=torch.float64).reshape(value.shape)  # 0: from nowhere, or from another operand
    moved = move_tensor(call, lambda v: v.known if v in indices else places if v is value else places.new_zeros(v.shape))
    low, high = torch.full((count + 1,), torch.iinfo(torch.int64).max), torch.full((count + 1,), -1)
    for place, (shape, need) in zip(list(moved) if call.name in MULTIPLE else [moved], results, strict=True):
        flat, ids = place.reshape(-1).long(), need.expand(shape).reshape(-1)
        low.scatter_reduce_(0, flat, ids, "amin")
        high.scatter_reduce_(0, flat, ids, "amax")
    own, low, high = value.full().reshape(-1), low[1:], high[1:]
    need = torch.where(high < 0, CONST, torch.where(low == high, high, own))
    return compress(need.reshape(value.shape), adopt=False)[0]


def _views(call: Call, value: Value) -> list[Tensor] | None:
    """The results of a movement as views of a contiguous operand that has no memory, each element in one place at most: their strides
    say where the elements came from. None for other movements."""
    if call.values() != [value]:
        return None
    operand = torch.empty(value.shape, device="meta")
    moved = move_tensor(call, lambda v: operand)
    views = list(moved) if call.name in MULTIPLE else [moved]
    storage = operand.untyped_storage()._cdata
    return views if all(v.untyped_storage()._cdata == storage and _apart(v) for v in views) else None


def _needs_of_views(value: Value, views: list[Tensor], needs: list[Tensor]) -> Tensor:
    """What is needed of an operand, from what is needed of views of it; CONST where none of them shows it.

    A dimension that every view has whole, and along which neither gates nor needs differ, is looked at in one place: tokens are many.
    """
    strides = torch.empty(value.shape, device="meta").stride()
    alike = [
        (stride, size, dim)
        for dim, (stride, size) in enumerate(zip(strides, value.shape))
        if value.ids.shape[dim] == 1 < size and all(_shows_all(v, need, stride, size) for v, need in zip(views, needs))
    ]
    found = value.full()
    for _, _, dim in alike:
        found = found.narrow(dim, 0, 1)
    found = torch.full(found.shape, CONST)

    def place(position: int) -> int:
        """Where in ``found`` a position of the operand is."""
        return sum(position // own % size * new for own, size, new in zip(strides, value.shape, found.stride()))

    for view, need in zip(views, needs):
        part = need.expand(view.shape)
        for dim in range(view.dim()):
            if any(_is_inside(view, dim, stride, size) for stride, size, _ in alike):
                part = part.narrow(dim, 0, 1)
        found.as_strided(part.shape, [place(step) for step in view.stride()], place(view.storage_offset())).copy_(part)
    return compress(found, adopt=False)[0]


def _shows_all(view: Tensor, need: Tensor, stride: int, size: int) -> bool:
    """Whether a view has all of an operand's dimension of that stride and size, apart from others, and needs it alike everywhere."""
    touching = [
        d for d, (n, step) in enumerate(zip(view.shape, view.stride())) if n > 1 and stride < step * n and step < stride * size
    ]
    whole = all(_is_inside(view, d, stride, size) and view.stride(d) % stride == 0 and need.shape[d] == 1 for d in touching)
    return whole and prod(view.shape[d] for d in touching) == size


def _is_inside(view: Tensor, dim: int, stride: int, size: int) -> bool:
    """Whether a view's dimension stays inside the operand's dimension of that stride and size."""
    return view.shape[dim] > 1 and stride <= view.stride(dim) and view.stride(dim) * view.shape[dim] <= stride * size


def _apart(view: Tensor) -> bool:
    """Whether no two elements of a view are in one place."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True
