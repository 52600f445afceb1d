"""The user's own ``torch.no_grad()`` and ``torch.autocast()`` regions: what is made outside of one stays outside, masks too."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS
from tasks import converted, small, total
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.capture import export
from hatify.errors import CaptureError
from hatify.rewrite import graph

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
HOW = ("no_grad", "autocast", "nested")


class Gate(nn.Module):
    """A gate that is computed in a region from a value that is read behind it too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.head = how, nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def gate(self, x: Tensor) -> Tensor:
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return torch.sigmoid(self.b(x)).float()
        with torch.no_grad():
            gate = torch.sigmoid(self.b(x))
            if self.how == "nested":
                with torch.enable_grad():
                    gate = gate * torch.tanh(self.b(x))
        return gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(torch.relu(x * self.gate(x)))


class WritesThroughViews(Gate):
    """Beside a region, views that overlap are written."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = x * self.gate(x)
        left, middle = y[:, :4], y[:, 2:6]
        left.mul_(2), middle.add_(1.0)
        return self.head(torch.relu(y))


def gradients(hat: HATModel) -> dict[str, Tensor | None]:
    hat.zero_grad()
    hat(X, task=0, mask_scale=3.0).square().sum().backward()
    return {name: hat.get_parameter(name).grad for name in ("a.weight", "b.weight")}


def test_a_mask_is_made_where_its_value_was() -> None:
    hat = _made(Gate("no_grad"))
    found = gradients(hat)
    a, b = (hat.maskers[name](0, 3.0) for name in "ab")
    x = hat["a"](X) * a
    out = hat["head"].tasks[0](torch.relu(x * (torch.sigmoid(hat["b"](x)).detach() * b)))
    hat.zero_grad()
    out.square().sum().backward()
    assert found["b.weight"] is None and torch.equal(found["a.weight"], hat.get_parameter("a.weight").grad)


def test_a_mask_in_the_region_would_take_the_gradient_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: masks where they are first read."""
    monkeypatch.setattr(graph, "opens", lambda node: False)
    monkeypatch.setattr(graph, "closes", lambda node: False)
    assert gradients(_made(Gate("no_grad")))["a.weight"] is None


def _made(model: nn.Module, **options) -> HATModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return converted(model, X, **options)


@pytest.mark.parametrize("how", HOW)
def test_every_region_is_kept(how: str) -> None:
    hat = _made(Gate(how))
    assert hatify.verify(hat).ok and ("enter_autocast" in hat.code) == (how == "autocast")
    assert bool(gradients(hat)["a.weight"].any())


@pytest.mark.parametrize("how", HOW)
def test_regions_are_kept_beside_writes_through_views(how: str) -> None:
    hat = _made(WritesThroughViews(how))
    assert "slice_scatter" in hat.code and hat.code.count("_set_grad_enabled(") == {"no_grad": 2, "autocast": 0, "nested": 2}[how]
    assert ("enter_autocast" in hat.code) == (how == "autocast")
    assert hatify.verify(hat).ok and bool(gradients(hat)["a.weight"].any())


@pytest.mark.parametrize("how", HOW)
def test_functionalisation_alone_loses_them(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control; the proof sees it."""
    monkeypatch.setattr(export, "enclose", lambda program: True)
    hat = _made(WritesThroughViews(how))
    report = hatify.verify(hat)
    assert not report.ok and max(report.gradients, report.parity) > 0.0


class MadeInside(Gate):
    """What a region makes is written through views behind it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.gate(x)
        left, middle = gate[:, :4], gate[:, 2:6]
        left.mul_(2), middle.add_(1.0)
        return self.head(torch.relu(x * gate))


def test_what_a_region_makes_may_be_written_behind_it() -> None:
    assert hatify.verify(_made(MadeInside("no_grad"))).ok


class WritesInside(Gate):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        left, middle = y[:, :4], y[:, 2:6]
        with torch.no_grad():
            left.mul_(2), middle.add_(1.0)
        return self.head(y)


class CountsInside(WritesInside):
    """A buffer that is written in a region."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        left, middle = y[:, :4], y[:, 2:6]
        left.mul_(2), middle.add_(1.0)
        with torch.no_grad():
            self.mean.lerp_(y.mean(0), 0.1)
        return self.head(y - self.mean)


class GivesAView(WritesInside):
    """A region that gives what it was given, which is written behind it."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        with torch.no_grad():
            left, middle = y[:, :4], y[:, 2:6]
        left.mul_(2), middle.add_(1.0)
        return self.head(y)


@pytest.mark.parametrize("network", [WritesInside, CountsInside, GivesAView])
def test_memory_that_a_region_shares_and_somebody_writes_is_refused(network: type[Gate]) -> None:
    with pytest.raises(CaptureError, match="shares memory with a region") as refused:
        hatify.convert(network("no_grad"), 2, example_inputs=X, verify=False)
    assert "test_regions.py" in str(refused.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_learns_without_a_task_learns_in_one(name: str) -> None:
    """Shared weights get a gradient in a task wherever they get one without: no mask stands between them and the loss."""
    hat, args, kwargs = small(name)
    learns = []
    for how in ({}, {"task": 0, "mask_scale": 5.0}):
        hat.zero_grad()
        total(hat(*args, **kwargs, **how)).backward()
        learns.append({n for n in hat.locks([0]) if hat.get_parameter(n).grad is not None})
    assert learns[0] <= learns[1] and (learns[0] or not hat.locks([0]))


class Switched(nn.Module):
    """A region of autocast, on or off, and what comes behind it."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled, self.a, self.b, self.head = enabled, nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.enabled):
            x = x + self.b(x.float()).float()
        return self.head(x)


@pytest.mark.parametrize("around", [False, True], ids=["plain", "under autocast"])
@pytest.mark.parametrize(
    "network", [Gate("autocast"), Gate("nested"), Switched(True), Switched(False)], ids=["gate", "nested", "on", "off"]
)
def test_compiled_as_one_graph(network: nn.Module, around: bool) -> None:
    """Autocast is what it was behind the region, and in the region what the region says, in compiled code as in a plain call."""
    torch._dynamo.reset()
    hat = _made(network)
    compiled = torch.compile(hat, fullgraph=True, backend="aot_eager")
    plain = {task: hat(X, task=task) for task in (None, 0, 1)}
    for task in (None, 0, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            expected, found = hat(X, task=task), compiled(X, task=task)
            assert torch.is_autocast_enabled("cpu") is around
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected)
        assert torch.equal(expected, plain[task]) is not around, "autocast around it makes a difference"
    compiled(X, task=0, mask_scale=3.0).square().sum().backward()
    found = hat.get_parameter("a.weight").grad.clone()
    torch.testing.assert_close(found, gradients(hat)["a.weight"])
    torch._dynamo.reset()
