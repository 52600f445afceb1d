"""What is on around a conversion is no part of the model; weights without values are refused."""

from __future__ import annotations

import pytest
import torch
from tasks import same
from torch import nn

import hatify
from hatify import conversion
from hatify.errors import ConversionError

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def around(how: str) -> torch.autocast | torch.no_grad:
    modes = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "no_grad": torch.no_grad, "inference": torch.inference_mode}
    return modes[how]()


@pytest.mark.parametrize("how", ["autocast", "no_grad", "inference"])
def test_a_conversion_is_what_it_is_anywhere(how: str) -> None:
    model = net()
    plain = hatify.convert(model, 2, example_inputs=X)
    with around(how):
        hat = hatify.convert(model, 2, example_inputs=X)
        assert torch.is_autocast_enabled("cpu") is (how == "autocast"), "what was on is on again"
    assert hat.verification.ok and hat.code == plain.code
    assert same([hat(X)], [model(X)])
    with torch.autocast("cpu", torch.bfloat16):
        assert hat(X).dtype is model(X).dtype is torch.bfloat16, "calls follow what is on around them"


def test_autocast_around_it_would_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(conversion, "_as_anywhere", lambda model: torch.enable_grad())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(hatify.HatifyError):
        hatify.convert(net(), 2, example_inputs=X)


@pytest.mark.parametrize("part", ["all", "buffer"])
def test_weights_without_values_are_refused_by_name(part: str) -> None:
    model = net()
    if part == "all":
        model = model.to("meta")
    else:
        model.register_buffer("table", torch.empty(3, device="meta"))
    for look in (lambda: hatify.convert(model, 2, example_inputs=X), lambda: hatify.check(model, example_inputs=X)):
        with pytest.raises(ConversionError, match="meta device") as refused:
            look()
        assert refused.value.where == ("0.weight, 0.bias, 1.weight, ..." if part == "all" else "table")
