"""Which task the calls of a converted network are for, and what they need of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hatify.errors import TaskError
from hatify.learning import Guard
from hatify.learning.reading import Reading
from hatify.modules import Masker, TaskContext, TaskIndexed, TaskIndexedParameter
from hatify.modules.bank import Bank
from hatify.modules.masking import Gated
from hatify.modules.numbers import task_number
from hatify.modules.recurrent import HATRecurrent

LASTING = 4
"""How many finished tasks' masks are kept at a time."""


@torch.compiler.assume_constant_result
def _prepared(model: TaskContexts) -> bool:
    """Makes what compiled code cannot make, before it is traced."""
    model._prepare_programs()
    return True


class TaskContexts:
    """The part of a HAT model that knows the task of a call."""

    maskers: dict[str, Masker]
    _guard: Guard
    _active_task: int | None
    _kept_contexts = _last_context = _made_bank = _programs_prepared = None  # the class has these names, so no child hides them

    def context(self, task: int | None, mask_scale: float | None = None, *, reading: Reading | None = None) -> TaskContext | None:
        """The context of one forward pass; None without a task.

        A finished task's masks are binary whatever the scale; so are those of a task that is given no scale in eval mode. In train mode the
        default is ``config.max_mask_scale``; the task of a session gets the session's scale, in train mode or where gradients are on.
        ``reading`` is what the pass reads in place of the tensors.

        Raises:
            TaskError: no such task, or a scale that is not positive and finite.
        """
        if task is None:
            if mask_scale is not None:
                raise TaskError("a mask scale needs a task", fix="hat(x, task=0, mask_scale=20.0)")
            return None
        task = self.checked_task(task)
        if mask_scale is not None and not 0 < mask_scale < math.inf:
            raise TaskError(f"mask_scale must be positive and finite, not {mask_scale!r}", fix="hat(x, task=0, mask_scale=20.0)")
        if task in self.finished_tasks:
            mask_scale = None
        elif mask_scale is None:
            session = self._guard.session
            if session is not None and session.task == task and (self.training or torch.is_grad_enabled()):
                mask_scale = session.scale_tensor
            elif self.training:
                mask_scale = self.config.max_mask_scale
        if torch.compiler.is_compiling():
            _prepared(self)
            maskers = self.maskers
            return TaskContext(task, mask_scale, lambda name: maskers[name](task, mask_scale), hard=mask_scale is None)
        if mask_scale is None and self._lasts(task):
            return self._lasting(task, reading)
        self._now_in_use(None)
        masks = self._bank.masks(task, mask_scale)
        return TaskContext(task, mask_scale, None, hard=mask_scale is None, masks=masks)

    def binary_context(self, task: int) -> TaskContext:
        """The context of a task as if it were finished: its masks binary, computed from its embeddings where they are needed."""
        maskers = self.maskers
        return TaskContext(task, None, lambda name: maskers[name](task, None), hard=True)

    def binary_masks(self, task: int) -> dict[str, Tensor]:
        """The masks of a task as if it were finished, by masker: zeros and ones of shape ``(channels,)``, on the CPU."""
        return {name: masker.live(task).float().cpu() for name, masker in self.maskers.items()}

    def _lasts(self, task: int) -> bool:
        """Whether the masks of ``task`` are what they were: its embeddings are protected, and nobody looks on who would want to see
        them made, nor a transform of ``torch.func``, to which all belongs that is made within."""
        guard = self._guard
        alone = not _get_current_dispatch_mode_stack() and torch._C._functorch.peek_interpreter_stack() is None
        return task in guard.protection.tasks and not guard.is_open and alone

    def _lasting(self, task: int, reading: Reading | None) -> TaskContext:
        """The context of a finished task, made once. Writes to a finished task's embeddings are undone before its next pass, so its
        masks change only with what is protected, or where an embedding is another tensor for a while (``functional_call``)."""
        known = self._guard.generation, self._bank.state(task)
        fixed = None if reading is None or reading.rest else reading.fixed
        kept = self.__dict__.setdefault("_kept_contexts", {})
        key = task, fixed is not None
        found = kept.pop(key, None)
        if found is None or found[0] != known:
            with torch.inference_mode(False), torch.no_grad():
                masks = self._bank.masks(task, None)
            found = known, TaskContext(task, None, None, hard=True, masks=masks, lasting=True, fixed=fixed)
        kept[key] = found  # the last used one is the last
        while len(kept) > LASTING:
            kept.pop(next(iter(kept)))
        self._now_in_use(found[1])
        return found[1]

    def _now_in_use(self, context: TaskContext | None) -> None:
        """Weights with masks in them are kept where one finished task is evaluated pass after pass, and nowhere else: they are as large as
        the weights."""
        last = self.__dict__.get("_last_context")
        if last is not context:
            if last is not None:
                last.forget_made()
            self.__dict__["_last_context"] = context
        elif context is not None:
            context.keeps = context.carries

    def _for_compiler(self, context: TaskContext | None) -> TaskContext | None:
        """The same with tensors and modules only: a number would be a constant that the code is compiled for."""
        if context is None:
            return None
        self._prepare_programs()
        chosen = [m.tasks[context.id] if isinstance(m, TaskIndexed) else m.of(context.id) for m in self._holders]
        return TaskContext(None, None, None, context.hard, chosen=chosen, masks=context.masks)

    def _prepare_programs(self) -> None:
        if not self.__dict__.get("_programs_prepared"):
            seen: set[Any] = set()
            for module in self.modules():
                for program in module.programs if isinstance(module, Gated) else ():
                    program.prepare(seen)
            self.__dict__["_programs_prepared"] = True

    @property
    def _bank(self) -> Bank:
        """All maskers that a pass reads."""
        found = self.__dict__.get("_made_bank")
        if found is None:
            read: set[str] = set()
            seen: set[Any] = set()
            for module in self.modules():
                if isinstance(module, Gated):
                    for program in module.programs:
                        program.collect(read, seen)
                elif isinstance(module, HATRecurrent):
                    read.update(f"{module.masker_path}.{name}" for name in module.maskers)
            found = self.__dict__["_made_bank"] = Bank({n: m for n, m in self.maskers.items() if n in read})
        return found

    def _number_copies(self) -> None:
        """Gives every module that holds copies its place in a context's ``chosen``."""
        holders = [m for m in self.modules() if isinstance(m, TaskIndexed | TaskIndexedParameter)]
        for slot, module in enumerate(holders):
            module.__dict__["_hat_slot"] = slot
        self.__dict__["_holders"] = holders

    def checked_task(self, task: Any) -> int:
        """``task`` as an integer in range.

        Raises:
            TaskError: it is not.
        """
        number = task_number(task)
        if not 0 <= number < self.config.num_tasks:
            raise TaskError(
                f"no task {task!r}", why=f"the model has the tasks 0 to {self.config.num_tasks - 1}", fix="hat(x, task=0)"
            )
        return number

    @property
    def active_task(self) -> int | None:
        """The task of calls that name none; None is the original network."""
        return self._active_task

    @active_task.setter
    def active_task(self, task: int | None) -> None:
        self._active_task = None if task is None else self.checked_task(task)
