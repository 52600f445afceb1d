"""``extract``: one finished task as a plain torch module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from hatify.calling import flatten
from hatify.errors import ExtractionError, HatifyError, TaskError
from hatify.lifecycle.exactness import inexact_nodes
from hatify.lifecycle.folding import Folded, fold, still_masked
from hatify.lifecycle.lowering import module_of
from hatify.lifecycle.picture import Picture
from hatify.lifecycle.plain import specialise
from hatify.lifecycle.slimming import slim_down
from hatify.model import HATModel
from hatify.modules.copies import overlaps
from hatify.modules.numbers import task_number
from hatify.proof.differences import difference
from hatify.proof.keeping import modes_kept
from hatify.proof.parity import taken_batches, takes
from hatify.structure import unflatten

ROUNDING = 1e3
"""How many units in the last place, relative to the largest output, an extracted network may differ by. Far more than was ever
measured, and far less than a mask that is missing."""


def extract(hat: HATModel, task: int, slim: bool = False) -> fx.GraphModule:
    """One finished task as a plain torch module: a graph over torch's (and the model's own) layers, with no hatify in it.

    ``extract(hat, t)(x)`` equals ``hat(x, task=t)`` up to the rounding of sums in another order, at any size that ``hat`` takes.

    Without ``slim`` the masks are folded into weights, biases and norms: what the task does not use becomes zero. Where every mask
    folds the state dict is the original architecture's own, with the task's heads, so that it loads there with ``strict=True``;
    a mask that does not fold stays as a ``where`` with a buffer, and so does the mask of a norm over live channels. With ``slim``
    dead channels are removed, and these norms are ordinary smaller ones.

    The result's ``extraction`` is a dict of plain data: ``task``, ``slim``, ``folded`` and ``stayed`` (masks; those that are still
    there with the reason), ``slimmed`` and ``whole`` (with ``slim``: how many channels layers keep; the nodes that get their operands
    whole, with the reason), ``difference`` (the largest absolute one measured on the example inputs, at several batch sizes) and
    ``bit_equal``, ``inexact`` (without ``slim``: the nodes where a difference begins), ``parameters`` (before, after), ``renamed``
    (children that are called like an attribute of every ``GraphModule``, as ``code``, and what they are called instead), ``notes``.

    Args:
        hat: a converted model; not changed.
        task: a finished task.
        slim: remove dead channels instead of zeroing them.

    Raises:
        TaskError: no such task, or one that is not finished.
        ExtractionError: the result cannot be run, or differs from the task by more than rounding.
    """
    task = _finished(hat, task)
    hat._guard.restore()  # what was written by hand since is none of the task's
    tensors = [t.cpu() for t in hat._facts.inputs]
    plain = specialise(hat, task)
    picture = Picture(plain, values_of(hat, tensors))
    for sizes in _other_sizes(hat) if slim else ():
        with contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError):  # what cannot be run there, measuring it finds
            picture.compare(plain, values_of(hat, sizes))
    folded = fold(plain, picture)
    before = sum(p.numel() for p in plain.root.parameters())
    slimmed = slim_down(plain, picture) if slim else []
    stayed = still_masked(plain, folded)
    module, renamed = module_of(plain, picture, f"{hat._facts.name}Task{task}")
    module.to(next((p.device for p in hat.parameters()), torch.device("cpu")))
    try:
        worst, scale = measured(hat, task, module)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ExtractionError(
            f"the {'smaller' if slim else 'extracted'} network cannot be run",
            where=hat._facts.name,
            why=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}",
            fix=_FIX[slim],
        ) from error
    report = {
        "task": task,
        "slim": slim,
        "folded": [{"node": f.name, "where": f.scope, "how": f.how} for f in folded if f.how],
        "stayed": [{"node": f.name, "where": f.scope, "why": f.why} for f in stayed],
        "slimmed": [{"node": s.name, "where": s.scope, "kept": s.kept, "live": s.live, "of": s.size} for s in slimmed if not s.why],
        "whole": [{"node": s.name, "where": s.scope, "why": s.why} for s in slimmed if s.why],
        "difference": worst,
        "bit_equal": worst == 0.0,
        "inexact": [] if worst == 0.0 or slim else _inexact(hat, task, module),
        "parameters": {"before": before, "after": sum(p.numel() for p in module.parameters())},
        "renamed": renamed,
        "notes": _notes(hat),
    }
    if not worst <= scale:
        raise ExtractionError(
            f"the extracted network does not give what task {task} gives",
            where=hat._facts.name,
            why=f"outputs differ by {worst:.3g}, rounding explains {scale:.3g}",
            fix=_FIX[slim],
        )
    module.extraction = report
    return module


def _finished(hat: Any, task: Any) -> int:
    if not isinstance(hat, HATModel):
        raise HatifyError(
            f"extract takes a converted model, not {type(hat).__name__}",
            fix="hat = hatify.convert(model, tasks=3); hatify.extract(hat, 0)",
        )
    done = sorted(hat.finished_tasks)
    if not done:
        raise TaskError(
            "no task is finished yet",
            why="masks of a task in training are soft: they cannot be folded",
            fix="with hat.learning(task=0, optimizer=optimizer) as run: ... finishes it; then hatify.extract(hat, 0)",
        )
    tasks = hat.config.num_tasks
    asked, task = task, task_number(task)
    if not 0 <= task < tasks:
        raise TaskError(
            f"no task {asked!r}", why=f"the model has the tasks 0 to {tasks - 1}", fix=f"hatify.extract(hat, {done[0]})"
        )
    if task not in done:
        raise TaskError(
            f"task {task} is not finished",
            why=f"finished are {', '.join(map(str, done))}; masks of a task in training are soft",
            fix=f"train it in hat.learning(task={task}, ...), or hatify.extract(hat, {done[0]})",
        )
    return task


_FIX = {True: "hatify.extract(hat, task, slim=False) instead; please report it", False: "please report it"}


def _other_sizes(hat: HATModel) -> Iterator[list[Tensor]]:
    """Inputs of another batch size, and those twice as long in every other dimension that is open, where the model takes them."""
    examples, fixed = hat._facts.inputs, hat._facts.check_sizes.fixed
    yield from ([t.cpu() for t in tensors] for tensors in taken_batches(hat)[1:2])
    longer = [t.cpu() for t in examples]
    for i, (name, tensor) in enumerate(zip(hat.signature.names, examples)):
        for dim in range(1, tensor.dim()):
            if (name, dim) not in fixed:
                longer[i] = longer[i].repeat_interleave(2, dim)
    if any(a.shape != b.shape for a, b in zip(longer, examples)) and hat._facts.check_sizes.fit(longer):
        with _evaluating(hat):
            taken = takes(hat, longer, [])
        if taken:
            yield longer


def _notes(hat: HATModel) -> list[str]:
    notes = []
    if hat.train_graph is not None:
        notes.append("in train mode the original takes another path; this module follows the path of eval mode in both")
    if not hat.can_train:
        notes.append("train mode could not be captured: this module serves in eval mode")
    for way, line in hat._facts.unlike[False].items():
        notes.append(f"the original takes another path {way} ({line}); this module does not")
    return notes


def values_of(hat: HATModel, tensors: Sequence[Tensor]) -> list[Any]:
    """One value per placeholder of a plain graph."""
    values, start = [], 0
    for _, structure in hat.signature.arguments():
        if structure.leaves:
            values.append(unflatten(list(tensors[start : start + structure.leaves]), structure))
            start += structure.leaves
    return values


def measured(hat: HATModel, task: int, module: torch.nn.Module) -> tuple[float, float]:
    """The largest difference from the task's outputs at several batch sizes, and what rounding may explain of it."""
    worst, scale = 0.0, 0.0
    device = next((p.device for p in hat.parameters()), torch.device("cpu"))
    with _evaluating(hat), torch.no_grad():
        for tensors in taken_batches(hat):
            outs = []
            for model, how, call in ((hat, {"task": task}, hat.signature.rebuild), (module, {}, partial(plain_call, hat))):
                args, kwargs = call([t.clone().to(device) for t in tensors])
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    outs.append([t.detach().clone() for t in flatten(model(*args, **how, **kwargs))[0]])
            worst = max(worst, difference(*outs))
            for out in outs[0]:
                if out.dtype.is_floating_point and out.numel():
                    finite = out[torch.isfinite(out)]
                    largest = float(finite.abs().max()) if finite.numel() else 0.0
                    scale = max(scale, ROUNDING * torch.finfo(out.dtype).eps * max(largest, 1e-3))
    return worst, scale


def _inexact(hat: HATModel, task: int, module: fx.GraphModule) -> list[str]:
    device = next((p.device for p in hat.parameters()), torch.device("cpu"))
    found: list[str] = []
    for tensors in taken_batches(hat):
        tensors = [t.to(device) for t in tensors]
        with _evaluating(hat), torch.no_grad(), torch.random.fork_rng(devices=[]):
            found += inexact_nodes(hat, task, module, [t.clone() for t in tensors], values_of(hat, [t.clone() for t in tensors]))
    return list(dict.fromkeys(found))


def plain_call(hat: HATModel, tensors: list[Tensor]) -> tuple[tuple, dict]:
    """A call without the constants that a plain module does not take."""
    given = iter(values_of(hat, tensors))
    args, kwargs = [], {}
    for parameter, structure in hat.signature.arguments():
        if not structure.leaves:
            continue
        value = next(given)
        if parameter.kind is parameter.VAR_POSITIONAL:
            args.extend(value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(value)
        else:
            kwargs[parameter.name] = value
    if args:  # what comes before *args can only be given by position
        first = [p for p, _ in hat.signature.arguments() if p.name in kwargs and p.kind is not p.KEYWORD_ONLY]
        args = [*(kwargs.pop(p.name) for p in first), *args]
    return tuple(args), kwargs


@contextlib.contextmanager
def _evaluating(hat: HATModel) -> Iterator[None]:
    """In eval mode; modes, buffers and tables that forward writes are as before afterwards."""
    tables = [m.weight for m in hat.modules() if getattr(m, "max_norm", None) is not None]
    buffers = [(b, b.clone()) for b in (*hat.buffers(), *tables) if not overlaps(b)]
    try:
        with modes_kept(hat):
            hat.eval()
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


__all__ = ["ExtractionError", "Folded", "extract"]
