"""Operators by name: what a stored graph may call.

Three families, each a closed list: what the generated code uses of hatify and of Python, ATen's functional operators that torch
offers under a public name, and a few operators of torchvision.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..capture.regions import enter_autocast, exit_autocast
from ..errors import ArtifactError
from ..modules import live_norms
from ..modules.grouped import GROUPED_MM
from ..modules.task_indexed import write_buffer
from ..modules.types import by_dtype, limit
from ..rewrite.graph import by_mode

__all__ = ["operator_from", "operator_name"]

PYTHON: dict[str, Callable] = {
    **{f"python.{name}": getattr(operator, name) for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge", "and_",
        "or_", "xor", "not_", "invert", "lshift", "rshift", "matmul", "getitem")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum", "reshape")},
    "python.round": round,
    "python.attribute": getattr,
    "torch.einsum": torch.functional.einsum,
    "torch.is_grad_enabled": torch.is_grad_enabled,
    "torch.set_grad_enabled": torch._C._set_grad_enabled,
    "hatify.by_mode": by_mode,
    "hatify.by_dtype": by_dtype,
    "hatify.limit": limit,
    "hatify.write_buffer": write_buffer,
    "hatify.layer_norm": live_norms.layer_norm,
    "hatify.rms_norm": live_norms.rms_norm,
    "hatify.group_norm": live_norms.group_norm,
    "hatify.enter_autocast": enter_autocast,
    "hatify.exit_autocast": exit_autocast,
}  # fmt: skip

ATTRIBUTES = ("device", "dtype", "shape", "ndim")
"""What ``python.attribute`` may read of a tensor."""

UNDERSCORED = {
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_conj", "_log_softmax", "_scaled_dot_product_attention_math", "_shape_as_tensor",
    "_softmax", "_to_copy", "_unsafe_index", "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_lanczos2d_aa",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_weight_norm", "__and__", "__or__", "__xor__",
    "__lshift__", "__rshift__", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_pack_padded_sequence", "_pad_packed_sequence", "_trilinear",
    "_cdist_forward", "_stack", "_euclidean_dist", "_pdist_forward", "_assert_tensor_metadata", "_local_scalar_dense", "_reshape_copy",
    "_embedding_bag", "_safe_softmax", "_standard_gamma", "_to_dense", "_grouped_mm",
}  # fmt: skip
FUNCTIONAL = {
    "sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "pad", "native_layer_norm", "native_group_norm",
    "native_dropout", "convolution", "lift_fresh_copy", "alias", "alias_copy", "scalar_tensor", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "view_copy", "im2col", "col2im",
    "matrix_H", "numpy_T", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "constant_pad_nd",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "grid_sampler", "glu", "hardswish", "mish", "silu", "gelu", "elu", "leaky_relu",
    "hardtanh", "hardsigmoid", "softplus", "log_sigmoid", "unbind", "new_empty_strided", "full_like", "fill", "masked_fill",
    "affine_grid_generator", "max_pool1d_with_indices", "cross_entropy_loss", "nll_loss_nd", "nll_loss2d",
    "uniform", "exponential", "cauchy", "geometric", "log_normal", "random", "normal_functional",
    "embedding_renorm", "reshape_as", "type_as", "expand_as", "view_as", "to", "slice",
    "copy", "new_empty", "new_zeros", "new_ones", "new_full", "item", "max_pool1d", "lift_fresh", "linear", "sum_to_size",
}  # fmt: skip
"""Functional operators whose public name is another one."""
ROOMS = {"linalg": torch.linalg, "special": torch.special, "fft": torch.fft}
"""Modules of torch whose functions are operators of these names after a prefix."""
REFUSED = {"from_file", "set_", "save", "load", "compile", "vmap", "apply_", "map_", "data", "numpy", "storage", "resize"}
UNCHECKED = re.compile(
    "sparse|coo_|quant(?!ile)|fbgemm|mkldnn|miopen|cudnn|nested|rnn|lstm|gru|native_batch_norm|flash_attention|native_multi_head_attention"
    "|transformer_encoder|weight_norm_interface|pin_memory|seed|(?<!grid_)generator|lu_solve|ldl_solve|ormqr"
)
"""Kernels that read or write beyond tensors whose sizes do not fit one another, and what changes more than its result. Captures hold the
operators above them, which look at sizes first."""
TORCHVISION = ("deform_conv2d", "nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")


@cache
def _public() -> frozenset[str]:
    names = {*dir(torch), *dir(torch.nn.functional), *dir(torch.Tensor)}
    rooms = {f"{prefix}_{name}" for prefix, room in ROOMS.items() for name in dir(room) if not name.startswith("_")}
    found = rooms | ({n for n in names if not n.startswith("_")} - REFUSED) | UNDERSCORED | FUNCTIONAL
    return frozenset(n for n in found if UNCHECKED.search(n) is None)


def operator_name(target: Any) -> str | None:
    """The stored name of a graph's function, or None where it cannot be stored."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name if _resolve(name) is target else None
    for name, function in PYTHON.items():
        if function is target:
            return name
    return None


def operator_from(name: str) -> Callable:
    """The function of a stored name.

    Raises:
        ValueError: not one of the list.
        ArtifactError: an operator of torchvision, which is not imported.
    """
    found = PYTHON.get(name) or _resolve(name)
    if found is None:
        raise ValueError(f"{name[:100]!r} is no operator that a stored graph may call")
    return found


@cache
def _resolve(name: str) -> torch._ops.OpOverload | None:
    space, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    if not (base.isidentifier() and overload.isidentifier()):
        return None
    if name == str(GROUPED_MM):
        return GROUPED_MM
    if space == "torchvision" and base in TORCHVISION:
        if not hasattr(torch.ops.torchvision, base):
            raise ArtifactError(
                f"the graph calls {name}",
                why="it is one of torchvision's compiled operators",
                fix="pip install torchvision, and import torchvision before loading",
            )
        return getattr(getattr(torch.ops.torchvision, base), overload, None)
    if space != "aten" or base not in _public():
        return None
    try:
        found = getattr(getattr(torch.ops.aten, base), overload)
    except AttributeError:
        return None
    return None if found._schema.is_mutable else found
