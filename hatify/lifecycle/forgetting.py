"""Forgetting single tasks: what only they use goes back to where it started; all other tasks stay equal to the last bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hatify.errors import TaskError, few
from hatify.learning.hooks import guard_of
from hatify.learning.network import Network, network_of
from hatify.lifecycle.forgotten import Count, Forgotten
from hatify.lifecycle.initial import default, drawn, drawn_copy, initialiser
from hatify.modules.continuous import is_continuous
from hatify.modules.numbers import task_number

RESETS = ("initial", "pretrained")


def forget_task(
    hat: nn.Module,
    task: int,
    *,
    dry_run: bool = False,
    reset: str = "initial",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Forgotten:
    """Forgets one task (section 4.1.1 of the paper): resets exactly what it alone uses, so that another task can be learned in its
    place. All other finished tasks give the same outputs as before, to the last bit.

    What it alone uses: elements of shared weights that are locked for it and for no other finished task; its copies of norms, heads and
    raw parameters; its running statistics; its masks. Everything is worked out before anything is written. Weights with
    ``requires_grad=False`` were trained by no task, and stay. The outputs without a task change with the shared weights, as they do in
    training.

    Args:
        hat: a HAT model, or a network written by hand from HAT layers.
        task: a task that is finished, or that a session has begun; of the latter, what its masks keep and no finished task needs.
        dry_run: only count.
        reset: ``initial``: what the layers' own ``reset_parameters`` draw (from torch's global generator), of which only the freed
            elements are taken; torch's usual uniform draw, and zero for vectors, where a weight has no such owner; copies of raw
            parameters and of layers without an initialiser as they are without a task. ``pretrained``: copies as they are without a
            task, shared weights from ``state_dict``. Masks start by ``config.mask_init`` either way, and so does a head with a class
            count of its own by its initialiser.
        state_dict: of the original model, for ``pretrained``.

    Returns:
        The count and the total of every parameter; see :class:`Forgotten`.

    Raises:
        TaskError: no such task, one that was never trained, a session is open, or what ``pretrained`` needs is missing. Nothing is
            changed then.

    >>> hatify.forget_task(hat, 2)["conv1.weight"].count  # doctest: +SKIP
    1184
    """
    network = network_of(hat)
    (task,) = _check_known(network, [task], "hatify.forget_task(hat, task), of one of these")
    _check_closed(hat)
    if task not in network.finished | network.begun:
        raise TaskError(
            f"task {task} was never trained: there is nothing to forget",
            why=f"finished are {sorted(network.finished) or 'none'}, begun and not finished {sorted(network.begun) or 'none'}",
            fix=f"hat.learning(task={task}, ...) trains it",
        )
    return _forget(network, [task], dry_run, reset, state_dict)


def prune(
    hat: nn.Module,
    keep: Iterable[int],
    *,
    dry_run: bool = False,
    reset: str = "initial",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Forgotten:
    """Forgets all finished tasks but those of ``keep``; arguments and result as :func:`forget_task`'s.

    All sets are worked out before anything is written, so the order of tasks plays no role. A task that was begun and not finished
    stays as it is.

    Raises:
        TaskError: also where ``keep`` is empty, or has a task that is not finished.
    """
    network = network_of(hat)
    kept, finished = list(keep), network.finished
    stay = sorted(t for t in finished if t in kept) or sorted(finished)
    kept = set(_check_known(network, kept, f"hatify.prune(hat, keep={stay})"))
    _check_closed(hat)
    if not kept:
        raise TaskError(
            "pruning would forget every task",
            why="keep is empty",
            fix=f"hatify.prune(hat, keep={sorted(finished)[:1] or [0]}), or hatify.forget_task(hat, task) for each",
        )
    if not kept <= finished:
        raise TaskError(
            f"tasks {sorted(kept - finished)} are not finished, so there is nothing of them to keep",
            why=f"finished are {sorted(finished) or 'none'}",
            fix=f"hatify.prune(hat, keep={stay})" if stay else None,
        )
    return _forget(network, sorted(finished - kept), dry_run, reset, state_dict)


def _check_known(network: Network, tasks: list[int], fix: str) -> list[int]:
    """The tasks, which there are, as numbers of Python's own. No number is suggested that was not asked for: what is forgotten is gone.

    Raises:
        TaskError: there are not.
    """
    unknown = [t for t in tasks if not 0 <= task_number(t) < network.tasks]
    if unknown:
        trained = sorted(network.finished | network.begun)
        raise TaskError(
            f"no task {', '.join(repr(t) for t in unknown)}",
            why=f"the network has the tasks 0 to {network.tasks - 1}; trained are {trained or 'none'}",
            fix=fix if trained else None,
        )
    return [task_number(t) for t in tasks]


def _check_closed(hat: nn.Module) -> None:
    session = guard_of(hat).session
    if session is not None:
        raise TaskError(
            f"task {session.task} is being learned",
            why="its session has sorted out what is locked and what is not",
            fix="hat.finish_task() or hat.abandon_task() first",
        )


@dataclass(eq=False)
class Freed:
    """One tensor of which elements are reset: ``where`` says which (bool, its shape, on the CPU), or None for all."""

    name: str
    tensor: Tensor
    where: Tensor | None
    kind: str
    new: Tensor | None = None  # the values of the freed elements, flat; of all of them in the tensor's shape

    @property
    def count(self) -> Count:
        total = self.tensor.numel()
        return Count(total if self.where is None else int(self.where.sum()), total, self.kind)

    def take(self, value: Tensor) -> None:
        """Takes the freed elements of ``value``, which has the tensor's shape."""
        value = value.detach().to(self.tensor.device, self.tensor.dtype)
        self.new = value if self.where is None else value[self.where.to(value.device)]

    def write(self) -> None:
        if self.where is None:
            self.tensor.copy_(self.new)
        else:
            self.tensor.masked_scatter_(self.where.to(self.tensor.device), self.new)
        self.tensor.grad = None  # it was made of what is forgotten


def _forget(network: Network, tasks: list[int], dry_run: bool, reset: str, state_dict: Mapping[str, Tensor] | None) -> Forgotten:
    if reset not in RESETS:
        raise TaskError(f"reset is one of {RESETS}, not {reset!r}", fix="hatify.forget_task(hat, 0, reset='initial')")
    guard = guard_of(network.module)
    guard.restore()  # the masks decide: they must be those that were finished
    kept = sorted(network.finished - set(tasks))
    freed = shared_weights(network, tasks, kept)
    own = [f for task in tasks for f in _own(network, task)]
    order = {name: i for i, name in enumerate([n for n, _ in _named(network.module)])}
    counts = {f.name: f.count for f in sorted((*freed, *own), key=lambda f: order[f.name])}
    freed = [f for f in freed if f.count.count]
    if reset == "pretrained":
        _check_original(network, freed, state_dict)
    if not dry_run and tasks:
        with torch.no_grad():
            _initial_weights(network, freed) if reset == "initial" else _original_weights(network, freed, state_dict)
            _initial_own(network, tasks, own, pretrained=reset == "pretrained")
            with guard.opened():
                for each in (*freed, *own):
                    each.write()
                for task in tasks:
                    network.mark(task, False)
    return Forgotten(counts, tasks, kept, reset, dry_run)


def shared_weights(network: Network, tasks: list[int], kept: list[int]) -> list[Freed]:
    """Of every shared weight that trains, the elements that some of ``tasks`` needs and none of ``kept``."""
    names = {id(p): name for name, p in reversed(list(network.module.named_parameters()))}
    used: dict[int, Tensor] = {}
    others: dict[int, Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}
    # one task at a time: locks of several together may be wider than what each of them needs (equation 2)
    for found, locks in (*((used, network.locks([task])) for task in tasks), (others, network.locks(kept))):
        for name, lock in locks.items():
            parameter = network.module.get_parameter(name)
            key = id(parameter)
            parameters[key] = parameter
            found[key] = found[key] | lock if key in found else lock
    free = {key: used[key] & ~others[key] for key in used}
    return [
        Freed(names[key], p, free[key] if p.requires_grad and is_continuous(p) else torch.zeros_like(free[key]), "weights")
        for key, p in parameters.items()
        if key in free
    ]


def _own(network: Network, task: int) -> list[Freed]:
    """What belongs to one task alone."""
    names = {id(tensor): name for name, tensor in _named(network.module)}
    masks = [Freed(names[id(e)], e, None, "masks") for e in network.embeddings(task)]
    copies = {id(t): t for t in network.copies(task)}.values()
    kinds = [(t, "copies" if isinstance(t, nn.Parameter) else "statistics") for t in copies]
    return masks + [Freed(names[id(t)], t, None, kind) for t, kind in kinds]


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


# what freed elements become


def _initial_own(network: Network, tasks: list[int], own: list[Freed], pretrained: bool) -> None:
    """New values for what belongs to single tasks."""
    new: dict[int, Tensor] = {}
    paths = {id(m): path for path, m in network.module.named_modules()}
    for task in tasks:
        for masker in network.maskers.values():
            new[id(masker.embeddings[task])] = masker.initial()
        for copies, plain in network.raw():
            tensor = copies.of(task)
            new[id(tensor)] = default(tensor) if plain is None else plain
        for module in network.indexed():
            values = drawn_copy(module, task, paths[id(module)], pretrained=pretrained)
            mine = module.tasks[task]
            for name, tensor in (*mine.named_parameters(), *mine.named_buffers()):
                new[id(tensor)] = values[name]
    for each in own:
        each.take(new[id(each.tensor)])


def _initial_weights(network: Network, freed: list[Freed]) -> None:
    """Every owner draws all of its weights once; the freed elements are taken."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    by_owner: dict[str, list[tuple[Freed, str]]] = {}
    for each in freed:
        places = [name.rpartition(".")[::2] for name in names[id(each.tensor)]]
        owner, attribute = next((p for p in places if initialiser(network.plain(p[0])) is not None), places[0])
        by_owner.setdefault(owner, []).append((each, attribute))
    for owner, found in by_owner.items():
        values = drawn(network.plain(owner), owner)
        for each, attribute in found:
            each.take(values[attribute])


def _original_weights(network: Network, freed: list[Freed], state_dict: Mapping[str, Tensor]) -> None:
    for each in freed:
        each.take(_original(network, each, state_dict))


def _original(network: Network, freed: Freed, state_dict: Mapping[str, Tensor]) -> Tensor | None:
    """The value of a shared weight in the original's state dict, under any of its names."""
    named = network.module.named_parameters(remove_duplicate=False)
    return next((state_dict[n] for n, p in named if p is freed.tensor and n in state_dict), None)


def _check_original(network: Network, freed: list[Freed], state_dict: Mapping[str, Tensor] | None) -> None:
    names = [each.name for each in freed]
    shown = few(names)
    if names and state_dict is None:
        raise TaskError(
            "the pretrained values of shared weights are needed",
            where=shown,
            why="training has written over them",
            fix="hatify.forget_task(hat, task, reset='pretrained', state_dict=original.state_dict()), or reset='initial'",
        )
    for each in freed:
        value = _original(network, each, state_dict)
        if value is None or value.shape != each.tensor.shape:
            raise TaskError(
                "the state dict is not the original's",
                where=each.name,
                why="it is missing" if value is None else f"its shape is {tuple(value.shape)}, not {tuple(each.tensor.shape)}",
                fix="state_dict=original.state_dict(), of the model that was converted",
            )
