"""Weights used more than once, in more than one way, or never."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import floats, network, tokens


@network("tied_autoencoder", floats(10))
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 16)
        self.bias = nn.Parameter(torch.randn(10) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.encoder(x))
        return F.linear(h, self.encoder.weight.t(), self.bias)


@network("tied_by_attribute", tokens(6, 20))
class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.hidden = nn.Linear(12, 24)
        self.project = nn.Linear(24, 12)
        self.norm = nn.LayerNorm(12)
        self.decoder = nn.Linear(12, 20, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.project(F.gelu(self.hidden(x)))
        return self.decoder(self.norm(x))


@network("shared_layers", floats(3, 8, 8))
class SharedLayers(nn.Module):
    """One conv used twice in a row (with one BatchNorm), one Linear used at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.linear = nn.Linear(12, 12)
        self.middle = nn.Linear(12, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.linear(x.mean((2, 3))))
        x = torch.tanh(self.middle(x))
        return self.fc(self.linear(x))


@network("functional_weights", floats(6, 8))
class FunctionalWeights(nn.Module):
    """Raw parameters used by F.linear, F.conv1d, matmul and baddbmm: layers in all but name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_weight = nn.Parameter(torch.randn(24, 8) * 0.3)
        self.qkv_bias = nn.Parameter(torch.randn(16) * 0.1)
        self.register_buffer("zero_bias", torch.zeros(8), persistent=False)
        self.kernel = nn.Parameter(torch.randn(12, 24, 3) * 0.2)
        self.projection = nn.Parameter(torch.randn(12, 10) * 0.3)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        # BEiT's bias: learned for q and v, a zero buffer for k.
        bias = torch.cat([self.qkv_bias[:8], self.zero_bias, self.qkv_bias[8:]])
        x = F.gelu(F.linear(x, self.qkv_weight, bias))
        x = F.relu(F.conv1d(x.transpose(1, 2), self.kernel, padding=1)).mean(-1)
        return self.fc(torch.tanh(x @ self.projection))


@network("unused_parameters", floats(8))
class UnusedAndAliased(nn.Module):
    """Parameters, buffers and modules that forward never touches, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.alias = self.fc1
        self.never_parameter = nn.Parameter(torch.randn(3))
        self.register_buffer("never_buffer", torch.arange(4))
        self.register_buffer("not_saved", torch.randn(2), persistent=False)
        self.never_module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.fc2 = nn.Linear(16, 5)
        self.tail = nn.ModuleDict({"head": self.fc2})

    def forward(self, x: Tensor) -> Tensor:
        return self.tail["head"](torch.relu(self.fc1(x)))


@network("module_in_plain_list", floats(8))
class ModulesInPlainList(nn.Module):
    """Modules also held in a plain list and reached through it: a copy of the tree must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 12)
        self.stages = [self.first, self.second]
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = torch.relu(stage(x))
        return self.fc(x)


@network("moe_dense", floats(8))
class DenseMixture(nn.Module):
    """Soft mixture: every expert runs, a softmax over the router weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 12)
        self.router = nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)) for _ in range(3))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gates = self.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.fc(x + (gates.unsqueeze(-1) * outputs).sum(1))


@network("frozen_stem", floats(3, 8, 8))
class FrozenStem(nn.Module):
    """A pretrained stem: requires_grad off, run under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stem.requires_grad_(False)
        self.trainable_stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = self.stem(x) + self.trainable_stem(x)
        # Only this second use has a gradient: if the region vanished, it would come twice.
        x = torch.relu(self.conv(frozen + self.trainable_stem(x)))
        return self.fc(x.mean((2, 3)))


@network("bilinear", lambda batch: (floats(6)(batch)[0], floats(4)(batch)[0]))
class BilinearNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(4, 7)
        self.bilinear = nn.Bilinear(8, 7, 10)
        self.fc = nn.Linear(10, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bilinear(torch.relu(self.left(a)), torch.tanh(self.right(b)))))


@network("deep_plain", floats(8))
def deep_plain() -> nn.Module:
    layers: list[nn.Module] = []
    for width_in in (8, *[16] * 18):
        layers += [nn.Linear(width_in, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 5))


@network("two_heads", floats(3, 8, 8))
class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.classes = nn.Linear(12, 5)
        self.boxes = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.classes(x), self.boxes(x).sigmoid()
