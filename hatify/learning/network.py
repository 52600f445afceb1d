"""What learning needs to know of a network, converted or written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from hatify.errors import TaskError
from hatify.modules import HATLayer, Masker, TaskIndexed, TaskIndexedParameter, hand_written
from hatify.modules.masker import FINISHED, tasks_in
from hatify.modules.numbers import task_number


class Network:
    """A network written by hand from HAT layers; a HAT model answers the same questions from what its conversion knows."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        inner = next((n for n, m in module.named_modules() if network_of.dispatch(type(m)) is not Network), None)
        if inner is not None:
            raise TaskError(
                f"{type(module).__name__} wraps a HAT model",
                where=inner,
                why="sessions belong to the model itself",
                fix="hat.learning(...) of the model that was wrapped; calls go through the wrapper as ever",
            )
        self.maskers: dict[str, Masker] = {}
        for name, found in module.named_modules():
            if isinstance(found, Masker):
                self.maskers[name.removesuffix(".masker")] = found
        if not self.maskers:
            raise TaskError(
                f"{type(module).__name__} has no HAT layers",
                fix="hatify.convert(model), or build it from hatify.HATLinear and others",
            )
        self.tasks = min(len(m.embeddings) for m in self.maskers.values())

    def checked(self, task: int) -> int:
        """``task``, in range.

        Raises:
            TaskError: it is not.
        """
        number = task_number(task)
        if not 0 <= number < self.tasks:
            raise TaskError(f"no task {task!r}", why=f"the network has the tasks 0 to {self.tasks - 1}", fix="task=0")
        return number

    @property
    def finished(self) -> set[int]:
        return set.intersection(*(m.finished for m in self.maskers.values()))

    def marks(self, state_dict: Mapping[str, Any], prefix: str) -> set[int] | None:
        """The finished tasks of a checkpoint, or None where it does not say."""
        paths = [n for n, m in self.module.named_modules() if isinstance(m, Masker)]
        found = [state_dict.get(f"{prefix}{path}._extra_state") for path in paths]
        found = [tasks_in(marks, FINISHED) for marks in found if marks is not None]
        return set.intersection(*found) if found else None

    overwriting = "load into a network that was built anew"
    """What to do where loading would overwrite finished tasks."""

    def rest(self) -> None:
        """Finished tasks' norms and heads stay in eval mode, so that a replay leaves their statistics alone."""
        for module in self.indexed():
            for task in self.finished:
                if module.tasks[task].training:
                    module.tasks[task].eval()

    @property
    def begun(self) -> set[int]:
        """Tasks that a session has begun, and none has finished."""
        return set.union(*(m.begun for m in self.maskers.values()))

    def mark(self, task: int, finished: bool, begun: bool = False) -> None:
        """Makes the masks of ``task`` binary for good, or soft again: of a task that was ``begun``, or of one never trained."""
        for masker in self.maskers.values():
            _mark(masker, task, finished, begun)
        for module in self.indexed():
            module.tasks[task].train(module.training and not finished)

    def indexed(self) -> list[TaskIndexed]:
        """Task-indexed modules."""
        return [m for m in self.module.modules() if isinstance(m, TaskIndexed)]

    def locks(self, tasks: Iterable[int]) -> dict[str, Tensor]:
        """Elements of every shared parameter that ``tasks`` need: bool, by name."""
        return hand_written.locks(self.module, tasks)

    def embeddings(self, task: int) -> list[nn.Parameter]:
        """The mask embeddings of ``task``."""
        return [m.embeddings[task] for m in self.maskers.values()]

    def copies(self, task: int | None) -> list[Tensor]:
        """Parameters and buffers that ``task`` alone uses, embeddings aside; those without a task for None."""
        found: list[Tensor] = []
        for module in self.module.modules():
            if isinstance(module, TaskIndexed):
                inside = {id(t) for m in module.tasks for t in (*m.parameters(), *m.buffers())}
                chosen = module if task is None else module.tasks[task]
                found += [t for t in (*chosen.parameters(), *chosen.buffers()) if task is not None or id(t) not in inside]
            elif isinstance(module, TaskIndexedParameter):
                if task is not None:
                    found.append(module.of(task))
                elif hasattr(module, "shared"):
                    found.append(module.shared)
        return found

    def raw(self) -> list[tuple[TaskIndexedParameter, Tensor | None]]:
        """Raw parameters and buffers with one copy per task, and their value without a task, if they have one."""
        found = [m for m in self.module.modules() if isinstance(m, TaskIndexedParameter)]
        return [(m, getattr(m, "shared", None)) for m in found]

    def plain(self, path: str) -> nn.Module:
        """The module at ``path`` with the class that its author gave it; its tensors may be on the meta device."""
        return self.module.get_submodule(path)

    def copy_to(self, task: int, source: int | None) -> None:
        """Copies the state of ``source`` (None: without a task) into the copies of ``task``, where shapes agree."""
        with torch.no_grad():
            for module in self.indexed():
                chosen = module if source is None else module.tasks[source]
                values = {k: v for k, v in chosen.state_dict(keep_vars=True).items() if not k.startswith("tasks.")}
                for key, mine in module.tasks[task].state_dict(keep_vars=True).items():
                    if key in values and values[key].shape == mine.shape:
                        mine.copy_(values[key])
            for module in self.module.modules():
                if isinstance(module, TaskIndexedParameter):
                    value = module.of(source) if source is not None else getattr(module, "shared", None)
                    if value is not None:
                        module.of(task).copy_(value)


def _mark(holder: Any, task: int, finished: bool, begun: bool) -> None:
    (holder.finished.add if finished else holder.finished.discard)(task)
    (holder.begun.add if begun and not finished else holder.begun.discard)(task)


class Converted(Network):
    """The same for a HAT model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def maskers(self) -> dict[str, Masker]:
        return self.module.maskers

    @property
    def tasks(self) -> int:
        return self.module.config.num_tasks

    @property
    def finished(self) -> set[int]:
        return self.module.finished_tasks

    overwriting = "hat.load_state_dict(state_dict, overwrite=True) if that is what you want"

    def marks(self, state_dict: Mapping[str, Any], prefix: str) -> set[int] | None:
        marks = state_dict.get(f"{prefix}{self.module._facts.room}.status._extra_state")
        return None if marks is None else tasks_in(marks, FINISHED)

    @property
    def begun(self) -> set[int]:
        return self.module.room.status.begun

    def mark(self, task: int, finished: bool, begun: bool = False) -> None:
        _mark(self.module.room.status, task, finished, begun)
        super().mark(task, finished, begun)

    def locks(self, tasks: Iterable[int]) -> dict[str, Tensor]:
        return self.module.locks(tasks)

    def copies(self, task: int | None) -> list[Tensor]:
        return [t for plain, of in self.module.task_copies() for t in (plain if task is None else of(task))]

    def raw(self) -> list[tuple[TaskIndexedParameter, Tensor | None]]:
        hat, facts = self.module, self.module._facts
        held = [(n, hat.get_parameter(n)) for n in facts.indexed] + [(n, hat.get_buffer(n)) for n in facts.indexed_buffers]
        return [(hat.indexed(name), value) for name, value in held]

    def plain_parameters(self) -> set[str]:
        """Names of shared parameters that torch's own layers alone use, as HAT layers, element by element: no normaliser and no
        formula joins some with others."""
        modules = self.module.named_modules()
        layers = {p for p, m in modules if isinstance(m, HATLayer) and m.plain_class.__module__.startswith("torch.nn.")}
        return {
            name
            for name, uses in self.module._facts.uses.items()
            if all(u.site in layers and u.positions is None and u.groups is None and not u.grouped for u in uses)
        }

    def plain(self, path: str) -> nn.Module:
        reference = self.module._facts.reference  # None for a model that was loaded
        return (self.module if reference is None else reference).get_submodule(path)

    def copy_to(self, task: int, source: int | None) -> None:
        if source is None:
            self.module.copy_to_tasks([task])
        else:
            super().copy_to(task, source)


network_of = singledispatch(Network)
"""The view of a network that learning works on; raises TaskError where it has no HAT layers."""
