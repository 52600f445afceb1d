"""Soft masks: finite gradients that reach what matters, and gradients of exactly zero where a binary mask says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tasks import converted, draw_masks, fill_masks, maskers, outputs, same, small, total
from torch import Tensor, nn

from hatify import HATModel
from hatify.modules import masker

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers over the same input, an operator of both, and a layer behind."""

    def __init__(self, what) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.what(self.a(x), self.b(x)))


class Padded(nn.Module):
    """-inf padding and max-pooling of a gated value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(self.conv(x), (1, 1, 1, 1), value=float("-inf")), 3, 1)
        x = F.max_pool2d(torch.tanh(self.after(x)), 3, 2, padding=1)
        return self.head(x.mean((2, 3)))


def bar(x: Tensor) -> Tensor:
    """-inf in the third column."""
    wall = torch.zeros(8)
    wall[2] = float("-inf")
    return x + wall


PARTIAL = {
    "sqrt of a pending value": lambda a, b: F.softplus(a).sqrt() + b,
    "log of a pending value": lambda a, b: a.abs().log() * b,
    "rsqrt of a pending value": lambda a, b: a.square().rsqrt() + b.pow(-0.5 * 2),
    "division of pending values": lambda a, b: a / b,
    "0/0 behind a reduction": lambda a, b: (a / a.square().sum(0).sqrt()) + b,
    "sqrt of a sum": lambda a, b: (a + b).abs().sqrt(),
    "log of a sum": lambda a, b: (a + b).abs().log(),
    "rsqrt of a sum": lambda a, b: (a + b).abs().rsqrt(),
    "division by a sum": lambda a, b: a / (a + b).square(),
    "root of a square of a sum": lambda a, b: (a + b).square().sqrt(),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b),
    "remainder": lambda a, b: a + torch.remainder(a, b.abs()),
    "atan2": lambda a, b: torch.atan2(a, b),
    "power of a tensor": lambda a, b: (a.abs() ** (-b.abs())).tanh(),
    "normalise": lambda a, b: F.normalize(a + b, dim=-1) + F.normalize(a, dim=0),
    "norm over gated channels": lambda a, b: (a + b).norm(dim=-1, keepdim=True) * a,
    "standard deviation": lambda a, b: a / (a.std(0) + 1e-6) + b,
    "-inf added": lambda a, b: bar(a).softmax(-1) + b,
    "-inf by where": lambda a, b: torch.where(torch.arange(8) == 2, float("-inf"), a).softmax(-1) + b,
    "-inf by masked_fill": lambda a, b: a.masked_fill(torch.arange(8) == 2, float("-inf")).softmax(-1) + b,
    "log softmax": lambda a, b: (a + b).log_softmax(-1),
    "product": lambda a, b: (a + b).prod(-1, keepdim=True) * a,
}
MASKS = {"half dead": (1.0, -1.0), "nearly dead": (1.0, -0.21), "underflow": (1.0, -0.25), "wholly dead": (-1.0, -1.0)}


def finite(hat: HATModel, x: Tensor, scale: float) -> None:
    """Outputs and every gradient of one step are finite."""
    hat.train()
    hat.zero_grad()
    out = hat(x, task=0, mask_scale=scale)
    assert out.isfinite().all(), "output"
    total(out).backward()
    broken = [n for n, p in hat.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not broken, f"gradients of {broken}"


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_functions_have_finite_gradients(name: str) -> None:
    hat = converted(Two(PARTIAL[name]), VECTORS)
    for live, dead in MASKS.values():
        fill_masks(hat, live, dead)
        for scale in (1.0, 400.0):
            finite(hat, VECTORS, scale)


@pytest.mark.parametrize(
    "name", ["softplus_log_sqrt", "layer_scale_tokens", "groupnorm_net", "channel_attention", "weight_norm", "cells_with_readout"]
)
def test_networks_have_finite_gradients(name: str) -> None:
    hat, (x,), _ = small(name)
    for live, dead in MASKS.values():
        fill_masks(hat, live, dead)
        finite(hat, x, 400.0)


FORMULAS = {
    "sqrt": (lambda a, b: F.softplus(a).sqrt(), lambda a, b, m: F.softplus(a).sqrt() * m),
    "log of a sum": (lambda a, b: (a + b).abs().add(0.1).log(), lambda a, b, m: ((a + b) * m).abs().add(0.1).log()),
    "rsqrt of a sum": (lambda a, b: (a + b).abs().rsqrt(), lambda a, b, m: ((a + b) * m).abs().rsqrt()),
    "division": (lambda a, b: b / F.softplus(a), lambda a, b, m: b / F.softplus(a) * m),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_partial_functions_still_see_channels_that_are_half_live(name: str) -> None:
    """Early in an epoch every channel is about half live, those with a negative embedding too: none may be replaced."""
    what, formula = FORMULAS[name]
    hat = converted(Two(what), VECTORS)
    fill_masks(hat, 0.1, -0.1)
    for scale in (0.01, 1.0, 20.0):
        mask = torch.sigmoid(scale * maskers(hat)[0].embeddings[0])
        expected = hat.head.tasks[0](formula(hat.a(VECTORS), hat.b(VECTORS), mask))
        torch.testing.assert_close(hat(VECTORS, task=0, mask_scale=scale), expected)


def test_infinite_padding_meets_no_soft_factor() -> None:
    hat = converted(Padded(), IMAGES)
    for live, dead in MASKS.values():
        fill_masks(hat, live, dead)
        finite(hat, IMAGES, 400.0)
    assert any(m.embeddings[0].grad is not None for m in maskers(hat))


def test_the_check_for_finite_gradients_can_fail() -> None:
    """The plain product of a mask and the root of a dead channel, which is what the rules avoid."""
    mask = torch.tensor([1.0, 0.0], requires_grad=True)
    (torch.ones(2) * mask).sqrt().sum().backward()
    assert not mask.grad.isfinite().all()


@pytest.mark.parametrize("name", ["deep_plain", "unet", "squeeze_excite", "einsum_attention", "mixer", "gated", "dense_concat"])
def test_gradients_reach_every_embedding(name: str) -> None:
    """Under a moderate scale each task's own embeddings move, and nobody else's."""
    hat, args, kwargs = small(name)
    with torch.no_grad():
        for masker in maskers(hat):
            masker.embeddings[0].normal_(0.5, 0.2)
    total(hat(*args, **kwargs, task=0, mask_scale=2.0)).backward()
    for path, masker in hat.maskers.items():
        grad = masker.embeddings[0].grad
        assert grad is not None and grad.any(), f"{path} got no gradient"
        assert masker.embeddings[1].grad is None
    copies = [p for n, p in hat.named_parameters() if ".tasks.1." in n]
    assert all(p.grad is None for p in copies)


def test_a_tasks_gradient_is_that_of_its_formula() -> None:
    """Against a network masked by hand: outputs and gradients of weights and embeddings."""
    hat = converted(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)), VECTORS)
    draw_masks(hat)
    total(hat(VECTORS, task=0, mask_scale=3.0)).backward()
    names = ["0.weight", "2.weight", "2.bias", "4.tasks.0.weight", "0.masker.embeddings.0", "2.masker.embeddings.0"]
    got = {n: hat.get_parameter(n).grad.clone() for n in names}
    hat.zero_grad()
    p = dict(hat.named_parameters())
    x = torch.tanh(F.linear(VECTORS, p["0.weight"], p["0.bias"])) * torch.sigmoid(3.0 * p["0.masker.embeddings.0"])
    x = torch.tanh(F.linear(x, p["2.weight"], p["2.bias"])) * torch.sigmoid(3.0 * p["2.masker.embeddings.0"])
    total(F.linear(x, p["4.tasks.0.weight"], p["4.tasks.0.bias"])).backward()
    for name in names:
        expected, e = p[name].grad, p[name].detach()
        if "embeddings" in name:  # equation 3
            expected = expected * 100.0 * (torch.cosh(3.0 * e) + 1) / (3.0 * (torch.cosh(e) + 1))
        torch.testing.assert_close(got[name], expected)


def subnormals(hat: HATModel, args: tuple, kwargs: dict) -> int:
    """How many elements of gradients are subnormal numbers at the largest scale."""
    hat.train()
    hat.zero_grad()
    with torch.no_grad():
        for each in maskers(hat):
            each.embeddings[0].copy_(torch.linspace(-0.3, 0.3, each.channels))
    total(hat(*args, **kwargs, task=0, mask_scale=400.0)).backward()
    grads = [p.grad.abs() for p in hat.parameters() if p.grad is not None]
    return sum(int(((g > 0) & (g < torch.finfo(g.dtype).tiny)).sum()) for g in grads)


@pytest.mark.parametrize("name", ["deep_plain", "unet", "multihead_attention", "stacked_both_ways"])
def test_nearly_dead_channels_make_no_subnormal_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hat, args, kwargs = small(name)
    assert subnormals(hat, args, kwargs) == 0
    monkeypatch.setattr(masker, "LEAST", 0.0)
    assert subnormals(hat, args, kwargs) > 0, "the control: masks as the sigmoid gives them"


# an independent proof of the locks

PROVED = ["conv1d", "unet", "channel_shuffle", "depthwise", "grouped", "squeeze_excite", "dense_concat", "coord_conv", "gated",
          "multihead_attention", "channel_attention", "mixer", "layer_scale_tokens",
          "groupnorm_net", "instancenorm_net", "rmsnorm", "weight_norm", "tied_autoencoder",
          "tied_by_attribute", "shared_layers", "functional_weights", "text_cnn", "stacked_both_ways", "projected_lstm",
          "encoder_decoder", "given_states", "cells_with_readout", "conv_transpose1d", "pixel_shuffle"]  # fmt: skip


def gradients(hat: HATModel, args: tuple, kwargs: dict, task: int) -> dict[str, Tensor]:
    """What a task's outputs feel of every shared parameter, with binary masks."""
    hat.eval()
    hat.zero_grad(set_to_none=True)
    total(hat(*args, **kwargs, task=task)).backward()
    grads = {n: hat.get_parameter(n).grad for n in hat.locks([])}
    return {n: torch.zeros_like(hat.get_parameter(n)) if g is None else g for n, g in grads.items()}


@pytest.mark.parametrize("name", PROVED)
def test_the_gradient_of_every_unlocked_weight_is_exactly_zero(name: str) -> None:
    hat, args, kwargs = small(name)
    felt = 0
    for seed in range(2):
        draw_masks(hat, seed)
        for task in (0, 1):
            locks, grads = hat.locks([task]), gradients(hat, args, kwargs, task)
            for parameter, lock in locks.items():
                assert not grads[parameter][~lock].any(), f"{parameter} is felt by task {task} where it is not locked"
            felt += sum(int((grads[p][lock] != 0).sum()) for p, lock in locks.items())
    assert felt > 0, "blind: no gradient at all"
    assert any(not lock.all() for lock in hat.locks([0]).values())


@pytest.mark.parametrize("name", ["unet", "layer_scale_tokens", "functional_weights"])
def test_another_tasks_locks_do_not_cover_a_task(name: str) -> None:
    """The negative control of the proof."""
    hat, args, kwargs = small(name)
    draw_masks(hat)
    grads, locks = gradients(hat, args, kwargs, 0), hat.locks([1])
    assert any(grads[p][~lock].any() for p, lock in locks.items())


@pytest.mark.parametrize("name", ["mixer", "rmsnorm", "groupnorm_net", "stacked_both_ways", "projected_lstm"])
def test_locks_are_tight(name: str) -> None:
    """On networks without ReLU nearly every locked element is felt, as long as no live path ends at a dead product."""
    hat, args, kwargs = small(name, batch=8)
    draw_masks(hat)
    locks, grads = hat.locks([0]), gradients(hat, args, kwargs, 0)
    locked = sum(int(lock.sum()) for lock in locks.values())
    felt = sum(int((grads[p][lock] != 0).sum()) for p, lock in locks.items())
    assert felt > 0.85 * locked


def test_a_large_scale_is_the_binary_mask() -> None:
    hat, args, kwargs = small("gated")
    draw_masks(hat)
    soft, hard = outputs(hat, args, kwargs, task=0, mask_scale=1e6), outputs(hat, args, kwargs, task=0)
    assert all(torch.allclose(a, b) for a, b in zip(soft, hard))
    assert not same(outputs(hat, args, kwargs, task=0, mask_scale=1.0), hard)
