"""Which tensors hold numbers that gradients and noise are for."""

from __future__ import annotations

from torch import Tensor


def is_continuous(tensor: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, no integers or truth values."""
    return tensor.is_floating_point() or tensor.is_complex()
