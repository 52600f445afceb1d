"""torchvision: classification, segmentation, video, detection (whole models and their backbones), optical flow; nothing quantised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from hatify.zoo.entry import Entry

BACKBONE = ".backbone"
SMALLEST = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "detection.faster_rcnn": "fasterrcnn_mobilenet_v3_large_320_fpn",
    "detection.fcos": "fcos_resnet50_fpn",
    "detection.keypoint_rcnn": "keypointrcnn_resnet50_fpn",
    "detection.mask_rcnn": "maskrcnn_resnet50_fpn",
    "detection.retinanet": "retinanet_resnet50_fpn",
    "detection.ssd": "ssd300_vgg16",
    "detection.ssdlite": "ssdlite320_mobilenet_v3_large",
    "efficientnet": "efficientnet_b0",
    "googlenet": "googlenet",
    "inception": "inception_v3",
    "maxvit": "maxvit_t",
    "mnasnet": "mnasnet0_5",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3": "mobilenet_v3_small",
    "optical_flow.raft": "raft_small",
    "regnet": "regnet_x_400mf",
    "resnet": "resnet18",
    "segmentation.deeplabv3": "deeplabv3_mobilenet_v3_large",
    "segmentation.fcn": "fcn_resnet50",
    "segmentation.lraspp": "lraspp_mobilenet_v3_large",
    "shufflenetv2": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "swin_transformer": "swin_t",
    "vgg": "vgg11",
    "video.mvit": "mvit_v2_s",
    "video.resnet": "mc3_18",
    "video.s3d": "s3d",
    "video.swin_transformer": "swin3d_t",
    "vision_transformer": "vit_b_16",
}
"""The smallest model of each module."""


def entries() -> Iterator[Entry]:
    """Every name of torchvision's registry but the quantised ones; of detection models also the backbone alone."""
    from torchvision import models

    for name in models.list_models():
        family = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if family.startswith("quantization"):
            continue
        yield Entry("torchvision", name, family, partial(build, name))
        if family.startswith("detection"):
            yield Entry("torchvision", name + BACKBONE, family, partial(_build_backbone, name))


def representatives() -> list[str]:
    """The smallest model of each module; of detection models also the backbone."""
    backbones = [name + BACKBONE for family, name in SMALLEST.items() if family.startswith("detection")]
    return [*SMALLEST.values(), *backbones]


def build(name: str) -> nn.Module:
    """The model with torchvision's random weights."""
    import inspect
    import typing

    from torchvision import models

    builder = models.get_model_builder(name)
    made = typing.get_type_hints(builder)["return"]
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # detection and segmentation would download a backbone
    if "init_weights" in inspect.signature(made).parameters:  # minutes for some; the weights are drawn anew anyhow
        options["init_weights"] = False
    return models.get_model(name, **options)


def _build_backbone(name: str) -> nn.Module:
    """The detector's part that takes a batch of images; of the detector's size where that is fixed (SSD's last maps would vanish)."""
    detector = build(name)
    fixed = detector.transform.fixed_size
    if fixed is not None:
        detector.backbone.image_size = fixed[0]
    return detector.backbone
