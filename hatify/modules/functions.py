"""Which rule a torch function has in a hand-written network, where that is certain."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hatify.gates.rules import RULES, Call, Interpreter, Outcome, norms, unknown
from hatify.gates.rules.base import Rule
from hatify.modules import live_norms

DUNDERS = {"__add__": "add", "__sub__": "sub", "__mul__": "mul", "__truediv__": "div", "__matmul__": "matmul", "__pow__": "pow",
           "__neg__": "neg", "__radd__": "add", "__rmul__": "mul"}  # fmt: skip
REFLECTED = {"__rsub__": operator.sub, "__rtruediv__": operator.truediv, "__rmatmul__": operator.matmul, "__rpow__": operator.pow}
OPERATORS = {operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.matmul: "matmul",
             operator.pow: "pow", operator.neg: "neg", operator.getitem: "getitem"}  # fmt: skip
VARIADIC = {"view", "reshape", "permute", "expand", "repeat", "tile", "flip"}
"""Methods that take one tuple or several numbers."""
OTHER_ORDER = {(torch.Tensor, "where"), (F, "instance_norm"), (F, "unfold"), (F, "adaptive_max_pool1d"), (F, "adaptive_max_pool2d"),
               (F, "adaptive_max_pool3d")}  # fmt: skip
"""Python functions that share a name with an operator of another signature."""
RENAMED = {
    F.unfold: "im2col", F.dropout1d: "feature_dropout", F.dropout2d: "feature_dropout", F.dropout3d: "feature_dropout",
    F.grid_sample: "grid_sampler", F.adaptive_max_pool1d: "adaptive_avg_pool1d", F.adaptive_max_pool2d: "adaptive_avg_pool2d",
    F.adaptive_max_pool3d: "adaptive_avg_pool3d", torch.linalg.vector_norm: "linalg_vector_norm", torch.special.expit: "sigmoid",
    F.logsigmoid: "log_sigmoid",
}  # fmt: skip


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True, *, live):
    return live_norms.layer_norm(input, normalized_shape, weight, bias, eps, live)


def _rms_norm(input, normalized_shape, weight=None, eps=None, *, live):
    return live_norms.rms_norm(input, normalized_shape, weight, eps, live)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True, *, live):
    return live_norms.group_norm(input, num_groups, weight, bias, eps, live)


LIVE = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}
"""Variants of torch's functions that count live channels only."""
FRESH = {
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like, torch.numel,
    torch.is_floating_point, torch.is_complex, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty,
}  # fmt: skip
"""Functions that read the shape of a tensor and not what is in it."""
WEIGHTED = {
    F.linear, F.bilinear, F.embedding, F.embedding_bag, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d, F.multi_head_attention_forward,
}  # fmt: skip
RUNNING = {F.batch_norm: 1, F.instance_norm: 1, torch.batch_norm: 3, torch.instance_norm: 3}
"""Normalisations that may keep statistics, and where these stand among the arguments."""


@dataclass(frozen=True)
class Function:
    """A call in the spelling that its rule reads. ``live`` is the variant of ``func`` that counts live channels only."""

    name: str
    rule: Rule
    func: Callable
    args: tuple
    kwargs: dict[str, Any]
    live: Callable | None = None


def _known() -> dict[Callable, str]:
    """Functions and methods of torch that are one operator with a rule, in that operator's order of arguments."""
    known: dict[Callable, str] = {}
    for name in RULES.rules:
        for room in (torch, F, Tensor):
            found = getattr(room, name, None)
            if callable(found) and (room, name) not in OTHER_ORDER and not name.endswith("_") and not isinstance(found, type):
                known[found] = name
    known.update({getattr(Tensor, spelled): name for spelled, name in DUNDERS.items()})
    return {**known, **OPERATORS, Tensor.__getitem__: "getitem", **RENAMED}


KNOWN = _known()
IN_PLACE = {
    getattr(room, name) for room in (torch, F, Tensor) for name in dir(room)
    if (name.endswith("_") and not name.endswith("__") or name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"))
    and not name.startswith("_") | name.endswith(("requires_grad_", "share_memory_")) and callable(getattr(room, name))
}  # fmt: skip


def read(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Function:
    """The rule and the arguments of a call; the unknown operator where it is not certain what ``func`` does."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in REFLECTED and len(args) == 2:
        func, args = REFLECTED[name], (args[1], args[0])
    name = KNOWN.get(func, "") if hashable(func) else ""
    kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(k, k) if name else k: v for k, v in kwargs.items()}
    for spelled in ("input", "self"):
        if name and not args and spelled in kwargs:
            args = (kwargs.pop(spelled),)
    if name and "other" in kwargs and len(args) == 1:
        args = (*args, kwargs.pop("other"))
    if name in VARIADIC and len(args) > 2 and all(isinstance(a, int) for a in args[1:]):
        args = (args[0], tuple(args[1:]))
    if name == "getitem":
        return _indexed(func, args)
    if func is F.interpolate:
        return Function("interpolate", _interpolation(args, kwargs), func, args, kwargs)
    if func in (F.batch_norm, torch.batch_norm, F.instance_norm):
        return Function("batch_norm", _own_statistics, func, args, kwargs)
    if not name or not args or _uncertain(name, args, kwargs):
        return Function("", unknown, func, args, kwargs)
    return Function(name, RULES[name], func, args, kwargs, LIVE.get(name))


def running_statistics(func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call keeps or reads running statistics."""
    place = RUNNING.get(func)
    if place is None:
        return False
    given = (*args[place : place + 2], kwargs.get("running_mean"), kwargs.get("running_var"))
    return any(isinstance(a, Tensor) for a in given)


def hashable(func: Any) -> bool:
    try:
        hash(func)
    except TypeError:
        return False
    return True


def _uncertain(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Arguments that the rule would misread, or results that cannot be masked."""
    if any(isinstance(a, torch.dtype) and not a.is_floating_point for a in (*args[1:], *kwargs.values())):
        return True
    if kwargs.get("out") is not None:
        return True
    if name == "view" and len(args) > 1 and isinstance(args[1], torch.dtype):
        return True  # other bits, not other places
    if name in ("softmax", "log_softmax", "softmin"):
        return not isinstance(args[1] if len(args) > 1 else kwargs.get("dim"), int)
    return False


def _indexed(func: Callable, args: tuple) -> Function:
    """Numbers, slices and lists of numbers move; index tensors move where the gates do not depend on what they hold."""
    value, index = args
    places = index if isinstance(index, tuple) else (index,)
    if all(isinstance(p, int | slice | type(None) | type(...) | list) for p in places):
        return Function("slice", RULES["slice"], operator.getitem, (value, index), {})
    whole = all(not isinstance(p, slice) or p == slice(None) for p in places)
    if whole and all(isinstance(p, slice) or not isinstance(p, int | list | type(None) | type(...)) for p in places):
        indices = [None if isinstance(p, slice) else p for p in places]
        return Function("index", RULES["index"], torch.ops.aten.index.Tensor, (value, indices), {})
    return Function("", unknown, operator.getitem, args, {})


def _interpolation(args: tuple, kwargs: dict[str, Any]) -> Rule:
    mode = args[3] if len(args) > 3 else kwargs.get("mode", "nearest")
    if mode.startswith("nearest"):
        return RULES["upsample_nearest2d"]
    spatial = args[0].dim() - 2
    name = {1: "upsample_linear1d", 2: "upsample_bilinear2d", 3: "upsample_trilinear3d"}.get(spatial)

    def rule(run: Interpreter, call: Call) -> Outcome:
        return RULES[name](run, Call(name, call.func, call.args, call.kwargs)) if name else unknown(run, call)

    return rule


def _own_statistics(run: Interpreter, call: Call) -> Outcome:
    """Batch and instance normalisation without running statistics."""
    return norms.per_channel(run, call, batch="batch" in call.func.__name__)


def normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Any:
    """``F.normalize``, operator by operator."""
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps).expand_as(input)


COMPOSITE = {F.normalize: normalize}
"""Functions that are seen operator by operator."""
