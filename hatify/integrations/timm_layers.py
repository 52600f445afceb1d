"""timm's own layers that have to stay whole, registered the way a user registers theirs."""

from timm import layers

from hatify.registry import ChannelNorm, Elementwise, MixingNorm, Weighted, register

for _name in ("BatchNormAct2d", "SyncBatchNormAct"):
    if hasattr(layers, _name):
        register(getattr(layers, _name), ChannelNorm())

for _name in ("DropPath", "DropBlock2d"):
    if hasattr(layers, _name):
        register(getattr(layers, _name), Elementwise())


def _standardised(conv) -> Weighted:
    gains = ("gain",) if getattr(conv, "gain", None) is not None else ()
    return Weighted(spatial=2, groups=conv.groups, row_locked=True, gains=gains)


for _name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"):
    if hasattr(layers, _name):
        register(getattr(layers, _name))(_standardised)

register(layers.Linear, Weighted())  # torch's own, but for casts where it is scripted
register(layers.Conv2dSame)(lambda conv: Weighted(spatial=2, groups=conv.groups))
register(layers.LayerNorm, MixingNorm("layer"))  # torch's own, but for the choice of kernel
