"""Copies of weights that cost no memory until one side is written.

A copy here is a copy in every respect: whatever is written to one side, by whichever means, never shows on the other. But as
long as neither has been written, both may read the same memory (torch's copy-on-write storage, ``torch._lazy_clone``). A
conversion copies the weights once, and what tasks cannot share once per task; nearly all of it is still equal when it is
done, and the copies of tasks that are never trained stay equal for good.

What may be copied so is a property of the tensor and of who reads it; all else gets an ordinary clone:

- An ordinary dense CPU tensor that is all of its storage. (A partial view would drag the whole storage along; an expanded one could
  not be written. On other devices captured graphs may hold addresses.)
- Nobody else can write to its memory unseen: no numpy array (numpy closes the storage to resizing for good), no other process,
  file or library (DLPack holds the tensor), no second tensor. A raw address that somebody took with ``data_ptr()`` *before* and still
  writes to cannot be seen; taking one afterwards gives that side memory of its own.
- It is held by layers whose kernels only read their weights. oneDNN's LSTM asks for a writable address: that gives
  the tensor its own memory in the middle of a forward pass, and two threads that serve one model abort the process.
  A custom C++ kernel may do the same. ``READERS`` are the layers known to read only; ``tests/test_copies.py`` holds each to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .closures import whole_copy

READERS = (
    nn.Linear,
    nn.Bilinear,
    _ConvNd,
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.PReLU,
    nn.MultiheadAttention,
)

PAGE = 4096
"""Tensors of fewer bytes are cloned: sharing them saves nothing that can be measured."""


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory with one another, as those of an expanded one do: nothing can write to it in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


def copy_of(tensor: Tensor) -> Tensor:
    """A detached copy of ``tensor``, any shape and dtype; it shares memory until written where :func:`can_share` says so.

    Only for tensors of :func:`shareable`: who reads a tensor cannot be told from the tensor.
    """
    if not can_share(tensor):
        return tensor.detach().clone()
    with torch.no_grad():
        return torch._lazy_clone(tensor)


def can_share(tensor: Tensor) -> bool:
    """Whether copy-on-write is sound for this tensor, whoever reads it."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or not tensor.is_leaf:
        return False
    storage = tensor.untyped_storage()
    whole = storage.nbytes() == tensor.nbytes >= PAGE and torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return whole and storage.resizable() and not storage.is_shared() and not tensor.is_pinned() and _alone(tensor, storage)


def _alone(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether nothing but ``tensor`` holds its storage (but the handle ``storage``), and nothing outside Python holds ``tensor``."""
    return tensor._use_count() == 1 and torch._C._storage_Use_Count(storage._cdata) == 2


def shareable(root: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers under ``root`` whose copies may share memory until written."""
    held: dict[int, Tensor] = {}
    otherwise: set[int] = set()
    for module in root.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and isinstance(module, READERS):
                held[id(tensor)] = tensor
            else:
                otherwise.add(id(tensor))
    yield from (t for key, t in held.items() if key not in otherwise and can_share(t))


def copy_module(module: nn.Module) -> nn.Module:
    """A deep copy whose weights share memory with the module's until either side is written; computed tensors are copied detached."""
    memo: dict[int, Any] = {}
    for tensor in list(shareable(module)):
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(copy_of(tensor), tensor.requires_grad)
        elif not vars(tensor) and not tensor.requires_grad:
            memo[id(tensor)] = copy_of(tensor)
    return whole_copy(module, memo, lambda t: None if t.is_leaf else t.detach().clone())
