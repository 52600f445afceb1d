"""What a rule is given, what it answers, and the fallback for operators that no rule knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from hatify.gates.table import CONST, TOP, GateTable
from hatify.gates.value import State, Value


@dataclass(frozen=True)
class Call:
    """One operator call; tensors in ``args`` and ``kwargs`` (nested lists included) are :class:`Value`."""

    name: str
    func: Callable
    args: tuple
    kwargs: dict[str, Any]

    def values(self) -> list[Value]:
        """The tensor operands in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda a: isinstance(a, Value))
        return [a for a in leaves if isinstance(a, Value)]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def map(self, change: Callable[[Value], Any]) -> tuple[tuple, dict]:
        """``(args, kwargs)`` with ``change`` applied to every tensor operand."""
        return pytree.tree_map(
            lambda a: change(a) if isinstance(a, Value) else a, (self.args, self.kwargs), is_leaf=lambda a: isinstance(a, Value)
        )


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of one result; ``ids`` None means TOP.

    ``factor`` are gates whose mask is applied to the result at once, where the soft factor of the others is in already: a second
    product would give it twice. ``state`` is that of ``ids`` afterwards.
    """

    ids: Tensor | None
    state: State = State.CLEAN
    factor: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What a rule decided: the operands after materialisation and the gates of each result.

    ``out`` is one :class:`Gates`, or a list of them for an operator with several results. ``live`` asks for the operator's
    live-statistics variant, given the mask of that value.
    """

    args: tuple
    kwargs: dict[str, Any]
    out: Gates | list[Gates]
    live: Value | None = None


class Interpreter(Protocol):
    """Who runs the rules."""

    table: GateTable

    def masked(self, value: Value, *, soft: bool, fill: float) -> Value:
        """``value`` with dead positions set to ``fill`` and, if ``soft``, live ones multiplied by the mask."""


Rule = Callable[[Interpreter, Call], Outcome]


class RuleTable:
    """Rules by operator name."""

    def __init__(self) -> None:
        self.rules: dict[str, Rule] = {}

    def add(self, names: Iterable[str], rule: Rule) -> None:
        for name in names:
            self.rules[name] = rule

    def __contains__(self, name: str) -> bool:
        return name in self.rules

    def __getitem__(self, name: str) -> Rule:
        return self.rules.get(name, unknown)


def clean(run: Interpreter, value: Value) -> Value:
    """``value`` with its mask materialised (itself where there is nothing left to do)."""
    if not value.gated or value.state is State.CLEAN:
        return value
    return run.masked(value, soft=value.state is State.PENDING, fill=0.0)


def stand_in(run: Interpreter, value: Value) -> Value:
    """``value`` with 1 at dead positions, for operators that are not defined at zero."""
    return run.masked(value, soft=False, fill=1.0) if value.gated else value


def clean_call(run: Interpreter, call: Call, which: Callable[[Value], bool] = lambda v: True) -> Call:
    """The call with the chosen operands materialised."""
    args, kwargs = call.map(lambda v: clean(run, v) if which(v) else v)
    return replace(call, args=args, kwargs=kwargs)


def unknown(run: Interpreter, call: Call) -> Outcome:
    """Materialise every operand; TOP comes out. Exact, merely conservative."""
    cleaned = clean_call(run, call)
    return Outcome(cleaned.args, cleaned.kwargs, Gates(None))


def one_state(run: Interpreter, call: Call) -> tuple[Call, State]:
    """The call with its gated operands brought to one state, and that state."""
    states = {v.state for v in call.values() if v.gated}
    if len(states) <= 1:
        return call, states.pop() if states else State.CLEAN
    return clean_call(run, call), State.CLEAN


def after_shift(state: State) -> State:
    """The state once something non-zero may stand at dead positions."""
    return State.DIRTY if state is State.CLEAN else state


def covers_constants(operands: list[Value], out: Tensor) -> bool:
    """Whether a position that is CONST in some operand is gated in ``out``."""
    return any(bool(((v.ids == CONST) & (out > TOP)).any()) for v in operands)


def is_open(argument: Any) -> bool:
    """Whether a number was computed from sizes that stay open: it has the example's value, and remembers its node."""
    return type(argument) not in (int, float, bool) and isinstance(argument, int | float)
