"""Positions on a lattice are taken by views; the others by their indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hatify.gates import Program, evaluate
from hatify.gates.lattice import Lattice

laws = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def lattices(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """The size of a vector, and a part of it with its dimensions in another order, repeated along others."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    before, behind = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    part = torch.arange(int(torch.tensor(sizes).prod())).view(sizes) + before
    for _ in range(draw(st.integers(0, 2))):
        part = part.unsqueeze(draw(st.integers(0, part.dim())))
    repeated = [draw(st.integers(1, 3)) if size == 1 else size for size in part.shape]
    order = draw(st.permutations(range(part.dim())))
    return before + part.numel() + behind, tuple(part.expand(repeated).permute(order).reshape(-1).tolist())


@laws
@given(lattices())
def test_a_lattice_takes_what_its_indices_take(case: tuple[int, tuple[int, ...]]) -> None:
    size, index = case
    x = torch.arange(size) * 10
    found = Lattice.of(index)
    assert found is not None
    assert torch.equal(found.take(x), x[list(index)])


@laws
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_any_indices_are_taken_right_or_not_at_all(index: list[int]) -> None:
    x = torch.arange(6) * 10
    found = Lattice.of(tuple(index))
    assert found is None or torch.equal(found.take(x), x[index])


@pytest.mark.parametrize("index", [(0, 2, 4), (3, 2, 1), (0, 1, 3), (0, 1, 1), (0, 0, 1), (0, 1, 4, 5), ()], ids=str)
def test_what_lies_on_no_lattice_or_on_one_with_gaps(index: tuple[int, ...]) -> None:
    assert Lattice.of(index) is None


def test_neighbours_are_a_view() -> None:
    x = torch.arange(6.0)
    assert Lattice.of((2, 3, 4)).take(x).data_ptr() == x[2:].data_ptr()


@pytest.mark.parametrize("index", [(2, 3), (0, 1, 0, 1), (1, 1, 2, 2), (0, 2, 1, 3), (3, 0, 1)], ids=str)
def test_programs_take_either_way(index: tuple[int, ...]) -> None:
    mask = torch.rand(4, requires_grad=True)
    out = evaluate(Program("atom", len(index), masker="m", index=index), {"m": mask}.__getitem__, {})
    along = torch.rand(len(index))
    assert torch.equal(out, mask[list(index)])
    torch.testing.assert_close(_gradient(out, mask, along), _gradient(mask[list(index)], mask, along))


def _gradient(out: Tensor, of: Tensor, along: Tensor) -> Tensor:
    return torch.autograd.grad(out, of, along)[0]
