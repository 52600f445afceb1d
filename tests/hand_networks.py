"""Networks written once, out of plain layers or of HAT layers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from hatify.modules import (
    HATGRU,
    HATLSTM,
    HATConfig,
    HATConv2d,
    HATConvTranspose2d,
    HATEmbedding,
    HATLinear,
    HATPayload,
    Masker,
    TaskIndexedBatchNorm2d,
    TaskIndexedGroupNorm,
    TaskIndexedLayerNorm,
    hat_class,
)

CONFIG = HATConfig(num_tasks=3)
PLAIN = SimpleNamespace(
    Linear=nn.Linear, Conv2d=nn.Conv2d, ConvTranspose2d=nn.ConvTranspose2d, Embedding=nn.Embedding,
    BatchNorm2d=nn.BatchNorm2d, LayerNorm=nn.LayerNorm, GroupNorm=nn.GroupNorm, GRU=nn.GRU, LSTM=nn.LSTM, LSTMCell=nn.LSTMCell,
)  # fmt: skip
HAT = SimpleNamespace(
    **{
        cls.plain_class.__name__: lambda *args, _cls=cls, **kwargs: _cls(*args, **kwargs, config=CONFIG)
        for cls in (
            HATLinear, HATConv2d, HATConvTranspose2d, HATEmbedding,
            TaskIndexedBatchNorm2d, TaskIndexedLayerNorm, TaskIndexedGroupNorm, HATGRU, HATLSTM, hat_class(nn.LSTMCell),
        )
    }
)  # fmt: skip


class MLP(nn.Module):
    """Residual blocks around a layer norm."""

    def __init__(self, kit):
        super().__init__()
        self.stem = kit.Linear(6, 12)
        self.norm = kit.LayerNorm(12)
        self.up, self.down = kit.Linear(12, 24), kit.Linear(24, 12)
        self.norm2 = kit.LayerNorm(12)
        self.head = kit.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(F.relu(self.norm2(x)))


class ConvNet(nn.Module):
    """Batch norm, in-place activations, a residual, pooling and a flatten before the head."""

    def __init__(self, kit):
        super().__init__()
        self.conv1, self.bn1 = kit.Conv2d(3, 8, 3, padding=1, bias=False), kit.BatchNorm2d(8)
        self.conv2, self.bn2 = kit.Conv2d(8, 8, 3, padding=1), kit.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.fc = kit.Linear(8 * 4 * 4, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(x))
        out += x
        return self.fc(torch.flatten(self.relu(out), 1))


class GroupNet(nn.Module):
    """Group norm, squeeze and excite, concatenation, a transposed convolution and resizing."""

    def __init__(self, kit):
        super().__init__()
        self.conv1, self.norm = kit.Conv2d(3, 8, 3, padding=1), kit.GroupNorm(2, 8)
        self.squeeze, self.excite = kit.Conv2d(8, 4, 1), kit.Conv2d(4, 8, 1)
        self.up = kit.ConvTranspose2d(8, 6, 2, stride=2)
        self.mix = kit.Conv2d(14, 4, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.conv1(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        up = F.avg_pool2d(self.up(x), 2)
        return self.mix(torch.cat([F.interpolate(x, scale_factor=1.0), up], 1)).mean((2, 3))


class Attention(nn.Module):
    """A transformer block with a fused projection, heads by reshape and permute, and explicit products."""

    def __init__(self, kit):
        super().__init__()
        self.embed = kit.Linear(5, 8)
        self.norm1, self.norm2 = kit.LayerNorm(8), kit.LayerNorm(8)
        self.qkv, self.proj = kit.Linear(8, 24), kit.Linear(8, 8)
        self.fc1, self.fc2 = kit.Linear(8, 16), kit.Linear(16, 8)
        self.head = kit.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1)) * (c // 2) ** -0.5
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Depthwise(nn.Module):
    """A depthwise convolution between two pointwise ones, and one weight used twice."""

    def __init__(self, kit):
        super().__init__()
        self.conv1, self.depth = kit.Conv2d(3, 8, 1), kit.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.twice = kit.Conv2d(8, 8, 1), kit.Conv2d(8, 8, 1)
        self.head = kit.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.depth(F.relu(self.conv1(x))))
        x = F.relu(self.twice(self.point(x)))
        return self.head(F.relu(self.twice(x))).mean((2, 3))


class Tokens(nn.Module):
    """An embedding in front of a linear layer over tokens."""

    def __init__(self, kit):
        super().__init__()
        self.table, self.fc, self.head = kit.Embedding(11, 8), kit.Linear(8, 8), kit.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(self.table(x))).mean(1))


class Sequences(nn.Module):
    """Both directions stacked, states handed from layer to layer, and a cell whose steps are also read by a linear layer."""

    def __init__(self, kit):
        super().__init__()
        self.embed = kit.Linear(5, 6)
        self.lstm = kit.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = kit.GRU(8, 4, batch_first=True)
        self.cell, self.read = kit.LSTMCell(4, 5), kit.Linear(5, 4)
        self.head = kit.Linear(4, 3)

    def forward(self, x):
        x, (last, _) = self.lstm(torch.tanh(self.embed(x)))
        x, last = self.gru(x, last[:1])
        states, scores = None, self.head(last[0])
        for step in range(3):
            states = self.cell(x[:, step], states)
            scores = scores + self.head(torch.tanh(self.read(states[0])))
        return scores


INPUTS = {
    MLP: lambda: torch.randn(7, 6),
    ConvNet: lambda: torch.randn(4, 3, 8, 8),
    GroupNet: lambda: torch.randn(3, 3, 6, 6),
    Attention: lambda: torch.randn(2, 7, 5),
    Depthwise: lambda: torch.randn(3, 3, 5, 5),
    Tokens: lambda: torch.randint(0, 11, (4, 6)),
    Sequences: lambda: torch.randn(3, 4, 5),
}


def maskers(network):
    return [m for m in network.modules() if isinstance(m, Masker)]


def draw_masks(network, seed=0):
    """Random masks for every task, about two thirds of the channels live."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for masker in maskers(network):
            for embedding in masker.embeddings:
                embedding.copy_(torch.randn(embedding.shape, generator=generator) + 0.4)
    return network


def draw_copies(network, seed=1):
    """Copies of norms that differ from each other, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if ".tasks." in name and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network


def made(net):
    return draw_copies(draw_masks(net(HAT)))


def outputs(network, x, task=0):
    with torch.no_grad():
        return network.eval()(HATPayload(x, task_id=task)).data
