"""Looking at memory that copies share until one of them is written."""

import torch
from torch import nn

SIDE = 256
"""Large enough that torch's kernels split the work between threads."""


def shared(tensor):
    return torch._C._is_cow_tensor(tensor)


def weight():
    return nn.Parameter(torch.randn(SIDE, SIDE))


def real(tensor):
    """The values, read without asking for an address."""
    return tensor.detach().clone()
