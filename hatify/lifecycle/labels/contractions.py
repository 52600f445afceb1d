"""Labels of products of two computed values: what is summed has the same labels on both sides."""

from __future__ import annotations

from torch import Tensor, fx

from hatify.lifecycle.kinds import Kind
from hatify.lifecycle.labels.base import Labelled, Walk, live
from hatify.lifecycle.labels.classes import LIVE


def contraction(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    sides = [(n, walk.of[n], letters) for n, letters in kind.sides]
    cuts = [(n, held, letters, letters[held.cut]) for n, held, letters in sides if held.cut is not None]
    if not cuts:
        return walk.whole(node)
    kept = {letter for *_, letter in cuts if letter in kind.out}
    summed = {letter for *_, letter in cuts if letter not in kind.out}
    if len(sides) != 2 or len(kept) > 1 or len(summed) > 1 or (kept and summed):
        return walk.refuse(node, "its operands are cut in ways that do not fit")
    if summed:
        shared = [c for c in sides[0][2] if c in sides[1][2]]
        views = [_by_letters(walk, held, letters, shared) for _, held, letters in sides]
        for (n, held, _), view in zip(sides, views):
            if held.cut is None and not walk.picture[n].constant:
                view.fill_(LIVE)
        walk.classes.tie(*views)
        return walk.whole(node)
    letter = kept.pop()
    n, held, letters, _ = cuts[0]
    if len(cuts) > 1 or any(letter in other for m, _, other in sides if m is not n):
        return walk.refuse(node, "it is cut along a dimension that both operands share")
    held = walk.same_over(held, [d for d, c in enumerate(letters) if c not in kind.out])
    return Labelled(_by_letters(walk, held, letters, list(kind.out)), kind.out.index(letter))


def attention(walk: Walk, node: fx.Node, kind: Kind) -> Labelled:
    """Queries and keys meet channel by channel; the channels of the values come out."""
    q, k, v = (walk.of[n] for n in node.args[:3])
    rank = len(walk.picture[node].shape)
    if any(held.cut not in (None, rank - 1) for held in (q, k, v)):
        return walk.refuse(node, "it is cut along another dimension than the channels of a head")
    for other in node.all_input_nodes:
        if other not in node.args[:3] and isinstance(walk.of[other], Labelled):
            walk.classes.tie(walk.of[other].ids, live(1))  # a bias of the scores: no head is dropped
    if q.cut is not None or k.cut is not None:
        rows = []
        for n, held in zip(node.args[:2], (q, k)):
            known = held.cut is not None or walk.picture[n].constant
            rows.append(_over_tokens(walk, held.ids if known else live(rank)))
        if rows[0].shape[:-2] != rows[1].shape[:-2] and node.kwargs.get("enable_gqa"):
            return walk.refuse(node, "queries share keys")
        walk.classes.tie(*rows)
    if v.cut is None:
        return walk.whole(node)
    if node.kwargs.get("enable_gqa"):
        return walk.refuse(node, "queries share values")
    return Labelled(_over_tokens(walk, v.ids), rank - 1)


def _over_tokens(walk: Walk, ids: Tensor) -> Tensor:
    """Labels tied over tokens, the last dimension but one."""
    first = ids.narrow(-2, 0, 1)
    if ids.shape[-2] > 1:
        walk.classes.tie(ids, first)
    return first


def _by_letters(walk: Walk, held: Labelled, letters: str, wanted: list[str]) -> Tensor:
    """The labels with one dimension per letter of ``wanted``; others are tied together."""
    ids = held.ids
    for d, letter in enumerate(letters):
        if letter not in wanted and ids.shape[d] > 1:
            first = ids.narrow(d, 0, 1)
            walk.classes.tie(ids, first)
            ids = first
    order = [letters.index(c) for c in wanted if c in letters]
    rest = [d for d, c in enumerate(letters) if c not in wanted]
    ids = ids.permute(*order, *rest).reshape([ids.shape[d] for d in order])
    present = iter(ids.shape)
    return ids.reshape([next(present) if c in letters else 1 for c in wanted]).clone()
