"""Real architectures, untrained, each for a habit of its own; built without network."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from networks.registry import randomise
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class ZooModel:
    """An architecture of a model library.

    Attributes:
        source_text: what a user types for it: `resnet50`, `torchvision:googlenet`.
        make: builds it with random weights, in train mode; the same weights at each call. No plain
            initialisation: see `randomise` and `_calibrate`.
        inputs: example inputs of a batch size, at the model's own size; the same values at each call.
    """

    source_text: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]


def _model(text: str, build: Callable[[], nn.Module], size: int) -> ZooModel:
    inputs = _images(size)

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Zero heads and 1e-6 residual scales, as several start with, would hide what the body does.
            return _calibrate(randomise(build().train()), inputs(4))

    return ZooModel(text, make, inputs)


def _images(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Coarse random patterns under noise: noise alone averages out before it reaches the head."""

    def inputs(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(size)
        coarse = torch.randn(batch, 3, 4, 4, generator=generator)
        noise = torch.randn(batch, 3, size, size, generator=generator)
        return (F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.5 * noise,)

    return inputs


@torch.no_grad()
def _calibrate(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Give batch norms the statistics of one batch.

    With those of initialisation, eval-mode activations vanish (GoogLeNet) or explode (Inception) with depth.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=1e-3)
    return model


def _timm(name: str, size: int = 224, **kwargs: Any) -> ZooModel:
    """A timm model whose train mode is stochastic, as far as `kwargs` (its drop rates) go."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **kwargs)

    return _model(name, build, size)


def _torchvision(name: str, size: int = 224, **kwargs: Any) -> ZooModel:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, **kwargs)

    return _model(f"torchvision:{name}", build, size)


_DROP = {"drop_path_rate": 0.1, "drop_rate": 0.1}
_HEAD_DROP = {"drop_rate": 0.1}  # families without stochastic depth

_MODELS = (
    _timm("resnet50", **_DROP),
    _timm("resnet18", size=32, **_DROP),
    _timm("vit_base_patch16_224", **_DROP),
    _timm("deit_tiny_distilled_patch16_224", **_DROP),
    _timm("beit_base_patch16_224", **_DROP),
    _timm("convnext_tiny", **_DROP),
    _timm("swin_tiny_patch4_window7_224", **_DROP),
    _timm("efficientnet_b0", **_DROP),
    _timm("mobilenetv3_small_100", **_DROP),
    _timm("regnety_002", **_DROP),
    _timm("resnext50_32x4d", **_DROP),
    _timm("densenet121", **_HEAD_DROP),
    _timm("inception_v3", size=299, **_HEAD_DROP),
    _timm("hrnet_w18_small", **_HEAD_DROP),
    _timm("resnetv2_50x1_bit", **_DROP),
    _timm("test_nfnet", size=160, **_DROP),
    _timm("mixer_s32_224", **_DROP),
    _timm("vgg11_bn", **_HEAD_DROP),
    _timm("convit_tiny", **_DROP),
    _timm("coat_tiny", **_DROP),
    _timm("ghostnet_050", **_HEAD_DROP),
    _timm("xcit_nano_12_p8_224", **_DROP),
    _timm("halonet_h1", size=256, **_DROP),
    _torchvision("shufflenet_v2_x0_5", weights=None),
    _torchvision("googlenet", weights=None, init_weights=False, aux_logits=True),
    _torchvision("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None),
)

ZOO: dict[str, ZooModel] = {model.source_text.rpartition(":")[2]: model for model in _MODELS}
