"""Sizes that stay open where torch would fix them: pools along one dimension, kernels as large as the image, ``linspace``, grids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tasks import draw_masks, finish, same
from torch import Tensor, nn

import hatify
from hatify.capture import export
from hatify.capture.pools import POOL
from hatify.errors import CallError


class Network(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor], dims: int = 2, writes: bool = False) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 6, 3, padding=1)
        self.call, self.head, self.writes = call, nn.Linear(6, 3), writes

    def forward(self, x: Tensor) -> Tensor:
        x = self.call(F.relu(self.conv(x)))
        if self.writes:
            x = x + 0
            first, x = x[:, :3], x.clone()
            first.mul_(2)
            x[:, :3] = torch.tanh(first)
        return self.head(x.flatten(2).mean(-1))


def grid(x: Tensor) -> Tensor:
    theta = x.new_tensor([[0.9, 0.1, 0.0], [-0.1, 0.9, 0.1]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def positions(x: Tensor) -> Tensor:
    rows, columns = torch.linspace(-1, 1, x.shape[2]), torch.linspace(0, x.shape[3] - 1, x.shape[3], dtype=torch.float64)
    return x * rows[:, None] + (x * columns).float()


CALLS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "average of the size": (2, lambda x: F.avg_pool2d(x, x.size()[2:])),
    "average of one number": (2, lambda x: F.avg_pool2d(x, kernel_size=x.shape[-1])),
    "average of parts": (2, lambda x: F.avg_pool2d(x, (x.shape[2] // 2, 2), stride=(x.shape[2] // 2, 1))),
    "average of a layer made on the way": (2, lambda x: nn.AvgPool2d((x.shape[2], x.shape[3]))(x)),
    "average with settings": (2, lambda x: F.avg_pool2d(x, x.shape[-1] // 2, 3, 1, True, False, divisor_override=7)),
    "average along one": (1, lambda x: F.avg_pool1d(x, x.size(2))),
    "average of a volume": (3, lambda x: F.avg_pool3d(x, x.shape[2:])),
    "maximum of the size": (2, lambda x: F.max_pool2d(x, x.size()[2:])),
    "maximum with settings": (2, lambda x: F.max_pool2d(x, x.shape[-1] // 3, 2, 1, dilation=(1, 2), ceil_mode=True)),
    "maximum along one": (1, lambda x: F.max_pool1d(x, 2)),
    "maximum along one with settings": (1, lambda x: F.max_pool1d(x, 4, 3, 2, 1, ceil_mode=True)),
    "maximum along one, dilated": (1, lambda x: torch.max_pool1d(x, [2], [1], dilation=[3])),
    "maximum of a layer": (1, nn.MaxPool1d(3, 2, 1)),
    "maximum over time": (1, lambda x: F.max_pool1d(x, x.size(2))),
    "maximum of torch": (1, lambda x: torch.max_pool1d(x, x.shape[-1] // 2)),
    "maximum of a volume": (3, lambda x: F.max_pool3d(x, kernel_size=x.shape[2:])),
    "affine grid": (2, grid),
    "positions": (2, positions),
}
SHAPES = {1: [(12,), (21,), (9,)], 2: [(8, 8), (12, 15), (17, 13)], 3: [(4, 4, 4), (5, 6, 8), (7, 5, 4)]}


def inputs(dims: int, number: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, *SHAPES[dims][number], generator=torch.Generator().manual_seed(number))


def taken(model: nn.Module, x: Tensor) -> bool:
    """Whether the original takes this size."""
    with contextlib.suppress(RuntimeError):
        model(x)
        return True
    return False


WRITTEN = ("average of the size", "maximum along one", "maximum of a layer", "maximum over time", "positions")


@pytest.mark.parametrize(
    ("call", "writes"), [*((c, False) for c in CALLS), *(pytest.param(c, True, id=f"{c}, writes through views") for c in WRITTEN)]
)
def test_the_sizes_stay_open(call: str, writes: bool) -> None:
    dims, function = CALLS[call]
    model = Network(function, dims, writes)
    hat = hatify.convert(model, 2, example_inputs=inputs(dims))
    held, names = dict(hat.named_parameters()), [name for name, _ in model.named_parameters()]
    assert hat.verification.ok and not POOL.py_kernels  # torch's own way is back
    sizes = 0
    for x in (*(inputs(dims, n) for n in range(3)), inputs(dims, 1, batch=1)):
        if not taken(model, x):
            continue
        sizes += 1
        for training in (False, True):
            wanted, got = model.train(training)(x), hat.train(training)(x)
            grads = torch.autograd.grad(wanted.sum(), list(model.parameters()))
            assert same([wanted.detach()], [got.detach()])
            assert same(list(grads), list(torch.autograd.grad(got.sum(), [held[name] for name in names])))
    assert sizes > 1


@pytest.mark.parametrize("call", CALLS)
def test_saved_and_extracted_they_stay_open(call: str, tmp_path: Path) -> None:
    dims, function = CALLS[call]
    model = Network(function, dims).eval()
    hat = hatify.convert(model, 2, example_inputs=inputs(dims), verify=False).eval()
    draw_masks(hat)
    finish(hat, 0)
    hatify.save(hat, tmp_path / "saved")
    loaded, plain, slim = hatify.load(tmp_path / "saved").eval(), hatify.extract(hat, 0), hatify.extract(hat, 0, slim=True)
    for x in filter(lambda x: taken(model, x), (inputs(dims, n) for n in range(3))):
        assert torch.equal(loaded(x), model(x)) and torch.equal(loaded(x, task=0), hat(x, task=0))
        for small in (plain, slim):
            torch.testing.assert_close(small(x), hat(x, task=0))


@pytest.mark.parametrize("call", CALLS)
def test_torch_itself_fixes_them(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    dims, function = CALLS[call]
    for opening in ("OpenCalls", "open_pools"):
        monkeypatch.setattr(export, opening, contextlib.nullcontext)
    model = Network(function, dims)
    hat = hatify.convert(model, 2, example_inputs=inputs(dims), verify=False)
    for number in (1, 2):
        if taken(model, inputs(dims, number)):
            with pytest.raises(CallError, match="does not fit|takes another path"):
                hat(inputs(dims, number))


def test_where_a_size_is_no_whole_number_it_is_fixed() -> None:
    model = Network(lambda x: x * torch.linspace(0.5, x.shape[2] - 0.5, x.shape[2])[:, None] / x.shape[2]).eval()
    hat = hatify.convert(model, 2, example_inputs=inputs(2)).eval()
    assert torch.equal(hat(inputs(2)), model(inputs(2)))
