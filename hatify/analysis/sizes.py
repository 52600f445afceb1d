"""Sizes and results of captured nodes, at the example's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hatify.errors import ConversionError


def varies_where_open(ids: Tensor, val: Any) -> bool:
    """Whether gates vary along a dimension whose size is open."""
    if ids.dim() != val.dim():
        return False
    return any(n > 1 and is_open_size(s) for n, s in zip(ids.shape, val.shape))


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
