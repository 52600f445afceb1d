"""What is needed of an operand of which views are read: by strides, and the same place by place."""

from __future__ import annotations

import random

import pytest
import torch

from hatify.analysis import places
from hatify.gates import GateTable, Value
from hatify.gates.rules import Call
from hatify.gates.rules.movement import MULTIPLE, move_tensor
from hatify.gates.table import CONST

aten = torch.ops.aten
SHAPE = (2, 6, 4, 9)
VIEWS = {
    "view": (aten.view.default, [2, 6, 4, 3, 3]),
    "view of merged dimensions": (aten.view.default, [12, 36]),
    "view across dimensions": (aten.view.default, [2, 3, 8, 9]),
    "reshape to one": (aten.reshape.default, [432]),
    "flatten": (aten.flatten.using_ints, 1, 2),
    "unflatten": (aten.unflatten.int, 1, [2, 3]),
    "permute": (aten.permute.default, [0, 3, 1, 2]),
    "transpose": (aten.transpose.int, 1, -1),
    "unsqueeze": (aten.unsqueeze.default, 2),
    "contiguous": (aten.contiguous.default,),
    "slice": (aten.slice.Tensor, 3, 2, 7),
    "slice with steps": (aten.slice.Tensor, 1, 1, 6, 2),
    "select": (aten.select.int, 2, 1),
    "narrow": (aten.narrow.default, 0, 1, 1),
    "unbind": (aten.unbind.int, 2),
    "split": (aten.split.Tensor, 4, 3),
    "split with sizes": (aten.split_with_sizes.default, [1, 3, 2], 1),
    "chunk": (aten.chunk.default, 3, 1),
    "diagonal": (aten.diagonal.default, 0, 1, 2),
    "windows apart": (aten.unfold.default, 3, 3, 3),
}
OTHERS = {
    "expand": (aten.expand.default, [3, 2, 6, 4, 9]),
    "windows that overlap": (aten.unfold.default, 3, 3, 1),
    "flip": (aten.flip.default, [1]),
    "roll": (aten.roll.default, [1], [2]),
}


def drawn(shape: tuple[int, ...], chance: random.Random) -> torch.Tensor:
    """Gates that differ along some dimensions."""
    sizes = [size if chance.random() < 0.4 else 1 for size in shape]
    generator = torch.Generator().manual_seed(chance.randrange(2**30))
    return torch.randint(2, 5, sizes, generator=generator)


def call_of(kind: str, value: Value) -> Call:
    function, *arguments = {**VIEWS, **OTHERS}[kind]
    return Call(function.__name__.split(".")[0], function, (value, *arguments), {})


def results_of(call: Call, chance: random.Random) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    moved = move_tensor(call, lambda v: torch.zeros(v.shape))
    return [(tuple(t.shape), drawn(tuple(t.shape), chance)) for t in (moved if call.name in MULTIPLE else [moved])]


@pytest.mark.parametrize("kind", VIEWS)
def test_strides_say_what_places_say(kind, monkeypatch):
    chance = random.Random(kind)
    for _ in range(60):
        value = Value(SHAPE, drawn(SHAPE, chance))
        call = call_of(kind, value)
        results = results_of(call, chance)
        assert places._views(call, value) is not None
        quick = places.moved_back(GateTable(), call, results, value, SHAPE, [shape for shape, _ in results])
        with monkeypatch.context() as patch:
            patch.setattr(places, "_views", lambda *rest: None)
            slow = places.moved_back(GateTable(), call, results, value, SHAPE, [shape for shape, _ in results])
        assert torch.equal(quick.expand(SHAPE), slow.expand(SHAPE))
        assert quick.shape == slow.shape


@pytest.mark.parametrize("kind", OTHERS)
def test_movements_that_are_no_views_go_by_places(kind):
    value = Value(SHAPE, drawn(SHAPE, random.Random(0)))
    assert places._views(call_of(kind, value), value) is None


def test_a_dimension_that_only_some_views_have_is_looked_at_everywhere(monkeypatch):
    """The negative control: with every dimension taken for alike, needs of one place would stand for all."""
    value = Value(SHAPE, torch.full((1, 1, 1, 1), 2))
    call = call_of("select", value)
    results = [((2, 6, 9), torch.full((1, 1, 1), 3))]
    quick = places.moved_back(GateTable(), call, results, value, SHAPE, [shape for shape, _ in results])
    assert quick.expand(SHAPE)[:, :, 1].eq(3).all() and quick.expand(SHAPE)[:, :, 0].eq(CONST).all()
    monkeypatch.setattr(places, "_shows_all", lambda *rest: True)
    with pytest.raises(RuntimeError, match="out of bounds"):
        places.moved_back(GateTable(), call, results, value, SHAPE, [shape for shape, _ in results])
