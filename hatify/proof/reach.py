"""Which elements of a parameter the inputs that it was tried on could reach at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hatify.gates import Use
from hatify.gates.table import TOP


def reached_by_inputs(uses: Sequence[Use], felt: Tensor) -> Tensor:
    """The elements that lie in places with a felt one, a bool tensor like ``felt``; all of them if nothing is felt.

    Places are what the data chooses between, not gates: the taps of a convolution (a dilated one's may meet nothing but padding),
    experts, rows of a table. Inputs and outputs are no places: where all of an output is locked and none felt, the lock is to blame.
    """
    reached, known = torch.zeros_like(felt), torch.zeros_like(felt)
    if not bool(felt.any()):
        return torch.ones_like(felt)
    for use in uses:
        along = _places(use)
        here = felt if use.positions is None else _as_used(use, felt)
        others = [d for d in range(here.dim()) if d not in along]
        there = (here.any(dim=others, keepdim=True) if along and others else here.new_ones((1,) * here.dim())).expand(use.shape)
        if use.positions is None:
            reached, known = reached | there.reshape(felt.shape), torch.ones_like(known)
        else:
            own = use.positions >= 0
            reached.view(-1)[use.positions[own & there]] = True
            known.view(-1)[use.positions[own]] = True
    return reached | ~known


def _as_used(use: Use, felt: Tensor) -> Tensor:
    """A parameter's elements where the use has them; False where it has another's."""
    return felt.reshape(-1)[use.positions.clamp(min=0)] & (use.positions >= 0)


def _places(use: Use) -> list[int]:
    """The dimensions along which neither outputs nor inputs lie; none where they cannot be told, or where locks are by the group."""
    rank = len(use.shape)
    if use.grouped or use.groups is not None or (use.rows.dim(), use.cols.dim()) != (rank, rank):
        return []
    outputs = [d for d in range(rank) if use.rows.shape[d] > 1]
    if len(outputs) != 1:
        return []
    if outputs[0] == rank - 1 > 0 and bool((use.cols == TOP).all()):
        return list(range(rank - 1))  # a table: each row lies along the outputs
    if rank == 3 and outputs[0] == 2:
        return [0]  # a matrix for each expert
    return list(range(2, rank)) if outputs[0] < 2 else []
