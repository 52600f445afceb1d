"""Detectors choose boxes by data and are refused whole; the call that the refusal names converts their backbone and changes nothing."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from tasks import draw_masks
from torch import Tensor, nn

import hatify
from hatify.errors import CaptureError

detection = pytest.importorskip("torchvision.models.detection")
ops = pytest.importorskip("torchvision.ops")
anchors = pytest.importorskip("torchvision.models.detection.anchor_utils")

WIDTH = 32  # FCOS normalises 32 groups
CLASSES = {"num_classes": 3}
SIZES = {**CLASSES, "min_size": 64, "max_size": 64}


class Pyramid(nn.Module):
    """Feature maps of two sizes by name, as detectors take them."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=8, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        # more weights than a head of four layers: a refusal names the part that has the most
        wide = [nn.Conv2d(6, 160, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(160, 160, 3, padding=1), nn.ReLU()]
        self.deeper = nn.Sequential(*wide, nn.Conv2d(160, 10, 1), nn.ReLU())
        self.fpn = ops.FeaturePyramidNetwork([6, 10], WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.stem(x)
        return self.fpn(OrderedDict([("0", first), ("1", self.deeper(first))]))


class Maps(Pyramid):
    """The same with a width for each map, as an SSD asks."""

    out_channels = [WIDTH, WIDTH]  # type: ignore[assignment]


def _anchors(count: int = 1) -> nn.Module:
    return anchors.AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0)[:count],) * 2)


def _two_stages(make: Callable[..., nn.Module], **more) -> nn.Module:
    few = {
        "rpn_post_nms_top_n_train": 20,
        "rpn_post_nms_top_n_test": 20,
        "box_batch_size_per_image": 8,
        "box_detections_per_img": 4,
    }
    return make(Pyramid(), rpn_anchor_generator=_anchors(3), box_score_thresh=0.0, **few, **SIZES, **more)


def _masks() -> nn.Module:
    model, room = _two_stages(detection.MaskRCNN), detection.mask_rcnn
    model.roi_heads.mask_head = room.MaskRCNNHeads(WIDTH, (WIDTH,), 1)
    model.roi_heads.mask_predictor = room.MaskRCNNPredictor(WIDTH, WIDTH, CLASSES["num_classes"])
    return model


def _keypoints() -> nn.Module:
    model, room = _two_stages(detection.KeypointRCNN, num_keypoints=4), detection.keypoint_rcnn
    model.roi_heads.keypoint_head = room.KeypointRCNNHeads(WIDTH, (WIDTH,))
    model.roi_heads.keypoint_predictor = room.KeypointRCNNPredictor(WIDTH, 4)
    return model


DETECTORS = {
    "faster_rcnn": lambda: _two_stages(detection.FasterRCNN),
    "mask_rcnn": _masks,
    "keypoint_rcnn": _keypoints,
    "retinanet": lambda: detection.RetinaNet(Pyramid(), anchor_generator=_anchors(3), score_thresh=0.0, **SIZES),
    "fcos": lambda: detection.FCOS(Pyramid(), anchor_generator=_anchors(), score_thresh=0.0, **SIZES),
    "ssd": lambda: detection.ssd.SSD(Maps(), anchors.DefaultBoxGenerator([[2], [2]]), (64, 64), score_thresh=0.0, **CLASSES),
}


def _targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    corner = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    return [{**corner, "masks": masks, "keypoints": torch.full((1, 4, 3), 20.0)} for _ in range(2)]


def _found(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What is detected, and the losses of a training step, flat."""
    model.eval()
    with torch.no_grad():
        tensors = [found[part] for found in model(list(images)) for part in sorted(found)]
    assert tensors and len(tensors[0]) > 0, "nothing is detected: nothing would be compared"
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = model(list(images), _targets())
    return [*tensors, *(losses[part].detach() for part in sorted(losses))]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", DETECTORS)
def test_the_call_that_the_refusal_names_works_and_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, images = DETECTORS[name](), torch.rand(2, 3, 64, 64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = _found(model, images)
    model.load_state_dict(state)
    with pytest.raises(CaptureError) as refused:
        hatify.convert(model, 2, example_inputs=([images[0], images[1]],))
    assert "its control flow depends on data" in refused.value.what and "torchvision/" in refused.value.where
    call = re.search(r"model\.backbone = hatify\.convert\(model\.backbone, example_inputs=\.\.\.\)", refused.value.fix)
    assert call is not None, refused.value.fix
    exec(call[0].replace("...", "images"), {"hatify": hatify, "model": model, "images": images})
    assert _same(_found(model, images), expected)

    draw_masks(model.backbone)
    model.backbone.active_task = 0
    assert not _same(_found(model, images), expected), "a task's masks do not reach the detector"
    model.backbone.active_task = None
    model.load_state_dict(state, strict=False)
    assert _same(_found(model, images), expected)
    with torch.no_grad():
        model.backbone.get_parameter("stem.0.weight").mul_(1.5)
    assert not _same(_found(model, images), expected), "the comparison sees no change of the backbone"
