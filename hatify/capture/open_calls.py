"""Operators whose settings torch has as plain numbers, called with open sizes: ``F.avg_pool2d(x, x.shape[2:])``, ``torch.linspace``.

Given to torch itself, such a size would be fixed. While a model is traced the call is a marker, which takes sizes; the graph has the
operator, which is given numbers when it runs.

``torch.broadcast_tensors``, of which distributions are made, is called as what it is: one ``expand`` for each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hatify.capture.tree import OperatorCall, mark_operator

aten = torch.ops.aten
Number = int | SymInt
Numbers = Number | Sequence[Number]


class OpenCalls(TorchFunctionMode):
    """Inside, calls of these operators leave the sizes that they are given open."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.broadcast_tensors:
            return _broadcast(*args)
        rule = _RULES.get(func)
        if rule is None or torch._C._functorch.peek_interpreter_stack() is not None or not _open((args, kwargs)):
            return func(*args, **kwargs)
        call = rule(*args, **kwargs)
        return func(*args, **kwargs) if call is None else mark_operator(*call)


def _open(given: Any) -> bool:
    leaves = pytree.tree_leaves(given, is_leaf=lambda a: isinstance(a, torch.Size))
    return any(isinstance(s, SymInt) for leaf in leaves for s in (leaf if isinstance(leaf, torch.Size) else (leaf,)))


def _broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return tuple(t.expand(shape) for t in tensors)


def _average(rank: int) -> Callable:
    def result(x: Tensor, kernel: list, stride: list, padding: list, ceil_mode: bool, *count: Any) -> Tensor:
        return _pooled(pool, x, kernel, stride, padding, [1] * rank, ceil_mode)

    pool = getattr(aten, f"avg_pool{rank}d").default
    operator = OperatorCall(pool, result)

    def call(
        input: Tensor,
        kernel_size: Numbers,
        stride: Numbers | None = None,
        padding: Numbers = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> tuple[OperatorCall, tuple]:
        last = () if rank == 1 else (divisor_override,)
        return operator, (input, *_settings(rank, kernel_size, stride, padding), ceil_mode, count_include_pad, *last)

    return call


def _largest(rank: int) -> Callable:
    pool = getattr(aten, f"max_pool{rank}d").default
    operator = OperatorCall(pool, partial(_pooled, pool))

    def call(
        input: Tensor,
        kernel_size: Numbers,
        stride: Numbers | None = None,
        padding: Numbers = 0,
        dilation: Numbers = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> tuple[OperatorCall, tuple] | None:
        if return_indices:
            return None
        return operator, (input, *_settings(rank, kernel_size, stride, padding), _each(rank, dilation), ceil_mode)

    return call


def _settings(rank: int, kernel: Numbers, stride: Numbers | None, padding: Numbers) -> tuple[list, list, list]:
    kernel = _each(rank, kernel)
    given = stride is not None and (isinstance(stride, Number) or len(stride) > 0)
    return kernel, _each(rank, stride) if given else [*kernel], _each(rank, padding)


def _each(rank: int, numbers: Numbers) -> list[Number]:
    """One number per dimension."""
    numbers = [numbers] if isinstance(numbers, Number) else [*numbers]
    return numbers * rank if len(numbers) == 1 else numbers


def _pooled(
    operator: torch._ops.OpOverload, x: Tensor, kernel: list, stride: list, padding: list, dilation: list, ceil_mode: bool
) -> Tensor:
    """An empty result; its sizes as in torch's documentation of the pools."""
    rank, sizes = len(kernel), []
    for n, k, s, p, d in zip(x.shape[-rank:], kernel, stride, padding, dilation):
        steps = n + 2 * p - d * (k - 1) - 1
        size = (-(-steps // s) if ceil_mode else steps // s) + 1
        if ceil_mode and (size - 1) * s >= n + p:  # no window starts in the padding on the right
            size -= 1
        sizes.append(size)
    one = operator(x.new_empty((1,) * (rank + 2)), [1] * rank)  # autocast may give another type
    return x.new_empty((*x.shape[:-rank], *sizes), dtype=one.dtype)


def _linspace(start: Any, end: Any, steps: Number, **options: Any) -> tuple[OperatorCall, tuple, dict] | None:
    plain = all(isinstance(v, int | float | SymInt) for v in (start, end)) and isinstance(steps, SymInt)
    if not plain or not options.keys() <= {"dtype", "device"}:
        return None
    return _SPACED, (start, end, steps), options


def _affine_grid(theta: Tensor, size: Sequence[Number], align_corners: bool | None = None) -> tuple[OperatorCall, tuple]:
    return _GRID, (theta, [*size], bool(align_corners))


_SPACED = OperatorCall(aten.linspace.default, lambda start, end, steps, **options: torch.empty(steps, **options))
_GRID = OperatorCall(
    aten.affine_grid_generator.default, lambda theta, size, align: theta.new_empty((size[0], *size[2:], len(size) - 2))
)
_RULES: dict[Callable, Callable] = {
    torch.linspace: _linspace,
    F.affine_grid: _affine_grid,
    torch.affine_grid_generator: _affine_grid,
    **{getattr(F, f"avg_pool{rank}d"): _average(rank) for rank in (1, 2, 3)},
    **{getattr(room, f"max_pool{rank}d"): _largest(rank) for rank in (1, 2, 3) for room in (F, torch)},
}
