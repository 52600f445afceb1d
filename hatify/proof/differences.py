"""Equal to the bit, or how far from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinity where shapes, types or the places of NaN differ."""
    if len(expected) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b):
            continue
        if a.dtype.is_floating_point or a.dtype.is_complex:
            same = (a == b) | (torch.isnan(a) & torch.isnan(b))
            gap = torch.where(same, torch.zeros((), dtype=a.dtype), (a - b)).abs().max().item()
            worst = max(worst, gap if gap == gap else float("inf"))
        else:
            worst = max(worst, float((a != b).any()))
    return worst
