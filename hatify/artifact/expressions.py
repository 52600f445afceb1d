"""Conditions on input sizes as data: a closed list of functions, evaluated on small integers only."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch.utils._sympy import functions

from ..capture.captured import ShapeGuard
from .fields import Fields

__all__ = ["guard_from", "guard_to"]

_PLAIN = ("Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not",
          "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan")  # fmt: skip
_TORCH = ("FloorDiv", "CleanDiv", "ModularIndexing", "Mod", "PythonMod", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt",
          "CeilToInt", "FloorToInt", "RoundToInt", "Max", "Min", "Where", "Identity", "FloatPow", "PowByNatural", "Round",
          "OpaqueUnaryFn_sqrt")  # fmt: skip
FUNCTIONS = {f"sympy.{n}": getattr(sympy, n) for n in _PLAIN}
FUNCTIONS |= {f"torch.{n}": getattr(functions, n) for n in _TORCH if hasattr(functions, n)}
_NAMES = {function: name for name, function in FUNCTIONS.items()}
LARGEST = 1000


def guard_to(guard: ShapeGuard) -> dict[str, Any]:
    """A guard as JSON.

    Raises:
        ValueError: its condition uses a function that is not stored.
    """
    symbols = {name: list(place) for name, place in guard.symbols.items()}
    return {"text": guard.text, "line": guard.line.rpartition("/")[2], "condition": _to(guard.expression), "symbols": symbols}


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


def guard_from(fields: Fields, ranks: list[int]) -> ShapeGuard:
    """The guard again; ``ranks`` are those of the inputs.

    Raises:
        ArtifactError: an unknown function, a place that no input has, or a condition of absurd size.
    """
    fields.only("text", "line", "condition", "symbols")
    places: dict[str, tuple[int, int]] = {}
    for name, part in fields.at("symbols").pairs():
        number = part.at(0).count(most=len(ranks) - 1)
        places[name] = (number, part.at(1).count(most=ranks[number] - 1))
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in places}
    left = [LARGEST]

    def build(data: Any, power: bool = False, in_power: bool = False) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"more than {LARGEST} parts")
        if type(data) is bool:
            return sympy.true if data else sympy.false
        if type(data) is str:
            return symbols[data]
        if type(data) is int:
            if not -(2**63) <= data < 2**63 or power and not -4 <= data <= 4:
                raise ValueError(f"the {'power' if power else 'number'} {str(data)[:20]}")
            return sympy.Integer(data)
        if type(data) is float:
            return sympy.Float(data)
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
        return FUNCTIONS[name](*(build(p, is_power and i == 1, is_power or in_power) for i, p in enumerate(parts)))

    expression = fields.at("condition").decoded(build, "a condition on sizes")
    if not isinstance(expression, Relational | BooleanAtom | BooleanFunction):
        raise fields.at("condition").wrong(str(expression)[:60], "a condition on sizes")
    return ShapeGuard(fields.get("text", str), fields.get("line", str), expression, places)
