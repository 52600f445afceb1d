"""Conditions on input sizes as data: a closed list of functions, evaluated on numbers only, for sympy may think forever about symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import BooleanAtom
from torch import Tensor
from torch.utils._sympy import functions

from ..capture.captured import ShapeGuard
from .constants import portable
from .fields import Fields

__all__ = ["StoredGuard", "guard_from", "guard_to"]

_PLAIN = ("Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not",
          "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan")  # fmt: skip
_TORCH = ("FloorDiv", "CleanDiv", "ModularIndexing", "Mod", "PythonMod", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt",
          "CeilToInt", "FloorToInt", "RoundToInt", "Max", "Min", "Where", "Identity", "FloatPow", "PowByNatural", "Round",
          "OpaqueUnaryFn_sqrt")  # fmt: skip
FUNCTIONS = {f"sympy.{n}": getattr(sympy, n) for n in _PLAIN}
FUNCTIONS |= {f"torch.{n}": getattr(functions, n) for n in _TORCH if hasattr(functions, n)}
_NAMES = {function: name for name, function in FUNCTIONS.items()}
LARGEST = 1000
"""Parts of a condition."""
BITS = 4096
"""Of a number on the way; products of sizes have some hundreds."""
TRIED = 1009
"""Size from which a condition is tried when it is read: a prime, so that nothing is divided by zero by accident."""


@dataclass(frozen=True)
class StoredGuard:
    """A condition as it is stored, in the place of :class:`ShapeGuard`."""

    text: str
    line: str
    condition: Any
    symbols: dict[str, tuple[int, int]]

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether the condition is true of the sizes of these inputs; what cannot be computed is not."""
        try:
            return bool(_value(self.condition, {name: tensors[n].shape[dim] for name, (n, dim) in self.symbols.items()}))
        except (ArithmeticError, TypeError, ValueError):
            return False


def guard_to(guard: ShapeGuard | StoredGuard) -> dict[str, Any]:
    """A guard as JSON.

    Raises:
        ValueError: its condition uses a function that is not stored.
    """
    symbols = {name: list(place) for name, place in guard.symbols.items()}
    condition = guard.condition if isinstance(guard, StoredGuard) else _to(guard.expression)
    return {"text": guard.text, "line": portable(guard.line), "condition": condition, "symbols": symbols}


def _to(expression: Any) -> Any:
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    if isinstance(expression, sympy.Symbol):
        return str(expression)
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Float):
        return float(expression)
    if isinstance(expression, sympy.Rational):
        return ["ratio", int(expression.p), int(expression.q)]
    name = _NAMES.get(expression.func)
    if name is None:
        raise ValueError(f"a condition on sizes with {expression.func.__name__}")
    return [name, *(_to(a) for a in expression.args)]


def guard_from(fields: Fields, ranks: list[int]) -> StoredGuard:
    """The guard again; ``ranks`` are those of the inputs.

    Raises:
        ArtifactError: an unknown function, a place that no input has, or a condition of absurd size.
    """
    fields.only("text", "line", "condition", "symbols")
    places: dict[str, tuple[int, int]] = {}
    for name, part in fields.at("symbols").pairs():
        number = part.at(0).count(most=len(ranks) - 1)
        places[name] = (number, part.at(1).count(most=ranks[number] - 1))
    sizes = {name: TRIED + 2 * i for i, name in enumerate(places)}
    part = fields.at("condition")
    if not isinstance(part.decoded(lambda data: _value(data, sizes), "a condition on sizes"), BooleanAtom):
        raise part.wrong(str(part.data)[:60], "a condition on sizes")
    return StoredGuard(fields.get("text", str), fields.get("line", str), part.data, places)


def _value(condition: Any, sizes: Mapping[str, int]) -> Any:
    """What a condition is for these sizes: a number or truth value of sympy's.

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError: it is none, or absurdly large.
    """
    left = LARGEST

    def value(data: Any, power: bool = False, in_power: bool = False) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {LARGEST} parts")
        if type(data) is bool:
            return sympy.true if data else sympy.false
        if type(data) is str:
            return sympy.Integer(sizes[data])
        if type(data) in (int, float):
            if type(data) is int and not -(2**63) <= data < 2**63 or power and not -4 <= data <= 4:
                raise ValueError(f"the {'power' if power else 'number'} {str(data)[:20]}")
            return sympy.Integer(data) if type(data) is int else sympy.Float(data)
        if type(data) is not list or not data or type(data[0]) is not str:
            raise ValueError("no condition")
        name, *parts = data
        if name == "ratio":
            if power or len(parts) != 2 or any(type(p) is not int for p in parts) or parts[1] == 0:
                raise ValueError("no ratio")
            return sympy.Rational(*parts)
        if power:
            raise ValueError("a computed power")
        is_power = name in ("sympy.Pow", "torch.FloatPow", "torch.PowByNatural")
        if is_power and in_power:
            raise ValueError("a power of a power")
        values = [value(p, is_power and i == 1, is_power or in_power) for i, p in enumerate(parts)]
        if is_power and len(values) == 2 and isinstance(values[0], sympy.Rational) and values[1] * _bits(values[0]) > 4 * BITS:
            raise ValueError("a power that is too large")
        return _small(values[0] if name == "torch.Identity" else FUNCTIONS[name](*values))

    return value(condition)


def _small(value: Any) -> Any:
    """The number or truth value, if it is one that can be computed with at once."""
    if not isinstance(value, sympy.Rational | sympy.Float | BooleanAtom):
        raise ValueError("no number")
    if _bits(value) > BITS if isinstance(value, sympy.Rational) else isinstance(value, sympy.Float) and abs(value) >= 2**BITS:
        raise ValueError(f"a number of more than {BITS} bits")
    return value


def _bits(value: sympy.Rational) -> int:
    return max(abs(int(value.p)), int(value.q)).bit_length()
