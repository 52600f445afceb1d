"""Weights of three dimensions, and weights that an einsum spells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import floats, network


@network("einsum_projections", floats(6, 10))
class EinsumProjections(nn.Module):
    """Projections by head, as research code writes them; the last one sums over heads and their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 12)
        self.query = nn.Parameter(torch.randn(3, 12, 4) * 0.3)  # (heads, in, out)
        self.key = nn.Parameter(torch.randn(12, 4) * 0.3)  # one for all heads
        self.value = nn.Parameter(torch.randn(3, 4, 12) * 0.3)  # (heads, out, in)
        self.out = nn.Parameter(torch.randn(16, 3, 4) * 0.3)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        q = torch.einsum("bnd,hdk->bhnk", x, self.query)
        k = torch.einsum("dk,bmd->bmk", self.key, x)
        v = torch.einsum("bmd,hvd->bhmv", x, self.value)
        y = torch.einsum("bhnk,bmk->bhnm", q, k).softmax(-1) @ v
        return self.fc(F.gelu(torch.einsum("bhnv,dhv->bnd", y, self.out)).mean(1))


@network("block_diagonal", floats(12))
class BlockDiagonal(nn.Module):
    """A matrix for each group of channels, by einsum and by a batched product; groups see channels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 12)
        self.blocks = nn.Parameter(torch.randn(3, 4, 6) * 0.4)  # (groups, in, out)
        self.more = nn.Parameter(torch.randn(3, 6, 5) * 0.4)
        self.fc = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x)).view(-1, 3, 4)
        x = torch.tanh(torch.einsum("bge,gef->bgf", x, self.blocks))
        x = torch.tanh(x[:, :, None] @ self.more)
        return self.fc(x.flatten(1))


@network("position_table_by_product", floats(3, 4, 4))
class PositionTable(nn.Module):
    """Rows of two tables picked by a product with constant one-hot vectors, and added to the tokens; tokens mixed by an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 2, stride=2)
        self.table = nn.Parameter(torch.randn(2, 7, 12))
        self.mix = nn.Parameter(torch.randn(4, 5) * 0.5)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        places = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
        x = torch.tanh(x + (F.one_hot(places, 7).to(x) @ self.table).sum(0))
        return self.fc(torch.tanh(torch.einsum("bnc,nm->bmc", x, self.mix)).mean(1))


@network("normalised_over_outputs", floats(6))
class NormalisedOverOutputs(nn.Module):
    """A weight whose rows are coupled by a softmax over what it gives, not over what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.randn(8, 10))
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(torch.tanh(self.fc1(x)) @ self.weight.softmax(1)))
