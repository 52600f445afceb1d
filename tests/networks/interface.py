"""Ways to be called and to answer: dicts, dataclasses, keywords, outputs that depend on the mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .registry import floats, network, randint, randn


@network("dict_in_out", lambda batch: ({"image": randn(batch, 3, 8, 8), "tokens": randint(20, batch, 6)},))
class DictInOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 12, 3, stride=2)
        self.tokens = nn.Embedding(20, 12)
        self.mix = nn.Linear(24, 16)
        self.classes = nn.Linear(16, 5)
        self.project = nn.Linear(16, 8)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = torch.relu(self.image(batch["image"])).mean((2, 3))
        x = torch.relu(self.mix(torch.cat([image, self.tokens(batch["tokens"]).mean(1)], 1)))
        return {"logits": self.classes(x), "embedding": self.project(x)}


@dataclass
class Prediction:
    logits: Tensor
    features: Tensor
    loss: Tensor | None = None


@network("dataclass_out", floats(10))
class DataclassOut(nn.Module):
    """Returns hidden features (to be materialised at the output) and a None in a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Prediction:
        features = torch.sigmoid(self.fc1(x))
        return Prediction(logits=self.fc2(features), features=features)


class Pair(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, ...]


@network("tuple_out", floats(10))
class TupleOut(nn.Module):
    """A named tuple with a tuple of hidden states inside, the input itself among them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 12)
        self.fc3 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Pair:
        a = torch.tanh(self.fc1(x))
        b = torch.relu(self.fc2(a))
        return Pair(self.fc3(b), (x, a, b))


@network("features_out", floats(3, 8, 8))
class FeaturesOut(nn.Module):
    """A backbone: no head, a list of feature maps and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[list[Tensor], None]:
        a = self.stage1(x)
        return [a, self.stage2(a)], None


def _keywords(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 6)
    mask[:, 4:] = 0.0
    return {"x": randn(batch, 6, 8), "mask": mask}


@network("kwargs_call", _keywords)
class KeywordCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.fc1(x)) * scale
        if mask is None:
            return self.fc2(x.mean(1))
        return self.fc2((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


@network("list_args", lambda batch: ([randn(batch, 6), randn(batch, 6, key=1)], randn(batch, 4)))
class ListArguments(nn.Module):
    """A list of tensors and *extra tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(4, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, views: list[Tensor], *extra: Tensor) -> Tensor:
        x = torch.stack([torch.relu(self.fc1(view)) for view in views]).mean(0)
        for value in extra:
            x = x + torch.tanh(self.fc2(value))
        return self.fc(x)


@network("aux_head_train_only", floats(3, 8, 8))
class AuxiliaryHead(nn.Module):
    """Two outputs in train mode, one in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.aux = nn.Linear(12, 5)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        out = self.fc(F.relu(self.conv2(x)).mean((2, 3)))
        if self.training:
            return out, self.aux(x.mean((2, 3)))
        return out


@network("layer_drop", floats(10))
class LayerDrop(nn.Module):
    """Skips whole layers in train mode by a Python-side random number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            if self.training and torch.rand(()).item() < 0.3:
                continue
            x = x + torch.relu(block(x))
        return self.fc(x)


@network("checkpointed", floats(10))
class Checkpointed(nn.Module):
    """Activation checkpointing inside forward, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 16)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            x = x + torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            x = x + self.block(x)
        return self.fc(x)
