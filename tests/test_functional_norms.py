"""Batch norms by function in models that write through views: PyTorch's functionalisation takes them apart, and nobody may see it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.ao.quantization as quantization
import torch.nn.functional as F
from tasks import same, total
from torch import Tensor, fx, nn

import hatify
from hatify import HATModel
from hatify.capture import export, statistics
from hatify.errors import CaptureError
from hatify.verification import VerificationError

X = torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """``norm(net, x)`` between a convolution and writes through views."""

    def __init__(self, norm: Callable[[Network, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.conv, self.out, self.head = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 3)
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(F.relu(self.norm(self, self.conv(x))))
        written = torch.zeros_like(y)
        first = written[:, :3]
        first.copy_(y[:, :3])
        written[:, 3:] = torch.tanh(y[:, 3:])
        first.mul_(2)
        return self.head(written.mean((2, 3)))


def normed(net: Network, x: Tensor, momentum: float = 0.1) -> Tensor:
    return F.batch_norm(x, net.mean, net.var, net.scale, net.shift, net.training, momentum)


def twice(net: Network, x: Tensor) -> Tensor:
    return F.batch_norm(torch.relu(normed(net, x)), net.mean, net.var, training=net.training, momentum=0.3)


def read_before_and_after(net: Network, x: Tensor) -> Tensor:
    old = net.mean.clone()
    return normed(net, x) + (net.mean - old).view(1, -1, 1, 1)


def read_through_a_view(net: Network, x: Tensor) -> Tensor:
    seen = net.mean.view(1, -1, 1, 1)
    return normed(net, x) + seen


def written_before(net: Network, x: Tensor) -> Tensor:
    if net.training:
        net.mean.mul_(0.9)
    return normed(net, x)


def unread(net: Network, x: Tensor) -> Tensor:
    normed(net, x)
    return x * 2


def of_a_part(net: Network, x: Tensor) -> Tensor:
    return torch.cat([F.batch_norm(x[:, :3], net.mean[:3], net.var[:3], training=net.training), x[:, 3:]], 1)


def of_copies(net: Network, x: Tensor) -> Tensor:
    return F.batch_norm(x, net.mean.clone(), net.var.clone(), net.scale, net.shift, net.training)


def of_what_is_read_later(net: Network, x: Tensor) -> Tensor:
    given = net.mean * 1.5
    if net.training:
        net.mean.copy_(given)
    return normed(net, x) + given.view(1, -1, 1, 1)


def without_statistics(net: Network, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, net.scale, net.shift, training=True)


def by_instance(net: Network, x: Tensor) -> Tensor:
    return F.instance_norm(x, net.mean, net.var, net.scale, net.shift, net.training)


def without_gradients(net: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = normed(net, x)
    return x + y


NORMS = [
    normed,
    twice,
    read_before_and_after,
    read_through_a_view,
    written_before,
    unread,
    of_a_part,
    of_copies,
    of_what_is_read_later,
    without_statistics,
    by_instance,
    without_gradients,
]


def made(norm: Callable[[Network, Tensor], Tensor]) -> Network:
    torch.manual_seed(0)
    return Network(norm)


def hooked() -> nn.Module:
    """A layer of torch's with a hook, which is traced into."""
    net = made(lambda net, x: net.layer(x))
    net.layer = nn.BatchNorm2d(6)
    net.layer.register_forward_hook(lambda layer, inputs, out: out * 1.1)
    del net.mean, net.var
    return net


class Prepared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm, self.relu, self.head = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.head(self.relu(self.norm(self.conv(self.enter(x)))).mean((2, 3))))


def prepared() -> nn.Module:
    """Made ready for training that is aware of quantization; its observers write through views."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = Prepared().train()
        net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(net, inplace=True)
    for _ in range(3):
        net(torch.randn(4, 2, 6, 6))
    return net


def steps(net: nn.Module, original: nn.Module) -> list[Tensor]:
    """Outputs and gradients of the original's parameters over two passes in train mode, and its buffers."""
    net.train()
    found = []
    for i in range(2):
        net.zero_grad()
        out = net(X + i)
        total(out).backward()
        own = dict(net.named_parameters())
        grads = [own[name].grad for name, _ in original.named_parameters()]
        found += [out, *(torch.zeros(()) if grad is None else grad for grad in grads)]
    own = dict(net.named_buffers())
    return [t.detach().clone() for t in (*found, *(own[name] for name, _ in original.named_buffers()))]


def norms_in(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if "batch_norm" in str(n.target)]


def learn(hat: HATModel, task: int) -> None:
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    hat.train()
    with hat.learning(task=task, optimizer=optimizer, steps_per_epoch=2) as run:
        for i in range(2):
            optimizer.zero_grad()
            (hat(X + i).square().mean() + run.regularization()).backward()
            optimizer.step()
    hat.eval()


MODELS = {**{norm.__name__: partial(made, norm) for norm in NORMS}, "hooked": hooked, "prepared": prepared}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_the_original_does(name: str) -> None:
    original = MODELS[name]()
    hat = hatify.convert(MODELS[name](), 2, example_inputs=X)
    assert hat.verification.ok
    assert same(steps(original, original), steps(hat, original))
    with torch.no_grad():
        assert same([original.eval()(X)], [hat.eval()(X)])
    for graph in (hat.graph, hat.train_graph or hat.graph):
        assert set(norms_in(graph)) <= {"aten.batch_norm.default"}


@pytest.mark.parametrize("norm", [normed, twice, written_before, of_a_part, read_through_a_view])
def test_statistics_belong_to_their_task_and_are_kept_on_disk(norm: Callable[[Network, Tensor], Tensor], tmp_path: Path) -> None:
    hat = hatify.convert(made(norm), 2, example_inputs=X).eval()
    before = [hat(X, task=task) for task in (0, 1)]
    hat.train()(3 * X, task=1)
    after = [hat.eval()(X, task=task) for task in (0, 1)]
    assert same(before[:1], after[:1]), "a task wrote another's statistics"
    assert not same(before[1:], after[1:]), "the task that ran did not learn its statistics"
    learn(hat, 0)
    first = hat(X, task=0)
    hatify.save(hat, tmp_path / "hat")
    loaded = hatify.load(tmp_path / "hat").eval()
    for net in (hat, loaded):
        learn(net, 1)
        net.train()(3 * X, task=0)
        assert same([first], [net.eval()(X, task=0)])
    assert same([hat(X, task=1)], [loaded(X, task=1)]) and hatify.verify(loaded).ok


def test_one_that_is_left_apart_has_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: as functionalisation leaves it, the proof finds it out."""
    monkeypatch.setattr(export, "write_statistics", lambda captured, buffers: None)
    with pytest.raises(VerificationError, match="backward fails"):
        hatify.convert(made(normed), 2, example_inputs=X)


def test_one_that_writes_to_what_is_read_later_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without a copy, it reads what was written to it."""
    monkeypatch.setattr(statistics, "_can_write", lambda *args: True)
    with pytest.raises(VerificationError):
        hatify.convert(made(of_what_is_read_later), 2, example_inputs=X)


def both_take_one_value(net: Network, x: Tensor) -> Tensor:
    level = x.mean((0, 2, 3)).detach()
    net.mean.copy_(level)
    net.var.copy_(level)
    return x


def test_what_pytorch_cannot_make_functional_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot make functional") as refused:
        hatify.convert(made(both_take_one_value), 2, example_inputs=X)
    assert __file__ in refused.value.where
