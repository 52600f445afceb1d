"""Small networks of layers that belong to other libraries, or to the user."""

import timm.layers
import torch
import torchvision.ops
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

import hatify


class Timm(nn.Module):
    """Norms with an activation inside, standardised convolutions, paths that are dropped."""

    def __init__(self):
        super().__init__()
        self.stem = timm.layers.StdConv2dSame(3, 8, 3, stride=2)
        self.bn = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
        self.conv = timm.layers.ScaledStdConv2d(8, 8, 3, padding=1)
        self.drop = timm.layers.DropPath(0.4)
        self.norm = timm.layers.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.stem(x))
        x = x + self.drop(self.conv(x))
        return self.head(self.norm(x.mean((2, 3))))


class Torchvision(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torchvision.ops.Conv2dNormActivation(3, 8)
        self.depth = torchvision.ops.StochasticDepth(0.5, "row")
        self.squeeze = torchvision.ops.SqueezeExcitation(8, 4)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.block(x)
        return self.head((x + self.depth(self.squeeze(x))).mean((2, 3)))


class Mixed(nn.Module):
    """A layer of transformers, weight norm, a recurrent layer, attention, a raw parameter, tied weights, a transient table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.register_buffer("order", torch.randperm(8), persistent=False)
        self.gpt = Conv1D(8, 8)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = torch.tanh(self.normed(torch.relu(self.gpt(x))))[..., self.order]
        x = x + self.lstm(x)[0] * self.scale
        return {"logits": self.head(x + self.attention(x, x, x, need_weights=False)[0]), "size": (tokens.shape[1], None)}


class Gated(nn.Module):
    """Decides by what it sees, so that it cannot be traced: kept whole by registration, loaded with its class."""

    def __init__(self, width, names=("a", "b")):
        super().__init__()
        self.names, self.inner = names, nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x) if float(x.detach().sum()) > 0 else -self.inner(x)


hatify.register(Gated, hatify.TaskIndexedLayer("looks at its data"))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.gate = Gated(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.gate(torch.relu(self.first(x))))


def bert():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20, use_cache=False
    )
    return transformers.BertModel(config)


NETWORKS = {
    "timm": (Timm, lambda: torch.randn(2, 3, 17, 17)),
    "torchvision": (Torchvision, lambda: torch.randn(2, 3, 9, 9)),
    "transformers": (
        bert,
        lambda: {"input_ids": torch.randint(0, 20, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)},
    ),
    "mixed": (Mixed, lambda: torch.randint(0, 11, (2, 5))),
}
