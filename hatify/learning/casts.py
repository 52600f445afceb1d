"""Casts of a network in memory (``.half()``, ``.to(torch.bfloat16)``): refused where a weight would become infinite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hatify.errors import NonFiniteError
from hatify.modules.continuous import is_continuous
from hatify.modules.shards import local


@torch.no_grad()
def check_reach(module: nn.Module, cast: Callable[[Tensor], Tensor]) -> None:
    """Whether all parameters stay finite under ``cast``, the function that ``module._apply`` is given. Changes nothing.

    Raises:
        NonFiniteError: a finite element has no finite neighbour in the new type.
    """
    types: dict[tuple[torch.dtype, torch.device], torch.dtype] = {}
    for name, parameter in module.named_parameters():
        if not is_continuous(parameter) or parameter.is_meta or not parameter.numel():
            continue
        key = parameter.dtype, parameter.device
        if key not in types:
            types[key] = cast(torch.empty(0, dtype=parameter.dtype, device=parameter.device)).dtype
        new, data = types[key], local(parameter)
        if not (new.is_floating_point or new.is_complex) or torch.finfo(new).max >= torch.finfo(data.dtype).max:
            continue
        if not data.abs().max() <= torch.finfo(new).max and bool((data.isfinite() & ~data.to(new).isfinite()).any()):
            raise NonFiniteError(
                f"a weight is too large for {new}",
                where=name,
                why=f"its largest is {data[data.isfinite()].abs().max():.4g}, the type ends at {torch.finfo(new).max:.4g}; 0 times "
                "infinity is NaN, for every task that shares it",
                fix="hat.to(torch.bfloat16), which reaches as far as float32",
            )
