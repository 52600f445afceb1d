"""Labels of operators that move elements: the operator itself says where labels go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hatify.gates import Value
from hatify.gates.rules.movement import VIEWS, is_index, move_tensor
from hatify.gates.value import compress
from hatify.lifecycle.kinds import Kind, call_of
from hatify.lifecycle.labels.base import Labelled, Walk, live
from hatify.lifecycle.labels.classes import ANY, LIVE

RESHAPES = {*VIEWS, "reshape", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze"}
JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")


def movement(walk: Walk, node: fx.Node, kind: Kind) -> Any:
    call = call_of(node, walk.picture)
    moved = [v for v in call.values() if not is_index(call, v)]
    held = {id(v): walk.of[v.data] for v in moved}
    if not any(h.cut is not None for h in held.values()):
        return walk.whole(node)
    if node.op == "call_module" or any(v.known is None for v in call.values() if is_index(call, v)):
        return walk.refuse(node, "it moves elements in a way that is not known beforehand")
    if call.name in JOINS:
        _align(walk, call, moved, held)

    def labels(value: Value) -> Tensor:
        if id(value) not in held:
            return value.known
        return _ids(held[id(value)], value).to(torch.float64).expand(value.shape)

    def places(value: Value) -> Tensor:
        """1, 2, 3, ... along the dimension that is cut."""
        if id(value) not in held:
            return value.known
        cut = held[id(value)].cut
        if cut is None:
            return torch.zeros(value.shape, dtype=torch.float64)
        shape = [-1 if d == cut else 1 for d in range(value.rank)]
        return (1 + torch.arange(value.shape[cut], dtype=torch.float64)).reshape(shape).expand(value.shape)

    out, where = move_tensor(call, labels), move_tensor(call, places)
    if isinstance(out, list | tuple):
        found = [_cut_of(walk, call.name, ids, place) for ids, place in zip(out, where)]
    else:
        found = _cut_of(walk, call.name, out, where)
    if found is None or (isinstance(found, list) and None in found):
        return walk.refuse(node, "it spreads channels over several dimensions")
    return found


def _ids(held: Labelled, value: Value) -> Tensor:
    """A value that is whole has live labels, unless it is a constant."""
    return held.ids if held.cut is not None or value.constant else live(value.rank)


def _cut_of(walk: Walk, name: str, ids: Tensor, place: Tensor) -> Labelled | None:
    """Where a moved value is cut: where its channels went. A dimension that came apart is cut at its innermost part; None where the
    operator spread channels in another way."""
    ids, place = compress(ids)[0], compress(place, adopt=False)[0]
    ids = torch.where(ids == ANY, LIVE, ids)  # constants beside channels, and zeros of a padding, stay: who meets them must, too
    dims = [d for d in range(place.dim()) if place.shape[d] > 1 and ids.shape[d] > 1]
    if not dims:
        walk.classes.tie(ids, live(1))  # one channel alone was taken: it stays
        return Labelled(ids, None)
    if len(dims) > 1 and name not in RESHAPES:
        return None
    cut = dims[-1]
    rows = ids.movedim(cut, -1).reshape(-1, ids.shape[cut])
    if len(rows) > 1:
        walk.classes.families.append(rows)
    return Labelled(ids, cut)


def _align(walk: Walk, call: Any, moved: list[Value], held: dict[int, Labelled]) -> None:
    """Values joined along one dimension have equal labels along the others."""
    rank = moved[0].rank
    dim = call.argument(1, "dim", 0) if call.name not in ("hstack", "vstack") else 0
    dim = dim % (rank + (call.name == "stack"))
    first = None
    for value in moved:
        own = held[id(value)]
        if own.cut is None and value.constant:
            continue
        ids = _ids(own, value)
        if call.name != "stack" and (own.cut == dim or ids.shape[dim] > 1):
            continue
        first = ids if first is None else first
        walk.classes.tie(first, ids)
