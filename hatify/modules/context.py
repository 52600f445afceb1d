"""Which task a forward pass is for."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from hatify.gates import Program, evaluate


class TaskContext:
    """What a forward pass knows of its task: the number, the scale, and the masks evaluated so far.

    A context of a task in training lives for one pass, so no mask outlives a change of its embedding; one that is ``lasting`` serves
    many, of a task whose masks do not change. ``id`` is the task; ``scale`` is None for binary masks.

    Args:
        task: its number.
        scale: the scale of its soft masks; None for binary ones.
        mask_of: gives a masker's mask by name, float32 of shape ``(channels,)``; or None, where ``masks`` has them all.
        hard: whether masks are binary.
        chosen: the copies of the task, at the ``_hat_slot`` of the module that holds them: what compiled code takes them from, in
            place of ``task`` and ``scale``, which are None then.
        masks: masks that are there already, by name.
        lasting: see above.
        fixed: for a pass that is sealed, which reads nothing that any task may still train: the ids of the tensors that it reads
            instead, and that stay as they are for as long as the context is used.

    Attributes:
        keeps: whether what is made of ``fixed`` tensors is kept for the next pass.
        carries: whether layers and norms may carry masks in their weights in this pass. Weights that a later task trains may overflow
            in a dead channel, and zero times infinity is NaN: for a finished task masks are applied where they stand, unless it is
            sealed.
    """

    def __init__(
        self,
        task: int | None,
        scale: float | Tensor | None,
        mask_of: Callable[[str], Tensor] | None,
        hard: bool,
        *,
        chosen: Sequence[Any] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        lasting: bool = False,
        fixed: Container[int] | None = None,
    ) -> None:
        self.id, self.scale, self.hard = task, scale, hard
        self.chosen, self._lasting = chosen, lasting
        self.keeps, self._fixed = False, () if fixed is None else fixed
        self.carries = (fixed is not None or not hard) and chosen is None and not torch.compiler.is_compiling()
        self._mask_of = mask_of
        self._atoms: dict[str, Tensor] = dict(masks or {})
        self._memo: dict = {}
        self._derived: dict = {}
        self._made: dict = {}

    def atom(self, masker: str) -> Tensor:
        """One masker's mask: float32, shape ``(channels,)``."""
        if masker not in self._atoms:
            self._atoms[masker] = self._mask_of(masker)
        return self._atoms[masker]

    def mask(self, program: Program) -> Tensor:
        """The mask that a gate program stands for: float32, shape ``(program.size,)``."""
        if program in self._memo:
            return self._memo[program]
        with self._for_all():
            return evaluate(program, self.atom, self._memo)

    def derived(
        self, program: Program, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[Tensor], Tensor], *more: Any
    ) -> Tensor:
        """What ``make`` gives for a mask in a shape, made once; ``more`` tells apart what is made for the same shape and type."""
        key = program, shape, dtype, *more
        found = self._derived.get(key)
        if found is None:
            with self._for_all():
                found = self._derived[key] = make(self.mask(program).reshape(shape))
        return found

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor stays as it is for as long as the context is used."""
        return id(tensor) in self._fixed

    def made_of(self, tensor: Tensor, make: Callable[[Tensor], Tensor], *key: Any) -> Tensor:
        """What ``make`` gives of a tensor; of a fixed one it is made once, if the context ``keeps`` it. ``key`` tells what is made."""
        if not self.keeps or not self.is_fixed(tensor):
            return make(tensor)
        found = self._made.get((id(tensor), *key))
        if found is None:
            with self._for_all():
                found = self._made[id(tensor), *key] = make(tensor)
        return found

    def forget_made(self) -> None:
        """What :meth:`made_of` kept is made anew, and kept no more."""
        self._made.clear()
        self.keeps = False

    def _for_all(self) -> AbstractContextManager:
        """What is made here once serves all that ask for it: later passes with gradients if the context is lasting, else the rest of
        the pass behind a region without gradients."""
        if self._lasting:
            made = ExitStack()
            made.enter_context(torch.inference_mode(False))
            made.enter_context(torch.no_grad())
            return made
        return nullcontext() if torch.is_grad_enabled() else torch.enable_grad()

    def copy_of(self, holder: Any, of: Callable[[int], Any]) -> Any:
        """The task's copy of what tasks cannot share; ``of`` gives that of any task of ``holder``."""
        return of(self.id) if self.chosen is None else self.chosen[holder._hat_slot]

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The maskers' masks that are there already, by name."""
        return self._atoms

    def again(self) -> TaskContext:
        """The same for one more pass, with nothing evaluated yet."""
        return TaskContext(None, None, None, self.hard, chosen=self.chosen, masks=self._atoms)
