"""Networks over patches: mixers, windows, class tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FusedAttention
from .registry import floats, network


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.norm2 = nn.LayerNorm(width)
        self.channel_mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


@network("mixer", floats(3, 12, 12))
class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(9, 16), MixerBlock(9, 16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class SpatialGate(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return u * self.proj(self.norm(v).transpose(-1, -2)).transpose(-1, -2)


@network("gmlp", floats(3, 12, 12))
class GMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.fc1 = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
        self.gates = nn.ModuleList(SpatialGate(9, 12) for _ in range(2))
        self.fc2 = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for norm, fc1, gate, fc2 in zip(self.norms, self.fc1, self.gates, self.fc2, strict=True):
            x = x + fc2(gate(F.gelu(fc1(norm(x)))))
        return self.head(x.mean(1))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@network("layer_scale_tokens", floats(3, 8, 8))
class LayerScaleTokens(nn.Module):
    """A small ViT: class token, positional embedding, LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16) * 0.5)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 16) * 0.5)
        self.norm1 = nn.LayerNorm(16)
        self.attn = FusedAttention(16, 4)
        self.ls1 = LayerScale(16)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 16))
        self.ls2 = LayerScale(16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return self.head(self.norm(x)[:, 0])


def window_partition(x: Tensor, size: int) -> Tensor:
    """(batch, height, width, channels) to (batch * windows, size * size, channels)."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def window_reverse(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """The inverse of `window_partition`."""
    x = x.view(-1, h // size, w // size, size, size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


@network("roll_window", floats(3, 16, 16))
class ShiftedWindows(nn.Module):
    """Swin's: windows folded into the batch, cyclic shift, patch merging by strided slices."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, stride=2)
        self.norm = nn.LayerNorm(12)
        self.attn = FusedAttention(12, 3)
        self.merge_norm = nn.LayerNorm(48)
        self.merge = nn.Linear(48, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        _, h, w, _ = x.shape
        shifted = torch.roll(self.norm(x), shifts=(-2, -2), dims=(1, 2))
        windows = self.attn(window_partition(shifted, 4))
        x = x + torch.roll(window_reverse(windows, 4, h, w), shifts=(2, 2), dims=(1, 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.merge(self.merge_norm(torch.cat(corners, -1)))
        return self.head(F.gelu(x).mean((1, 2)))
