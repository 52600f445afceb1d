"""The eager interpreter: runs the rules of the algebra as a hand-written network runs.

What a call does to gates depends on the gates, shapes and arguments of its operands, never on the data; so each decision (a
:class:`Plan`) is made once and kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hatify.errors import TaskError
from hatify.gates import TOP, GateTable, Program, State, Use, Value, compile_gates, evaluate
from hatify.gates.layers import Weighted, weighted, weighted_uses
from hatify.gates.recurrent import Recurrent, recurrent, recurrent_uses
from hatify.gates.rules import Call, Gates
from hatify.gates.rules.base import Rule
from hatify.gates.value import ones
from hatify.modules.masker import MASKERS, Masker

TABLE = GateTable()
"""One table for all hand-written networks; the atoms are channels of :attr:`Masker.key`."""
_SIZES: dict[str, int] = {}
MOST_PLANS = 8192
MOST_USES = 64
"""A layer used in more ways than this is locked as a whole."""


class Seen(dict):
    """How a layer has been used: uses of its parameters by a key that tells equal ones. Pickled empty: gates are numbers of
    this process."""

    def __reduce__(self) -> tuple:
        return Seen, ()

    def __deepcopy__(self, memo: dict) -> Seen:
        return Seen({key: list(uses) for key, uses in self.items()})


class Kept(OrderedDict):
    """The most recent results by key, at most ``MOST_PLANS``."""

    def get_or(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key in self:
            self.move_to_end(key)
            return self[key]
        self[key] = made = make()
        if len(self) > MOST_PLANS:
            self.popitem(last=False)
        return made


_plans, _programs, _large, _maskers = Kept(), Kept(), Kept(), Kept()
_compile: list[Callable[[Tensor], Program]] = []


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call does: the masks applied to each tensor operand in order (``(soft, fill, gates)``), the gates of each result, and the
    operand whose live mask a normalisation counts by."""

    masks: tuple[tuple[tuple[bool, float, Tensor], ...], ...]
    out: tuple[Gates, ...]
    live: int | None = None


@dataclass(frozen=True, eq=False)
class WeightedPlan:
    """The same for a weighted layer; ``uses`` are those of its parameters, ``key`` tells equal ones."""

    masks: tuple[tuple[bool, float, Tensor], ...]
    out: Gates
    uses: tuple[Use, ...]
    key: tuple


class _Dry:
    """Runs rules on values whose handle is ``(number of the operand, masks applied to it)``."""

    table = TABLE

    def masked(self, value: Value, *, soft: bool, fill: float) -> Value:
        operand, masks = value.data
        return replace(value, state=State.CLEAN, data=(operand, (*masks, (soft, fill, value.ids))))


def plan(
    name: str, rule: Rule, func: Callable, args: tuple, kwargs: dict, gates_of: Callable[[Any], tuple[Tensor, State]], token: Any
) -> Plan:
    """The plan of one call with at least one gated operand.

    Args:
        gates_of: ids and state of an operand, or None for an argument that is no tensor.
        token: tells ``func`` and its settings from others; None where the plan may not be kept.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    found = [gates_of(leaf) for leaf in leaves]
    numbers: dict[int, int] = {}
    order = [numbers.setdefault(id(leaf), len(numbers)) if f else -1 for leaf, f in zip(leaves, found)]

    def make() -> Plan:
        values: dict[int, Value] = {}
        for leaf, gates, number in zip(leaves, found, order):
            if gates:
                values.setdefault(number, Value(tuple(leaf.shape), *gates, data=(number, ()), dtype=leaf.dtype))
        dry = [values[number] if gates else leaf for leaf, gates, number in zip(leaves, found, order)]
        dry_args, dry_kwargs = pytree.tree_unflatten(dry, spec)
        outcome = rule(_Dry(), Call(name, func, dry_args, dry_kwargs))
        after = pytree.tree_leaves((outcome.args, outcome.kwargs), is_leaf=lambda a: isinstance(a, Value))
        out = outcome.out if isinstance(outcome.out, list) else [outcome.out]
        masks = tuple(a.data[1] for a in after if isinstance(a, Value))
        return Plan(masks, tuple(out), None if outcome.live is None else outcome.live.data[0])

    key = None
    if token is not None:
        parts = [_known(leaf, gates) for leaf, gates in zip(leaves, found)]
        key = (name, token, spec, tuple(order), tuple(parts))
    try:
        return make() if key is None else _plans.get_or(key, make)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return make()


def _known(leaf: Any, gates: tuple[Tensor, State] | None) -> Hashable:
    if gates:
        return tuple(leaf.shape), leaf.dtype, ids_key(gates[0]), gates[1]
    if isinstance(leaf, slice):
        return slice, leaf.start, leaf.stop, leaf.step
    return type(leaf), leaf


def ids_key(ids: Tensor) -> tuple:
    """What tells gates from others."""
    return tuple(ids.shape), ids.numpy().tobytes()


def weighted_plan(
    layer: Weighted, rank: int, gates: tuple[Tensor, State], masker: Masker | None, channels: tuple[int, int], shapes: dict
) -> WeightedPlan:
    """The plan of a weighted layer on an input of that rank; ``channels`` are its inputs and outputs."""
    ids, state = gates
    bias = layer.bias is not None and layer.bias in shapes

    def make() -> WeightedPlan:
        value = Value((0,) * rank, ids, state, data=(0, ()))
        outcome = weighted(_Dry(), value, layer, None if masker is None else atoms(masker), *channels, bias)
        uses = weighted_uses(layer, outcome, shapes, *channels)
        return WeightedPlan(outcome.x.data[1], outcome.out, tuple(uses), (ids_key(outcome.rows), ids_key(outcome.cols)))

    key = ("weighted", layer, rank, ids_key(ids), state, masker and masker.key, channels, tuple(sorted(shapes.items())))
    return _plans.get_or(key, make)


@dataclass(frozen=True, eq=False)
class RecurrentPlan:
    """The same for a recurrent layer: masks for its input and each state, gates of each result."""

    masks: tuple[tuple[tuple[bool, float, Tensor], ...], ...]
    out: tuple[Gates, ...]
    uses: tuple[Use, ...]
    key: tuple


def recurrent_plan(layer: Recurrent, operands: list[tuple], maskers: Mapping[str, Masker], shapes: dict) -> RecurrentPlan:
    """The plan of a recurrent layer; ``operands`` are ``(shape, dtype, ids, state)`` of its input and its states."""

    def make() -> RecurrentPlan:
        values = [
            Value(shape, ids, state, data=(number, ()), dtype=dtype) for number, (shape, dtype, ids, state) in enumerate(operands)
        ]
        states = tuple(values[1:]) if layer.memory else values[1] if len(values) > 1 else None
        own = {name: atoms(masker) for name, masker in maskers.items()}
        outcome = recurrent(_Dry(), layer, Call("recurrent", None, (values[0], states or None), {}), own)
        after = pytree.tree_leaves(outcome.args, is_leaf=lambda a: isinstance(a, Value))
        uses = recurrent_uses(layer, own, outcome.cols, shapes)
        return RecurrentPlan(tuple(v.data[1] for v in after), tuple(outcome.out), tuple(uses), (ids_key(outcome.cols),))

    known = tuple((shape, dtype, ids_key(ids), state) for shape, dtype, ids, state in operands)
    key = ("recurrent", layer, known, tuple(m.key for m in maskers.values()), tuple(sorted(shapes.items())))
    return _plans.get_or(key, make)


def atoms(masker: Masker) -> Tensor:
    """The gates of a masker's channels."""
    _SIZES[masker.key] = masker.channels
    return TABLE.atoms(masker.key, masker.channels)


def record(seen: dict, made: WeightedPlan | RecurrentPlan) -> None:
    """Notes how a layer was used. Past ``MOST_USES`` ways it counts as used in every way, which locks all of it."""
    if made.key in seen or "every way" in seen:
        return
    if len(seen) < MOST_USES:
        seen[made.key] = list(made.uses)
        return
    seen.clear()
    seen["every way"] = [replace(u, rows=ones(len(u.shape)), cols=ones(len(u.shape))) for u in made.uses]


def program(ids: Tensor) -> Program:
    """The program that evaluates gates."""

    def make() -> Program:
        if not _compile or len(_programs) >= MOST_PLANS:  # the compiler keeps all that it made: start anew now and then
            _compile[:] = [compile_gates(TABLE, _SIZES)]
        return _compile[0](ids)

    return _programs.get_or(ids_key(ids), make)


def too_large(ids: Tensor) -> bool:
    """Whether gates have grown past the size at which they widen."""
    return _large.get_or(ids_key(ids), lambda: TABLE.too_large(ids))


def maskers_of(ids: Tensor) -> tuple[Masker, ...]:
    """The maskers that gates depend on; none where nothing is gated."""
    keys = _maskers.get_or(ids_key(ids), lambda: TABLE.maskers(ids))
    return tuple(MASKERS[key] for key in keys)


def mask_of(ids: Tensor, task: int, scale: float | None, device: torch.device) -> Tensor:
    """The mask that gates stand for: float32, the shape of ``ids``; soft with a scale, where a masker has not finished the task."""
    return evaluate(program(ids), lambda key: masker_of(key, task)(task, scale).to(device), {"device": device}).reshape(ids.shape)


def live(ids: Tensor, task: int) -> Tensor:
    """Which gates are live for the binary mask of ``task``: bool, the shape of ``ids``, on the CPU."""
    mask = evaluate(program(ids), lambda key: masker_of(key, task).live(task).float().cpu(), {})
    return (mask > 0).reshape(ids.shape)


def masker_of(key: str, task: int) -> Masker:
    """The masker of a key.

    Raises:
        TaskError: it has no such task.
    """
    return checked_masker(MASKERS[key], task)


def checked_masker(masker: Masker, task: int) -> Masker:
    """The same for a masker at hand."""
    checked_task(task, len(masker.embeddings))
    return masker


def checked_task(task: int, tasks: int) -> None:
    """Raises where there is no such task."""
    if not 0 <= task < tasks:
        raise TaskError(f"no task {task}", why=f"the network has the tasks 0 to {tasks - 1}", fix="HATPayload(x, task_id=0)")


def gates_of_result(gates: Gates | None, out: Tensor, name: str) -> tuple[Tensor, State]:
    """Ids and state of a result.

    Raises:
        TaskError: a rule gave gates that do not fit the result.
    """
    if gates is None or gates.ids is None or not bool((gates.ids > TOP).any()):
        return ones(out.dim()), State.CLEAN
    ids = gates.ids
    if ids.dim() != out.dim() or any(i not in (1, n) for i, n in zip(ids.shape, out.shape)):
        raise TaskError(
            f"the rule of {name} gave gates of shape {tuple(ids.shape)} for a result of shape {tuple(out.shape)}",
            fix=f"{name} on payload.data, and HATPayload(result, task_id=payload.task_id) again",
        )
    return ids, gates.state
