"""Parameters that are sharded over processes, as ``torch.distributed.fsdp.fully_shard`` leaves them: the part here, and the whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor. Who has none need not import them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that is here, detached, of the same memory, and writes to it are not counted; an ordinary tensor is here as a whole."""
    if not sharded(tensor):
        return tensor.data
    with torch.no_grad():
        return tensor.to_local().data


def version(tensor: Tensor) -> int:
    """How many writes torch has counted."""
    if not sharded(tensor):
        return tensor._version
    with torch.no_grad():
        return tensor.to_local()._version


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process (a collective operation), differentiable: gradients are averaged over processes."""
    if not sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The part of ``full`` that is here when it is sharded as ``like``, a view; no communication."""
    if not sharded(like) or sharded(full):
        return local(full)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (size, start) in enumerate(zip(shape, offset)):
        full = full.narrow(dim, min(start, full.shape[dim]), size)
    return full


def agreed(value: float, tensors: Iterable[Tensor]) -> float:
    """The largest of all processes' values, where ``tensors`` are sharded over them: they must come to the same decision. NaN counts as
    infinity."""
    first = next((t for t in tensors if sharded(t)), None)
    if first is None:
        return value
    import torch.distributed as dist

    shared = torch.tensor(value, dtype=torch.float64, device=first.to_local().device).nan_to_num(nan=torch.inf, posinf=torch.inf)
    for dim in range(first.device_mesh.ndim):
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=first.device_mesh.get_group(dim))
    return float(shared)


def _managed(module: nn.Module) -> list[nn.Module]:
    """The modules inside that ``fully_shard`` manages."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]


def shard_again(module: nn.Module) -> list[nn.Module]:
    """Gives up what was gathered for a forward pass, in the middle of one too (where ``reshard()`` does nothing for a root), so that the
    module holds the parameters that its optimizer holds.

    Returns:
        The modules whose ``unshard()`` gathers it again.
    """
    gathered = []
    for each in _managed(module):
        groups = [g for g in each._get_fsdp_state()._fsdp_param_groups if g.is_unsharded]
        for group in groups:
            group._to_sharded()
        gathered += [each] if groups else []
    return gathered
