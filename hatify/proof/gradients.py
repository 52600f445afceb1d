"""The second proof of the locks, by gradients: what a finished task does not feel is not locked, and what is not locked it does not
feel."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hatify.gates import Use
from hatify.gates.table import TOP
from hatify.model import HATModel
from hatify.modules import TaskContext
from hatify.proof.keeping import kept, seeded
from hatify.proof.noise import draw

DRAWS, INPUTS = 3, 3
"""How often masks and weights are drawn anew, and inputs for each of them."""


@dataclass
class GradientProof:
    """``leak`` is the largest gradient of a finished task's outputs with respect to a weight that is not locked for it: exactly 0.
    ``tightness`` is the share of locked weights whose gradient is not zero; None where nothing is locked. ``by_parameter`` is the
    same per parameter. Both are None where a task's own gradients were never finite, as for a network that divides by a ReLU."""

    leak: float | None
    tightness: float | None
    by_parameter: dict[str, float] = field(default_factory=dict)


def prove_by_gradients(
    hat: HATModel, *, without_locks: Sequence[str] = (), whole: Sequence[str] = (), seed: int = 0
) -> GradientProof:
    """Gradients of two tasks' outputs with random weights and binary masks, in eval mode; the model is as before afterwards.

    A dead ReLU hides weights that count, so the tightness is measured with smooth functions in place of ReLU and its like (they keep
    zero at zero, and the sign where that is promised) and scores of attention that no softmax saturates at; the leak with and without
    them. Rows of tables that no input named are not counted.

    Args:
        without_locks: parameters whose locks are left out: a negative control, which must leak.
        whole: parameters that are locked as a whole: a negative control, which must be less tight.
        seed: of weights, masks and inputs.
    """
    with seeded(seed):
        return _measure(hat, without_locks, whole, torch.Generator().manual_seed(seed))


def _measure(hat: HATModel, without_locks: Sequence[str], whole: Sequence[str], generator: torch.Generator) -> GradientProof:
    tasks = range(min(2, hat.config.num_tasks))
    leak: float | None = None
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(DRAWS):
        with _drawn(hat, generator, tasks):
            hat.eval()
            locks = [_locks(hat, [task], without_locks, whole) for task in tasks]
            together = _locks(hat, tasks, without_locks, whole)
            felt = {name: torch.zeros(lock.shape, dtype=torch.bool) for name, lock in together.items()}
            for tensors in _inputs(hat, generator):
                for task, smooth in itertools.product(tasks, (True, False)):
                    found = _gradients(hat, tensors, task, smooth, generator)
                    if not all(bool(g[locks[task][n]].isfinite().all()) for n, g in found.items()):
                        continue  # the task's own network is not finite here: nothing to be told from it
                    leak = max(leak or 0.0, *(_largest(g[~locks[task][n]]) for n, g in found.items()), 0.0)
                    for name, gradient in found.items():
                        felt[name] |= gradient != 0
            for name, seen in felt.items():
                locked = _counted(hat, name, seen, together[name])
                part, of = counts.get(name, (0, 0))
                counts[name] = (part + int((seen & locked).sum()), of + int(locked.sum()))
    if leak is None:
        return GradientProof(None, None)
    locked = sum(of for _, of in counts.values())
    shares = {name: part / of for name, (part, of) in counts.items() if of}
    return GradientProof(leak, sum(part for part, _ in counts.values()) / locked if locked else None, shares)


@contextlib.contextmanager
def _drawn(hat: HATModel, generator: torch.Generator, tasks: Sequence[int]) -> Iterator[None]:
    """Weights and the masks of ``tasks`` drawn anew, but for copies that none of these tasks reads."""
    others = [t for t in range(hat.config.num_tasks) if t not in tasks]
    unread = {id(c) for _, copies in hat.task_copies() for t in others for c in copies(t)}
    with kept(hat):
        draw(hat, [p for p in hat.parameters() if p.dtype.is_floating_point and id(p) not in unread], generator, tasks)
        yield


def _locks(hat: HATModel, tasks: Sequence[int], without: Sequence[str], whole: Sequence[str]) -> dict[str, Tensor]:
    locks = hat.locks(tasks, without=tuple(without))
    return {
        n: torch.ones_like(lock) if n in whole else lock for n, lock in locks.items() if hat.get_parameter(n).is_floating_point()
    }


def _counted(hat: HATModel, name: str, seen: Tensor, locked: Tensor) -> Tensor:
    """Locked elements that inputs could show: of an embedding's table, the rows that were read."""
    if all(_is_table(use) for use in hat._facts.uses[name]):
        return locked & seen.any(1, keepdim=True)
    return locked


def _is_table(use: Use) -> bool:
    """Whether the use reads rows by their number, as an embedding does: each row lies along the outputs, and no input has a gate."""
    along = len(use.shape) == 2 and use.rows.dim() == 2 and use.rows.shape[0] == 1 < use.rows.shape[1]
    return along and bool((use.cols == TOP).all())


def _largest(gradient: Tensor) -> float:
    """The largest absolute value; infinity for what is not finite."""
    if not gradient.numel():
        return 0.0
    return float(gradient.abs().nan_to_num(nan=float("inf")).max())


def _inputs(hat: HATModel, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """The example inputs, and others like them: other numbers, the same indices in another order."""
    examples = hat._facts.inputs
    yield [t.clone() for t in examples]
    for _ in range(INPUTS - 1):
        tensors = []
        for tensor in examples:
            if tensor.dtype.is_floating_point:
                spread = float(tensor.float().std()) if tensor.numel() > 1 else 1.0
                tensor = tensor + spread * torch.randn(tensor.shape, generator=generator).to(tensor)
            elif tensor.dtype != torch.bool and tensor.dim():
                order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
                tensor = tensor.reshape(-1)[order].reshape(tensor.shape)
            tensors.append(tensor)
        yield tensors


def _gradients(hat: HATModel, tensors: list[Tensor], task: int, smooth: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """Gradients of a random sum of a task's outputs with respect to every shared parameter, on the CPU."""
    maskers = hat.maskers
    context = TaskContext(task, None, lambda name: maskers[name](task, None), hard=True)
    with _leaves(hat) as leaves, torch.enable_grad(), Smooth() if smooth else contextlib.nullcontext():
        out = [o for o in hat.run([t.clone() for t in tensors], context) if o.requires_grad]
        loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in out)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if out and leaves else [None] * len(leaves)
    zeros = [
        torch.zeros(leaf.shape) if g is None else g.to_dense() if g.is_sparse else g for g, leaf in zip(found, leaves.values())
    ]
    return {name: gradient.detach().cpu() for name, gradient in zip(leaves, zeros)}


@contextlib.contextmanager
def _leaves(hat: HATModel) -> Iterator[dict[str, Tensor]]:
    """Every shared parameter replaced by a leaf of the same memory: no hook of a training session sees these gradients."""
    shared = {n: hat.get_parameter(n) for n in hat._facts.uses if hat.get_parameter(n).is_floating_point()}
    leaves = {n: nn.Parameter(p.detach()) for n, p in shared.items()}
    new = {id(p): leaves[n] for n, p in shared.items()}
    swapped = [(m._parameters, k, p) for m in hat.modules() for k, p in m._parameters.items() if id(p) in new]
    for shelf, key, parameter in swapped:
        shelf[key] = new[id(parameter)]
    try:
        yield leaves
    finally:
        for shelf, key, parameter in swapped:
            shelf[key] = parameter


def _rise(x: Tensor) -> Tensor:
    """``sqrt(1 + x²) - 1``: like ReLU zero at zero and never negative, but nowhere else flat."""
    square = x.square()
    return square / ((1 + square).sqrt() + 1)


def _between(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """A smooth function between bounds that hold zero, zero at zero."""
    if low == 0:
        x = _rise(x)
    up = x if high is None else high * torch.tanh(x / high) if high else torch.zeros_like(x)
    down = x if not low else low * torch.tanh(x / low)
    return torch.where(x > 0, up, down)


class Smooth(TorchFunctionMode):
    """Runs functions that are flat on one side as smooth ones, whether a module, torch or the graph calls them."""

    def __torch_function__(self, func: Callable, types, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0].strip("_")
        if name in ("softmax", "scaled_dot_product_attention"):
            return func(*_calmed(name, args, kwargs), **kwargs)
        if name in ("relu", "gelu", "hardswish", "hardsigmoid", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "threshold"):
            smooth = _smooth(name, *args, **{k: v for k, v in kwargs.items() if k != "inplace"})
            if smooth is not None:
                return smooth
        return func(*args, **kwargs)


def _calmed(name: str, args: tuple, kwargs: dict) -> tuple:
    """The arguments with scores of a size at which a softmax still feels all of them; what a mask has ruled out stays ruled out."""
    if name == "softmax":
        scores = args[0].detach()
        largest = torch.where(scores.abs() < RULED_OUT, scores, 0.0).abs().max() if scores.numel() else scores.sum()
    else:
        scale = kwargs.get("scale") or args[0].shape[-1] ** -0.5
        largest = scale * args[0].detach().norm(dim=-1).max() * args[1].detach().norm(dim=-1).max()
    return (args[0] * (MOST / largest.clamp(min=MOST)), *args[1:])


RULED_OUT, MOST = 1e4, 8.0
"""Scores that large are masks; the most that scores are left at."""


def _smooth(name: str, x: Tensor, *args, **kwargs) -> Tensor | None:
    """The smooth counterpart of a call, or None for one that is not like ReLU (a bound above zero)."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        return None
    if name == "relu":
        return _rise(x)
    if name == "relu6":
        return _between(x, 0, 6)
    if name in ("hardswish", "gelu"):  # exactly zero, and flat, from some -6 on
        return torch.nn.functional.silu(x)
    if name == "hardsigmoid":
        return torch.sigmoid(x)
    if name == "threshold":
        at, value = (*args, *kwargs.values())[:2]
        return _rise(x) if at == value == 0 else None
    given = (*args, None, None)[:2]
    low = kwargs.get("min", kwargs.get("min_val", given[0]))
    high = kwargs.get("max", kwargs.get("max_val", given[1]))
    if name == "hardtanh":
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    if any(isinstance(b, Tensor) for b in (low, high)) or not (low is not None and low <= 0) or (high is not None and high < 0):
        return None
    return _between(x, low, high)
