"""``x[m] = y[m]`` and ``x[m] = 0`` with masks that come from data: how many elements a mask picks need not be known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tasks import draw_masks, finish, same
from torch import Tensor, nn

import hatify
from hatify.capture import chosen
from hatify.errors import HatifyError


class Network(nn.Module):
    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.call = nn.Linear(5, 8), nn.Linear(8, 2), call

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(self.call(h.clone(), torch.relu(h) * 0.1))


def by_element(h: Tensor, y: Tensor) -> Tensor:
    m = h > 0.5
    h[m] = y[m]
    return h


def by_row(h: Tensor, y: Tensor) -> Tensor:
    m = h.sum(-1) > 0
    h[m] = y[m]
    return h


def a_number(h: Tensor, y: Tensor) -> Tensor:
    h[y > 0.05] = 1.0
    h[h.sum(-1) > 0] = 0
    return h


def of_itself(h: Tensor, y: Tensor) -> Tensor:
    m = y < h
    h[m] = h[m]
    y[m] = h[m]
    return y


def of_a_part(h: Tensor, y: Tensor) -> Tensor:
    part = h[:, :4]
    m = part > 0
    part[m] = y[:, 4:][m] if y is h else 0.5
    return h


def distances(h: Tensor, y: Tensor) -> Tensor:
    """The farthest elements, one after another, as in PointNet++."""
    least = torch.full((h.shape[0], h.shape[1]), 1e10)
    farthest, found = torch.zeros(h.shape[0], dtype=torch.long), []
    rows = torch.arange(h.shape[0])
    for _ in range(3):
        found.append(farthest)
        distance = (h - h[rows, farthest].unsqueeze(1)) ** 2
        closer = distance < least
        least[closer] = distance[closer]
        farthest = least.max(-1)[1]
    return torch.zeros_like(h).scatter(1, torch.stack(found, 1), 1.0) * h


CALLS = {f.__name__: f for f in (by_element, by_row, a_number, of_itself, of_a_part, distances)}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_mask_picks_is_written_in_place(name: str) -> None:
    torch.manual_seed(0)
    model, x = Network(CALLS[name]), torch.randn(6, 5)
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    assert not {"index", "index_put"} & set(hat.report.unknown_operators)
    other = torch.randn(11, 5)
    assert same(hat(other), model(other))
    draw_masks(hat)
    finish(hat, 0)
    for slim in (False, True):
        assert torch.allclose(hatify.extract(hat, 0, slim=slim)(other), hat.eval()(other, task=0), atol=1e-6)


def test_only_what_is_picked_is_read() -> None:
    """A value that is not finite where the mask is not comes neither forward nor back."""

    def roots(h: Tensor, y: Tensor) -> Tensor:
        m = h > 0
        h[m] = h.sqrt()[m]
        return h

    torch.manual_seed(0)
    model, x = Network(roots), torch.randn(6, 5)
    hat = hatify.convert(model, tasks=2, example_inputs=x, verify=False)
    assert same(hat(x), model(x)) and bool(hat(x).isfinite().all())


def written_between(h: Tensor, y: Tensor) -> Tensor:
    m = h > 0
    picked = y[m]
    y.mul_(2)
    h[m] = picked
    return h


def by_another(h: Tensor, y: Tensor) -> Tensor:
    m = h > 0
    picked = y[m]
    m.logical_not_()
    h[~m] = picked
    return h


def computed(h: Tensor, y: Tensor) -> Tensor:
    m = h > 0
    h[m] = torch.sort(y[m])[0]
    return h


@pytest.mark.parametrize("call", [written_between, by_another, computed])
def test_what_was_picked_otherwise_is_refused(call: Callable) -> None:
    with pytest.raises(HatifyError, match="a size depends on data"):
        hatify.convert(Network(call), tasks=2, example_inputs=torch.randn(6, 5))


def test_without_it_the_size_depends_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "_assigned", lambda *given: False)
    with pytest.raises(HatifyError, match="a size depends on data"):
        hatify.convert(Network(by_element), tasks=2, example_inputs=torch.randn(6, 5))
