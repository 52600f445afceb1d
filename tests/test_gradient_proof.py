"""Tightness and leak: what gradients say of locks, and that they can say otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tasks import converted, small
from torch import Tensor, nn

import hatify
from hatify.proof import parity
from hatify.proof.gradients import Smooth
from hatify.verification import prove_by_gradients

TIGHT = ["conv1d", "unet", "depthwise", "groupnorm_net", "mixer", "stacked_both_ways", "projected_lstm", "text_cnn", "weight_norm",
         "normalised_over_outputs", "weight_on_the_left"]  # fmt: skip
"""No product of two masked values, no layer so narrow that a live path ends."""


@pytest.mark.parametrize("name", TIGHT)
def test_every_locked_weight_counts_and_no_other_does(name: str) -> None:
    hat, _, _ = small(name)
    before = {k: v.clone() for k, v in hat.state_dict().items()}
    proof = hatify.verify(hat, tightness=True)
    assert proof.leak == 0.0 and proof.tightness > 0.999 and proof.ok
    assert proof.to_dict()["tightness"] == proof.tightness
    assert all(torch.equal(v, before[k]) for k, v in hat.state_dict().items()), "the proof changed the model"
    assert all(p.grad is None for p in hat.parameters())


def test_it_is_not_measured_unless_asked_for() -> None:
    hat, _, _ = small("conv1d")
    proof = hatify.verify(hat)
    assert proof.tightness is None and proof.leak is None and proof.ok


@pytest.mark.parametrize("name", ["unet", "mixer", "stacked_both_ways"])
def test_a_lock_that_is_too_wide_is_less_tight(name: str) -> None:
    hat, _, _ = small(name)
    exact = prove_by_gradients(hat)
    widest = max(exact.by_parameter, key=lambda n: hat.get_parameter(n).numel())
    wide = prove_by_gradients(hat, whole=[widest])
    assert wide.leak == 0.0
    assert wide.tightness < exact.tightness and wide.by_parameter[widest] < 0.9 * exact.by_parameter[widest]
    others = [n for n in exact.by_parameter if n != widest]
    assert all(wide.by_parameter[n] == exact.by_parameter[n] for n in others)


def test_the_papers_locks_are_less_tight() -> None:
    x = torch.randn(4, 6)
    layers = [nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)]
    exact, paper = (prove_by_gradients(converted(nn.Sequential(*layers), x, locking=rule)) for rule in ("exact", "paper"))
    # for one task the rules agree; of two tasks together the paper's also lock pairs that neither uses
    assert paper.leak == exact.leak == 0.0
    assert exact.tightness == 1.0 and paper.by_parameter["2.weight"] < 0.95


@pytest.mark.parametrize("name", ["unet", "projected_lstm", "weight_norm"])
def test_a_missing_lock_leaks(name: str) -> None:
    hat, _, _ = small(name)
    for parameter in prove_by_gradients(hat).by_parameter:
        assert prove_by_gradients(hat, without_locks=[parameter]).leak > 0, parameter
    assert not hatify.verify(hat, tightness=True, without_locks=[parameter]).ok


def test_no_hook_of_a_session_is_in_the_way() -> None:
    """A finished task's locked weights have no gradients in training; here they must."""
    hat, args, kwargs = small("conv1d")
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    with hat.learning(task=0, optimizer=optimizer, schedule="constant") as run:
        optimizer.zero_grad()
        (hat(*args, **kwargs).square().sum() + run.regularization()).backward()
        optimizer.step()
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0 and proof.tightness > 0.999


class DeadUnits(nn.Module):
    """Every ReLU-like function of torch's, each behind biases that keep it dead."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(7))
        self.modules_of = nn.ModuleList([nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid()])
        self.head = nn.Linear(6, 2)
        with torch.no_grad():
            for layer in self.layers:
                layer.bias.fill_(-8.0)

    def forward(self, x: Tensor) -> Tensor:
        steps = [*self.modules_of, F.relu, lambda t: F.hardtanh(t, 0.0, 4.0), lambda t: t.clamp(min=0.0)]
        return self.head(sum(step(layer(x)) for layer, step in zip(self.layers, steps)))


def test_dead_units_do_not_hide_locks() -> None:
    """Without smooth functions no weight of this network is felt at all."""
    x = torch.randn(5, 6)
    hat = converted(DeadUnits(), x)
    args, _ = hat.example_inputs
    hat(*args, task=0).sum().backward()
    assert not any(hat.get_parameter(n).grad.any() for n in hat._facts.uses)
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0
    assert all(share > 0.0 for share in proof.by_parameter.values())


class Auxiliary(nn.Module):
    """A second output that only train mode reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.extra = nn.Linear(6, 12), nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.9), nn.Linear(16, 2))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).tanh()
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_what_only_train_mode_reads_is_felt() -> None:
    hat = converted(Auxiliary(), torch.randn(5, 6))
    args, _ = hat.example_inputs
    hat(*args, task=0).sum().backward()
    assert hat.get_parameter("extra.0.weight").grad is None
    modes = [m.training for m in hat.modules()]
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0 and proof.tightness == proof.by_parameter["extra.0.weight"] == 1.0 and proof.unreached == 0.0
    assert [m.training for m in hat.modules()] == modes
    assert prove_by_gradients(hat, without_locks=["extra.0.weight"]).leak > 0
    assert prove_by_gradients(hat, whole=["extra.0.weight"]).by_parameter["extra.0.weight"] < 0.9


class Wide(nn.Sequential):
    """Taps ten pixels apart."""

    def __init__(self) -> None:
        middle = nn.Conv2d(12, 12, 3, padding=10, dilation=10)
        super().__init__(nn.Conv2d(3, 12, 1), middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize(("size", "unreached"), [(8, 8 / 9), (16, 0.0)])
def test_taps_that_meet_padding_only_are_told_apart(size: int, unreached: float) -> None:
    hat = converted(Wide(), torch.randn(2, 3, size, size))
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0 and proof.tightness == 1.0
    locked = sum(int(lock.sum()) for lock in hat.locks([0, 1]).values())
    assert proof.unreached == 0.0 if not unreached else 0.0 < proof.unreached < unreached and locked
    wide = prove_by_gradients(hat, whole=["1.weight"])
    assert wide.by_parameter["1.weight"] < 0.9, "taps that are left out do not hide a lock that is too wide"


def test_rows_that_no_index_names_are_told_apart() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 12), nn.Linear(12, 2))
    few, all_of_them = (prove_by_gradients(converted(model, tokens)) for tokens in (torch.arange(5)[None], torch.arange(50)[None]))
    assert few.tightness == all_of_them.tightness == 1.0
    assert few.unreached > 0.5 and all_of_them.unreached == 0.0


def test_inputs_and_outputs_are_no_places() -> None:
    """A convolution that reads a channel of zeros: the lock on it is to blame, and is counted."""

    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(4, 6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(torch.cat([x, x[:, :1] * 0.0], 1)).mean((2, 3)))

    proof = prove_by_gradients(converted(Zeros(), torch.randn(2, 3, 8, 8)))
    assert proof.leak == proof.unreached == 0.0
    assert proof.by_parameter["conv.weight"] == pytest.approx(0.75)


def test_many_smooth_functions_do_not_hide_small_values() -> None:
    x = torch.tensor([1e-6, -1e-6], requires_grad=True)
    out = x
    with Smooth():
        for _ in range(20):
            out = F.leaky_relu(F.relu(out), 1e-3)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad.abs() > 0.1).all()


RELU_LIKE = [F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.hardtanh, nn.ReLU(inplace=True), torch.ops.aten.relu.default,
             lambda t: t.clamp(0, 6), lambda t: F.threshold(t, 0, 0)]  # fmt: skip


@pytest.mark.parametrize("function", RELU_LIKE)
def test_smooth_functions_are_felt_everywhere(function) -> None:
    x = torch.tensor([-4.0, -0.3, 0.2, 7.0], dtype=torch.float64, requires_grad=True)
    with Smooth():
        out = function(x * 1.0)
        at_zero = function(torch.zeros(1, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad != 0).all()
    assert torch.equal(at_zero, function(torch.zeros(1, dtype=torch.float64))), "the algebra counts on f(0)"
    if function(torch.tensor([-1.0])) >= 0:
        assert (out >= 0).all()


def test_what_is_not_like_relu_stays() -> None:
    x = torch.tensor([-4.0, 0.1, 3.0])
    with Smooth():
        assert torch.equal(x.clamp(min=1e-6), torch.tensor([1e-6, 0.1, 3.0]))
        assert torch.equal(F.hardtanh(x, 0.5, 2.0), torch.tensor([0.5, 0.5, 2.0]))
        assert torch.equal(F.threshold(x, 0.5, 9.0), torch.tensor([9.0, 9.0, 3.0]))


def test_a_network_without_finite_gradients_is_not_judged() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.fc(x) * 0.0).abs().sqrt())

    hat = converted(Infinite(), torch.randn(3, 4))
    proof = prove_by_gradients(hat)
    assert proof.leak is None and proof.tightness is None


# gradients that are equal up to rounding


class Rounded(torch.autograd.Function):
    """The identity, whose gradient is off by a part of itself."""

    off = 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 + Rounded.off * torch.linspace(-1, 1, grad.numel()).view_as(grad))


class Twice(nn.Module):
    """Batch norms over two samples, or none."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(8) if normed else nn.Tanh() for _ in range(2)]
        self.body = nn.Sequential(nn.Linear(6, 8), norms[0], nn.Linear(8, 8), norms[1])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Rounded.apply(self.body(x)))


@pytest.mark.parametrize(
    ("normed", "off", "ok"), [(True, 0.0, True), (True, 1e-6, True), (True, 3e-3, False), (False, 1e-6, True), (False, 3e-3, False)]
)
def test_rounding_is_as_large_as_the_originals_own(monkeypatch: pytest.MonkeyPatch, normed: bool, off: float, ok: bool) -> None:
    """What two samples give is almost ±1, and its gradients almost zero: a kernel's rounding shows there. The same difference in a network
    whose own gradients do not move with the last bit of its weights is an error."""
    x = torch.randn(2, 6)
    hat = hatify.convert(Twice(normed), 2, example_inputs=x, verify=False)
    before = [p.clone() for p in hat.parameters()]
    step = parity._train_step

    def stepping(model: nn.Module, *args: Any) -> Any:
        Rounded.off = off if model is hat else 0.0
        return step(model, *args)

    monkeypatch.setattr(parity, "_train_step", stepping)
    found = hatify.verify(hat)
    assert found.ok is ok and (found.gradients > 1e-4) is (normed and off > 0 or off > 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, hat.parameters()))
