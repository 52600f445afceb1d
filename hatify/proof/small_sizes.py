"""Sizes of one, which the exporter never thinks of: whether a branch on them matters is asked by running it beside the original."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import sympy
import torch
from torch import Tensor

from hatify.capture.captured import ShapeGuard, is_true
from hatify.capture.export import export_mode
from hatify.capture.modes import ONE_AT_A_TIME
from hatify.capture.questions import answered
from hatify.errors import CaptureError
from hatify.model import HATModel
from hatify.modules.continuous import is_continuous
from hatify.original import original_of
from hatify.proof.keeping import kept
from hatify.proof.noise import draw
from hatify.proof.parity import equals_original_on

Places = frozenset[tuple[int, int]]


def settle(hat: HATModel, traced: bool) -> None:
    """Lifts the conditions on sizes that make no difference.

    Where the model's code asks whether a size is one, the graph has the path of larger ones. If both give the same outputs, statistics
    and gradients under random weights, inputs of this size are taken too, under the conditions that the code puts on other sizes on that
    path; else the condition stays. Sizes of zero are left to it.

    Args:
        traced: what a model that asks whether it is traced is answered.
    """
    sizes = hat._facts.check_sizes
    doubted = [guard for guard in sizes.guards if guard.doubted]
    if not doubted or any(p.is_meta for p in hat.parameters()):
        return
    guards, sizes.guards = sizes.guards, [guard for guard in sizes.guards if not guard.doubted]
    known: dict[Places, list[ShapeGuard] | None] = {}
    with kept(hat):
        draw(hat, [p for p in hat.parameters() if is_continuous(p)], torch.Generator().manual_seed(0), ())
        harmless = [guard for guard in doubted if _is_harmless(hat, guard, known, traced)]
    lifted = {places for guard in harmless for places in _tried_places(guard)}
    sizes.guards = [_lifted(guard) if guard in harmless else guard for guard in guards]
    sizes.guards += [guard for places in lifted for guard in known[places]]
    sizes.seen.clear()


def _is_harmless(hat: HATModel, guard: ShapeGuard, known: dict[Places, list[ShapeGuard] | None], traced: bool) -> bool:
    """Whether the condition is broken, and makes no difference, at every choice of sizes of one that breaks it."""
    example = {s: hat._facts.inputs[number].shape[dim] for s, (number, dim) in _symbols(guard)}
    for ones in _breaking(guard):
        if is_true(guard.expression, {s: 1 if s in ones else size for s, size in example.items()}):
            return False  # by these sizes nothing is told
    return all(_tried(hat, places, known, traced) is not None for places in _tried_places(guard))


def _tried_places(guard: ShapeGuard) -> list[Places]:
    """The places in the inputs of each choice of sizes of one that breaks the condition."""
    return [frozenset(place for symbol in ones for place in guard.doubted[str(symbol)]) for ones in _breaking(guard)]


def _symbols(guard: ShapeGuard) -> list[tuple[sympy.Symbol, tuple[int, int]]]:
    return [(symbol, guard.symbols[str(symbol)]) for symbol in guard.expression.free_symbols]


def _breaking(guard: ShapeGuard) -> Iterator[list[sympy.Symbol]]:
    """Those whose sizes of one break the condition together, while the other sizes are large."""
    symbols = list(guard.expression.free_symbols)
    for some in itertools.product((True, False), repeat=len(symbols)):
        ones = [symbol for symbol, one in zip(symbols, some) if one]
        if ones and not is_true(guard.expression, {s: 1 if s in ones else _LARGE for s in symbols}):
            yield ones


_LARGE = 1009
"""A prime, which no condition on divisors holds for by accident."""


def _tried(hat: HATModel, places: Places, known: dict[Places, list[ShapeGuard] | None], traced: bool) -> list[ShapeGuard] | None:
    """The conditions under which sizes of one at these places make no difference; None where they do."""
    if places not in known:
        tensors = []
        for number, tensor in enumerate(hat._facts.inputs):
            for dim in (dim for input_number, dim in places if input_number == number):
                tensor = tensor.narrow(dim, 0, 1)
            tensors.append(tensor.clone())
        known[places] = _conditions(hat, places, tensors, traced) if equals_original_on(hat, tensors) else None
    return known[places]


def _conditions(hat: HATModel, places: Places, tensors: list[Tensor], traced: bool) -> list[ShapeGuard] | None:
    """What the model's code asks of other sizes where those at ``places`` are one; None where that cannot be told."""
    model, names, fixed = original_of(hat), hat.signature.names, hat._facts.check_sizes.fixed
    found: list[ShapeGuard] = []
    with ONE_AT_A_TIME, answered(traced, []):
        for training in (False, True) if hat.can_train else (False,):
            try:
                captured = export_mode(model, hat.signature, tensors, training)
            except CaptureError:
                return None
            found += [_where_one(places, guard) for guard in captured.guards]
            for size in captured.fixed_sizes:
                place = names.index(size.input), size.dim
                if place not in places and (size.input, size.dim) not in fixed:
                    condition = sympy.Eq(sympy.Symbol("size"), size.size)
                    text = f"{size.input}.shape[{size.dim}] == {size.size}"
                    found.append(_where_one(places, ShapeGuard(text, size.input, condition, {"size": place})))
    return list({guard.expression: guard for guard in found}.values())


def _where_one(places: Places, guard: ShapeGuard) -> ShapeGuard:
    """A condition that holds only for inputs whose sizes at ``places`` are one."""
    symbols: dict[str, tuple[int, int]] = {}

    def at(place: tuple[int, int]) -> sympy.Symbol:
        name = "size_{}_{}".format(*place)
        symbols[name] = place
        return sympy.Symbol(name, integer=True)

    condition = guard.expression.xreplace({s: at(guard.symbols[str(s)]) for s in guard.expression.free_symbols})
    expression = sympy.Or(condition, *(sympy.Ne(at(place), 1) for place in sorted(places)))
    return ShapeGuard(guard.text, guard.line, expression, symbols)


def _lifted(guard: ShapeGuard) -> ShapeGuard:
    """The condition, of which the sizes of one that were tried are exceptions."""
    plain = {s: sympy.Symbol(str(s), integer=True) for s in guard.expression.free_symbols}
    tried = [sympy.And(*(sympy.Eq(p, 1) if s in ones else p >= 2 for s, p in plain.items())) for ones in _breaking(guard)]
    return replace(guard, expression=sympy.Or(guard.expression.xreplace(plain), *tried), doubted=None)
