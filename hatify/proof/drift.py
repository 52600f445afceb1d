"""Drift: a finished task's outputs before and after all that it does not lock became noise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hatify.model import HATModel
from hatify.modules import HATRecurrent, TaskContext
from hatify.modules.continuous import is_continuous
from hatify.modules.copies import can_share
from hatify.proof.differences import difference
from hatify.proof.inputs import batch_size
from hatify.proof.keeping import buffers_kept, seeded
from hatify.proof.noise import draw, noise


def drift_and_control(
    hat: HATModel,
    batches: list[list[Tensor]],
    without_locks: Sequence[str],
    without_masks: Sequence[str],
    seed: int,
    notes: list[str],
    strength: float = 0.1,
) -> tuple[float, float | None]:
    """Two tasks with random binary masks; all that the first does not lock becomes noise (copies of other tasks NaN, where that can be
    put back); its outputs are compared. The model is left as noise: see :func:`hatify.proof.keeping.kept`. ``strength`` is that of the
    noise that all weights get before, a task's own included.

    Returns:
        The drift, and the drift with the locks taken away too (None where nothing is shared, or something was left out already).
    """
    generator = torch.Generator().manual_seed(seed)
    task, other = 0, 1 if hat.config.num_tasks > 1 else None
    own, unread = _of_task(hat, task), _unread(hat, task)
    kept_out = {id(p) for p in unread}
    written = [p for p in hat.parameters() if is_continuous(p) and id(p) not in kept_out]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        draw(hat, written, generator, [t for t in (task, other) if t is not None], strength)
        before = _outputs(hat, batches, task, seed, without_masks)
        if not _finite(before):
            if _finite(_outputs(hat, batches, None, seed, without_masks)):
                notes.append("masks make outputs that are not finite, while those without a task are")
                return math.inf, None
            notes.append("outputs are not finite under random weights: drift means little")
        stack.enter_context(_nan(unread))  # only now: NaN before and after would look equal
        locked: list[nn.Parameter] = []
        sharing = False
        for name, lock in hat.each_lock([task], without=tuple(without_locks)):
            parameter = hat.get_parameter(name)
            sharing = sharing or bool(lock.any())
            locked.append(parameter)
            if id(parameter) not in own and is_continuous(parameter):
                parameter.copy_(torch.where(lock.to(parameter.device), parameter, noise(parameter, generator)))
        done = own | {id(p) for p in locked}
        for parameter in written:
            if id(parameter) not in done:
                parameter.copy_(noise(parameter, generator))
        for buffer in _copied_buffers(hat):
            if id(buffer) not in own and is_continuous(buffer):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        drift = difference(before, _outputs(hat, batches, task, seed, without_masks))
        if without_locks or without_masks or not sharing:
            return drift, None  # a control already, or nothing is shared
        for parameter in locked:
            parameter.copy_(noise(parameter, generator))
        control = difference(before, _outputs(hat, batches, task, seed, without_masks))
    return drift, control


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(o).all()) for o in outputs if is_continuous(o))


def _outputs(hat: HATModel, batches: list[list[Tensor]], task: int | None, seed: int, without_masks: Sequence[str]) -> list[Tensor]:
    """Outputs of a task with binary masks (None: without a task), in eval mode and, where the modes have graphs of their own, in train
    mode."""
    out: list[Tensor] = []
    modes = [False, True] if hat.train_graph is not None else [False]
    with _without(hat, without_masks):
        for training in modes:
            hat.train(training)
            for tensors in batches:
                if training and batch_size(tensors) == 1 < batch_size(batches[0]):
                    continue  # one value has no variance: a norm over the batch refuses it, the original's too
                context = None if task is None else hat.binary_context(task)
                with buffers_kept(hat), seeded(seed):
                    out += [o.detach().clone() for o in hat.run([t.clone() for t in tensors], context)]
    return out


def _of_task(hat: HATModel, task: int) -> set[int]:
    """Ids of the tensors that belong to one task alone."""
    own: set[int] = set()
    for masker in hat.maskers.values():
        own.add(id(masker.embeddings[task]))
    for _, copies in hat.task_copies():
        own.update(id(t) for t in copies(task))
    return own


def _unread(hat: HATModel, task: int) -> list[nn.Parameter]:
    """Parameters that belong to other tasks alone, so that ``task`` reads none of them. (Buffers, which forward restores, and tensors
    that share memory with others are left to the noise.)"""
    others = [t for t in range(hat.config.num_tasks) if t != task]
    found = [p for _, copies in hat.task_copies() for other in others for p in copies(other) if isinstance(p, nn.Parameter)]
    return [p for p in found if is_continuous(p) and can_share(p)]


def _copied_buffers(hat: HATModel) -> list[Tensor]:
    """Buffers of task-indexed modules: the one without a task and those of every task."""
    found: list[Tensor] = []
    for module, copies in hat.task_copies():
        found += [b for b in module if not isinstance(b, nn.Parameter)]
        for task in range(hat.config.num_tasks):
            found += [b for b in copies(task) if not isinstance(b, nn.Parameter)]
    return found


@contextlib.contextmanager
def _nan(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters are NaN throughout, which takes no memory and which one read would show."""
    held = [(p, p.data) for p in parameters]
    try:
        for parameter, value in held:
            parameter.data = value.new_full((), float("nan")).expand(value.shape)
        yield
    finally:
        for parameter, value in held:
            parameter.data = value


@contextlib.contextmanager
def _without(hat: HATModel, names: Sequence[str]) -> Iterator[None]:
    masks = hat.room.masks
    removed = {name: masks._modules[name] for name in names if name in masks._modules}
    unfolded = {name: hat.get_submodule(name.rpartition(".")[0]) for name in names if name not in removed}
    for name in removed:
        masks._modules[name] = _Unmasked()
    for name, layer in unfolded.items():
        layer.__dict__["folded"] = partial(_folded_without, layer, name.rpartition(".")[2])
    try:
        yield
    finally:
        masks._modules.update(removed)
        for layer in unfolded.values():
            layer.__dict__.pop("folded", None)


def _folded_without(layer: HATRecurrent, masker: str, mask_of: Callable[[str], Tensor], soft: bool) -> dict[str, Tensor]:
    """The weights of a recurrent layer with one masker left out."""
    return type(layer).folded(layer, lambda name: torch.ones_like(mask_of(name)) if name == masker else mask_of(name), soft)


class _Unmasked(nn.Module):
    def forward(self, x: Tensor, task: TaskContext | None = None) -> Tensor:
        return x
