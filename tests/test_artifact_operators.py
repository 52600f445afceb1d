"""What a directory may call: torch's public functions, whatever family they are of, and nothing that reads past a tensor's end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hatify
from hatify.artifact.operators import operator_name

EYE = torch.eye(8)
FUNCTIONS: dict[str, Callable] = {
    "affine_grid": lambda h: F.affine_grid(h[:, :6].view(-1, 2, 3), (h.size(0), 1, 2, 2), align_corners=False).flatten(1),
    "uniform_": lambda h: h * (torch.zeros(h.size(0), 1).uniform_(0, 1) < 0.5),
    "normal_": lambda h: h + torch.empty_like(h).normal_(),
    "gumbel_softmax": F.gumbel_softmax,
    "log_normal_": lambda h: h + torch.empty_like(h).log_normal_(),
    "slogdet": lambda h: h + torch.linalg.slogdet(EYE * h.mean().exp())[1],
    "cholesky": lambda h: h @ torch.linalg.cholesky(EYE + h.T @ h),
    "pinv": lambda h: h @ torch.linalg.pinv(EYE + h.T @ h),
    "solve_triangular": lambda h: torch.linalg.solve_triangular(EYE, h.T, upper=True).T,
    "eigvalsh": lambda h: h + torch.linalg.eigvalsh(EYE + h.T @ h),
    "vecdot": lambda h: torch.linalg.vecdot(h, h)[:, None] + h,
    "quantile": lambda h: h - h.quantile(0.5, 1, keepdim=True),
    "ndtr": torch.special.ndtr,
    "gammaln": lambda h: torch.special.gammaln(h.exp()),
    "cross_entropy": lambda h: h + F.cross_entropy(h, h.argmax(1)),
    "hfft": lambda h: torch.fft.hfft(h, 8),
}


class Net(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.first, self.out, self.function = nn.Linear(6, 8), nn.LazyLinear(3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.function(self.first(x)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_stored(name: str, tmp_path) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = Net(FUNCTIONS[name])
    model(x)
    hat = hatify.convert(model, 2, example_inputs=x, verify=False).eval()
    loaded = hatify.load(hatify.save(hat, tmp_path / "hat"))
    torch.manual_seed(0)
    expected = model.eval()(x)
    torch.manual_seed(0)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("name", ["linalg_lu_solve", "linalg_ldl_solve", "lu_solve", "from_file", "set_", "_fused_adam_"])
def test_what_trusts_its_arguments_is_not(name: str) -> None:
    """Pivots, for one, are positions in memory that nobody checks."""
    packet = getattr(torch.ops.aten, name)
    assert all(operator_name(getattr(packet, overload)) is None for overload in packet.overloads())
