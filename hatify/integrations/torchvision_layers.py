"""torchvision's own layers that have to stay whole."""

from torchvision import ops

from hatify.registry import Elementwise, register

register(ops.StochasticDepth, Elementwise())
for _name in ("DropBlock2d", "DropBlock3d"):
    if hasattr(ops, _name):
        register(getattr(ops, _name), Elementwise())
