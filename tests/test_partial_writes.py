"""Writes to a part of a tensor: ``x[:, ::2] = y`` is a new tensor in the graph, and the promises hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tasks import converted
from torch import Tensor, nn

import hatify
from hatify.capture.modes import capture
from hatify.errors import CaptureError

aten = torch.ops.aten
VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def interleaved(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.size(0), 2 * a.size(1))
    out[:, ::2] = a
    out[:, 1::2] = b
    return out


def in_turns(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros_like(a)
    for i in range(4):
        out[:, i] = torch.tanh(out[:, i - 1] + a[:, i]) + b[:, i]
    return out


def added(a: Tensor, b: Tensor) -> Tensor:
    out = a * 2
    out[:, 2:6] += b[:, :4]
    out[1:, 2:4].mul_(b[1:, :2]).sub_(1.0)
    return out


def expanded(a: Tensor, b: Tensor) -> Tensor:
    out = torch.stack([a, b], 1)
    out[:, 0, :3] = b[:1, 0:1]
    return out.flatten(1)


def changed_later(a: Tensor, b: Tensor) -> Tensor:
    """What was written does not change with where it came from."""
    out, b = a * 2, b * 2
    out[:, :3] = b[:, 3:6]
    b.add_(1.0)
    return out + b


def wider(a: Tensor, b: Tensor) -> Tensor:
    out = a.double()
    out[:, ::2] = b[:, :4]
    return out.float()


def in_another_type(a: Tensor, b: Tensor) -> Tensor:
    """Under autocast the product has another type than what it is written to."""
    out = a.float() + 1.0
    out[:, :4] = torch.mm(b, b.t())
    return out


def of_a_view(a: Tensor, b: Tensor) -> Tensor:
    """The whole is itself a view, and what it is a view of is read again."""
    out = a * 2
    out.view(-1, 4)[:, 0] = b[:, 1].repeat_interleave(2)
    return out


def read_again(a: Tensor, b: Tensor) -> Tensor:
    """The part is read, and written once more, by the name that it had before the write."""
    out = a * 2
    part = out[:, :3]
    same = part.add_(b[:, :3])
    out = out * part.sum(1, keepdim=True) + same.sum(1, keepdim=True)
    rows = out[1:]
    rows.mul_(2.0)
    rows.add_(1.0)
    return out


def gradients_off(a: Tensor, b: Tensor) -> Tensor:
    out = a * 2
    with torch.no_grad():
        out[:, :3] = 1.0
    return out + b


def whole_by_another_name(a: Tensor, b: Tensor) -> Tensor:
    out = a * 2
    other = out[:, 1:]
    out[:, :3] = b[:, :3]
    return out[:, 1:] + other


def written_by_names(a: Tensor, b: Tensor) -> Tensor:
    """Two names of overlapping parts, each written after the other was made."""
    out = a * 2
    first, second = out[:, :4], out[:, 2:6]
    first.add_(b[:, :4])
    second.mul_(b[:, :4])
    return out


class Net(nn.Module):
    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.c = nn.Linear(combine(torch.zeros(4, 8), torch.zeros(4, 8)).size(1), 3)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.combine(torch.tanh(self.a(x)), torch.tanh(self.b(x)))))


def overlapping(a: Tensor, b: Tensor) -> Tensor:
    """Windows of one memory: what is written to the first column of them is in the others too."""
    windows = (a * 2).unfold(1, 3, 1)
    windows[:, :, 0] = b[:, :6]
    return windows.flatten(1)


class OnLayers(nn.Module):
    """What is written to is what a layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.c = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, ::2] *= 2.0
        y = self.drop(x)  # the same memory in eval mode alone
        y[:, 0] = 0.5
        return self.c(torch.tanh(x + y))


def test_what_layers_gave() -> None:
    model = OnLayers()
    assert hatify.convert(model, 3, example_inputs=VECTORS).verification.ok
    captured, trained, _ = capture(model, (VECTORS,), {})
    assert captured.repeats and trained is not None


def copied_then_source_written(a: Tensor, b: Tensor) -> Tensor:
    out, b = torch.zeros_like(a), b * a
    out.copy_(b)
    b.add_(1.0)
    return out - b * 2


def copied_then_written(a: Tensor, b: Tensor) -> Tensor:
    out, b = torch.zeros_like(a), b * a
    out.copy_(b)
    out.add_(1.0)
    return out - b * 2


def copied_then_part_written(a: Tensor, b: Tensor) -> Tensor:
    out, b = torch.zeros_like(a), b * a
    out.copy_(b)
    out[:, :4].add_(1.0)
    return out - b * 2


def copied_twice(a: Tensor, b: Tensor) -> Tensor:
    first, second, b = torch.zeros_like(a), torch.zeros_like(a), b * a
    first.copy_(b)
    second.copy_(first)
    second.add_(1.0)
    return second - b * 2


COPIED = [copied_then_source_written, copied_then_written, copied_then_part_written, copied_twice]
RENAMED = [interleaved, in_turns, added, expanded, changed_later, wider, in_another_type, read_again]
TRACED = [of_a_view, written_by_names, whole_by_another_name]
"""What tracing alone makes functional."""


@pytest.mark.parametrize("combine", [*RENAMED, *COPIED, *TRACED], ids=lambda f: f.__name__)
def test_the_promises_hold(combine: Callable) -> None:
    model = Net(combine)
    hat = hatify.convert(model, 3, example_inputs=VECTORS)
    assert hat.verification.ok
    fixed = combine is in_another_type  # its part is as wide as the batch
    for size in (4,) if fixed else (2, 7):
        x = torch.randn(size, 6)
        assert torch.equal(model(x), hat(x))


@pytest.mark.parametrize("combine", RENAMED, ids=lambda f: f.__name__)
def test_types_follow(combine: Callable) -> None:
    model = Net(combine).eval()
    hat = converted(model, VECTORS)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(model(VECTORS), hat(VECTORS))
    model.double(), hat.double()
    if combine is not wider and combine is not in_another_type:  # these name a type, in which the layer behind is not
        assert torch.equal(model(VECTORS.double()), hat(VECTORS.double()))


@pytest.mark.parametrize("combine", RENAMED, ids=lambda f: f.__name__)
def test_one_trace_is_enough(combine: Callable) -> None:
    captured, _, _ = capture(Net(combine).eval(), (VECTORS,), {})
    written = [n for n in captured.graph.nodes if n.target in (aten.slice_scatter.default, aten.select_scatter.default)]
    assert captured.repeats and written and not any(n.target is aten.copy_.default for n in captured.graph.nodes)


@pytest.mark.parametrize("combine", TRACED, ids=lambda f: f.__name__)
def test_control_what_a_new_whole_would_get_wrong_is_traced(combine: Callable) -> None:
    captured, _, _ = capture(Net(combine).eval(), (VECTORS,), {})
    assert not captured.repeats


def test_gradients_that_a_new_whole_would_lose_are_refused() -> None:
    with pytest.raises(CaptureError, match="shares memory with a region of torch.no_grad"):
        hatify.convert(Net(gradients_off), 2, example_inputs=VECTORS)


def test_what_a_new_whole_would_not_share_is_refused() -> None:
    with pytest.raises(CaptureError, match="internal overlap"):
        hatify.convert(Net(overlapping), 2, example_inputs=VECTORS)


class Remembering(nn.Module):
    """Buffers that are copied from and to: ``how`` writes them."""

    def __init__(self, how: Callable) -> None:
        super().__init__()
        self.layer, self.head, self.how = nn.Linear(8, 6), nn.Linear(6, 2), how
        self.register_buffer("now", torch.zeros(6))
        self.register_buffer("before", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.how(self, y.mean(0).detach())
        return self.head(y + self.before)


def written_behind(net: Remembering, mean: Tensor) -> None:
    net.now.copy_(mean)
    mean *= 2


def shifted(net: Remembering, mean: Tensor) -> None:
    net.before.copy_(net.now)
    net.now.copy_(mean)


def counted_on(net: Remembering, mean: Tensor) -> None:
    net.before.copy_(net.now)
    net.now.add_(1.0)


@pytest.mark.parametrize("how", [written_behind, shifted, counted_on], ids=lambda f: f.__name__)
@pytest.mark.parametrize("verify", [True, False])
def test_a_buffer_keeps_what_it_was_given(how: Callable, verify: bool) -> None:
    model = Remembering(how)
    hat = hatify.convert(model, 2, example_inputs=torch.randn(4, 8), verify=verify)
    for training in (True, True, False):
        x = torch.randn(4, 8)
        assert torch.equal(model.train(training)(x), hat.train(training)(x))
        assert torch.equal(model.now, hat.get_buffer("now")) and torch.equal(model.before, hat.get_buffer("before"))
