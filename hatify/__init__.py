"""hatify: any trained torch network becomes one that learns task after task and never forgets.

What a user may rely on, and nothing else. Names load on first use, so that ``import hatify`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "convert": "hatify.conversion",
    "check": "hatify.checking",
    "verify": "hatify.verification",
    "extract": "hatify.lifecycle.extraction",
    "forget_task": "hatify.lifecycle.forgetting",
    "prune": "hatify.lifecycle.forgetting",
    "usage": "hatify.lifecycle.capacity",
    "save": "hatify.artifact",
    "load": "hatify.artifact",
    "Learning": "hatify.learning",
    "mask_scale": "hatify.learning",
    "regularization": "hatify.learning",
    "HATModel": "hatify.model",
    "HATPayload": "hatify.modules",
    "HATConfig": "hatify.modules",
    "HATLinear": "hatify.modules",
    "HATConv1d": "hatify.modules",
    "HATConv2d": "hatify.modules",
    "HATConv3d": "hatify.modules",
    "HATConvTranspose1d": "hatify.modules",
    "HATConvTranspose2d": "hatify.modules",
    "HATConvTranspose3d": "hatify.modules",
    "HATEmbedding": "hatify.modules",
    "HATRNN": "hatify.modules",
    "HATGRU": "hatify.modules",
    "HATLSTM": "hatify.modules",
    "TaskIndexedBatchNorm1d": "hatify.modules",
    "TaskIndexedBatchNorm2d": "hatify.modules",
    "TaskIndexedBatchNorm3d": "hatify.modules",
    "TaskIndexedLayerNorm": "hatify.modules",
    "TaskIndexedGroupNorm": "hatify.modules",
    "TaskIndexedParameter": "hatify.modules",
    "register": "hatify.registry",
    "Weighted": "hatify.registry",
    "Recurrent": "hatify.registry",
    "ChannelNorm": "hatify.registry",
    "MixingNorm": "hatify.registry",
    "Elementwise": "hatify.registry",
    "Spatial": "hatify.registry",
    "Moving": "hatify.registry",
    "TaskIndexedLayer": "hatify.registry",
    "HatifyError": "hatify.errors",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hatify' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
