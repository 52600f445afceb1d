"""Lengths that a maximum along one dimension leaves open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tasks import same
from torch import Tensor, nn

import hatify
from hatify.capture import export
from hatify.capture.pools import KEY, POOL
from hatify.errors import CallError


class Network(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor], writes: bool = False) -> None:
        super().__init__()
        self.conv, self.pool, self.head, self.writes = nn.Conv1d(2, 6, 3, padding=1), pool, nn.Linear(6, 3), writes

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv(x)))
        if self.writes:
            x = x + 0
            first, x = x[:, :3], x.clone()
            first.mul_(2)
            x[:, :3] = torch.tanh(first)
        return self.head(x.mean(-1))


POOLS = {
    "function": lambda x: F.max_pool1d(x, 2),
    "settings": lambda x: F.max_pool1d(x, 4, 3, 2, 1, ceil_mode=True),
    "dilated": lambda x: torch.max_pool1d(x, [2], [1], dilation=[3]),
    "layer": nn.MaxPool1d(3, 2, 1),
}
X, LONGER, SHORT = (torch.randn(2, 2, n, generator=torch.Generator().manual_seed(n)) for n in (20, 33, 4))


@pytest.mark.parametrize("writes", [False, True], ids=["", "writes through views"])
@pytest.mark.parametrize("pool", POOLS)
def test_the_length_stays_open(pool: str, writes: bool) -> None:
    model = Network(POOLS[pool], writes)
    hat = hatify.convert(model, 2, example_inputs=X)
    assert hat.verification.ok and not POOL.py_kernels
    for x in (X, LONGER, SHORT, LONGER[:1]):
        for training in (False, True):
            wanted, got = model.train(training)(x), hat.train(training)(x)
            assert same([wanted.detach()], [got.detach()])
            names = [name for name, _ in model.named_parameters()]
            held = dict(hat.named_parameters())
            grads = torch.autograd.grad(wanted.sum(), list(model.parameters()))
            assert same(list(grads), list(torch.autograd.grad(got.sum(), [held[name] for name in names])))
        assert hat(x, task=0).shape == (len(x), 3)


def test_torch_itself_fixes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(export, "open_pools", contextlib.nullcontext)
    hat = hatify.convert(Network(POOLS["function"]), 2, example_inputs=X, verify=False)
    with pytest.raises(CallError, match="does not fit"):
        hat(LONGER)
    assert KEY not in POOL.py_kernels
