"""What a recurrent layer means to the algebra: one masker per layer and direction, folded into the weights that read its units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hatify.gates.layers import Layer
from hatify.gates.locks import Use
from hatify.gates.rules.base import Call, Gates, Interpreter, clean
from hatify.gates.rules.contractions import or_along
from hatify.gates.table import TOP
from hatify.gates.value import State, Value


@dataclass(frozen=True)
class Recurrent(Layer):
    """A layer whose units see their own last values: becomes HAT, with one masker per layer and direction over its units.

    A dead unit's value is not zero inside the recurrence, and no mask node can stand there. So a task's mask is folded into the
    *columns* of every weight that reads the units (the recurrent weight, the next layer's input weight, the projection).

    Args:
        blocks: rows of the weights per hidden unit (1 for a plain RNN, 3 for a GRU, 4 for an LSTM).
        hidden: hidden units of one layer and direction.
        projected: size that the hidden units are projected to (``proj_size``), or 0.
        layers: stacked layers.
        directions: 2 for a bidirectional layer.
        bias: whether there are biases.
        cell: one step, with parameters without a layer's number (``GRUCell``).
        memory: the state is ``(h, c)``.
    """

    blocks: int
    hidden: int
    projected: int = 0
    layers: int = 1
    directions: int = 1
    bias: bool = True
    cell: bool = False
    memory: bool = False


@dataclass(frozen=True)
class Stage:
    """One layer and direction: the maskers of its units and of what it passes on (the same without a projection), and those
    of the units that it reads besides its own (none: the layer's input)."""

    units: str
    passed: str
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """Which maskers the rows and the columns of one parameter belong to.

    ``rows`` repeats ``blocks`` times. ``cols`` None is a vector; no maskers at all are the layer's own input.
    """

    parameter: str
    rows: str
    blocks: int
    cols: tuple[str, ...] | None


def stages(layer: Recurrent) -> list[Stage]:
    """All layers and directions, in the order of torch's states."""
    found: list[Stage] = []
    for number in range(layer.layers):
        reads = tuple(s.passed for s in found[-layer.directions :])
        for direction in range(layer.directions):
            units = "units" if layer.cell else f"l{number}{'_reverse' if direction else ''}"
            found.append(Stage(units, f"{units}_projected" if layer.projected else units, reads))
    return found


def masker_sizes(layer: Recurrent) -> dict[str, int]:
    """The maskers of a layer: their channels by name."""
    sizes: dict[str, int] = {}
    for stage in stages(layer):
        sizes[stage.units] = layer.hidden
        if layer.projected:
            sizes[stage.passed] = layer.projected
    return sizes


def folds(layer: Recurrent) -> list[Fold]:
    """How every parameter of a layer reads and writes units."""
    found: list[Fold] = []
    for stage in stages(layer):
        suffix = "" if layer.cell else f"_{stage.units}"
        found.append(Fold(f"weight_ih{suffix}", stage.units, layer.blocks, stage.reads))
        found.append(Fold(f"weight_hh{suffix}", stage.units, layer.blocks, (stage.passed,)))
        if layer.bias:
            found += [Fold(f"bias_{side}{suffix}", stage.units, layer.blocks, None) for side in ("ih", "hh")]
        if layer.projected:
            found.append(Fold(f"weight_hr{suffix}", stage.passed, 1, (stage.units,)))
    return found


@dataclass(frozen=True, eq=False)
class RecurrentOutcome:
    """``args`` as the layer reads them (its input, and its states if given), the gates of its results in order, and the gates of
    the input's features, for locks."""

    args: tuple
    out: list[Gates]
    cols: Tensor


def recurrent(
    run: Interpreter,
    layer: Recurrent,
    call: Call,
    atoms: dict[str, Tensor],
    unmasked: Callable[[Value], Value] = lambda value: value,
) -> RecurrentOutcome:
    """The rule of a recurrent layer: its input is materialised; outputs and states leave with their masks pending.

    ``atoms`` are the gates of its maskers by name. A state whose gates are the layer's own stays pending (a cell called step after
    step): it reaches its own unit, and others through folded columns. ``unmasked`` gives the pending value that a state was
    materialised from, or the value itself, so that the soft factor does not gather from step to step.
    """
    x, states = call.argument(0, "input"), call.argument(1, "hx")
    x = clean(run, x)
    order = stages(layer)
    passed, units = [atoms[s.passed] for s in order], [atoms[s.units] for s in order]
    own = [passed, units] if layer.memory else [passed]
    rank = x.rank

    def state_ids(of: list[Tensor]) -> Tensor:
        ids = of[0] if layer.cell else torch.stack(of)
        return ids if ids.dim() == rank else ids.unsqueeze(-2)

    def settled(value: Value, ids: Tensor) -> Value:
        for held in (value, unmasked(value)):
            if held.state is State.PENDING and held.ids.shape == ids.shape and torch.equal(held.ids, ids):
                return held
        return clean(run, value)

    args: tuple[Any, ...] = (x,)
    if states is not None:
        given = states if layer.memory else (states,)
        kept = tuple(settled(value, state_ids(of)) for value, of in zip(given, own))
        args = (x, kept if layer.memory else kept[0])
    out = [Gates(state_ids(of), State.PENDING) for of in own]
    if not layer.cell:
        features = torch.cat(passed[-layer.directions :])
        out.insert(0, Gates(features.reshape((1,) * (rank - 1) + (-1,)), State.PENDING))
    return RecurrentOutcome(args, out, or_along(run.table, x.ids, rank - 1))


def recurrent_uses(layer: Recurrent, atoms: dict[str, Tensor], cols: Tensor, shapes: dict[str, tuple[int, ...]]) -> list[Use]:
    """How a recurrent layer uses its parameters: an element is needed where its own unit and the unit or feature that it reads
    are live. ``cols`` are the gates of the input's features, ``shapes`` those of the parameters."""
    uses = []
    for fold in folds(layer):
        rows = atoms[fold.rows].repeat(fold.blocks)
        if fold.cols is None:
            uses.append(Use(fold.parameter, rows, torch.full((1,), TOP), shapes[fold.parameter]))
            continue
        reads = torch.cat([atoms[name] for name in fold.cols]) if fold.cols else cols
        uses.append(Use(fold.parameter, rows.reshape(-1, 1), reads.reshape(1, -1), shapes[fold.parameter]))
    return uses
