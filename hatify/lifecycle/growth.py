"""More tasks than were planned, without touching the old ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hatify.conversion import check_class_heads, task_counts
from hatify.errors import TaskError
from hatify.learning.network import network_of
from hatify.modules import TaskIndexed
from hatify.modules.task_indexed import task_copy
from hatify.rewrite.surgery import take_class_count

if TYPE_CHECKING:
    from hatify.model import HATModel


def grow(hat: HATModel, tasks: int | Sequence[int | None], optimizer: Optimizer | Iterable[Optimizer] | None) -> list[int]:
    """See :meth:`HATModel.add_tasks`."""
    added, classes = task_counts(tasks, fix="hat.add_tasks(2) or hat.add_tasks([2, 3])")
    if hat._guard.session is not None:
        raise TaskError(
            f"task {hat._guard.session.task} is being learned",
            why="what its session protects was worked out for the tasks there are",
            fix="hat.finish_task() or hat.abandon_task() first",
        )
    old = hat.config.num_tasks
    new = list(range(old, old + added))
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    siblings = [_siblings(hat, task) for task in reversed(range(old))]
    groups = [_groups(o, siblings) for o in optimizers]
    copies = _copies(hat, added, classes)  # all that may be refused comes before anything is changed
    with hat._guard.opened():
        _extend(hat, added, copies)
        _tell(hat, new, classes)
    for each, found in zip(optimizers, groups):
        _add_groups(hat, each, found, new)
    return new


def _copies(hat: HATModel, added: int, classes: list[int | None] | None) -> list[tuple[TaskIndexed, list[nn.Module]]]:
    """The new copies of every task-indexed module, made as a conversion makes them."""
    analysis = hat._facts.analysis
    if classes is not None and any(count is not None for count in classes):
        check_class_heads(analysis, fix=f"hat.add_tasks({added})")
    heads = {
        id(hat.get_submodule(p)): p for p, plan in analysis.layers.items() if plan.role == "head" and p in analysis.class_heads
    }
    found = []
    for module in network_of(hat).indexed():
        copies = [task_copy(module) for _ in range(added)]
        path = heads.get(id(module))
        for copied, count in zip(copies, classes or ()):
            if path is not None:
                take_class_count(path, module, copied, count)
        found.append((module, copies))
    return found


def _extend(hat: HATModel, added: int, copies: list[tuple[TaskIndexed, list[nn.Module]]]) -> None:
    for masker in hat.maskers.values():
        masker.grow(added)
    for module, more in copies:
        module.tasks.extend(more)
    for indexed, value in network_of(hat).raw():
        indexed.grow(added, value)


def _tell(hat: HATModel, new: list[int], classes: list[int | None] | None) -> None:
    """All that knows how many tasks there are. What copies of the model share is replaced, not changed."""
    facts = hat._facts
    count = new[-1] + 1
    known = facts.settings["classes"]
    if known is not None or classes is not None:
        known = [*(known or [None] * new[0]), *(classes or [None] * len(new))]
    config = replace(facts.config, num_tasks=count)
    settings = {**facts.settings, "tasks": count, "classes": known, "config": asdict(config)}
    hat._learn(config=config, settings=settings)
    hat.room.status.tasks = count
    if hat.report is not None:
        hat.report = replace(hat.report, tasks=count, classes=list(known or [None] * count))


# optimizers


def _siblings(hat: HATModel, task: int) -> dict[str, Tensor]:
    """What belongs to one task alone and is trained, by a name that says nothing of the task."""
    found: dict[str, Tensor] = {f"masker {name}": masker.embeddings[task] for name, masker in hat.maskers.items()}
    for number, module in enumerate(network_of(hat).indexed()):
        found.update({f"module {number} {name}": p for name, p in module.tasks[task].named_parameters()})
    for number, (copies, _) in enumerate(network_of(hat).raw()):
        if not copies.buffer:
            found[f"raw {number}"] = copies.of(task)
    return found


def _groups(optimizer: Optimizer, siblings: list[dict[str, Tensor]]) -> dict[int, list[str]]:
    """Which of what belongs to a task stands in which param group, for the first of ``siblings`` that is in one."""
    place = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    found: dict[int, list[str]] = {}
    for name in siblings[0]:
        held = [place[id(task[name])] for task in siblings if id(task[name]) in place]
        if held:
            found.setdefault(held[0], []).append(name)
    if not found:
        raise TaskError(
            "the optimizer holds nothing that belongs to a task",
            why="new masks and copies go into groups like those of the other tasks'",
            fix="hat.add_tasks(n), then optimizer.add_param_group(...) or a new optimizer for hat.parameters()",
        )
    return found


def _add_groups(hat: HATModel, optimizer: Optimizer, groups: dict[int, list[str]], new: list[int]) -> None:
    """For every group that holds masks or copies of other tasks one more with the same settings, for those of the new tasks."""
    named = {id(p): name for name, p in hat.named_parameters()}
    parameters = [_siblings(hat, task) for task in new]
    for number, names in groups.items():
        like = optimizer.param_groups[number]
        settings: dict[str, Any] = {k: v for k, v in like.items() if k not in ("params", "param_names")}
        more = [found[name] for found in parameters for name in names]
        if "param_names" in like:
            more = [(named[id(p)], p) for p in more]
        optimizer.add_param_group({**settings, "params": more})
