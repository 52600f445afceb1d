"""Mixtures of experts: each token goes through matrices of its own, which lie in one parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import floats, network


@network("grouped_experts", floats(6, 10))
class GroupedExperts(nn.Module):
    """Tokens sorted by expert, and one grouped product for all of them (half precision, as its kernel wants while it is traced)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.router = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 24, 16) * 0.2)  # (experts, out, in)
        self.down = nn.Parameter(torch.randn(4, 24, 16) * 0.2)  # (experts, in, out)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        tokens = x.flatten(0, 1)
        weight, expert = self.router(tokens).softmax(-1).max(-1)
        expert, order = torch.sort(expert)
        ends = torch.histc(expert.float(), bins=4, min=0, max=3).cumsum(0, dtype=torch.int32)
        y = F.grouped_mm(tokens[order].bfloat16(), self.up.transpose(1, 2).bfloat16(), offs=ends)
        y = F.grouped_mm(F.gelu(y), self.down.bfloat16(), offs=ends).float()
        y = y[torch.argsort(order)] * weight[:, None]
        return self.fc((tokens + y).view_as(x).mean(1))
