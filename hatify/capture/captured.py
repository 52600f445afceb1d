"""What a capture is: a graph of leaves and glue, and what it assumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hatify.calling import Signature, Structure


@dataclass(frozen=True)
class FixedSize:
    """A size that the capture could not keep open: the model itself, or its code, needs it."""

    input: str
    dim: int
    size: int


@dataclass(frozen=True)
class ShapeGuard:
    """A condition on input sizes that the model's own code branched on, with the line that did.

    ``symbols`` maps a symbol to (input number, dimension). ``doubted`` has every such place of each symbol where only sizes of zero and
    one break the condition: see :func:`hatify.proof.small_sizes.settle`.
    """

    text: str
    line: str
    expression: Any
    symbols: dict[str, tuple[int, int]]
    doubted: dict[str, list[tuple[int, int]]] | None = None

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether the condition is true of the sizes of these inputs."""
        values = {s: tensors[self.symbols[str(s)][0]].shape[self.symbols[str(s)][1]] for s in self.expression.free_symbols}
        return is_true(self.expression, values)


def is_true(condition: Any, sizes: dict[Any, Any]) -> bool:
    """Whether a condition on symbols is true of these sizes; what cannot be computed (a division by an empty size) is not."""
    try:
        return bool(condition.subs(sizes))
    except (ArithmeticError, TypeError):
        return False


@dataclass
class Captured:
    """One mode's graph. Its nodes: placeholders (one per input tensor), ``get_attr`` of parameters, buffers and constants,
    ``call_module`` of leaves, ``call_function`` of functional ATen operators and of integer arithmetic on sizes.

    ``node.meta`` holds ``val`` (fake tensors or integers), ``scope`` (module path) and ``line`` (source line).
    ``writes`` are buffers with the node whose value they take at the end; ``constants`` are tensors that no module holds.
    ``eval_only`` says that train mode could not be captured, ``open_sizes`` that all sizes were left open to the exporter, ``repeats``
    that calls that are alike could be traced once. ``asks`` are the places where the model's code asks whether gradients are on, by
    mode (True: train mode); ``own_modes`` the modules that the model's own ``train()`` and ``eval()`` leave in the other mode,
    ``frozen`` the parameters that they freeze or thaw; ``kept`` are attributes of modules that forward puts tensors into,
    ``selections`` buffers whose values were taken for which elements a boolean index picks or which way a branch goes; ``reads`` the
    source lines that read the type of a tensor of real numbers (``reads_whole``: of another), ``unlike`` those that compute something
    else when the model runs in another way.
    """

    graph: fx.Graph
    signature: Signature
    output: Structure
    inputs: list[Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)
    writes: dict[str, fx.Node] = field(default_factory=dict)
    fixed_sizes: list[FixedSize] = field(default_factory=list)
    guards: list[ShapeGuard] = field(default_factory=list)
    leaves: dict[str, torch.nn.Module] = field(default_factory=dict)
    eval_only: bool = False
    open_sizes: bool = True
    repeats: bool = True
    asks: dict[bool, list[str]] = field(default_factory=dict)
    own_modes: dict[bool, list[str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    selections: dict[str, Tensor] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    reads_whole: list[str] = field(default_factory=list)
    unlike: dict[Way, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ByMode:
    """A constant argument that differs between the modes."""

    train: Any
    eval: Any


def with_numbers_by_mode(arguments: Any, by_mode: Any) -> Any:
    """The arguments of a node, with the numbers that ``by_mode`` (the same arguments) has by mode."""
    leaves, _ = pytree.tree_flatten_with_path(by_mode, is_leaf=lambda a: isinstance(a, ByMode))
    numbers = {path: leaf for path, leaf in leaves if isinstance(leaf, ByMode)}
    return pytree.tree_map_with_path(lambda path, a: numbers.get(path, a), arguments)


@dataclass(frozen=True)
class Way:
    """A type that a model may be cast to, and that of autocast around it (None: no autocast)."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        return f"in {self.dtype}" if self.autocast is None else f"under autocast to {self.autocast}"


@dataclass(frozen=True)
class Typed:
    """A constant argument that is taken from the type of ``source`` (None: that of the model's parameters): the type itself, one of
    its limits, or what ``choices`` have for it."""

    source: fx.Node | None
    limit: str | None = None
    choices: tuple[tuple[torch.dtype, Any], ...] = ()
