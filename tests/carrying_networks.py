"""Networks whose masks weights can carry, or must not, and how a soft step of two networks is compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tasks import converted, draw_masks
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hatify import HATModel
from hatify.calling import flatten
from hatify.rewrite import carrying

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Two convolutions with a norm between, and what stands behind the norm."""

    def __init__(self, behind: object, norm: object = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)
        self.act = behind if isinstance(behind, nn.Module) else None
        self.behind = None if isinstance(behind, nn.Module) else behind

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = self.act(x) if self.act is not None else self.behind(x)
        return self.head(F.relu(self.next(x)).mean((2, 3)))


class ActNorm(nn.BatchNorm2d):
    """A norm with an activation of its own, as timm has them."""

    def __init__(self, channels: int, act: object = F.relu) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def network(behind: object, norm: object = nn.BatchNorm2d) -> HATModel:
    torch.manual_seed(0)
    model = Body(behind, norm)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    hat = converted(model, IMAGES)
    draw_masks(hat)
    return hat


def carriers(hat: HATModel, which: str = "mask") -> list[str]:
    """Which layers and norms carry the masks of their outputs (or ``inputs``) in eval mode, by their paths."""
    graph = carrying.carrying(hat, hat.graph, hat.maskers)
    return [] if graph is None else [n.target for n in graph.nodes if which in n.kwargs]


def carries(hat: HATModel) -> bool:
    return "norm" in carriers(hat)


class Two(nn.Module):
    """A layer, what is done with its result, and what reads that; ``(batch, 5, 6)`` in, ``(batch, 5, 3)`` out."""

    def __init__(self, between: Callable[[Tensor], Tensor], layer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.between = layer, between
        self.second, self.head = nn.Linear(width, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.between(self.first(x)))))


class Attention(nn.Module):
    """Two heads of two channels, from one layer; the product with the values by torch's function or by matrix products."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.proj, self.head = fused, nn.Linear(6, 12), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q * 0.5 @ k.transpose(-1, -2), -1) @ v
        return self.head(x + self.proj(y.transpose(1, 2).flatten(2)))


class Separate(nn.Module):
    """Attention with a layer each for queries, keys and values: the masks of queries and keys are both layers'."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Product(nn.Module):
    """The product of two layers' results, which has one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)
        self.second, self.head = nn.Linear(4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.left(x) * self.right(x))))


class Convolutions(nn.Module):
    """Convolutions with strides and groups, without a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(5, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 12, 3, groups=4, padding=1, padding_mode="replicate")
        self.depthwise = nn.Conv1d(12, 24, 3, groups=12, padding=1, bias=False)
        self.conv2 = nn.Conv1d(24, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.grouped(F.silu(self.conv1(x))))
        return self.head(torch.tanh(self.conv2(F.gelu(self.depthwise(x)))).mean(2))


def twice(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * b


LAYERS = {
    "views": (
        lambda: Two(lambda x: x.reshape(*x.shape[:-1], 2, 4).transpose(-1, -2).flatten(-2), nn.Linear(6, 8), 8),
        "first second",
    ),
    "a part": (lambda: Two(lambda x: x[..., 2:6], nn.Linear(6, 8), 4), "second"),
    "read twice": (lambda: Two(lambda x: x + torch.relu(x), nn.Linear(6, 8), 8), "second"),
    "two halves multiplied": (lambda: Two(twice, nn.Linear(6, 8), 4), "second"),
    "a rounded quotient": (lambda: Two(lambda x: torch.div(x, 0.1, rounding_mode="floor"), nn.Linear(6, 8), 8), "second"),
    "relu in place": (lambda: Two(nn.ReLU(inplace=True), nn.Linear(6, 8), 8), "second"),
    "gate": (lambda: Two(F.glu, nn.Linear(6, 8), 4), "second"),
    "gelu": (lambda: Two(F.gelu, nn.Linear(6, 8), 8), "second"),
    "attention": (lambda: Attention(fused=True), "qkv proj"),
    "attention by products": (lambda: Attention(fused=False), "qkv proj"),
    "attention by three layers": (Separate, "query key value"),
    "product": (Product, "left second"),
    "convolutions": (Convolutions, ""),
}
INPUTS = {
    "a part": "second", "read twice": "second", "two halves multiplied": "second", "gate": "second", "gelu": "second",
    "a rounded quotient": "second", "relu in place": "second", "convolutions": "grouped conv2",
}  # fmt: skip
"""What carries the mask of its output, and what that of its input."""


def drawn(make: Callable[[], nn.Module], batch: int) -> tuple[HATModel, Tensor]:
    torch.manual_seed(0)
    hat, x = converted(make(), torch.randn(2, 5, 6)), torch.randn(batch, 5, 6)
    draw_masks(hat)
    return hat, x


def soft_step(hat: HATModel, args: tuple, kwargs: dict, scale: float) -> dict[str, Tensor]:
    """Outputs and gradients of a soft pass of task 0 in train mode, in double precision."""
    args, kwargs = pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, (args, kwargs))
    hat.double().train()
    torch.manual_seed(3)
    outs = [o for o in flatten(hat(*args, **kwargs, task=0, mask_scale=scale))[0] if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    return found | {name: p.grad for name, p in hat.named_parameters() if p.grad is not None}


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """In what two soft steps differ by more than masks' single precision explains."""
    assert a.keys() == b.keys()
    unit = max(float(v.abs().max()) for v in b.values() if v.numel())
    return [name for name in a if a[name].numel() and float((a[name] - b[name]).abs().max()) > 1e-6 * unit]
