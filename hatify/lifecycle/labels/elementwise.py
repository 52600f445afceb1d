"""Labels of operators that act on each position alone, or mix positions that are not cut."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from hatify.lifecycle.kinds import Kind
from hatify.lifecycle.labels.base import Labelled, Walk, along, live
from hatify.lifecycle.labels.classes import ANY
from hatify.lifecycle.labels.layers import parametrised
from hatify.lifecycle.picture import operator_of

REALIGNED = 0.8
"""A summand that is live at less than this share of the sum's channels is computed on its own channels and spread out; above it, it
keeps the sum's channels, dead ones included, which costs less than spreading."""


def mask(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    return walk.of[node.args[1]]


def pick(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    held, index = walk.of[node.args[0]], node.args[1]
    return held[index] if isinstance(held, list) and isinstance(index, int) else walk.whole(node)


def elementwise(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    """Operands that meet have the same labels; see ``REALIGNED``."""
    if node.op == "call_module" and any(True for _ in walk.plain.leaves[node.target].parameters()):
        return parametrised(walk, node)
    if _draws(node):
        return walk.refuse(node, "it draws a random number for every channel, in eval mode too")
    operands = [(n, walk.of[n]) for n in walk.operands(node)]
    shape = walk.picture[node].shape
    rank = len(shape)
    cuts = {held.cut + rank - held.ids.dim() for n, held in operands if held.cut is not None}
    if not cuts:
        return walk.whole(node)
    if len(cuts) > 1:
        return walk.refuse(node, "its operands are cut along different dimensions")
    cut = cuts.pop()
    narrow = _narrow(walk, node, operands, rank, cut)
    out = torch.full((1,) * rank, ANY)
    if len(narrow) == len(operands):
        out = along(walk.classes.fresh(shape[cut]), rank, cut).ids
    for n, held in operands:
        if n in narrow:
            walk.realigned.add((node, n))
            continue
        own = walk.picture[n].shape
        size = own[cut - (rank - len(own))] if cut >= rank - len(own) else 1
        if size == 1 and shape[cut] > 1:
            continue  # the same for every channel
        ids = held.ids.reshape((1,) * (rank - held.ids.dim()) + tuple(held.ids.shape))
        if held.cut is None and not walk.picture[n].constant:
            ids = live(rank)
        walk.classes.tie(out, ids)
        a, b = torch.broadcast_tensors(out, ids)
        out = torch.where(a == ANY, b, a)
    return Labelled(out.contiguous(), cut)


def mixed(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    """Positions along ``kind.dims`` are mixed: none of them may be dropped. A reduction leaves these dimensions out."""
    x = walk.of[walk.operands(node)[0]]
    if x.cut is None:
        return walk.whole(node)
    if x.cut in kind.dims:
        does = "reduces over" if kind.family == "reduction" else "mixes"
        return walk.refuse(node, f"it {does} channels that are cut")
    x = walk.same_over(x, kind.dims)
    if kind.keep:
        return x
    ids = x.ids.squeeze(kind.dims)
    return Labelled(ids, x.cut - sum(d < x.cut for d in kind.dims))


def _draws(node: fx.Node) -> bool:
    return node.op == "call_function" and "dropout" in operator_of(node) and True in (*node.args[1:], *node.kwargs.values())


def _narrow(walk: Walk, node: fx.Node, operands: list, rank: int, cut: int) -> set[fx.Node]:
    """Summands that have far fewer live channels than the sum."""
    sums = node.op == "call_function" and operator_of(node) in ("add", "sub")
    needed = walk.needs[node]
    if not sums or needed is None or len(operands) != 2 or operands[0][0] is operands[1][0]:
        return set()
    if any(h.cut is None or h.ids.numel() != h.ids.shape[h.cut] or h.ids.dim() != rank for _, h in operands):
        return set()

    def count(n: fx.Node) -> int:
        used: Tensor = (needed & ~walk.zeros[n]).movedim(cut, -1)
        return int(used.reshape(-1, used.shape[-1]).any(0).expand(walk.picture[n].shape[cut]).sum())

    every = count(node)
    return {n for n, _ in operands if count(n) < REALIGNED * every}
