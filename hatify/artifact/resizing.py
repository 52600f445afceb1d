"""Layers that differ in their sizes alone: what was captured of one serves the other, if no number of it is one of those sizes.

A network has a dozen widths and hundreds of layers; a capture takes half a second, trying one out a few milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.utils import _pytree as pytree

from ..facts import Sizes
from .expressions import guard_to
from .lowered import Recipe

__all__ = ["Family", "family_of", "resized"]

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?!\w)")
_INTEGER = re.compile(r"(?<![\w.-])\d+(?![\w.])")


@dataclass(frozen=True)
class Family:
    """``kind`` is what layers of one family have in common, ``numbers`` those among it, ``sizes`` the numbers, in order, by which they may
    differ."""

    kind: tuple
    numbers: frozenset[float]
    sizes: tuple[int, ...]

    def changed(self, other: Family) -> set[int]:
        """The sizes that are other ones there."""
        return {mine for mine, theirs in zip(self.sizes, other.sizes) if mine != theirs}


def family_of(parts: tuple) -> Family:
    """The family of a kind: sizes of tensors, and integers among the settings that are equal to one, stand for numbers."""
    sizes: list[int] = []
    numbers: set[float] = {-1.0, 0.0, 1.0}

    def part_of(part: Any) -> Any:
        if not (isinstance(part, tuple) and len(part) == 4):
            return part
        path, cls, settings, held = part
        dims = {size for _, tensor in held if tensor is not None for size in tensor[0]}

        def named(found: re.Match) -> str:
            if int(found[0]) not in dims:
                return found[0]
            sizes.append(int(found[0]))
            return "size"

        found = tuple((name, _INTEGER.sub(named, text)) for name, text in settings)
        numbers.update(float(n) for _, text in found for n in _NUMBER.findall(text))
        for _, tensor in held:
            sizes.extend(() if tensor is None else tensor[0])
        return path, cls, found, tuple((name, None if t is None else (len(t[0]), t[1])) for name, t in held)

    kind = tuple(part_of(part) for part in parts)
    return Family(kind, frozenset(numbers), tuple(sizes))


def resized(recipe: Recipe, was: Family, now: Family, call: tuple[tuple, dict], meaning: Any) -> Recipe | None:
    """The recipe for a layer of the same family, called like this. None if one of the numbers in it is a size that changed, or none of the
    settings: it may be computed from a size.

    The caller proves it on the layer.
    """
    args, kwargs = call
    numbers = set(_numbers(recipe))
    if numbers & was.changed(now) or not numbers <= was.numbers:
        return None
    sizes = recipe.sizes
    tensors = recipe.signature.bind(args, kwargs)
    if [t.dim() for t in tensors] != [t.dim() for t in sizes.example]:
        return None
    by_name = dict(zip(sizes.names, tensors))
    fixed = {(name, dim): by_name[name].shape[dim] for name, dim in sizes.fixed}
    made = Sizes.of(sizes.names, fixed, sizes.guards, sizes.example)
    return replace(recipe, sizes=made, meaning=None if meaning is None else replace(meaning)) if made.fit(tensors) else None


def _numbers(recipe: Recipe) -> Iterator[float]:
    """All numbers of the graphs, of the results' structure and of the conditions on sizes."""
    for graph in recipe.graphs.values():
        for node in graph.nodes:
            yield from (float(a) for a in pytree.tree_leaves((node.args, node.kwargs)) if type(a) in (int, float))
    texts = [*(guard_to(g) for g in recipe.sizes.guards), *(s.to_json() for s in recipe.outputs.values())]
    for text in texts:
        yield from map(float, re.findall(r"(?<!\d)\d+(?!\d)", json.dumps(text)))
