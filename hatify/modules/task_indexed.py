"""What tasks cannot share: one copy per task, next to the one that is used without a task."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hatify.errors import TaskError
from hatify.modules import live_norms
from hatify.modules.calls import copy_of_task
from hatify.modules.carrying import ChannelMask, norm_with
from hatify.modules.config import HATConfig, config_of
from hatify.modules.context import TaskContext
from hatify.modules.copies import copy_module
from hatify.modules.payload import HATPayload, norm_of_payload
from hatify.modules.replacing import AsksBeforeReplacing


class TaskIndexed(AsksBeforeReplacing):
    """Mixin of task-indexed modules: the module itself serves calls without a task, ``tasks[t]`` serves task ``t``.

    So the original keys stay: ``bn1.weight`` without a task, ``bn1.tasks.3.weight`` for task 3. A call of a task with a
    ``mask`` gives the result with that mask on its channels.
    """

    takes_payloads = True
    tasks: nn.ModuleList
    plain_class: type[nn.Module]

    def forward(
        self,
        x: Any,
        *args: Any,
        task: TaskContext | None = None,
        live: Tensor | None = None,
        mask: ChannelMask | None = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(x, HATPayload):
            return norm_of_payload(self, x, args, kwargs)
        if task is None and live is None:
            return super().forward(x, *args, **kwargs)
        chosen = self if task is None else task.copy_of(self, self.tasks.__getitem__)

        def call(norm: nn.Module) -> Any:
            return norm(x, *args, **kwargs) if live is None else live_norms.of_module(norm, x, live)

        return call(chosen) if mask is None else norm_with(chosen, mask, x, call)


@cache
def task_indexed_class(base: type[nn.Module]) -> type:
    """The task-indexed subclass of a module class: ``TaskIndexed`` + its name."""

    def __init__(self, *args: Any, config: HATConfig | None = None, **kwargs: Any) -> None:
        args, config = config_of(args, config)
        base.__init__(self, *args, **kwargs)
        make_task_indexed(self, config.num_tasks)

    name = f"TaskIndexed{base.__name__}"
    doc = f"{base.__name__} with one copy per task; arguments as {base.__name__}, then ``config`` (:class:`HATConfig`)."
    return type(name, (TaskIndexed, base), {"__init__": __init__, "plain_class": base, "__doc__": doc, "__module__": __name__})


def make_task_indexed(module: nn.Module, tasks: int) -> None:
    """Gives ``module`` one copy of itself per task (no write to one shows in another) and the task-indexed class."""
    copies = [task_copy(module) for _ in range(tasks)]
    if not isinstance(module, TaskIndexed):
        module.__class__ = task_indexed_class(module.__class__)
    module.tasks = nn.ModuleList(copies)
    module.tasks.training = module.training


def task_copy(module: nn.Module) -> nn.Module:
    """A copy of a module as it is without a task, for one task: no write to one shows in the other; its plain class, no gradients."""
    tasks = module._modules.pop("tasks", None) if isinstance(module, TaskIndexed) else None
    try:
        copied = copy_module(module)
    finally:
        if tasks is not None:
            module._modules["tasks"] = tasks
    copied.__class__ = type(module).plain_class if isinstance(module, TaskIndexed) else module.__class__
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


TaskIndexedBatchNorm1d = task_indexed_class(nn.BatchNorm1d)
TaskIndexedBatchNorm2d = task_indexed_class(nn.BatchNorm2d)
TaskIndexedBatchNorm3d = task_indexed_class(nn.BatchNorm3d)
TaskIndexedLayerNorm = task_indexed_class(nn.LayerNorm)
TaskIndexedGroupNorm = task_indexed_class(nn.GroupNorm)


class TaskIndexedParameter(nn.Module):
    """A raw parameter or buffer with one copy per task.

    In a hand-written network it holds the value without a task too: ``TaskIndexedParameter(torch.zeros(64), config)``, read by
    ``self.scale(payload)``. In a converted one the value without a task stays where the original had it.

    Args:
        value: the initial value, any shape; copied for every task.
        config: number of tasks.
        shared: False where the value without a task lives elsewhere.
        buffer: hold buffers instead of parameters.
    """

    takes_payloads = True

    def __init__(self, value: Tensor, config: HATConfig, *, shared: bool = True, buffer: bool = False) -> None:
        super().__init__()
        self.buffer = buffer
        self.count = config.num_tasks
        if shared:
            self.shared = nn.Parameter(value.detach().clone())
        if buffer:
            for task in range(config.num_tasks):
                self.register_buffer(f"task{task}", value.detach().clone())
        else:
            grad = getattr(value, "requires_grad", True) or not isinstance(value, nn.Parameter)
            self.tasks = nn.ParameterList(nn.Parameter(value.detach().clone(), grad) for _ in range(config.num_tasks))

    def of(self, task: int) -> Tensor:
        """The copy of one task."""
        return getattr(self, f"task{task}") if self.buffer else self.tasks[task]

    def grow(self, tasks: int, value: Tensor) -> None:
        """Copies of ``value`` for ``tasks`` more tasks."""
        for task in range(self.count, self.count + tasks):
            copied = value.detach().clone()
            if self.buffer:
                self.register_buffer(f"task{task}", copied)
            else:
                self.tasks.append(nn.Parameter(copied, value.requires_grad or not isinstance(value, nn.Parameter)))
        self.count += tasks

    def forward(self, *given: Any) -> Tensor:
        """``(value without a task, context)`` in a converted network; a payload, or nothing, in a hand-written one."""
        if len(given) == 2:
            value, task = given
            return value if task is None else task.copy_of(self, self.of)
        if not given or given[0] is None:
            return self.shared
        if isinstance(given[0], HATPayload):
            return self.shared if given[0].task_id is None else copy_of_task(self.of, self.count, given[0].task_id)
        raise TaskError("a TaskIndexedParameter is read with a payload", fix="self.scale(payload)")


def write_buffer(current: Tensor, value: Tensor) -> Tensor:
    """Writes a buffer's new value in place, as the original's forward did."""
    with torch.no_grad():
        return current.copy_(value)
