"""What a result is read for: a backward pass that tightens locks.

A unit of a gated layer counts only where its partner is live too: in ``up(x) * silu(gate(x))`` the product is masked by both, and so is
what a query and a key have in common. Where the partner is dead no output depends on the unit, whatever number stands there, so a task
does not need the weights that write it. :func:`narrow_uses` replaces «the output is live» by «the output is needed» in the locks.

The rule: positions of a value are needed where a reader's mask, or what is needed of a reader that works position by position (or only
moves), says so; everything else that reads them needs all that is live. It never reads more into a number than «masked by ``where``»:
a product of two clean operands has no mask of its own, and 0 · inf is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hatify.analysis.heads import operator_name
from hatify.analysis.plan import Masked, Step
from hatify.analysis.sizes import concrete, is_open_size, same_size, tensors_of
from hatify.gates import State, Use, Value
from hatify.gates.layers import ChannelNorm, Elementwise, channel_dim
from hatify.gates.rules import Call
from hatify.gates.rules.elementwise import ADDITIVE, PARTIAL, PRODUCT, QUOTIENT, TYPES_ONLY, UNARY
from hatify.gates.rules.movement import MULTIPLE, NAMES, REGROUPING, is_index, move_tensor, open_places, pads_with_value
from hatify.gates.table import TOP
from hatify.gates.value import compress
from hatify.registry import describe

if TYPE_CHECKING:
    from hatify.analysis.analyst import Analyst

POSITIONWISE = {*UNARY, *PARTIAL, *PRODUCT, *QUOTIENT, *ADDITIVE, "pow", "masked_fill"}
"""Each element of the result is computed from the operands' elements at its own place."""
JOINING = {*PRODUCT, *QUOTIENT}
"""Of these a result is dead where one operand is, although the other may hold any number there."""


def narrow_uses(run: Analyst) -> None:
    """Tightens the rows of every use whose output is needed less often than it is live."""
    needs = _Needs(run)
    for name, uses in run.analysis.uses.items():
        run.analysis.uses[name] = [_narrowed(use, [needs.of_rows(node) for node in run.analysis.written_by[use]]) for use in uses]


def _narrowed(use: Use, needed: list[dict[int, int]]) -> Use:
    """``use`` with rows as all of its calls need them; as it is where they differ."""
    if not needed or not needed[0] or any(other != needed[0] for other in needed):
        return use
    ids, where = torch.unique(use.rows, return_inverse=True)
    rows = torch.tensor([needed[0].get(i, i) for i in ids.tolist()])[where].reshape(use.rows.shape)
    return replace(use, rows=rows)


class _Needs:
    """For each value of the graphs, the gates at which somebody needs it: ids that broadcast to its shape, never wider than its own."""

    def __init__(self, run: Analyst) -> None:
        self.run, self.table = run, run.table
        self.found: dict[tuple[fx.Node, int | None], Tensor] = {}
        for captured in run.graphs:
            for node in reversed(captured.graph.nodes):
                for index, value in self._results(node):
                    own = _made(value)[0].ids
                    self.found[node, index] = own if node in captured.writes.values() else self._joined(node, index, own)

    def of_rows(self, node: fx.Node | None) -> dict[int, int]:
        """Which gate stands for each gate of the result of ``node`` in locks; empty where they cannot be told apart."""
        if node is None or not isinstance(self.run.env[node], Value):
            return {}
        own, need = torch.broadcast_tensors(_made(self.run.env[node])[0].ids, self.found[node, None])
        count = len(self.table.keys)  # a pair as one number: to sort numbers is much faster than to sort columns
        pairs = {divmod(pair, count) for pair in torch.unique(own * count + need).tolist()}
        changed = dict(pairs)
        several = len(changed) < len(pairs)  # one gate at places of different needs
        return {} if several or any(self.table.keys[i][0] == "and" for i in changed) else changed

    def _results(self, node: fx.Node) -> list[tuple[int | None, Value]]:
        held = self.run.env.get(node)
        if isinstance(held, Value):
            return [(None, held)]
        return [(i, v) for i, v in enumerate(held) if isinstance(v, Value)] if isinstance(held, list | tuple) else []

    def _joined(self, node: fx.Node, index: int | None, own: Tensor) -> Tensor:
        """What all readers of a result need of it together: an upper bound, which is ``own`` where they differ."""
        needs = [self._read_by(user, node, index, own) for user in node.users]
        needs = [need for need in needs if need is not None]
        if not needs or not bool((own > TOP).any()):
            return own
        first, *others = torch.broadcast_tensors(own, *needs)[1:]
        for other in others:
            first = torch.where(first == other, first, own)
        need = self.table.combine("and", own, first)
        return own if self.table.too_large(need) else need

    def _read_by(self, user: fx.Node, node: fx.Node, index: int | None, own: Tensor) -> Tensor | None:
        """What one reader needs; None where it reads another result of ``node``."""
        if index is not None:
            if operator_name(user) != "getitem" or not isinstance(user.args[1], int):
                return own
            return self.found[user, None] if user.args[1] == index else None
        step = self.run.analysis.steps.get(user)
        if step is None or "by_mode" in user.meta or user.op not in ("call_function", "call_module"):
            return own
        operands = [v for v in pytree.tree_leaves((step.args, step.kwargs), is_leaf=_is_value) if _is_value(v)]
        need: Tensor | None = None
        for value in operands:
            made, masks = _made(value)
            if made.data is not node:
                continue
            here = self._of_operand(user, step, value)
            for mask in masks:
                here = self.table.combine("and", here, mask)
            need = here if need is None or need.shape == here.shape and torch.equal(need, here) else own
        return own if need is None else need

    def _of_operand(self, user: fx.Node, step: Step, value: Value) -> Tensor:
        """What the results of ``user`` that are needed need of one operand, as it stands there."""
        results = self._results(user)
        if not any(self._is_narrower(user, index, result) for index, result in results) and operator_name(user) not in JOINING:
            return value.ids
        if user.op == "call_module":
            return self._through_layer(user, value)
        name = operator_name(user)
        call = Call(name, user.target, step.args, step.kwargs)
        if name in POSITIONWISE and len(results) == 1 and results[0][0] is None:
            made = _made(results[0][1])[0]
            if name in JOINING and made.state is State.CLEAN and sum(v.gated for v in call.values()) > 1:
                return value.ids
            if name in TYPES_ONLY and value is not call.values()[0]:
                return value.ids
            return _placed_back(self.found[user, None], made.shape, value)
        if name in NAMES:
            need = self._moved_back(call, [(_made(r)[0].shape, self.found[user, i]) for i, r in results], value)
            return value.ids if any(need.shape[dim] > 1 for dim in _moving(user, call, value)) else need
        return value.ids

    def _is_narrower(self, node: fx.Node, index: int | None, result: Value) -> bool:
        own, need = _made(result)[0].ids, self.found[node, index]
        return own.shape != need.shape or not torch.equal(own, need)

    def _through_layer(self, user: fx.Node, value: Value) -> Tensor:
        """Layers that work on each channel alone: activations, norms of each channel, depthwise products without a masker."""
        meaning = describe(self.run.model.get_submodule(user.target))
        need = self.found.get((user, None))
        if need is None or _made(self.run.env[user])[0].ids.shape != value.ids.shape:
            return value.ids
        if isinstance(meaning, Elementwise):
            return need
        plan = self.run.analysis.layers[user.target]
        dim = 1 if isinstance(meaning, ChannelNorm) else channel_dim(value, meaning) if plan.role == "through" else None
        alone = dim is not None and all(size == 1 for d, size in enumerate(need.shape) if d != dim)
        return need if alone and need.shape[dim] == value.shape[dim] else value.ids

    def _moved_back(self, call: Call, results: list[tuple[tuple[int, ...], Tensor]], value: Value) -> Tensor:
        """Where a movement's results are needed, at the places that their elements came from; what nobody reads counts as live."""
        indices = [v for v in call.values() if is_index(call, v)]
        if pads_with_value(call) or any(v.known is None for v in indices) or value in indices:
            return value.ids
        views = _views(call, value)
        if views is not None:
            return _needs_of_views(value, views, [need for _, need in results])
        count = torch.Size(value.shape).numel()
        places = torch.arange(1, count + 1, dtype=torch.float64).reshape(value.shape)  # 0: from nowhere, or from another operand
        moved = move_tensor(call, lambda v: v.known if v in indices else places if v is value else places.new_zeros(v.shape))
        low, high = torch.full((count + 1,), torch.iinfo(torch.int64).max), torch.full((count + 1,), -1)
        for place, (shape, need) in zip(list(moved) if call.name in MULTIPLE else [moved], results, strict=True):
            flat, ids = place.reshape(-1).long(), need.expand(shape).reshape(-1)
            low.scatter_reduce_(0, flat, ids, "amin")
            high.scatter_reduce_(0, flat, ids, "amax")
        own = value.full().reshape(-1)
        need = torch.where(low[1:] == high[1:], high[1:], own)
        return compress(need.reshape(value.shape), adopt=False)[0]


def _is_value(operand: object) -> bool:
    return isinstance(operand, Value)


def _made(value: Value) -> tuple[Value, list[Tensor]]:
    """The value as its node makes it, and the masks that it has had since."""
    masks = []
    while isinstance(value.data, Masked):
        value = value.data.value
        masks.append(value.ids)
    return value, masks


def _moving(user: fx.Node, call: Call, value: Value) -> list[int]:
    """The dimensions along which another call, with other sizes, moves other elements."""
    before, after = _made(value)[0].data.meta["val"].shape, tensors_of(user.meta["val"])[0].shape
    open_dims = [dim for dim, size in enumerate(before) if is_open_size(size)]
    return [*open_dims, *open_places(call), *(_regrouped(before, after) if call.name in REGROUPING else ())]


def _regrouped(before: Sequence, after: Sequence) -> list[int]:
    """The dimensions that a reshape takes apart or puts together with one whose size is open: what was next to what depends on it."""
    found, left, right = [], list(enumerate(before)), list(after)
    while left or right:
        dims, sizes, others = [], [], []
        while True:  # the smallest groups of the same size, at any size
            here, there = prod(sizes), prod(others)
            if sizes and others and same_size(here, there):
                break
            if left and (not right or concrete(here) <= concrete(there)):
                dim, size = left.pop(0)
                dims.append(dim)
                sizes.append(size)
            elif right:
                others.append(right.pop(0))
            else:
                break
        if any(is_open_size(size) for size in (*sizes, *others)):
            found += dims
    return found


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
    """What is needed of an operand, from what is needed of views of it; what none of them shows counts as live.

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
    found = found.clone(memory_format=torch.contiguous_format)

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


def _placed_back(need: Tensor, shape: tuple[int, ...], value: Value) -> Tensor:
    """The needs of a result at the places of an operand that broadcasts to it."""
    missing = len(shape) - value.rank
    full = (1,) * missing + value.shape
    spread = any(own == 1 and out > 1 and need.shape[d] > 1 for d, (own, out) in enumerate(zip(full, shape)))
    return value.ids if spread else need.reshape(need.shape[missing:])
