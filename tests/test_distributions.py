"""Networks made of ``torch.distributions``: their parameters are broadcast to one another, and logarithms are taken of them."""

from __future__ import annotations

import pytest
import torch
from tasks import draw_masks, finish, same
from torch import Tensor, distributions, nn
from torch.nn.functional import softplus

import hatify
from hatify.capture import open_calls
from hatify.errors import VerificationError


class Autoencoder(nn.Module):
    """A variational one: the reconstruction and the divergence from the prior."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.scale, self.decoder = nn.Linear(20, 32), nn.Linear(32, 4), nn.Linear(32, 4), nn.Linear(4, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.encoder(x))
        code = distributions.Normal(self.mean(h), softplus(self.scale(h)) + 1e-4)
        divergence = distributions.kl_divergence(code, distributions.Normal(0.0, 1.0)).sum(-1)
        return self.decoder(code.rsample()), divergence


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(20, 32), nn.Linear(32, 2), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        actions = distributions.Normal(self.mean(h), self.scale(h).clamp(-5, 2).exp())
        action = actions.rsample()
        return torch.tanh(action), actions.log_prob(action).sum(-1)


class Spread(nn.Module):
    """No chance in it: the logarithm of what was broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.last = nn.Linear(20, 32), nn.Linear(32, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = softplus(self.scale(torch.tanh(self.body(x)))) + 1e-4
        scale, floor = torch.broadcast_tensors(scale, torch.full((1, 1), 0.1))
        return self.last(torch.log(scale) + floor)


NETWORKS = {cls.__name__: cls for cls in (Autoencoder, Policy, Spread)}


@pytest.mark.parametrize("name", NETWORKS)
def test_made_of_distributions(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name](), torch.randn(4, 20)
    hat = hatify.convert(model, tasks=3, example_inputs=x)
    assert hat.report.unknown_operators.get("broadcast_tensors") is None
    other = torch.randn(9, 20)
    torch.manual_seed(1)
    expected = model(other)
    torch.manual_seed(1)
    assert same(hat(other), expected)


def test_a_part_is_smaller() -> None:
    torch.manual_seed(0)
    hat, x = hatify.convert(Spread(), tasks=2, example_inputs=torch.randn(4, 20)), torch.randn(7, 20)
    draw_masks(hat)
    finish(hat, 0)
    slim = hatify.extract(hat, 0, slim=True)
    assert torch.allclose(slim(x), hat.eval()(x, task=0), atol=1e-6)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in Spread().parameters())


def test_as_torch_calls_it_the_logarithm_meets_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_calls, "_broadcast", torch.broadcast_tensors)
    with pytest.raises(VerificationError, match="not finite"):
        hatify.convert(Spread(), tasks=2, example_inputs=torch.randn(4, 20))
