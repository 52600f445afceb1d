"""What a converted network has once per task: copies of norms, heads, raw parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hatify.facts import Facts
from hatify.modules import TaskIndexed, TaskIndexedParameter


class TaskCopies:
    """The part of a HAT model that knows the copies of its tasks, and what they are copies of."""

    _facts: Facts

    def copy_to_tasks(self, tasks: Any) -> None:
        """Copies the state without a task into the task copies of ``tasks``, where shapes agree (a head of another class count
        keeps its own)."""
        with torch.no_grad():
            for task in tasks:
                for module in self.modules():
                    if isinstance(module, TaskIndexed):
                        mine = {k: v for k, v in module.state_dict(keep_vars=True).items() if not k.startswith("tasks.")}
                        for key, value in module.tasks[task].state_dict(keep_vars=True).items():
                            if value.shape == mine[key].shape:
                                value.copy_(mine[key])
                for name in (*self._facts.indexed, *self._facts.indexed_buffers):
                    self.indexed(name).of(task).copy_(_attribute(self, name))

    def indexed(self, name: str) -> TaskIndexedParameter:
        """The task copies of a raw parameter or buffer, by its original name."""
        return self.get_submodule(self._facts.indexed_paths[name])

    def task_copies(self) -> list[tuple[list[Tensor], Callable[[int], list[Tensor]]]]:
        """Everything that has one copy per task: the tensors without a task, and a function from a task to its tensors."""
        found = []
        for module in self.modules():
            if isinstance(module, TaskIndexed):
                found.append((_shared(module), lambda t, m=module: [*m.tasks[t].parameters(), *m.tasks[t].buffers()]))
        for name in (*self._facts.indexed, *self._facts.indexed_buffers):
            copies = self.indexed(name)
            found.append(([_attribute(self, name)], lambda t, copies=copies: [copies.of(t)]))
        return found

    def original_state(self) -> dict[str, Tensor]:
        """Parameters and buffers without a task, by the original's names (buffers that are not saved included)."""
        return {n: _attribute(self, n) for n in self._facts.original_names}


def _shared(module: TaskIndexed) -> list[Tensor]:
    """The parameters and buffers that a layer has besides its task copies; these are not looked at, there may be many."""
    parts = [child for name, child in module.named_children() if name != "tasks"]
    parameters = [p for p in module._parameters.values() if p is not None] + [p for part in parts for p in part.parameters()]
    buffers = [b for b in module._buffers.values() if b is not None] + [b for part in parts for b in part.buffers()]
    return [*{id(t): t for t in (*parameters, *buffers)}.values()]


def _attribute(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner)
    return owner._parameters[attribute] if attribute in owner._parameters else owner._buffers[attribute]
