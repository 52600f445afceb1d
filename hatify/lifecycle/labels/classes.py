"""Labels that live and die together, and which of them are kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ANY, LIVE = 0, 1
"""Labels of constants, which take on any, and of what is never dropped."""


class Classes:
    """Labels are numbers; ``tie`` makes classes of them (union-find). ``families`` are int tensors of shape ``(parts, size)``: every
    part keeps as many labels as the fullest."""

    def __init__(self) -> None:
        self.parent: list[int] = [ANY, LIVE]
        self.families: list[Tensor] = []
        self.kept: list[bool] = []

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def fresh(self, count: int) -> Tensor:
        """New labels."""
        first = len(self.parent)
        self.parent += range(first, first + count)
        return torch.arange(first, first + count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Labels at equal places live and die together; constants go with anything."""
        pairs = torch.unique(torch.stack([t.reshape(-1) for t in torch.broadcast_tensors(a, b)]), dim=1)
        for x, y in pairs.t().tolist():
            if x != ANY and y != ANY:
                x, y = sorted((self.root(x), self.root(y)))
                self.parent[y] = x

    def solve(self, used: Iterable[Tensor]) -> None:
        """Keeps the classes of the labels in ``used``, and in every family as many as its fullest part has."""
        kept = [False] * len(self.parent)
        kept[ANY] = kept[self.root(LIVE)] = True
        for labels in used:
            for label in torch.unique(labels).tolist():
                kept[self.root(label)] = True
        changed = True
        while changed:
            changed = False
            for family in self.families:
                parts = [[self.root(i) for i in part] for part in family.tolist()]
                target = max(1, max(sum(kept[i] for i in part) for part in parts))
                for part in parts:
                    changed |= _filled(part, kept, target)
        self.kept = [kept[self.root(i)] for i in range(len(self.parent))]

    def keeps(self, ids: Tensor) -> Tensor:
        """Which labels are kept: bool, the shape of ``ids``."""
        distinct, where = torch.unique(ids, return_inverse=True)
        return torch.tensor([self.kept[i] for i in distinct.tolist()])[where].reshape(ids.shape)


def _filled(part: list[int], kept: list[bool], target: int) -> bool:
    """Keeps more labels of ``part`` until ``target`` of its places are kept; whether any was missing."""
    found = False
    for label in part:
        if not kept[label] and sum(kept[i] for i in part) < target:
            kept[label] = found = True
    return found
