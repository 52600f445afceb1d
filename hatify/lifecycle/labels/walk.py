"""The labels of a whole graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hatify.lifecycle.kinds import Kind
from hatify.lifecycle.labels import contractions, elementwise, layers, movement
from hatify.lifecycle.labels.base import Labelled, Walk
from hatify.lifecycle.labels.classes import ANY
from hatify.lifecycle.needs import Needs
from hatify.lifecycle.picture import Picture
from hatify.lifecycle.plain import Plain
from hatify.lifecycle.zeros import Zeros

RULES: dict[str, Callable[[Walk, fx.Node, Kind], Any]] = {
    "mask": elementwise.mask,
    "pick": elementwise.pick,
    "elementwise": elementwise.elementwise,
    "prelu": layers.prelu,
    "reduction": elementwise.mixed,
    "mixing": elementwise.mixed,
    "spatial": elementwise.mixed,
    "weighted": layers.weighted,
    "channel norm": layers.channel_norm,
    "norm": layers.plain_norm,
    "live norm": layers.live_norm,
    "contraction": contractions.contraction,
    "attention": contractions.attention,
    "movement": movement.movement,
}
"""By family of nodes; every other family gets its operands whole."""


class Labels(Walk):
    """Labels every value of a graph, and decides which labels are kept."""

    def __init__(self, plain: Plain, picture: Picture, zeros: Zeros, needs: Needs, dense: dict[fx.Node, str]) -> None:
        super().__init__(plain, picture, zeros, needs, dense)
        for node in plain.graph.nodes:
            self.of[node] = self._visit(node, zeros.kinds[node])
        self.classes.solve(self._used())

    def _visit(self, node: fx.Node, kind: Kind) -> Any:
        seen = self.picture[node]
        if kind.family in ("output", "number") or (seen.shape is None and not seen.parts):
            return None
        if seen.parts and (kind.family != "movement" or any(p.shape is None for p in seen.parts)):
            return self.whole(node)
        if seen.constant and not seen.parts and kind.family != "mask":
            return Labelled(torch.full((1,) * len(seen.shape), ANY), None)
        if node in self.dense or kind.family not in RULES:
            self.keep_layer(node)
            return self.whole(node)
        return RULES[kind.family](self, node, kind)

    def _used(self):
        """The labels of positions that are needed and possibly not zero."""
        for node, held in self.of.items():
            need = self.needs[node]
            if isinstance(held, Labelled) and held.cut is not None and need is not None:
                ids, used = torch.broadcast_tensors(held.ids, need & ~self.zeros[node])
                yield ids[used]
