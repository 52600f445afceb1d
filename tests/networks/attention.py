"""Transformers and attention in the spellings that people use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import floats, network, randn


@network("transformer_encoder", floats(7, 6))
class EncoderClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


@network("transformer_encoder_norm_first", floats(7, 6))
class SequenceFirstEncoder(nn.Module):
    """Sequence first, norm first, gelu, a causal mask made on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[0], device=x.device, dtype=x.dtype)
        return self.head(self.encoder(x, mask=mask)[-1])


def _decoder_inputs(batch: int) -> tuple[Tensor, Tensor]:
    return randn(batch, 5, 6), randn(batch, 7, 4, key=1)


@network("transformer_decoder", _decoder_inputs)
class DecoderNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.embed_memory = nn.Linear(4, 16)
        layer = nn.TransformerDecoderLayer(16, 4, dim_feedforward=24, dropout=0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=2)
        self.head = nn.Linear(16, 5)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.decoder(self.embed(target), self.embed_memory(memory)))


@network("multihead_attention", lambda batch: (randn(batch, 5, 8), randn(batch, 7, 6, key=1)))
class CrossAttention(nn.Module):
    """`kdim`/`vdim` give MultiheadAttention separate projections; the averaged weights are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 12)
        self.attention = nn.MultiheadAttention(12, 3, kdim=6, vdim=6, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(x)
        attended, weights = self.attention(query, memory, memory)
        return self.head(self.norm(query + attended)), weights


@network("einsum_attention", floats(6, 8))
class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 16, bias=False)
        self.k = nn.Linear(8, 16, bias=False)
        self.v = nn.Linear(8, 16)
        self.out = nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).reshape(b, n, 4, 4) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q * 4**-0.5, k).softmax(dim=-1)
        x = x + self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, 16))
        return self.head(x.mean(1))


class FusedAttention(nn.Module):
    """timm's spelling: fused qkv, F.scaled_dot_product_attention with live dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


@network("scaled_dot_product", floats(6, 8))
class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.norm1 = nn.LayerNorm(16)
        self.attn = FusedAttention(16, 4)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


@network("grouped_query_attention", floats(6, 8))
class GroupedQueryAttention(nn.Module):
    """Language models' spelling: rotary positions, fewer key heads repeated, causal, SwiGLU, RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.norm = nn.RMSNorm(16)
        self.q = nn.Linear(16, 16, bias=False)
        self.kv = nn.Linear(16, 16, bias=False)
        self.o = nn.Linear(16, 16, bias=False)
        self.gate = nn.Linear(16, 24, bias=False)
        self.up = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)
        self.register_buffer("frequencies", 1.0 / 100.0 ** (torch.arange(0, 4, 2) / 4), persistent=False)
        self.head = nn.Linear(16, 5)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2], device=x.device), self.frequencies)
        angles = torch.cat([angles, angles], -1).to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        y = self.norm(x)
        q = self.rotate(self.q(y).view(b, n, 4, 4).transpose(1, 2))
        k, v = self.kv(y).view(b, n, 2, 2, 4).permute(2, 0, 3, 1, 4)
        k, v = self.rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, 16))
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(x[:, -1])


@network("relative_position_bias", floats(8, 4, 4))
class RelativePositionBias(nn.Module):
    """A learned table indexed by a constant index buffer, added to the attention logits."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(8, 36, 1)
        self.table = nn.Parameter(torch.randn(49, 3) * 0.5)
        coords = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        relative = coords[:, :, None] - coords[:, None, :] + 3
        self.register_buffer("index", relative[0] * 7 + relative[1])
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 3, 4)).unbind(1)
        bias = self.table[self.index.view(-1)].view(16, 16, 3).permute(2, 0, 1)
        weights = (q.transpose(-2, -1) @ k / 2.0 + bias).softmax(-1)
        return self.fc((v @ weights.transpose(-2, -1)).flatten(1, 2).mean(-1))


@network("channel_attention", floats(8, 4, 4))
class ChannelAttention(nn.Module):
    """XCiT's: attention between channels of L2-normalised queries and keys, learned temperature per head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 4, 1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        x = (weights.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c)
        return self.fc(x.mean(1))
