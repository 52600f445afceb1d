"""Which layer classes stay layers, and what each one means to the mask algebra.

A layer that is not here is traced through: what it computes is then seen operator by operator. Registering is for
layers whose inside must stay together: weights that are normalised before use, statistics that change in forward,
randomness that depends on ``training``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from hatify.errors import ConversionError
from hatify.gates.layers import ChannelNorm, Elementwise, Layer, MixingNorm, Moving, Spatial, TaskIndexedLayer, Weighted
from hatify.gates.recurrent import Recurrent

Describe = Callable[[Any], "Layer"]


_DESCRIPTIONS: dict[type, Describe] = {}
_SAFE_OVERRIDES = {"__init__", "__doc__", "__module__", "extra_repr", "reset_parameters", "__repr__", "__annotations__",
                   "__constants__", "_reset_parameters", "init_weights", "__qualname__", "__firstlineno__",
                   "__static_attributes__", "__getstate__", "__setstate__", "_load_from_state_dict", "__class_getitem__"}  # fmt: skip


class Traced:
    """A forward that stands for a module's own while it is traced; the same for all that is alike."""


def register(layer_class: type[nn.Module], description: Layer | None = None):
    """Tells hatify what a layer class means, so that it is kept whole and converted by that meaning.

    Subclasses that do not override ``forward`` follow. Use it with a description, or as a decorator of a function that
    describes one layer::

        hatify.register(StochasticDepth, hatify.Elementwise())

        @hatify.register(WeightStandardizedConv2d)
        def describe(conv):
            return hatify.Weighted(spatial=2, groups=conv.groups, row_locked=True)

    Raises:
        ConversionError: not a subclass of ``torch.nn.Module``, or no description.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise ConversionError(
            f"only module classes can be registered, not {layer_class!r}",
            fix="@hatify.register(MyLayer) over a function that takes one layer and returns its description",
        )
    if description is not None:
        _DESCRIPTIONS[layer_class] = lambda layer: description
        return description

    def keep(describe: Describe | Layer) -> Describe | Layer:
        _DESCRIPTIONS[layer_class] = (lambda layer: describe) if isinstance(describe, Layer) else describe
        return describe

    return keep


def registered_classes() -> list[type[nn.Module]]:
    """All classes that are registered, torch's own included."""
    _load_integrations()
    return [*_DESCRIPTIONS]


def describe(module: nn.Module) -> Layer | None:
    """What ``module`` means as a layer, or None where it is traced through."""
    _load_integrations()
    if module._forward_hooks or module._forward_pre_hooks or _has_own_forward(module):
        return None  # a layer with something around it is not its plain class
    meaning = describe_as(module, type(module))
    return None if isinstance(meaning, Weighted) and _holds_buffer(module, meaning.weight) else meaning


def _has_own_forward(module: nn.Module) -> bool:
    """Whether ``module.forward = ...`` was written; what stands for a layer while it is traced does not count."""
    return not isinstance(vars(module).get("forward"), Traced | None)


def _holds_buffer(module: nn.Module, name: str) -> bool:
    """Whether a weight was made a buffer: frozen by hand."""
    return module._buffers.get(name) is not None


def describe_as(module: nn.Module, cls: type) -> Layer | None:
    """What ``module`` would mean if it were of the class ``cls``: a HAT layer means what its plain class means."""
    if parametrize.is_parametrized(module):
        return _parametrized(module, parametrize.type_before_parametrizations(module) if cls is type(module) else cls)
    return _by_class(module, cls)


def _by_class(module: nn.Module, cls: type) -> Layer | None:
    for base in cls.__mro__:
        if base not in _DESCRIPTIONS:
            continue
        between = cls.__mro__[: cls.__mro__.index(base)]
        if not any(name in vars(base) or hasattr(base, name) for c in between for name in vars(c) if name not in _SAFE_OVERRIDES):
            found = _DESCRIPTIONS[base](module)
            if not isinstance(found, Layer):
                raise ConversionError(
                    f"the registered description of {base.__name__} returned {found!r}",
                    fix="return hatify.Weighted(...), hatify.Elementwise(), hatify.TaskIndexedLayer() or another description",
                )
            return found
        if issubclass(base, nn.modules.batchnorm._NormBase):
            return TaskIndexedLayer(f"{cls.__name__} changes what {base.__name__} does")
        return None
    return None


def _parametrized(module: nn.Module, cls: type) -> Layer | None:
    """Weight norm locks by its own reduction group. What others couple is seen where they are traced through, as weights that forward
    computes are; those that hold buffers may write to them, and registered layers must stay together: one copy per task."""
    plain = _by_class(module, cls)
    weights = isinstance(plain, Weighted) and set(module.parametrizations) == {plain.weight}
    chain = module.parametrizations[plain.weight] if weights else ()
    if len(chain) != 1 or not isinstance(chain[0], _WeightNorm) or chain[0].dim != 0:
        traced = plain is None or isinstance(plain, Weighted) and cls.forward.__module__.startswith("torch.nn.")
        traced = traced and next(module.parametrizations.buffers(), None) is None
        return None if traced else TaskIndexedLayer(f"{type(module).__name__}: a parametrisation that couples its weights")
    prefix = f"parametrizations.{plain.weight}."
    return replace(
        plain,
        weight=prefix + "original1",
        gains=(prefix + "original0",),
        row_locked=not plain.transposed,
        column_grouped=plain.transposed,
    )


def _load_integrations() -> None:
    for library in ("timm", "torchvision", "transformers"):
        if library in sys.modules and f"hatify.integrations.{library}_layers" not in sys.modules:
            __import__(f"hatify.integrations.{library}_layers")


def _linear(layer: nn.Linear) -> Layer:
    return Weighted()


def _conv(dims: int, transposed: bool = False) -> Describe:
    return lambda layer: Weighted(spatial=dims, transposed=transposed, groups=layer.groups)


def _embedding(layer) -> Layer:
    if layer.max_norm is not None:
        return TaskIndexedLayer("max_norm writes the table in forward")
    return Weighted(bias=None, lookup=True, pooled=isinstance(layer, nn.EmbeddingBag))


def _recurrent(blocks: int) -> Describe:
    return lambda layer: Recurrent(
        blocks, layer.hidden_size, layer.proj_size, layer.num_layers, 1 + layer.bidirectional, layer.bias, memory=blocks == 4
    )


def _recurrent_cell(blocks: int) -> Describe:
    return lambda layer: Recurrent(blocks, layer.hidden_size, bias=layer.bias, cell=True, memory=blocks == 4)


for _dims, _class in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1):
    _DESCRIPTIONS[_class] = _conv(_dims)
for _dims, _class in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), start=1):
    _DESCRIPTIONS[_class] = _conv(_dims, transposed=True)
_DESCRIPTIONS[nn.Linear] = _linear
_DESCRIPTIONS[nn.Embedding] = _DESCRIPTIONS[nn.EmbeddingBag] = _embedding
for _class in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register(_class, ChannelNorm())
for _class in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
    register(_class, ChannelNorm(batch=False))
register(nn.LayerNorm, MixingNorm("layer"))
register(nn.RMSNorm, MixingNorm("rms"))
register(nn.GroupNorm, MixingNorm("group"))
for _class in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
               nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
               nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
               nn.AlphaDropout, nn.FeatureAlphaDropout):  # fmt: skip
    register(_class, Elementwise())
for _dims in (1, 2, 3):
    for _kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "LPPool"):
        if hasattr(nn, f"{_kind}{_dims}d"):
            _pool = getattr(nn, f"{_kind}{_dims}d")
            _DESCRIPTIONS[_pool] = lambda layer, d=_dims: (
                TaskIndexedLayer("returns indices") if getattr(layer, "return_indices", False) else Spatial(d)
            )
register(nn.PixelShuffle, Moving())
register(nn.PixelUnshuffle, Moving())
register(nn.ZeroPad2d, Moving())
for _class, _blocks in ((nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)):
    _DESCRIPTIONS[_class] = _recurrent(_blocks)
for _class, _blocks in ((nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)):
    _DESCRIPTIONS[_class] = _recurrent_cell(_blocks)
register(nn.Bilinear, TaskIndexedLayer("weights of three dimensions"))
