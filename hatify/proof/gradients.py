"""The second proof of the locks, by gradients: what a finished task does not feel is not locked, and what is not locked it does not
feel."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hatify.model import HATModel
from hatify.proof.keeping import kept, seeded
from hatify.proof.noise import draw
from hatify.proof.reach import reached_by_inputs

DRAWS, INPUTS = 3, 3
"""How often masks and weights are drawn anew, and inputs for each of them."""


@dataclass
class GradientProof:
    """``leak`` is the largest gradient of a finished task's outputs with respect to a weight that is not locked for it: exactly 0.
    ``tightness`` is the share of locked weights whose gradient is not zero; None where nothing is locked. ``by_parameter`` is the
    same per parameter. ``unreached`` is the share of locked weights that this leaves out, for no input reached them: taps that met padding
    only, experts that no token chose, rows of tables that no index named. All are None where a task's own gradients were never
    finite, as for a network that divides by a ReLU."""

    leak: float | None
    tightness: float | None
    by_parameter: dict[str, float] = field(default_factory=dict)
    unreached: float | None = None


def prove_by_gradients(
    hat: HATModel, *, without_locks: Sequence[str] = (), whole: Sequence[str] = (), seed: int = 0
) -> GradientProof:
    """Gradients of two tasks' outputs with random weights and binary masks, of each graph without dropout and with the statistics of
    eval mode; the model is as before afterwards.

    A dead ReLU hides weights that count, so the tightness is measured with functions that are flat nowhere in place of ReLU and its
    like (they keep zero at zero, and the sign where that is promised) and scores of attention that no softmax saturates at; the leak
    with and without them. Weights that no input reached are not counted.

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
    counts: dict[str, Counter[str]] = {}
    for _ in range(DRAWS):
        with _drawn(hat, generator, tasks):
            locks = [_locks(hat, [task], without_locks, whole) for task in tasks]
            felt = [{name: torch.zeros_like(lock) for name, lock in own.items()} for own in locks]
            for tensors in _inputs(hat, generator):
                for of_train, task, smooth in itertools.product(_graphs(hat), tasks, (True, False)):
                    hat.eval().training = of_train  # which graph it is, and nothing else
                    found = _gradients(hat, tensors, task, smooth, generator)
                    if not all(bool(g[locks[task][n]].isfinite().all()) for n, g in found.items()):
                        continue  # the task's own network is not finite here: nothing to be told from it
                    leak = max(leak or 0.0, *(_largest(g[~locks[task][n]]) for n, g in found.items()), 0.0)
                    for name, gradient in found.items():
                        felt[task][name] |= (gradient != 0) & locks[task][name]
            together = _locks(hat, tasks, without_locks, whole)  # the paper's rule locks more than for each of them
            for name, locked in together.items():
                seen, own = [of[name] for of in felt], [of[name] for of in locks]
                near = [lock & reached_by_inputs(hat._facts.uses[name], there) for lock, there in zip(own, seen)]
                missed = _any(own) & ~_any(near)
                found = {"felt": _any(seen) & locked, "reached": locked & ~missed, "locked": locked}
                counts.setdefault(name, Counter()).update({what: int(elements.sum()) for what, elements in found.items()})
    if leak is None:
        return GradientProof(None, None)
    total = sum(counts.values(), Counter())
    shares = {name: count["felt"] / count["reached"] for name, count in counts.items() if count["reached"]}
    if not total["locked"]:
        return GradientProof(leak, None, shares)
    unreached = 1 - total["reached"] / total["locked"]
    return GradientProof(leak, total["felt"] / total["reached"] if total["reached"] else None, shares, unreached)


def _any(sets: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.logical_or, sets)


def _graphs(hat: HATModel) -> tuple[bool, ...]:
    """Whether it is train mode's, for each graph: auxiliary heads may be in that one alone."""
    return (False,) if hat.train_graph is None else (False, True)


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
    context = hat.binary_context(task)
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
    """Like ReLU zero at zero and never negative, but nowhere flat; linear on both sides, for squares of small values vanish."""
    return torch.where(x > 0, x, -0.5 * x)


def _between(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """A smooth function between bounds that hold zero, zero at zero."""
    if low == 0:
        x = _rise(x)
    up = x if high is None else high * torch.tanh(x / high) if high else torch.zeros_like(x)
    down = x if not low else low * torch.tanh(x / low)
    return torch.where(x > 0, up, down)


_SMOOTHED = {
    "relu",
    "gelu",
    "hardswish",
    "hardsigmoid",
    "relu6",
    "hardtanh",
    "clamp",
    "clip",
    "clamp_min",
    "threshold",
    "leaky_relu",
}


class Smooth(TorchFunctionMode):
    """Runs functions that are flat on one side as smooth ones, whether a module, torch or the graph calls them."""

    def __torch_function__(self, func: Callable, types, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0].strip("_")
        if name in ("softmax", "scaled_dot_product_attention"):
            return func(*_calmed(name, args, kwargs), **kwargs)
        if name in _SMOOTHED:
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
    if name == "leaky_relu":
        slope = (*args, *kwargs.values(), 0.01)[0]
        return torch.where(x > 0, x, x * max(slope, 0.5)) if slope > 0 else None
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
