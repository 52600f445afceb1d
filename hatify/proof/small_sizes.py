"""Sizes of one, which the exporter never thinks of: whether a branch on them matters is asked by running it beside the original."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import sympy
import torch

from hatify.capture.captured import ShapeGuard
from hatify.model import HATModel
from hatify.modules.continuous import is_continuous
from hatify.proof.keeping import kept
from hatify.proof.noise import draw
from hatify.proof.parity import equals_original_on

Places = frozenset[tuple[int, int]]


def settle(hat: HATModel) -> None:
    """Lifts the conditions on sizes that make no difference.

    Where the model's code asks whether a size is one, the graph has the path of larger ones. If both give the same outputs, statistics
    and gradients under random weights, inputs of this size are taken too; else the condition stays. Sizes of zero are left to it.
    """
    sizes = hat._facts.check_sizes
    doubted = [guard for guard in sizes.guards if guard.doubted]
    if not doubted or any(p.is_meta for p in hat.parameters()):
        return
    guards, sizes.guards = sizes.guards, [guard for guard in sizes.guards if not guard.doubted]
    known: dict[Places, bool] = {}
    with kept(hat):
        draw(hat, [p for p in hat.parameters() if is_continuous(p)], torch.Generator().manual_seed(0), ())
        harmless = [guard for guard in doubted if all(_same(hat, places, known) for places in _breaking(guard))]
    sizes.guards = [_above_zero(guard) if guard in harmless else guard for guard in guards]
    sizes.seen.clear()


def _breaking(guard: ShapeGuard) -> Iterator[Places]:
    """The places in the inputs where sizes of one break the condition together, while the other sizes are large."""
    symbols = list(guard.expression.free_symbols)
    for some in itertools.product((True, False), repeat=len(symbols)):
        ones = [symbol for symbol, one in zip(symbols, some) if one]
        if ones and not guard.expression.subs({s: 1 if s in ones else _LARGE for s in symbols}):
            yield frozenset(place for symbol in ones for place in guard.doubted[str(symbol)])


_LARGE = 1009
"""A prime, which no condition on divisors holds for by accident."""


def _same(hat: HATModel, places: Places, known: dict[Places, bool]) -> bool:
    if places not in known:
        tensors = []
        for number, tensor in enumerate(hat._facts.inputs):
            for dim in (dim for input_number, dim in places if input_number == number):
                tensor = tensor.narrow(dim, 0, 1)
            tensors.append(tensor.clone())
        known[places] = equals_original_on(hat, tensors)
    return known[places]


def _above_zero(guard: ShapeGuard) -> ShapeGuard:
    """The condition, of which a size of one is an exception."""
    plain = {s: sympy.Symbol(str(s), integer=True) for s in guard.expression.free_symbols}
    expression = sympy.Or(guard.expression.xreplace(plain), sympy.And(*(s >= 1 for s in plain.values())))
    return replace(guard, expression=expression, doubted=None)
