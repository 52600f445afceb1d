"""Layers of other libraries that differ in their sizes alone are captured once, and proved each."""

import pytest
import torch
from torch import nn

import hatify
from hatify.artifact import lowering
from hatify.artifact.resizing import family_of


class Normed(nn.BatchNorm1d):
    """A layer of its own, of any width."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Numbered(nn.BatchNorm1d):
    """The width is a number in what it computes, and one that no example shows: nothing is that large."""

    def forward(self, x):
        return super().forward(x).clamp(max=10**6 * self.num_features)


class Counted(nn.BatchNorm1d):
    """The width is a number of an operator."""

    def forward(self, x):
        return super().forward(x).clamp(max=self.num_features)


WIDTHS = (5, 6, 7, 8)


def converted(layer):
    torch.manual_seed(0)
    parts = [m for a, b in zip((4, *WIDTHS), (*WIDTHS, 9)) for m in (nn.Linear(a, b), layer(b))]
    return hatify.convert(nn.Sequential(*parts, nn.Linear(9, 2)), 2, example_inputs=torch.randn(3, 4), verify=False)


@pytest.mark.parametrize("layer, captures", [(Normed, 1), (Numbered, 5), (Counted, 5)])
def test_widths_are_captured_once_unless_they_are_numbers_of_the_code(layer, captures, tmp_path, monkeypatch):
    seen, original = [], lowering._captured
    monkeypatch.setattr(lowering, "_captured", lambda plain, call: seen.append(plain) or original(plain, call))
    hat = converted(layer)
    hat(torch.randn(3, 4), task=1)  # what a call keeps on its layers is none of their settings
    path = hatify.save(hat, tmp_path / "saved")
    assert len(seen) == captures
    again, x = hatify.load(path), torch.randn(6, 4) * 100
    for training in (False, True):
        for task in (None, 1):
            assert torch.equal(hat.train(training)(x, task=task), again.train(training)(x, task=task))
    hatify.save(hat, tmp_path / "second")
    assert len(seen) == captures and "_hat_slot" not in (path / "model.json").read_text()


def test_a_family_is_what_is_left_without_sizes():
    def kind(width, eps, stride):
        settings = (("eps", repr(eps)), ("stride", repr((stride, stride))), ("width", repr(width)))
        return (("", Normed, settings, (("weight", ((width, 3), torch.float32)),)), (2, torch.float32))

    base = family_of(kind(8, 1e-5, 1))
    assert family_of(kind(9, 1e-5, 1)).kind == base.kind and base.changed(family_of(kind(9, 1e-5, 1))) == {8}
    assert family_of(kind(8, 1e-6, 1)).kind != base.kind and family_of(kind(8, 1e-5, 2)).kind != base.kind
