"""Steps on images ``(batch, channels, height, width)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .steps import ACTIVATIONS, SIZE, channels, divisor, step, width

# weighted layers


@step(4)
def conv(net, x, y, number):
    size = (1, 3)[number % 2]
    return [net.layer("conv", lambda: nn.Conv2d(channels(x), width(number), size, padding=size // 2))(x)]


@step(4)
def conv_without_bias(net, x, y, number):
    return [net.layer("conv", lambda: nn.Conv2d(channels(x), width(number), 1, bias=False))(x)]


@step(4)
def grouped_conv(net, x, y, number):
    groups = divisor(channels(x), number)
    return [net.layer("conv", lambda: nn.Conv2d(channels(x), groups * (1 + number % 3), 3, padding=1, groups=groups))(x)]


@step(4)
def depthwise_conv(net, x, y, number):
    size = channels(x)
    return [net.layer("conv", lambda: nn.Conv2d(size, size * (1 + number % 2), 3, padding=1, groups=size))(x)]


@step(4)
def transposed_conv(net, x, y, number):
    groups = divisor(channels(x), number)
    return [net.layer("conv", lambda: nn.ConvTranspose2d(channels(x), 2 * groups, 3, padding=1, groups=groups))(x)]


@step(4)
def conv_twice(net, x, y, number):
    layer = net.layer("conv", lambda: nn.Conv2d(channels(x), channels(x), 1))
    return [layer(torch.relu(layer(x)))]


@step(4)
def functional_conv(net, x, y, number):
    return [F.conv2d(x, net.parameter("weight", 6, channels(x), 1, 1), net.parameter("bias", 6))]


@step(4)
def standardised_conv(net, x, y, number):
    weight = net.parameter("weight", 6, channels(x), 1, 1)
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.var((1, 2, 3), keepdim=True) + 0.1).sqrt()
    return [F.conv2d(x, weight)]


@step(4)
def linear_over_columns(net, x, y, number):
    return [net.layer("linear", lambda: nn.Linear(x.shape[3], x.shape[3]))(x)]


# norms


@step(4)
def batch_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.BatchNorm2d(channels(x)))(x)]


@step(4)
def instance_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.InstanceNorm2d(channels(x), affine=number % 2 == 0))(x)]


@step(4)
def group_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.GroupNorm(divisor(channels(x), number), channels(x)))(x)]


@step(4)
def layer_norm_of_channels(net, x, y, number):
    return [net.layer("norm", lambda: nn.LayerNorm(channels(x)))(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]


@step(4)
def l2_normalised(net, x, y, number):
    return [F.normalize(x, dim=1)]


@step(4)
def standardised_by_hand(net, x, y, number):
    return [(x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-2).sqrt()]


# elementwise, joins and gates


@step(4)
def activation(net, x, y, number):
    return [ACTIVATIONS[number % len(ACTIVATIONS)](x)]


@step(4)
def prelu(net, x, y, number):
    return [net.layer("act", lambda: nn.PReLU(channels(x)))(x)]


@step(4)
def dropout(net, x, y, number):
    return [net.layer("drop", lambda: (nn.Dropout, nn.Dropout2d)[number % 2](0.2))(x)]


@step(4, two=True)
def add(net, x, y, number):
    return [x + y]


@step(4, two=True)
def subtract(net, x, y, number):
    return [x - 0.5 * y]


@step(4, two=True)
def multiply(net, x, y, number):
    return [x * y]


@step(4, two=True)
def gate(net, x, y, number):
    return [torch.sigmoid(x) * y]


@step(4, two=True)
def largest(net, x, y, number):
    return [torch.maximum(x, y)]


@step(4, two=True)
def divide(net, x, y, number):
    return [x / (1 + y.abs())]


@step(4, two=True)
def choose(net, x, y, number):
    return [torch.where(x > 0, x, y)]


@step(4, two=True)
def concatenate(net, x, y, number):
    return [torch.cat([x, y], 1)]


@step(4)
def concatenate_constant(net, x, y, number):
    return [torch.cat([x, net.parameter("more", 1, 2, 1, 1).expand(x.shape[0], 2, *x.shape[2:])], 1)]


@step(4)
def squeeze_excite(net, x, y, number):
    down = net.layer("down", lambda: nn.Conv2d(channels(x), 4, 1))
    up = net.layer("up", lambda: nn.Conv2d(4, channels(x), 1))
    return [x * torch.sigmoid(up(torch.relu(down(x.mean((2, 3), keepdim=True)))))]


@step(4)
def efficient_channel_attention(net, x, y, number):
    mixed = net.layer("conv", lambda: nn.Conv1d(1, 1, 3, padding=1))(x.mean((2, 3)).unsqueeze(1))
    return [x * torch.sigmoid(mixed).transpose(1, 2).unsqueeze(-1)]


@step(4)
def spatial_gate(net, x, y, number):
    seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return [x * torch.sigmoid(net.layer("conv", lambda: nn.Conv2d(2, 1, 3, padding=1))(seen))]


@step(4)
def gated_linear_unit(net, x, y, number):
    return [F.glu(x, 1)] if channels(x) % 2 == 0 else []


@step(4)
def layer_scale(net, x, y, number):
    return [x * net.parameter("scale", channels(x), 1, 1)]


@step(4)
def shift(net, x, y, number):
    return [x + net.parameter("shift", 1, channels(x), 1, 1)]


@step(4)
def masked_by_constant(net, x, y, number):
    return [x * net.constant("mask", lambda: (torch.arange(channels(x)) % 3 != number % 3).float().view(1, -1, 1, 1))]


@step(4)
def filled_by_constant(net, x, y, number):
    mask = net.constant("mask", lambda: torch.eye(SIZE).repeat(2, 2)[: x.shape[2], : x.shape[3]] > 0)
    return [x.masked_fill(mask, (-1.0, 0.0)[number % 2])]


@step(4)
def softmax_of_channels(net, x, y, number):
    return [x.softmax(1)]


@step(4)
def channel_attention(net, x, y, number):
    q = F.normalize(x.flatten(2), dim=-1)
    scores = (q @ q.transpose(1, 2)).softmax(-1)
    return [(scores @ x.flatten(2)).view_as(x)]


# movement


@step(4)
def halves(net, x, y, number):
    return list(x.chunk(2, 1)) if channels(x) % 2 == 0 else []


@step(4)
def unequal_parts(net, x, y, number):
    if channels(x) < 3:
        return []
    first = 1 + number % (channels(x) - 1)
    return list(x.split([first, channels(x) - first], 1))


@step(4)
def part(net, x, y, number):
    return [x[:, number % channels(x) // 2 :]]


@step(4)
def every_other(net, x, y, number):
    return [x[:, ::2]]


@step(4)
def one_channel(net, x, y, number):
    return [x * x[:, number % channels(x)].unsqueeze(1)]


@step(4)
def channel_shuffle(net, x, y, number):
    groups = divisor(channels(x), number)
    return [x.view(x.shape[0], groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)]


@step(4)
def channels_by_index(net, x, y, number):
    order = net.constant("order", lambda: torch.randperm(channels(x)))
    return [x[:, order]]


@step(4)
def roll(net, x, y, number):
    return [x.roll((1 + number % 2, 1), (1, 3))]


@step(4)
def halves_swapped(net, x, y, number):
    return [x.roll((channels(x) // 2, 1), (1, 2))]


@step(4)
def flip(net, x, y, number):
    return [x.flip(1)]


@step(4)
def padded_channels(net, x, y, number):
    return [F.pad(x, (0, 0, 0, 0, number % 2, 2))]


@step(4)
def pixel_unshuffle(net, x, y, number):
    return [F.pixel_unshuffle(x, 2)] if x.shape[2] % 2 == 0 else []


@step(4)
def pixel_shuffle(net, x, y, number):
    return [F.pixel_shuffle(x, 2)] if channels(x) % 4 == 0 and x.shape[2] < 2 * SIZE else []


@step(4)
def pool(net, x, y, number):
    kind = (F.avg_pool2d, F.max_pool2d)[number % 2]
    return [F.interpolate(kind(x, 3, 1, 1), scale_factor=1.0)]


@step(4)
def mean_over_space(net, x, y, number):
    return [x - x.mean((2, 3), keepdim=True)]


@step(4)
def transposed_space(net, x, y, number):
    return [x.transpose(2, 3)]


@step(4)
def to_tokens(net, x, y, number):
    return [x.flatten(2).transpose(1, 2)]


@step(4)
def patches(net, x, y, number):
    return [F.unfold(x, 2, stride=2).transpose(1, 2)] if x.shape[2] % 2 == 0 else []
