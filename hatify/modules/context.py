"""Which task a forward pass is for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hatify.gates import Program, evaluate


class TaskContext:
    """One forward pass: the task, the scale, and the masks evaluated so far.

    A context lives for one pass, so no mask outlives a change of its embedding. ``id`` is the task; ``scale`` is None for
    binary masks.
    """

    def __init__(self, task: int, scale: float | None, mask_of: Callable[[str], Tensor], hard: bool) -> None:
        self.id, self.scale, self.hard = task, scale, hard
        self._mask_of = mask_of
        self._atoms: dict[str, Tensor] = {}
        self._memo: dict = {}

    def atom(self, masker: str) -> Tensor:
        """One masker's mask: float32, shape ``(channels,)``."""
        if masker not in self._atoms:
            self._atoms[masker] = self._mask_of(masker)
        return self._atoms[masker]

    def mask(self, program: Program) -> Tensor:
        """The mask that a gate program stands for: float32, shape ``(program.size,)``."""
        return evaluate(program, self.atom, self._memo)
