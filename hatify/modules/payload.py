"""Hand-written HAT networks: a tensor with its task, its scale and its pending mask."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hatify.modules import calls, eager
from hatify.modules.calls import norm_of_payload, weighted_of_payload
from hatify.modules.pending import Pending

METHODS = (
    "abs", "add", "amax", "amin", "argmax", "bfloat16", "bmm", "chunk", "clamp", "clamp_min", "clone", "contiguous",
    "cumsum", "detach", "div", "double", "exp", "expand", "expand_as", "flatten", "flip", "float", "half", "index_select",
    "log", "log_softmax", "masked_fill", "matmul", "max", "mean", "min", "movedim", "mul", "narrow", "norm", "permute",
    "pow", "prod", "relu", "repeat", "reshape", "roll", "rsqrt", "select", "sigmoid", "softmax", "split", "sqrt", "square",
    "squeeze", "std", "sub", "sum", "swapaxes", "tanh", "transpose", "unbind", "unflatten", "unsqueeze", "var", "view",
    "view_as",
)  # fmt: skip
OPERATORS = {"__neg__": operator.neg, "__getitem__": operator.getitem}
BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "matmul": operator.matmul,
          "pow": operator.pow}  # fmt: skip
COMPARISONS = {"__lt__": operator.lt, "__le__": operator.le, "__gt__": operator.gt, "__ge__": operator.ge}


class HATPayload(Pending):
    """A tensor on its way through a HAT network, with the task it is for (section 3.1 of the paper).

    The mask of the layer that made it stays pending until something needs the masked tensor: activations, reshapes and sums of
    equally masked tensors work on the unmasked one. What each operation does to masks is decided by the same rules that convert
    networks; an operation without a rule gets the masked tensor, which is always right. Without a task nothing is ever masked,
    and a network gives exactly what the same network of plain layers gives.

    >>> import torch
    >>> from torch import nn
    >>> from hatify import HATConfig, HATLinear, HATPayload
    >>> config = HATConfig(num_tasks=5)
    >>> class HATMLP(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc1 = HATLinear(64, 32, config)
    ...         self.relu = nn.ReLU()
    ...         self.fc2 = HATLinear(32, 2, config)
    ...     def forward(self, x: HATPayload) -> HATPayload:
    ...         x = self.fc1(x)
    ...         x = x.forward_by(self.relu)
    ...         x = self.fc2(x)
    ...         return x
    >>> network = HATMLP()
    >>> out = network(HATPayload(torch.rand(16, 64), task_id=0, mask_scale=10.0))
    >>> out.data.shape, out.task_id
    (torch.Size([16, 2]), 0)

    A payload works with ``+ - * / @``, indexing, the methods of tensors that move, reduce or act on each element, and with
    torch's functions: ``torch.cat([a, b], 1)``, ``F.gelu(a)``. A plain tensor beside it counts as a constant of the network (a
    position table, a :class:`TaskIndexedParameter`); what depends on the input goes in as a payload: ``payload.like(tensor)``.

    Args:
        data: a tensor; a converted network also returns whatever structure of tensors the original returned.
        task_id: the task, or None for the network without masks.
        mask_scale: the scale ``s`` of soft masks ``sigmoid(s * e)`` while the task is trained; None for binary masks. A finished
            task's masks are binary whatever the scale.

    Raises:
        TaskError: no possible task or scale.
    """

    __slots__ = ()

    def forward_by(self, module: Callable, *args: Any, **kwargs: Any) -> Any:
        """Passes the payload through a module or function that does not know payloads (section 3.2.3).

        Layers without weights and torch's functions follow their rules, so that masks stay pending where they can; anything else
        is given the masked data. Buffers that an unknown layer writes in forward are not kept apart.

        Raises:
            TaskError: the module has weights that tasks would share; names the layer to use instead.
        """
        return calls.forward_by(self, module, args, kwargs)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return calls.call_function(func, args, kwargs or {})

    # a tensor's manners

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a HATPayload has no {name!r}; payload.data is the masked tensor")

    @property
    def shape(self) -> torch.Size:
        return self._raw.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._raw.dtype

    @property
    def device(self) -> torch.device:
        return self._raw.device

    @property
    def requires_grad(self) -> bool:
        return self._raw.requires_grad

    @property
    def ndim(self) -> int:
        return self._raw.dim()

    @property
    def T(self) -> HATPayload:
        return self.permute(tuple(range(self.ndim))[::-1])

    @property
    def mT(self) -> HATPayload:
        return self.transpose(-2, -1)

    def dim(self) -> int:
        return self._raw.dim()

    def size(self, dim: int | None = None) -> Any:
        return self._raw.size() if dim is None else self._raw.size(dim)

    def numel(self) -> int:
        return self._raw.numel()

    def is_floating_point(self) -> bool:
        return self._raw.is_floating_point()

    def to(self, *args: Any, **kwargs: Any) -> HATPayload:
        """Another device or floating-point type, as :meth:`torch.Tensor.to`."""
        return calls.call_function(Tensor.to, (self, *args), kwargs)

    def __len__(self) -> int:
        return len(self._raw)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __iter__(self) -> Iterator[HATPayload]:
        return iter(self.unbind(0))

    def __repr__(self) -> str:
        shape = tuple(self._raw.shape) if isinstance(self._raw, Tensor) else type(self._raw).__name__
        pending = f", pending={eager.TABLE.describe(self._ids)}" if self._pending else ""
        return f"HATPayload({shape}, task_id={self._task}, mask_scale={self._scale}{pending})"


def _method(func: Callable) -> Callable:
    def method(self: HATPayload, *args: Any, **kwargs: Any) -> Any:
        return calls.call_function(func, (self, *args), kwargs)

    return method


def _reflected(func: Callable) -> Callable:
    def method(self: HATPayload, other: Any) -> Any:
        return calls.call_function(func, (other, self), {})

    return method


for _name in METHODS:
    setattr(HATPayload, _name, _method(getattr(Tensor, _name)))
for _name, _func in (*OPERATORS.items(), *COMPARISONS.items()):
    setattr(HATPayload, _name, _method(_func))
for _name, _func in BINARY.items():
    setattr(HATPayload, f"__{_name}__", _method(_func))
    setattr(HATPayload, f"__r{_name}__", _reflected(_func))

__all__ = ["HATPayload", "norm_of_payload", "weighted_of_payload"]
