"""Convolutional networks: dimensions, groups, resampling, skips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import floats, network


@network("conv1d", floats(4, 32))
class Conv1dResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 12, 5, padding=2)
        self.stem_bn = nn.BatchNorm1d(12)
        self.conv1 = nn.Conv1d(12, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(12)
        self.conv2 = nn.Conv1d(12, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean(dim=-1))


@network("conv3d", floats(2, 6, 8, 8))
class Conv3dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(2, 8, 3, padding=1),
            nn.BatchNorm3d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(2),
            nn.Conv3d(8, 12, 3, padding=1),
            nn.BatchNorm3d(12),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool3d(1),
        )
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def conv_bn_relu(in_channels: int, out_channels: int, **kwargs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False, **kwargs),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


@network("unet", floats(3, 16, 16))
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv_bn_relu(3, 8)
        self.down2 = conv_bn_relu(8, 16)
        self.bottom = conv_bn_relu(16, 24)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.merge2 = conv_bn_relu(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge1 = conv_bn_relu(16, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        d1 = self.down1(x)
        d2 = self.down2(self.pool(d1))
        b = self.bottom(self.pool(d2))
        u2 = self.merge2(torch.cat([self.up2(b), d2], dim=1))
        u1 = self.merge1(torch.cat([self.up1(u2), d1], dim=1))
        return self.head(u1)


@network("conv_transpose1d", floats(4, 8))
class ConvTranspose1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose1d(4, 12, 4, stride=2, padding=1)
        self.bn = nn.BatchNorm1d(12)
        self.up2 = nn.ConvTranspose1d(12, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up2(F.relu(self.bn(self.up1(x))))))


@network("conv_transpose3d", floats(3, 3, 4, 4))
class ConvTranspose3dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(3, 8, 2, stride=2)
        self.bn = nn.BatchNorm3d(8)
        self.conv = nn.Conv3d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.bn(self.up(x)))))
        return self.fc(x.mean(dim=(2, 3, 4)))


@network("pixel_shuffle", floats(3, 8, 8))
class PixelShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.PixelUnshuffle(2)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.up = nn.PixelShuffle(2)
        self.conv3 = nn.Conv2d(8, 12, 3, padding=1)
        self.out = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.conv2(self.down(F.relu(self.conv1(x))))))
        return self.out(F.pixel_shuffle(F.gelu(self.conv3(x)), 2))


@network("channel_shuffle", floats(3, 16, 16))
class ChannelShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(12, 24, 1, groups=3)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 12, 1, groups=3)
        self.fc = nn.Linear(12, 5)

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.shuffle(F.relu(self.bn1(self.conv1(x))), 3)
        x = x + self.conv2(y)
        return self.fc(x.mean((2, 3)))


@network("depthwise", floats(3, 16, 16))
class DepthwiseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Depthwise on the raw input: one task would lock it all if it had no masker of its own.
        self.raw = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.point0 = nn.Conv2d(3, 12, 1)
        self.depth1 = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.bn1 = nn.BatchNorm2d(12)
        self.point1 = nn.Conv2d(12, 16, 1)
        self.depth2 = nn.Conv2d(16, 32, 3, padding=1, groups=16)  # channel multiplier 2
        self.point2 = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.point0(self.raw(x)))
        x = F.relu6(self.point1(F.relu6(self.bn1(self.depth1(x)))))
        x = self.point2(F.silu(self.depth2(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@network("grouped", floats(4, 16, 16))
def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, groups=4),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 12, 3, padding=1, groups=12, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 5),
    )


@network("dilated", floats(3, 16, 16))
class DilatedPyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(10, 6, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.project = nn.Conv2d(18, 12, 1)
        self.same = nn.Conv2d(12, 12, 3, padding="same", dilation=2, padding_mode="reflect")
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.project(torch.cat([branch(x) for branch in self.branches], 1)))
        return self.fc(self.same(x).amax((2, 3)))


@network("padding", floats(3, 10, 10))
class PaddingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.pad1 = nn.ReflectionPad2d(1)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.pad2 = nn.ReplicationPad2d((1, 2, 0, 1))
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.zero = nn.ZeroPad2d(1)
        self.one = nn.ConstantPad2d(1, 1.0)
        self.fc = nn.Linear(12, 5)
        self.conv4 = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(self.pad1(x)))
        x = F.relu(self.conv3(self.pad2(x)))
        x = F.relu(self.conv4(self.one(self.zero(x))))
        x = F.pad(x, (0, 1, 2, 0), value=1.0)
        x = F.pad(x, (1, 1), mode="circular") if x.dim() == 3 else F.pad(x, (1, 1, 1, 1), mode="circular")
        x = F.pad(x.mean((2, 3)), (2, 2), value=0.0)  # constant channels beside the gated ones
        return self.fc(x)


@network("upsample", floats(3, 8, 8))
class UpsampleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.up1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv3 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = F.relu(self.conv2(self.up1(F.relu(self.conv1(x)))))
        x = self.conv3(self.up2(x))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@network("adaptive_pool", floats(3, 14, 14))
class AdaptivePoolNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((4, 3))
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.max = nn.AdaptiveMaxPool2d(2)
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        return self.fc(self.max(self.conv2(x)).view(x.size(0), -1))


@network("avg_max_pool", floats(3, 16, 16))
class AvgMaxPoolNet(nn.Module):
    """Max pooling of values that may be negative: a pending channel and a zeroed one pool differently."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 12, 3, padding=1)
        self.max = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max(self.conv1(x))
        average = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = torch.cat([average, F.lp_pool2d(self.conv2(x), 2, 1)], 1)
        x = self.conv3(x)
        return self.fc(torch.cat([x.mean((-2, -1)), x.amax((-2, -1))], dim=1))


@network("unfold_fold", floats(3, 8, 8))
class UnfoldFoldNet(nn.Module):
    """Overlapping patches: `fold` sums, so it is no movement."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Linear(6 * 9, 6 * 9)
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
        patches = F.gelu(self.mix(patches)).transpose(1, 2)
        return self.out(x + F.fold(patches, x.shape[-2:], 3, padding=1, stride=2))


@network("squeeze_excite", floats(3, 12, 12))
class SqueezeExciteNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.reduce = nn.Conv2d(12, 4, 1)
        self.expand = nn.Conv2d(4, 12, 1)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.conv1(x)))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.conv2(x * gate) + x
        return self.fc(x.mean((2, 3)))


@network("coord_conv", floats(3, 8, 8))
class CoordConv(nn.Module):
    """Coordinate channels are constant everywhere: live for every task."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(5, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(10, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def add_coords(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).view(1, 1, 1, w).expand(n, 1, h, w)
        return torch.cat([x, ys, xs], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(self.add_coords(x)))
        x = F.relu(self.conv2(self.add_coords(x)))
        return self.fc(x.mean((2, 3)))


@network("dense_concat", floats(3, 8, 8))
class DenseConcat(nn.Module):
    """DenseNet's habit: each layer normalises the concatenation of all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.relu(torch.cat(features, 1)).mean((2, 3)))


@network("branch_on_shape", floats(3, 8, 12))
class BranchOnShape(nn.Module):
    """Transposes tall images: the branch that was captured is wrong for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, (3, 5), padding=(1, 2))
        self.conv2 = nn.Conv2d(8, 8, (1, 3))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > x.shape[3]:
            x = x.transpose(2, 3)
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class StandardisedConv(nn.Conv2d):
    """Weight standardisation as users write it: a subclass whose forward computes the weight."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = self.weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledLinear(nn.Linear):
    """One learned number for the whole weight: that alone cannot be shared."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale.exp(), self.bias)


class SphericalLinear(nn.Linear):
    """The whole weight over its norm: every element depends on every other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


@network("computed_weights", floats(3, 8, 8))
class ComputedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = StandardisedConv(3, 10, 3), nn.GroupNorm(2, 10)
        self.conv2 = StandardisedConv(10, 12, 3, groups=2)
        self.scaled, self.sphere = ScaledLinear(12, 12), SphericalLinear(12, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x))))).mean((2, 3))
        return self.fc(torch.tanh(self.scaled(x)) + torch.tanh(self.sphere(x)))
