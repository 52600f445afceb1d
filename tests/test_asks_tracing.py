"""Models that ask whether they are traced, and act on the answer."""

import pytest
import torch
from torch import nn

import hatify
from hatify import conversion
from hatify.errors import CaptureError
from hatify.verification import VerificationError


def exporting() -> bool:
    """A library's own helper."""
    return torch.compiler.is_exporting()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.scaled(torch.relu(self.stem(x))).mean((2, 3)))


class Exports(Net):
    """Computes something else when exported."""

    def scaled(self, h):
        return h * 1.5 if exporting() else h


class Compiles(Net):
    def scaled(self, h):
        return h * 1.5 if torch.compiler.is_compiling() else h


class OpenSizes(Net):
    """Skips the resizing of what has the size already, unless exported: resized to its own size it is the same."""

    def __init__(self):
        super().__init__()
        self.grid = nn.Parameter(torch.randn(1, 8, 16, 16))

    def scaled(self, h):
        if not exporting() and h.shape[2:] == self.grid.shape[2:]:
            return h + self.grid
        return h + nn.functional.interpolate(self.grid, size=h.shape[2:], mode="bilinear", antialias=True)


class LooksAtData(Net):
    """An ordinary call looks into its data, and gives the same."""

    def scaled(self, h):
        if not torch.compiler.is_compiling() and bool((h < 0).all()):
            return h * 2.0
        return h


class LooksAtDataAndDiffers(Net):
    def scaled(self, h):
        if torch.compiler.is_compiling():
            return h * 1.5
        return h * 2.0 if bool((h < 0).all()) else h


class CannotExport(Net):
    def scaled(self, h):
        if torch.compiler.is_exporting():
            raise NotImplementedError("no export")
        return h


def converted(net: nn.Module, **options) -> hatify.HATModel:
    return hatify.convert(net, tasks=2, example_inputs=torch.randn(2, 3, 16, 16), **options)


def note_of(hat: hatify.HATModel) -> str:
    return "\n".join(note for note in hat.report.notes if "traced" in note)


@pytest.mark.parametrize("kind", [Exports, Compiles, CannotExport])
@pytest.mark.parametrize("verify", [True, False])
def test_where_the_trace_differs_the_ordinary_call_is_captured(kind, verify):
    net = kind().eval()
    hat = converted(net, verify=verify).eval()
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(hat(x), net(x))
    assert f"{kind.__name__}.scaled: captured as in an ordinary call" in note_of(hat)
    assert hatify.verify(hat).ok


def test_without_the_comparison_parity_does_not_hold(monkeypatch):
    monkeypatch.setattr(conversion, "equals_original", lambda hat: True)
    with pytest.raises(VerificationError, match="parity"):
        converted(Exports())


def test_where_the_trace_is_equal_sizes_stay_open():
    net = OpenSizes().eval()
    hat = converted(net).eval()
    x = torch.randn(2, 3, 24, 20)
    assert torch.equal(hat(x), net(x)) and note_of(hat) == ""


def test_where_an_ordinary_call_looks_at_data_the_trace_is_kept():
    net = LooksAtData().eval()
    hat = converted(net).eval()
    assert torch.equal(hat(net_input := torch.randn(2, 3, 16, 16)), net(net_input)) and note_of(hat) == ""


def test_where_neither_is_the_model_the_proof_refuses():
    with pytest.raises(VerificationError, match="parity"):
        converted(LooksAtDataAndDiffers())
    assert "an ordinary call cannot be traced" in note_of(converted(LooksAtDataAndDiffers(), verify=False))


def test_a_model_that_fails_either_way_is_refused_for_the_first_reason():
    class Never(CannotExport):
        def scaled(self, h):
            return super().scaled(h) * h.sum().item().as_integer_ratio()[0]

    with pytest.raises(CaptureError, match="no export"):
        converted(Never())


def test_what_torch_answers_is_as_before():
    before = torch.compiler.is_exporting, torch.compiler.is_compiling
    converted(Exports())
    assert before == (torch.compiler.is_exporting, torch.compiler.is_compiling)
