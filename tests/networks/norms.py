"""Normalisation: of activations, by hand and by module, and of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .registry import floats, network


@network("groupnorm_net", floats(3, 8, 8))
class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1 = nn.GroupNorm(3, 12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(1, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        x = x + F.silu(self.norm2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@network("instancenorm_net", floats(3, 8, 8))
class InstanceNormNet(nn.Module):
    """Instance norm with and without statistics, and over features after a Linear over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1 = nn.InstanceNorm2d(12, affine=True)
        self.conv2 = nn.Conv2d(12, 10, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(10, affine=True, track_running_stats=True)
        self.linear = nn.Linear(10, 16)
        self.norm3 = nn.InstanceNorm1d(64)  # channels are tokens: reduces over gated features
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        x = F.relu(self.norm2(self.conv2(x)))
        x = self.norm3(self.linear(x.flatten(2).transpose(1, 2)))
        return self.fc(x.mean(1))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@network("layernorm_channels_last", floats(3, 8, 8))
class ChannelsLastNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.norm1 = LayerNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm2 = LayerNorm2d(12)
        self.conv = nn.Conv2d(12, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x))
        x = x + F.gelu(self.conv(self.norm2(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


@network("rmsnorm", floats(4, 8))
class RMSNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.norm = nn.RMSNorm(16)
        self.fc2 = nn.Linear(16, 16)
        self.norm2 = nn.RMSNorm(16, eps=1e-5, elementwise_affine=False)
        self.fc3 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.fc1(x)))
        return self.fc3(self.norm2(x + self.fc2(x)))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class CenteredNorm(nn.Module):
    """Layer normalisation in plain arithmetic, channels first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None] * x + self.bias[:, None]


@network("hand_written_rmsnorm", floats(4, 8))
class HandWrittenNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.norm1 = RMSNorm(16)
        self.fc2 = nn.Linear(16, 12)
        self.norm2 = CenteredNorm(12)
        self.fc3 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.norm1(self.fc1(x))))
        return self.fc3(torch.tanh(self.norm2(x.transpose(1, 2)).transpose(1, 2)))


@network("batchnorm_variants", floats(3, 8, 8))
class BatchNormVariants(nn.Module):
    """No affine, no statistics, cumulative average, heads folded into the batch, F.batch_norm by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12, affine=False)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12, track_running_stats=False)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(4, momentum=None)  # sees the three heads as batch
        self.conv4 = nn.Conv2d(12, 6, 1)
        self.register_buffer("mean", torch.randn(6) * 0.1)
        self.register_buffer("var", torch.rand(6) + 0.5)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        b, c, h, w = x.shape
        x = F.relu(self.bn3(self.conv3(x).reshape(b * 3, c // 3, h, w)).reshape(b, c, h, w))
        x = F.batch_norm(self.conv4(x), self.mean, self.var, training=self.training, momentum=0.1)
        return self.fc(x.mean((2, 3)))


@network("norm_l2", floats(3, 8, 8))
class CosineClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.project = nn.Linear(12, 16)
        self.prototypes = nn.Parameter(torch.randn(5, 16))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(F.relu(self.conv(x)).mean((2, 3)))
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.prototypes, dim=-1))


@network("weight_norm", floats(3, 8, 8))
class WeightNormNet(nn.Module):
    """On a transposed conv dim 0 is the input: whole input channels are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 10, 3, padding=1, stride=2))
        self.up = parametrizations.weight_norm(nn.ConvTranspose2d(10, 8, 2, stride=2))
        self.linear = parametrizations.weight_norm(nn.Linear(8, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.conv(x))))
        return self.fc(F.relu(self.linear(x.mean((2, 3)))))


@network("spectral_norm", floats(3, 8, 8))
class SpectralNormNet(nn.Module):
    """One power iteration per train-mode forward: `_u` and `_v` are written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.spectral_norm(nn.Conv2d(3, 10, 3, padding=1))
        self.conv2 = parametrizations.spectral_norm(nn.Conv2d(10, 10, 3, padding=1))
        self.linear = parametrizations.spectral_norm(nn.Linear(10, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return self.fc(F.relu(self.linear(x.mean((2, 3)))))


if hasattr(nn.utils, "weight_norm"):

    @network("old_weight_norm", floats(3, 16))
    class OldWeightNormNet(nn.Module):
        """The hook-based one: `weight` is a plain attribute computed before each forward."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.utils.weight_norm(nn.Conv1d(3, 10, 3, padding=1))
            self.linear = nn.utils.weight_norm(nn.Linear(10, 12), dim=None)
            self.fc = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.linear(F.relu(self.conv(x)).mean(-1))))


class StandardizedConv2d(nn.Conv2d):
    """Conv2d whose filters are standardised before use."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@network("weight_standardized", floats(3, 8, 8))
class WeightStandardizedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = StandardizedConv2d(3, 12, 3, padding=1)
        self.norm1 = nn.GroupNorm(3, 12)
        self.conv2 = StandardizedConv2d(12, 12, 3, padding=1, groups=2)
        self.norm2 = nn.GroupNorm(3, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x))) + x
        return self.fc(x.mean((2, 3)))
