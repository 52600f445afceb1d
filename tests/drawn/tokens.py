"""Steps on tokens ``(batch, length, channels)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .steps import ACTIVATIONS, channels, step, width


@step(3)
def linear(net, x, y, number):
    return [net.layer("linear", lambda: nn.Linear(channels(x), width(number), bias=number % 3 > 0))(x)]


@step(3)
def linear_by_function(net, x, y, number):
    weight = net.parameter("weight", channels(x), 6)
    return [x @ weight if number % 2 else torch.einsum("nlc,cd->nld", x, weight)]


@step(3)
def layer_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.LayerNorm(channels(x), elementwise_affine=number % 3 > 0))(x)]


@step(3)
def rms_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.RMSNorm(channels(x)))(x)]


@step(3)
def norm_of_heads(net, x, y, number):
    if channels(x) % 2:
        return []
    heads = x.unflatten(2, (2, -1))
    return [net.layer("norm", lambda: nn.LayerNorm(heads.shape[3]))(heads).flatten(2)]


@step(3)
def batch_norm_of_tokens(net, x, y, number):
    return [net.layer("norm", lambda: nn.BatchNorm1d(channels(x)))(x.transpose(1, 2)).transpose(1, 2)]


@step(3)
def activation_of_tokens(net, x, y, number):
    return [ACTIVATIONS[number % len(ACTIVATIONS)](x)]


@step(3, two=True)
def add_tokens(net, x, y, number):
    return [x + y]


@step(3, two=True)
def multiply_tokens(net, x, y, number):
    return [F.silu(x) * y]


@step(3)
def fused_attention(net, x, y, number):
    size = (4, 8)[number % 2]
    q, k, v = (
        net.layer("qkv", lambda: nn.Linear(channels(x), 3 * size))(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return [net.layer("proj", lambda: nn.Linear(size, width(number)))(out.transpose(1, 2).flatten(2))]


@step(3)
def attention_by_hand(net, x, y, number):
    q, k, v = net.layer("qkv", lambda: nn.Linear(channels(x), 12))(x).chunk(3, -1)
    scores = (q @ k.transpose(1, 2) * 0.5).softmax(-1)
    return [scores @ v]


@step(3, two=True)
def cross_attention(net, x, y, number):
    size = (4, 6)[number % 2]
    q = net.layer("q", lambda: nn.Linear(channels(x), size))(x).unflatten(2, (2, -1)).transpose(1, 2)
    k, v = net.layer("kv", lambda: nn.Linear(channels(x), 2 * size))(y).unflatten(2, (2, 2, -1)).permute(2, 0, 3, 1, 4)
    return [F.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2).reshape(*x.shape[:2], size)]


@step(3)
def rotary_attention(net, x, y, number):
    """Queries and keys turned by their place, but for the first token if ``number`` is odd."""
    q, k, v = net.layer("qkv", lambda: nn.Linear(channels(x), 24))(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3]).repeat(2)

    def turned(t):
        first, rest = t.split([number % 2, t.shape[2] - number % 2], 2)
        there = angles[number % 2 :]
        a, b = rest.chunk(2, -1)
        return torch.cat([first, rest * there.cos() + torch.cat([-b, a], -1) * there.sin()], 2)

    return [F.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).reshape(*x.shape[:2], 8)]


@step(3, two=True)
def linear_attention(net, x, y, number):
    """A sum over tokens of keys times values, read by queries."""
    q = net.layer("q", lambda: nn.Linear(channels(x), 6))(x).relu()
    k, v = net.layer("kv", lambda: nn.Linear(channels(y), 12))(y).chunk(2, -1)
    out = q @ (k.relu().transpose(1, 2) @ v)
    return [out / (q.sum(-1, keepdim=True) + 1.0) if number % 2 else out]


@step(3, two=True)
def product_of_sums(net, x, y, number):
    """Two factors that are sums: masked before they meet. ``number`` says whether one of them is read once more."""
    size = width(number)
    a = net.layer("a", lambda: nn.Linear(channels(x), size))(x) + net.layer("b", lambda: nn.Linear(channels(y), size))(y)
    c = net.layer("c", lambda: nn.Linear(channels(x), size))(x) + net.layer("d", lambda: nn.Linear(channels(y), size))(y)
    return [a * F.silu(c), *((a,) if number % 3 == 0 else (c,) if number % 3 == 1 else ())]


@step(3, two=True)
def heads_beside_the_batch(net, x, y, number):
    """Two heads in the batch's dimension, and what ``number`` says between them there."""
    a, b = (
        net.layer(name, lambda t=t: nn.Linear(channels(t), 8))(t).unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)
        for name, t in (("a", x), ("b", y))
    )
    if number % 6 == 0:
        out = a * F.silu(b)
    elif number % 6 == 1:
        out = a + b.flip(0)
    elif number % 6 == 2:
        out = torch.bmm((a @ b.transpose(1, 2)).softmax(-1), b)
    elif number % 6 == 3:
        out = net.layer("norm", lambda: nn.LayerNorm(4))(a) + b
    elif number % 6 == 4:
        out = net.layer("conv", lambda: nn.Conv1d(4, 4, 3, padding=1, groups=4))(a.transpose(1, 2)).transpose(1, 2)
    else:
        out = torch.cat([a, b], -1)[..., 2:6]
    return [out.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)]


@step(3)
def torch_attention(net, x, y, number):
    if channels(x) % 2:
        return []
    return [net.layer("attn", lambda: nn.MultiheadAttention(channels(x), 2, batch_first=True))(x, x, x, need_weights=False)[0]]


@step(3)
def token_mixing(net, x, y, number):
    return [net.layer("mix", lambda: nn.Linear(x.shape[1], x.shape[1]))(x.transpose(1, 2)).transpose(1, 2)]


@step(3)
def spatial_gating_unit(net, x, y, number):
    if channels(x) % 2:
        return []
    a, b = x.chunk(2, -1)
    b = net.layer("norm", lambda: nn.LayerNorm(b.shape[-1]))(b)
    return [a * net.layer("mix", lambda: nn.Linear(x.shape[1], x.shape[1]))(b.transpose(1, 2)).transpose(1, 2)]


@step(3)
def class_token(net, x, y, number):
    return [torch.cat([net.parameter("token", 1, 1, channels(x)).expand(x.shape[0], -1, -1), x], 1)]


@step(3)
def without_first_token(net, x, y, number):
    return [x[:, 1:]] if x.shape[1] > 2 else []


@step(3)
def first_token_added(net, x, y, number):
    return [x + x[:, :1]]


@step(3)
def positions(net, x, y, number):
    return [x + net.parameter("positions", 1, x.shape[1], channels(x))]


@step(3)
def conv_over_tokens(net, x, y, number):
    return [net.layer("conv", lambda: nn.Conv1d(channels(x), width(number), 3, padding=1))(x.transpose(1, 2)).transpose(1, 2)]


@step(3)
def recurrent(net, x, y, number):
    return [net.layer("rnn", lambda: (nn.GRU, nn.LSTM)[number % 2](channels(x), 4, batch_first=True))(x)[0]]


@step(3)
def heads_swapped(net, x, y, number):
    return [x.unflatten(2, (2, -1)).flip(2).flatten(2)] if channels(x) % 2 == 0 else []


@step(3)
def to_image(net, x, y, number):
    return [x.transpose(1, 2).unflatten(2, (2, -1))] if x.shape[1] % 2 == 0 else []
