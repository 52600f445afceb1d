"""What a payload carries: a tensor, its task and scale, and the gates of its pending mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hatify.errors import TaskError
from hatify.gates import State
from hatify.gates.value import ones
from hatify.modules import eager
from hatify.modules.masking import apply_mask
from hatify.modules.numbers import task_number


class Pending:
    """A tensor whose mask is applied when something needs it; see :class:`HATPayload`."""

    __slots__ = ("_raw", "_masked", "_settled", "_ids", "_state", "_task", "_scale", "_maskers", "__weakref__")

    def __init__(self, data: Any, task_id: int | None = None, mask_scale: float | None = None) -> None:
        if isinstance(data, Pending):
            raise TaskError("a payload holds a tensor, not another payload", fix="HATPayload(payload.data, task_id=0)")
        rank = data.dim() if isinstance(data, Tensor) else 0
        self._set(data, ones(rank), State.CLEAN, _task(task_id), _scale(mask_scale))

    def _set(self, raw: Any, ids: Tensor, state: State, task: int | None, scale: float | None) -> None:
        self._raw, self._ids, self._state, self._task, self._scale = raw, ids, state, task, scale
        self._maskers = eager.maskers_of(ids)  # kept alive: a payload may outlive its network
        self._masked: tuple[Tensor, bool] | None = None
        self._settled = False

    # what it holds

    @property
    def data(self) -> Any:
        """The masked data. Dead positions are zero, live ones multiplied by the mask."""
        if not self._pending:
            return self._raw
        grad = torch.is_grad_enabled()
        if self._masked is not None and (self._masked[1] or not grad):  # what was looked at under no_grad has no gradient
            return self._masked[0]
        masked = apply_mask(self._raw, self._mask(), soft=self._state is State.PENDING and self._scale is not None)
        if not _recomputing():
            self._masked = masked, grad
        return masked

    masked_data = data

    @property
    def unmasked_data(self) -> Any:
        """The data with its mask still pending."""
        return self._raw

    @property
    def mask(self) -> Tensor | None:
        """What ``data`` multiplies ``unmasked_data`` by: float32 of the data's shape; None where nothing is pending."""
        if not self._pending:
            return None
        mask = self._mask() if self._state is State.PENDING else (self._mask() > 0).float()
        return mask.expand(self._raw.shape)

    @property
    def task_id(self) -> int | None:
        return self._task

    @property
    def mask_scale(self) -> float | None:
        return self._scale

    @property
    def _pending(self) -> bool:
        return self._state is not State.CLEAN and self._gated

    @property
    def _gated(self) -> bool:
        return bool(self._maskers)

    def _mask(self) -> Tensor:
        return eager.mask_of(self._ids, self._task, self._scale, self._raw.device)

    def _current(self) -> Any:
        """What the next operation works on: the masked data once some operation has asked for it, as in a converted network."""
        return self.data if self._settled else self._raw

    def _gates(self) -> tuple[Tensor, State]:
        return self._ids, State.CLEAN if self._settled else self._state

    def _unsettled(self) -> Pending:
        """The same tensor as no operation had asked for its masked data yet."""
        return self._made(self._raw, self._ids, self._state)

    def _with(self, masks: tuple[tuple[bool, float, Tensor], ...]) -> Any:
        """The data with these masks applied: its own gates, or narrower ones that a partner has a part in."""
        data = self._current()
        for soft, fill, ids in masks:
            if fill == 0.0 and not (ids.shape == self._ids.shape and torch.equal(ids, self._ids)):
                data = self._made(data, ids, State.PENDING).data
            elif fill == 0.0:
                data = self.data
                self._settled = not _recomputing()
            else:
                data = apply_mask(data, self._mask(), soft=soft and self._scale is not None, fill=fill)
        return data

    # making others

    def like(self, tensor: Tensor) -> Pending:
        """A tensor that depends on the input (or is one more input) as a payload of the same task and scale."""
        return type(self)(tensor, self._task, self._scale)

    def _made(self, raw: Tensor, ids: Tensor, state: State) -> Pending:
        made = type(self).__new__(type(self))
        made._set(raw, ids, state, self._task, self._scale)
        if eager.too_large(ids):  # the expression has grown too large: from here on live for all
            made._set(made.data, ones(raw.dim()), State.CLEAN, self._task, self._scale)
        return made

    def _become(self, other: Pending) -> None:
        """Takes over another's content, where torch would have written in place."""
        for name in ("_raw", "_masked", "_settled", "_ids", "_state", "_maskers"):
            setattr(self, name, getattr(other, name))


def _recomputing() -> bool:
    """Whether activations are recomputed in backward (``torch.utils.checkpoint``): the second run must find payloads as the first
    did, so they remember nothing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _task(task: Any) -> int | None:
    if task is None:
        return None
    number = task_number(task)
    if number < 0:
        raise TaskError(f"no task {task!r}", why="tasks are numbered from 0", fix="HATPayload(x, task_id=0)")
    return number


def _scale(scale: Any) -> float | None:
    if scale is not None and not 0 < scale < math.inf:
        raise TaskError(f"mask_scale must be positive and finite, not {scale!r}", fix="HATPayload(x, task_id=0, mask_scale=20.0)")
    return None if scale is None else float(scale)
