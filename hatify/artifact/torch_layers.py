"""Torch's own layers as data: class by its plain name, attributes by name and type, no constructor."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..modules.carrying import adds_nothing
from .constants import constant_from, constant_to
from .fields import Fields

__all__ = ["LAYERS", "attributes_from", "attributes_to", "empty_layer", "plain_class"]

_CONV = (
    "in_channels:i out_channels:i kernel_size:t stride:t padding:ts dilation:t transposed:b output_padding:t groups:i padding_mode:s "
    "_reversed_padding_repeated_twice:t"
)
_NORM = "num_features:i eps:f momentum:f? affine:b track_running_stats:b"
WEIGHT = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d{1,9}(_reverse)?", re.ASCII)
"""What recurrent layers call their weights."""
_RNN = (
    "mode:s input_size:i hidden_size:i num_layers:i bias:b batch_first:b dropout:f bidirectional:b proj_size:i _flat_weights_names:S "
    "_all_weights:S"
)
_CELL = "input_size:i hidden_size:i bias:b"
_MAX_POOL = "kernel_size:t stride:t padding:t dilation:t return_indices:b ceil_mode:b"
_AVG_POOL = "kernel_size:t stride:t padding:t ceil_mode:b count_include_pad:b"
_PAD = "padding:t"

_LINES = {
    "Linear Bilinear": "in_features:i? in1_features:i? in2_features:i? out_features:i",
    "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d": _CONV,
    "BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d": _NORM,
    "SyncBatchNorm": f"{_NORM} process_group:none",
    "LayerNorm": "normalized_shape:t eps:f elementwise_affine:b",
    "RMSNorm": "normalized_shape:t eps:f? elementwise_affine:b",
    "GroupNorm": "num_groups:i num_channels:i eps:f affine:b",
    "LocalResponseNorm CrossMapLRN2d": "size:i alpha:f beta:f k:f",
    "Embedding": "num_embeddings:i embedding_dim:i padding_idx:i? max_norm:f? norm_type:f scale_grad_by_freq:b sparse:b",
    "EmbeddingBag": "num_embeddings:i embedding_dim:i max_norm:f? norm_type:f scale_grad_by_freq:b padding_idx:i? mode:s sparse:b "
    "include_last_offset:b",
    "RNN": f"nonlinearity:s {_RNN}",
    "LSTM GRU": _RNN,
    "RNNCell": f"{_CELL} nonlinearity:s",
    "LSTMCell GRUCell": _CELL,
    "MaxPool1d MaxPool2d MaxPool3d": _MAX_POOL,
    "AvgPool1d": _AVG_POOL,
    "AvgPool2d AvgPool3d": f"{_AVG_POOL} divisor_override:i?",
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d": "output_size:t?",
    "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d": "output_size:t? return_indices:b",
    "LPPool1d LPPool2d LPPool3d": "norm_type:f kernel_size:t stride:t? ceil_mode:b",
    "MaxUnpool1d MaxUnpool2d MaxUnpool3d": "kernel_size:t stride:t padding:t",
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout": "p:f inplace:b",
    "ReLU SELU SiLU Mish Hardswish Hardsigmoid": "inplace:b",
    "ReLU6 Hardtanh": "min_val:f max_val:f inplace:b",
    "LeakyReLU": "negative_slope:f inplace:b",
    "RReLU": "lower:f upper:f inplace:b",
    "PReLU": "num_parameters:i init:f",
    "ELU CELU": "alpha:f inplace:b",
    "GELU": "approximate:s",
    "GLU": "dim:i",
    "Sigmoid Tanh Tanhshrink Softsign LogSigmoid Identity Softmax2d": "",
    "Softmax LogSoftmax Softmin": "dim:i?",
    "Hardshrink Softshrink": "lambd:f",
    "Softplus": "beta:f threshold:f",
    "Threshold": "threshold:f value:f inplace:b",
    "PixelShuffle": "upscale_factor:i",
    "PixelUnshuffle": "downscale_factor:i",
    "ChannelShuffle": "groups:i",
    "ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d": f"{_PAD} value:f",
    "ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d": _PAD,
    "CircularPad1d CircularPad2d CircularPad3d": _PAD,
    "Flatten": "start_dim:i end_dim:i",
    "Unflatten": "dim:i unflattened_size:t",
    "Fold": "output_size:t kernel_size:t dilation:t padding:t stride:t",
    "Unfold": "kernel_size:t dilation:t padding:t stride:t",
    "Upsample UpsamplingBilinear2d UpsamplingNearest2d": "name:s size:t? scale_factor:F? mode:s align_corners:b? "
    "recompute_scale_factor:b?",
    "CosineSimilarity": "dim:i eps:f",
    "MultiheadAttention": "embed_dim:i kdim:i vdim:i _qkv_same_embed_dim:b num_heads:i dropout:f batch_first:b head_dim:i "
    "add_zero_attn:b bias_k:none? bias_v:none?",
    "TransformerEncoderLayer": "norm_first:b activation_relu_or_gelu:i activation:A?",
    "TransformerDecoderLayer": "norm_first:b activation:A?",
    "TransformerEncoder": "num_layers:i enable_nested_tensor:b use_nested_tensor:b mask_check:b norm:none?",
    "TransformerDecoder": "num_layers:i norm:none?",
    "Transformer": "d_model:i nhead:i batch_first:b",
}

LAYERS: dict[str, dict[str, str]] = {
    name: dict(part.split(":") for part in text.split()) for names, text in _LINES.items() for name in names.split()
}
"""Attributes that the forward of each class reads, with their types: i(nt), f(loat or int), b(ool), s(tring), t (an int or integers in a
tuple or list), F (floats likewise), S (nested lists of strings), A (a function among :data:`ACTIVATIONS`); ``?``: may be None or
absent, or among its children and parameters."""

ACTIVATIONS: dict[str, Any] = {"relu": nn.functional.relu, "gelu": nn.functional.gelu}
"""Functions that a layer of torch keeps as an attribute, by the names that its constructor takes."""


def plain_class(module: nn.Module, cls: type | None = None) -> str | None:
    """The name of torch's class that does exactly what ``module`` does as a ``cls`` (default: its own class), or None."""
    cls = cls or type(module)
    if "forward" in vars(module):
        return None
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.modules.") and LAYERS.get(base.__name__) is not None:
            return base.__name__ if getattr(nn, base.__name__) is base and adds_nothing(cls, base) else None
    return None


def attributes_to(module: nn.Module, name: str) -> dict[str, Any]:
    """The attributes of a layer as JSON.

    Raises:
        ValueError: one of another type than torch's own constructor gives.
    """
    schema = LAYERS[name]
    names = {function: text for text, function in ACTIVATIONS.items()}
    written = {"S": lambda v: v, "A": lambda v: v if v is None else names[v]}
    return {a: written.get(schema[a].rstrip("?"), constant_to)(v) for a, v in attributes_of(module, name).items()}


def attributes_of(module: nn.Module, name: str) -> dict[str, Any]:
    """The attributes that a class of torch reads.

    Raises:
        ValueError: one of another type than torch's own constructor gives.
    """
    found = {}
    for attribute, kind in LAYERS[name].items():
        value = getattr(module, attribute, None)
        held = attribute in module._modules or attribute in module._parameters
        if kind.endswith("?") and (held or not hasattr(module, attribute)):
            continue
        if not _fits(value, kind):
            raise ValueError(f"{attribute} is {value!r}")
        found[attribute] = value
    return found


_PLAIN: dict[str, tuple[type, ...]] = {"i": (int,), "f": (int, float), "b": (bool,), "t": (int,), "ts": (int,), "F": (int, float)}
"""Types of JSON that are such an attribute as they are."""
_SCHEMAS = {
    name: [(attribute, kind, _PLAIN.get(kind.rstrip("?"), ())) for attribute, kind in schema.items()]
    for name, schema in LAYERS.items()
}


def attributes_from(fields: Fields, name: str) -> dict[str, Any]:
    """The attributes again, checked.

    Raises:
        ArtifactError: an unknown attribute, or one of the wrong type.
    """
    fields.only(*LAYERS[name])
    found = {}
    for attribute, kind, plain in _SCHEMAS[name]:
        if type(fields.data.get(attribute)) in plain:
            found[attribute] = fields.data[attribute]
            continue
        if kind.endswith("?") and not fields.has(attribute):
            continue
        part = fields.at(attribute)
        if kind.rstrip("?") == "A":
            value = None if part.data is None else ACTIVATIONS[part.one_of(*ACTIVATIONS)]
        else:
            value = part.data if kind.rstrip("?") == "S" else part.decoded(constant_from, "a constant")
        if not _fits(value, kind):
            raise part.wrong(str(value)[:60], f"the {attribute} of a {name}")
        found[attribute] = value
    return found


def _fits(value: Any, kind: str) -> bool:
    if value is None:
        return kind.endswith("?") or kind == "none"
    kind = kind.rstrip("?")
    if kind == "i":
        return type(value) is int
    if kind == "f":
        return type(value) in (int, float)
    if kind == "b":
        return type(value) is bool
    if kind == "s":
        return type(value) is str
    if kind == "none":
        return False
    if kind == "A":
        return any(value is function for function in ACTIVATIONS.values())
    if kind == "S":
        return isinstance(value, list) and all(_fits(v, "S") or (type(v) is str and WEIGHT.fullmatch(v) is not None) for v in value)
    number = (lambda v: type(v) is int or v is None) if kind.startswith("t") else (lambda v: type(v) in (int, float))
    many = isinstance(value, tuple | list) and all(number(v) for v in value)
    return many or number(value) or (kind == "ts" and value in ("same", "valid"))


def empty_layer(name: str, attributes: dict[str, Any]) -> nn.Module:
    """A layer of torch with these attributes and without parameters, as its constructor never ran."""
    cls = getattr(nn, name)
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.__dict__.update(attributes)
    return layer


def check_recurrent(attributes: Fields, module: nn.RNNBase) -> None:
    """Whether the weights of a recurrent layer are those that its sizes ask for: torch's kernels trust them.

    Raises:
        ArtifactError: they are not.
    """
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    kind = next(c for c in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, c))
    out, directions = module.proj_size or module.hidden_size, ("", "_reverse")[: 1 + module.bidirectional]
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(min(module.num_layers, len(module._flat_weights_names) + 1)):
        inputs = out * len(directions) if layer else module.input_size
        rows = gates * module.hidden_size
        for direction in (f"_l{layer}{d}" for d in directions):
            expected |= {f"weight_ih{direction}": (rows, inputs), f"weight_hh{direction}": (rows, out)}
            expected |= {f"bias_ih{direction}": (rows,), f"bias_hh{direction}": (rows,)} if module.bias else {}
            expected |= {f"weight_hr{direction}": (out, module.hidden_size)} if module.proj_size else {}
    held = {name: tuple(t.shape) for name, t in module._parameters.items() if t is not None and name in expected}
    modes = {nn.LSTM: ("LSTM",), nn.GRU: ("GRU",), nn.RNN: ("RNN_TANH", "RNN_RELU")}[kind]
    if module.mode not in modes or [*expected] != list(module._flat_weights_names):
        raise attributes.wrong(f"{module.mode} of {module.num_layers} layers", f"those of the {len(held)} weights")
    for name, shape in held.items():
        if shape != expected[name]:
            raise attributes.wrong(f"sizes that ask for {name} of {list(expected[name])}", f"those of {list(shape)}")


def settle(module: nn.Module) -> None:
    """After its parameters are there: recurrent layers keep a list of them."""
    if isinstance(module, nn.RNNBase):
        with torch.no_grad():
            module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]
            module._init_flat_weights()
