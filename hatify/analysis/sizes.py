"""Sizes and results of captured nodes, at the example's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hatify.errors import ConversionError


def varies_where_open(ids: Tensor, val: Any) -> bool:
    """Whether gates vary along a dimension whose size is open, other than by repeating for each of some (the heads of each sample)."""
    return any(not repeats(ids, dim, val.shape[dim]) for dim in open_dims(ids, val))


def open_dims(ids: Tensor, val: Any) -> list[int]:
    """The dimensions along which gates vary and whose size is open."""
    if ids.dim() != val.dim():
        return []
    return [dim for dim, (n, size) in enumerate(zip(ids.shape, val.shape)) if n > 1 and is_open_size(size)]


def period(size: Any) -> int:
    """The number in front of an open size: 4 of ``4 * batch``."""
    return int(size.node.expr.as_coeff_Mul()[0]) if size.node.expr.as_coeff_Mul()[0].is_Integer else 1


def repeats(ids: Tensor, dim: int, size: Any) -> bool:
    """Whether gates repeat along a dimension of an open size as often as the number in front of it says, or do not vary.

    Where a movement puts heads next to an open batch, they do for every batch, as for the example's.
    """
    count, length = ids.shape[dim], period(size)
    if count == 1:
        return True
    if length < 2 or count % length or count < 2 * length:
        return False
    by_period = ids.unflatten(dim, (-1, length))
    return bool((by_period == by_period.narrow(dim, 0, 1)).all())


def is_open_size(size: Any) -> bool:
    """Whether a size differs from call to call."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same in every call."""
    a, b = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (a, b))
    return bool(a == b)


def concrete(size: Any) -> Any:
    """A size at the example's inputs."""
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        hint = size.node.hint
        if hint is None:
            raise ConversionError(
                "a size depends on data",
                why=f"{size} is only known when the model runs (a boolean index, nonzero, unique)",
                fix="index with integers, or keep the module whole: hatify.register(ThatModule, hatify.TaskIndexedLayer())",
            )
        return hint
    return size


def tensors_of(val: Any) -> list:
    if isinstance(val, Tensor):
        return [val]
    return [v for v in val if isinstance(v, Tensor)] if isinstance(val, list | tuple) else []


def all_finite(tensor: Tensor) -> bool:
    """Whether a constant holds no infinity or NaN (integers never do)."""
    return not tensor.dtype.is_floating_point or bool(torch.isfinite(tensor).all())
