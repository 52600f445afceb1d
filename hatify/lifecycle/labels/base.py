"""What the rules of labels share: labelled values, and the state of one walk through a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hatify.lifecycle.kinds import Site
from hatify.lifecycle.labels.classes import LIVE, Classes
from hatify.lifecycle.needs import Needs
from hatify.lifecycle.picture import Picture
from hatify.lifecycle.plain import Plain
from hatify.lifecycle.zeros import Zeros


class Labelled:
    """One value's labels: ``ids`` of its rank and broadcastable to it, and the dimension ``cut`` along which positions are dropped
    (None: none are; also where everything along it has one label)."""

    def __init__(self, ids: Tensor, cut: int | None) -> None:
        self.ids, self.cut = ids, None if cut is None or ids.shape[cut] == 1 else cut


class Walk:
    """The labels found so far. ``dense`` maps nodes whose operands have to be whole to the reason; it grows while the graph is read.

    Attributes:
        of: labels by node: a :class:`Labelled`, a list of them for several results, or None.
        own: the labels that a weighted layer gives its outputs, by node.
        realigned: pairs of a sum and a summand that is computed on channels of its own and spread out.
    """

    def __init__(self, plain: Plain, picture: Picture, zeros: Zeros, needs: Needs, dense: dict[fx.Node, str]) -> None:
        self.plain, self.picture, self.zeros, self.needs, self.dense = plain, picture, zeros, needs, dense
        self.classes = Classes()
        self.of: dict[fx.Node, Any] = {}
        self.own: dict[fx.Node, Tensor] = {}
        self.realigned: set[tuple[fx.Node, fx.Node]] = set()
        self.rows: dict[int, Tensor] = {}
        self.columns: dict[int, Tensor] = {}
        self.shared = _shared(plain)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a node reads."""
        return [n for n in node.all_input_nodes if self.picture[n].shape is not None]

    def whole(self, node: fx.Node) -> Any:
        """Labels of a value of which nothing is dropped."""
        seen = self.picture[node]
        if seen.parts:
            return [None if p.shape is None else _live(len(p.shape)) for p in seen.parts]
        return _live(len(seen.shape))

    def refuse(self, node: fx.Node, why: str) -> Any:
        """``node`` gets its operands whole."""
        self.dense.setdefault(node, why)
        self.keep_layer(node)
        return self.whole(node)

    def uniform(self, held: Labelled) -> Tensor:
        """Labels along the cut dimension, tied over all others: shape ``(size,)``."""
        rows = held.ids.movedim(held.cut, -1).reshape(-1, held.ids.shape[held.cut])
        for row in rows[1:]:
            self.classes.tie(rows[0], row)
        return rows[0]

    def same_over(self, held: Labelled, dims: Any) -> Labelled:
        """``held``, tied along ``dims`` where labels vary there."""
        if all(held.ids.shape[d] == 1 for d in dims):
            return held
        return along(self.uniform(held), held.ids.dim(), held.cut)

    def alike(self, shelf: dict[int, Tensor], node: fx.Node, labels: Tensor) -> Tensor:
        """``labels``, tied to those that another call of the same layer has."""
        self.classes.tie(shelf.setdefault(id(self.plain.leaves[node.target]), labels), labels)
        return labels

    def keep_layer(self, node: fx.Node) -> None:
        """A layer that gets all its channels here keeps them all, for its other calls too."""
        if node.op == "call_module":
            for shelf in (self.rows, self.columns):
                self.alike(shelf, node, live(1))

    def used_elsewhere(self, path: str) -> bool:
        """Whether a parameter of the layer at ``path`` is read by something else too."""
        return any(self.plain.parameter_name(path, n) in self.shared for n, _ in self.plain.leaves[path].named_parameters())

    def is_shared(self, site: Site) -> bool:
        return site.path is not None and self.used_elsewhere(site.path)


def along(ids: Tensor, rank: int, dim: int) -> Labelled:
    """Labels ``(size,)`` of a value that is cut along ``dim``."""
    return Labelled(ids.reshape([-1 if d == dim else 1 for d in range(rank)]), dim)


def live(rank: int) -> Tensor:
    """The labels of a value of which nothing is dropped."""
    return torch.full((1,) * rank, LIVE)


def _live(rank: int) -> Labelled:
    return Labelled(live(rank), None)


def _shared(plain: Plain) -> set[str]:
    """Parameters that more than one layer, or the glue too, reads."""
    readers: dict[str, set] = {}
    for node in plain.graph.nodes:
        if node.op == "call_module":
            leaf = plain.leaves[node.target]
            for name, _ in leaf.named_parameters():
                readers.setdefault(plain.parameter_name(node.target, name), set()).add(id(leaf))
        elif node.op == "get_attr" and any(user.target is not getattr for user in node.users):  # more than its type
            readers.setdefault(plain.canonical(node.target), set()).add(node)
    return {name for name, found in readers.items() if len(found) > 1}
