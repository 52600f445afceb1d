"""What an analysis decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, fx

from hatify.gates import GateTable, Use, Value

HAT, ROW_LOCKED, TASK_INDEXED, FROZEN = "hat", "row-locked", "task-indexed", "frozen"
RUNGS = (HAT, ROW_LOCKED, TASK_INDEXED, FROZEN)


class _Computed:
    """A number at the example's inputs that remembers the node which computes it."""

    node: fx.Node

    def __new__(cls, value: float, node: fx.Node) -> Self:
        number = super().__new__(cls, value)
        number.node = node
        return number


class Size(_Computed, int):
    """A size that a node computes."""


class Ratio(_Computed, float):
    """A floating-point number computed from sizes."""


@dataclass(frozen=True, eq=False)
class Masked:
    """The handle of a materialised value: dead positions of ``value`` become ``fill``, live ones are multiplied if ``soft``."""

    value: Value
    soft: bool
    fill: float


def node_of(value: Value) -> fx.Node:
    """The node that made a value, behind the masks that it has had."""
    while isinstance(value.data, Masked):
        value = value.data.value
    return value.data


@dataclass(frozen=True, eq=False)
class Step:
    """What becomes of one node: its operands (handles are nodes or :class:`Masked`), and a live mask for a norm."""

    args: tuple
    kwargs: dict[str, Any]
    live: Value | None = None


@dataclass
class LayerPlan:
    """What a layer, or a raw parameter, becomes.

    ``role`` is ``hat`` (a masker of its own), ``through`` (depthwise: gates pass, no masker), ``shared-head`` (no mask on the
    output), ``head`` (task-indexed output layer), ``norm``, ``recurrent`` (several maskers), ``task-indexed`` or ``plain`` (nothing to
    protect).
    """

    path: str
    role: str
    rung: str
    reason: str = ""
    masker: str | None = None
    channels: int = 0


@dataclass
class Analysis:
    """The decisions for all graphs of one model. ``steps`` are by node, and by ``(node, "write")`` for what a buffer is given."""

    table: GateTable = field(default_factory=GateTable)
    sizes: dict[str, int] = field(default_factory=dict)
    steps: dict[Any, Step] = field(default_factory=dict)
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    parameters: dict[str, LayerPlan] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    operators: Counter = field(default_factory=Counter)
    unknown: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    class_heads: set[str] = field(default_factory=set)
    written_by: dict[Use, list[fx.Node | None]] = field(default_factory=dict)
    narrower: dict[Masked, Tensor] = field(default_factory=dict)

    def mask_ids(self, masked: Masked) -> Tensor:
        """The gates that a mask node applies once masks are binary: those of its value, or fewer where a reader needs no more."""
        return self.narrower.get(masked, masked.value.ids)

    def use(self, use: Use, node: fx.Node | None = None) -> None:
        """Records one more use of a parameter; a use seen before (a layer called twice alike) counts once.

        ``node`` is the call whose result it writes, None where its output is also read inside the layer.
        """
        known = self.uses.setdefault(use.parameter, [])
        for other in known:
            same = other.shape == use.shape and other.rows.shape == use.rows.shape and other.cols.shape == use.cols.shape
            if same and other.positions is use.positions and (other.rows == use.rows).all() and (other.cols == use.cols).all():
                self.written_by[other].append(node)
                return
        known.append(use)
        self.written_by[use] = [node]
