"""What is on around a conversion is no part of the model; weights without values are refused."""

from __future__ import annotations

import pytest
import torch
from tasks import same
from torch import Tensor, nn

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
    with pytest.raises(ConversionError, match="meta device") as refused:
        hatify.convert(model, 2, example_inputs=X)
    assert refused.value.where == ("0.weight, 0.bias, 1.weight, ..." if part == "all" else "table")


class Masked(nn.Module):
    """Attention whose mask is filled with a tensor of one number, as GPT-2 wrote it."""

    def __init__(self, value: float | None = None) -> None:
        super().__init__()
        self.value, self.q, self.head = value, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        scores = q @ q.transpose(-1, -2)
        value = torch.finfo(scores.dtype).min if self.value is None else self.value
        fill = torch.tensor(value, dtype=scores.dtype, device=scores.device)
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return self.head((torch.where(allowed, scores, fill).softmax(-1) @ q).mean(1))


@pytest.mark.parametrize("value", [None, -1e4], ids=["limit", "number"])
def test_a_tensor_of_one_number_follows_the_type(value: float | None) -> None:
    torch.manual_seed(0)
    model, x = Masked(value), torch.randn(2, 5, 8)
    hat = hatify.convert(model, 2, example_inputs=x)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert same([hat.to(dtype)(x.to(dtype))], [model.to(dtype)(x.to(dtype))])
        assert hat(x.to(dtype), task=1).dtype is dtype
    assert hatify.verify(hat).ok


@pytest.mark.parametrize(
    "made", [lambda: torch.tensor(True), lambda: torch.tensor(3), lambda: torch.tensor(0.5)], ids=["bool", "int", "float"]
)
def test_a_tensor_of_one_number_has_the_type_that_it_has(made) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * made()

    model = nn.Sequential(Scaled(5, 8), nn.ReLU(), nn.Linear(8, 3))
    assert same([hatify.convert(model, 2, example_inputs=X)(X)], [model(X)])
