"""Tensors in another floating-point type: what must not change by it does not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..modules.masker import in_type

__all__ = ["FLOATS", "Cast", "cast", "check_dtype", "named"]

FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The types that a model may be stored or loaded in, by name."""


def check_dtype(dtype: object) -> None:
    """Whether tensors may be stored or loaded in that type (None: as they are).

    Raises:
        ArtifactError: they may not.
    """
    if dtype is not None and dtype not in FLOATS.values():
        why = f"a floating-point type is meant: {', '.join(FLOATS)}"
        raise ArtifactError(f"dtype must be a floating-point type, not {dtype!r}", why=why, fix="dtype=torch.float16")


def named(name: str) -> torch.dtype:
    """The type of that name.

    Raises:
        ArtifactError: there is none.
    """
    check_dtype(FLOATS.get(name, name))
    return FLOATS[name]


def cast(key: str, tensor: Tensor, dtype: torch.dtype | None, embedding: bool = False, file: Path | None = None) -> Tensor:
    """The tensor in another type; itself where it has no floating-point type, or ``dtype`` is None.

    Args:
        key: its name, for the error.
        embedding: it is a mask embedding: the binary mask stays as it is, however the numbers are rounded.
        file: where it was read, for the error.

    Raises:
        ArtifactError: a finite number has no finite neighbour in that type (locks need finite weights).
    """
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    made = in_type(tensor, dtype) if embedding else tensor.to(dtype)
    if not made.is_meta and not made.isfinite().all() and bool((tensor.isfinite() & ~made.isfinite()).any()):
        raise ArtifactError(
            "a number is too large for the type",
            where=key if file is None else f"{file}: {key}",
            why=f"its largest is {tensor[tensor.isfinite()].abs().max():.4g}; {dtype} ends at {torch.finfo(dtype).max:.4g}",
            fix="dtype=torch.bfloat16, which reaches as far as float32",
        )
    return made


class Cast:
    """A tensor that is written in another type, cast when its turn comes."""

    def __init__(self, key: str, tensor: Tensor, dtype: torch.dtype, embedding: bool) -> None:
        self._how = key, tensor.detach(), dtype, embedding
        self.shape, self.device, self.dtype = tensor.shape, tensor.device, dtype
        self.nbytes = tensor.numel() * dtype.itemsize

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    def detach(self) -> Tensor:
        return cast(*self._how)
