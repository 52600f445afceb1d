"""Pools along one dimension, traced as pools along two.

Torch takes ``max_pool1d`` apart in code that asks for the length as a number, which would fix it. Taken apart here, while a model is
traced, it stays open; the graph has the operator itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._C import DispatchKey

POOL = torch.ops.aten.max_pool1d.default
KEY = DispatchKey.CompositeImplicitAutograd


@contextlib.contextmanager
def open_pools() -> Iterator[None]:
    """Sets torch's own way of taking the operator apart aside; for one thread at a time."""
    if KEY in POOL.py_kernels:
        yield
        return
    POOL.py_impl(KEY)(_pool)
    try:
        yield
    finally:
        del POOL.py_kernels[KEY]
        POOL._dispatch_cache.clear()


def _pool(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    kernel, step, pad, spread = ([v] if isinstance(v, int) else list(v) for v in (kernel_size, stride, padding, dilation))
    step = [1, *step] if step else []
    pooled = torch.ops.aten.max_pool2d.default(x.unsqueeze(-2), [1, *kernel], step, [0, *pad], [1, *spread], ceil_mode)
    return pooled.squeeze(-2)
