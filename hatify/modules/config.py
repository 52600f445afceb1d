"""How many tasks, and how masks start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hatify.errors import ConversionError

INITIALISATIONS = ("ones", "normal", "sparse")


@dataclass(frozen=True)
class HATConfig:
    """Settings of HAT layers.

    Args:
        num_tasks: tasks that masks and copies are made for.
        max_mask_scale: the scale ``s_max`` of equations 3 to 6; also the scale of a task in training that is given none.
        mask_init: ``ones`` (section 4.1), ``normal`` (N(0, 1), the original HAT) or ``sparse`` (a tenth of the channels live).
        gradient_compensation: equation 3.
        max_embedding: mask embeddings are clamped to this magnitude, in equation 3 and after every step of a session.
        max_exponent: ``s * e`` is clamped to this magnitude in equation 3: cosh(89) overflows.

    Raises:
        ConversionError: a value that makes no sense.
    """

    num_tasks: int = 10
    max_mask_scale: float = 100.0
    mask_init: str = "ones"
    gradient_compensation: bool = True
    max_embedding: float = 6.0
    max_exponent: float = 50.0

    def __post_init__(self) -> None:
        if not isinstance(self.num_tasks, int) or self.num_tasks < 1:
            raise ConversionError(f"num_tasks must be a positive integer, not {self.num_tasks!r}", fix="HATConfig(num_tasks=10)")
        if not self.max_mask_scale > 0:
            raise ConversionError(f"max_mask_scale must be positive, not {self.max_mask_scale!r}", fix="max_mask_scale=100.0")
        if not (self.max_embedding > 0 and 0 < self.max_exponent <= 80):
            raise ConversionError(
                f"clamps must be positive, and max_exponent at most 80: {self.max_embedding!r}, {self.max_exponent!r}",
                fix="HATConfig(max_embedding=6.0, max_exponent=50.0)",
            )
        if self.mask_init not in INITIALISATIONS:
            raise ConversionError(
                f"unknown mask_init {self.mask_init!r}", fix="mask_init=" + " or ".join(repr(i) for i in INITIALISATIONS)
            )


def config_of(args: tuple[Any, ...], config: HATConfig | None) -> tuple[tuple[Any, ...], HATConfig]:
    """A layer's own arguments and its configuration, which the paper passes last, by position: ``HATLinear(64, 32, config)``."""
    if config is None and args and isinstance(args[-1], HATConfig):
        args, config = args[:-1], args[-1]
    return args, config or HATConfig()
