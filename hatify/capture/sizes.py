"""What a capture assumed about the sizes of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from sympy import Eq, Symbol
from sympy.printing.str import StrPrinter
from torch import fx

from hatify.calling import Signature
from hatify.capture.branches import Branch
from hatify.capture.captured import FixedSize, ShapeGuard
from hatify.capture.questions import is_inside


def fixed_sizes(signature: Signature, placeholders: list[fx.Node]) -> list[FixedSize]:
    sizes = []
    for name, node in zip(signature.names, placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
                sizes.append(FixedSize(name, dim, int(size)))
    return sizes


def guards_of(signature: Signature, placeholders: list[fx.Node], branches: list[Branch]) -> list[ShapeGuard]:
    """Guards that the model's own lines put on sizes, and equations of PyTorch's (``x.split(2)`` has as many parts as it had); the other
    guards of its internals concern strides and size one."""
    symbols: dict[str, list[tuple[int, int]]] = {}
    environment = None
    for number, node in enumerate(placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                environment = size.node.shape_env
                symbols.setdefault(str(size.node.expr), []).append((number, dim))
    if environment is None:
        return []
    held = [(environment.replace(branch.condition), branch.line, True) for branch in branches]
    for guard in environment.guards:
        place = guard.sloc.framework_loc
        filename = getattr(place, "filename", str(place))
        expression = environment.simplify(guard.expr)
        if not is_inside(filename) or isinstance(expression, Eq):
            held.append((expression, f"{filename}:{getattr(place, 'lineno', '?')}: {getattr(place, 'line', '')}", False))
    found: dict[Any, ShapeGuard] = {}
    for expression, line, doubted in held:
        names = [str(s) for s in expression.free_symbols]
        if names and set(names) <= set(symbols):
            first = {name: symbols[name][0] for name in names}
            text = _readable(expression, first, signature)
            found[expression] = ShapeGuard(text, line, expression, first, {n: symbols[n] for n in names} if doubted else None)
    return list(found.values())


def _readable(expression: Any, places: dict[str, tuple[int, int]], signature: Signature) -> str:
    """The condition with ``x.shape[1]`` for a symbol of the exporter's."""
    names = {s: f"{signature.names[places[str(s)][0]]}.shape[{places[str(s)][1]}]" for s in expression.free_symbols}
    return _Infix().doprint(expression.xreplace({s: Symbol(name, integer=True) for s, name in names.items()}))


class _Infix(StrPrinter):
    """``a != b`` instead of sympy's ``Ne(a, b)``."""

    def _print_Relational(self, expression: Any) -> str:
        return f"{self._print(expression.lhs)} {expression.rel_op} {self._print(expression.rhs)}"
