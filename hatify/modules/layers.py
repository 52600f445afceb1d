"""Weighted layers with a masker: the same layer, and a mask per task over its output channels."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from hatify.modules.carrying import ChannelMask, layer_with
from hatify.modules.config import HATConfig, config_of
from hatify.modules.eager import Seen
from hatify.modules.masker import Masker
from hatify.modules.payload import HATPayload, weighted_of_payload
from hatify.modules.recurrent import RECURRENT, HATRecurrent, add_maskers
from hatify.modules.replacing import AsksBeforeReplacing


class HATLayer(AsksBeforeReplacing):
    """Mixin of HAT layers. On a tensor it is the plain layer, with ``mask`` on the channels of its output and ``inputs`` on those of its
    input, if given; on a payload it masks its input first and leaves its own mask pending on the output (section 3.1). ``masker`` may be
    None: a shared output layer without a mask. ``carries`` False says that masks are never in its weights: it is of a class of its own, or
    was, before it was saved."""

    takes_payloads = True
    masker: Masker | None
    carries = True
    plain_class: type[nn.Module]

    def forward(self, x: Any, *args: Any, mask: ChannelMask | None = None, inputs: ChannelMask | None = None, **kwargs: Any) -> Any:
        if isinstance(x, HATPayload):
            return weighted_of_payload(self, x, args, kwargs)
        if mask is not None or inputs is not None:
            return layer_with(self, x, mask, inputs)
        return super().forward(x, *args, **kwargs)


@cache
def hat_class(base: type[nn.Module]) -> type:
    """The HAT subclass of a weighted or recurrent layer class: ``HAT`` + its name."""

    def __init__(self, *args: Any, config: HATConfig | None = None, **kwargs: Any) -> None:
        args, config = config_of(args, config)
        base.__init__(self, *args, **kwargs)
        if recurrent:
            add_maskers(self, config)
        else:
            self.masker = Masker(_out_channels(self), config)
        self.seen = Seen()

    recurrent = issubclass(base, RECURRENT)

    doc = f"{base.__name__} with one mask per task; arguments as {base.__name__}, then ``config`` (:class:`HATConfig`)."
    members = {"__init__": __init__, "plain_class": base, "__doc__": doc, "__module__": __name__}
    return type(f"HAT{base.__name__}", (HATRecurrent if recurrent else HATLayer, base), members)


def _out_channels(layer: nn.Module) -> int:
    for name in ("out_features", "out_channels", "embedding_dim"):
        if hasattr(layer, name):
            return getattr(layer, name)
    return layer.weight.shape[0]


HATLinear = hat_class(nn.Linear)
HATConv1d = hat_class(nn.Conv1d)
HATConv2d = hat_class(nn.Conv2d)
HATConv3d = hat_class(nn.Conv3d)
HATConvTranspose1d = hat_class(nn.ConvTranspose1d)
HATConvTranspose2d = hat_class(nn.ConvTranspose2d)
HATConvTranspose3d = hat_class(nn.ConvTranspose3d)
HATEmbedding = hat_class(nn.Embedding)
HATRNN = hat_class(nn.RNN)
HATGRU = hat_class(nn.GRU)
HATLSTM = hat_class(nn.LSTM)
