"""Models in types other than float32: what they are proved by, and their norms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tasks import draw_masks, finish
from torch import Tensor, nn
from typed_networks import BRAIN, DOUBLE, HALF, WAYS, MaskedFill, pair, within

import hatify


class SharedHead(nn.Module):
    """The gradient of ``x`` is a sum of many, which another order rounds otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 0), (torch.float64, 0), (HALF, 16), (BRAIN, 16)])
def test_gradients_may_differ_by_the_rounding_of_the_type(dtype: torch.dtype, steps: int) -> None:
    hat = hatify.convert(SharedHead().to(dtype), 2, example_inputs=torch.randn(5, 4, dtype=dtype))
    report = hat.verification
    assert report.ok and report.rounding == max(1e-4, steps * torch.finfo(dtype).eps)
    report.gradients = report.rounding
    assert not report.ok
    report.gradients = 0.9 * report.rounding
    assert report.ok


class RootMeanSquare(nn.Module):
    """A norm with the default of its type, over values so small that it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x) * 0.01))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BRAIN, DOUBLE])
def test_a_norm_over_live_channels_has_torchs_own_default(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hat = hatify.convert(RootMeanSquare(), 2, example_inputs=torch.randn(5, 4), verify=False).eval().to(dtype)
    draw_masks(hat)
    finish(hat, 0)
    x, live = torch.randn(5, 4, dtype=dtype), hat.maskers["first"].live(0)
    assert 0 < live.sum() < 8
    kept = [F.rms_norm((hat.first(x) * 0.01)[:, live], (int(live.sum()),), hat.norm.tasks[0].weight[live])]
    wanted = kept[0] @ hat.head.tasks[0].weight[:, live].T + hat.head.tasks[0].bias
    for found in (
        hat(x, task=0),
        hatify.extract(hat.float(), 0).to(dtype)(x),
        hatify.extract(hat.float(), 0, slim=True).to(dtype)(x),
    ):
        torch.testing.assert_close(found, wanted)
        hat.to(dtype)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)], ids=lambda n: type(n).__name__)
def test_an_extracted_norm_follows_the_type(norm: nn.Module) -> None:
    torch.manual_seed(0)
    hat = hatify.convert(nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 3)), 2, example_inputs=torch.randn(5, 4), verify=False)
    draw_masks(hat.eval())
    finish(hat, 0)
    plain, x = hatify.extract(hat, 0), torch.randn(5, 4)
    for way in WAYS:
        with within(way):
            found = copy.deepcopy(plain).to(way.dtype)(x.to(way.dtype))
            torch.testing.assert_close(found, copy.deepcopy(hat).to(way.dtype)(x.to(way.dtype), task=0))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, DOUBLE])
def test_a_model_that_was_cast_can_be_verified(dtype: torch.dtype) -> None:
    _, hat = pair(MaskedFill)
    report = hatify.verify(hat.to(dtype))
    assert report.ok and report.parity == report.parity_train == report.drift == 0.0
    assert [t.dtype for t in hat.example_inputs[0]] == [dtype, torch.int64]


class MaskedByNumber(nn.Module):
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
    model, x = MaskedByNumber(value), torch.randn(2, 5, 8)
    hat = hatify.convert(model, 2, example_inputs=x)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        expected = model.to(dtype)(x.to(dtype))
        assert torch.equal(hat.to(dtype)(x.to(dtype)), expected) and hat(x.to(dtype), task=1).dtype is dtype
    assert hatify.verify(hat).ok


def test_the_value_of_a_constant_may_be_asked() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 ** float(torch.tensor(0.25, dtype=torch.float32).log2().round())

    model, x = nn.Sequential(Scaled(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5)
    assert torch.equal(hatify.convert(model, 2, example_inputs=x)(x), model(x))
