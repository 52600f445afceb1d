"""Locks: which elements a set of tasks needs, against brute force over tasks, over one-hot weights, and over perturbations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from lock_networks import LOCKED
from tasks import converted, fill_masks, maskers, outputs, same
from torch import Tensor, nn

from hatify import HATModel
from hatify.gates import CONST, TOP, GateTable, Use, compile_gates, evaluate, locked
from hatify.gates.layers import Weighted, weighted, weighted_uses
from hatify.gates.rules.contractions import or_along
from hatify.gates.value import State, Value
from hatify.registry import describe

SIZES = {"out": 6, "in": 6}
TASKS = (0, 1, 2)


class Drawn:
    """A table with two maskers and random binary masks for three tasks."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.table = GateTable()
        self.out, self.inp = (self.table.atoms(name, size) for name, size in SIZES.items())
        self.program = compile_gates(self.table, SIZES)
        self.masks = [{name: self._mask(size) for name, size in SIZES.items()} for _ in TASKS]

    def _mask(self, size: int) -> Tensor:
        return (torch.rand(size, generator=self.generator) > 0.5).float()

    def live(self, ids: Tensor, task: int) -> Tensor:
        return (evaluate(self.program(ids), self.masks[task].__getitem__, {}) > 0).reshape(ids.shape)

    def use(self) -> Use:
        """A weight of 6 outputs and 6 inputs with gates of every kind."""
        mixed = self.table.combine("or", self.inp, self.out.flip(0))
        cols = torch.where(torch.rand(6, generator=self.generator) > 0.5, mixed, self.inp)
        cols[0] = TOP
        return Use("weight", self.out[:, None], cols[None], (6, 6))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tasks", [(), (1,), (0, 2), TASKS])
def test_locked_is_brute_force_over_tasks(seed: int, tasks: tuple[int, ...]) -> None:
    drawn = Drawn(seed)
    use = drawn.use()
    exact = locked(use, 36, drawn.live, tasks, paper=False).view(6, 6)
    paper = locked(use, 36, drawn.live, tasks, paper=True).view(6, 6)
    for o, j in itertools.product(range(6), range(6)):
        out = [bool(drawn.live(use.rows[o], t)) for t in tasks]
        inp = [bool(drawn.live(use.cols[:, j], t)) for t in tasks]
        assert exact[o, j] == any(a and b for a, b in zip(out, inp))
        assert paper[o, j] == (any(out) and any(inp))
    assert not (exact & ~paper).any()


def test_the_paper_locks_pairs_that_no_task_uses() -> None:
    table = GateTable()
    use = Use("weight", table.atoms("out", 2)[:, None], table.atoms("in", 2)[None], (2, 2))
    masks = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    program = compile_gates(table, {"out": 2, "in": 2})

    def live(ids: Tensor, task: int) -> Tensor:
        return (evaluate(program(ids), lambda _: masks[task], {}) > 0).reshape(ids.shape)

    assert locked(use, 4, live, (0, 1), paper=False).tolist() == [True, False, False, True]
    assert locked(use, 4, live, (0, 1), paper=True).all()


@pytest.mark.parametrize("paper", [False, True])
def test_positions_lead_back_to_the_parameter(paper: bool) -> None:
    """A weight made of slices: rows in another order, one element read twice, one from elsewhere."""
    drawn = Drawn(0)
    positions = torch.arange(36).view(6, 6).flip(0).clone()
    positions[0, 0], positions[1, 1] = -1, positions[2, 2]
    use = drawn.use()
    plain = locked(use, 36, drawn.live, TASKS, paper).view(6, 6)
    moved = locked(replace(use, positions=positions), 50, drawn.live, TASKS, paper)
    assert moved.shape == (50,) and not moved[36:].any()
    expected = {int(p) for p, needed in zip(positions.flatten(), plain.flatten()) if needed and p >= 0}
    assert set(moved.nonzero().flatten().tolist()) == expected


def test_a_channel_with_a_constant_position_is_live() -> None:
    """Column 0 is CONST everywhere, column 1 at one position, column 2 nowhere: what is CONST is live for every task."""
    table = GateTable()
    a, b, c = table.atoms("in", 3).tolist()
    ids = torch.tensor([[CONST, CONST], [a, CONST], [b, c]])
    assert or_along(table, ids, 0).tolist() == [TOP, TOP, table.pair("or", b, c)]


class Dry:
    """An interpreter that only notes what was materialised."""

    def __init__(self) -> None:
        self.table = GateTable()

    def masked(self, value: Value, *, soft: bool, fill: float) -> Value:
        return replace(value, state=State.CLEAN)


GEOMETRIES = {
    "linear": (nn.Linear(4, 6), (1, 4)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (1, 4, 5, 5)),
    "grouped": (nn.Conv1d(4, 6, 3, groups=2), (1, 4, 5)),
    "grouped more": (nn.Conv2d(6, 12, 1, groups=3), (1, 6, 3, 3)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5)),
    "depthwise with a multiplier": (nn.Conv2d(3, 6, 3, groups=3), (1, 3, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 3, 3)),
    "transposed, grouped": (nn.ConvTranspose1d(6, 8, 3, groups=2), (1, 6, 4)),
    "transposed, depthwise": (nn.ConvTranspose2d(4, 8, 2, groups=4), (1, 4, 3, 3)),
    "three dimensions": (nn.Conv3d(2, 4, 2, groups=2), (1, 2, 3, 3, 3)),
}


@torch.no_grad()
def touched(layer: nn.Module, shape: tuple[int, ...], element: int) -> tuple[int, int]:
    """The output and the input channel that one element of the weight connects: found by running it alone."""
    layer.weight.zero_()
    layer.weight.view(-1)[element] = 1.0
    channels = 1.0 + torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    out = layer(channels.expand(shape))[0]
    strongest = out.reshape(len(out), -1).amax(1)
    row = int(strongest.argmax())
    return row, int(strongest[row]) - 1


DEPTHWISE = [name for name in GEOMETRIES if "depthwise" in name]
"""Only these work without a masker of their own."""


@pytest.mark.parametrize(("name", "masked"), [(n, True) for n in GEOMETRIES] + [(n, False) for n in DEPTHWISE])
def test_every_element_reads_and_writes_its_channels(name: str, masked: bool) -> None:
    layer, shape = GEOMETRIES[name]
    meaning = describe(layer)
    assert isinstance(meaning, Weighted)
    run = Dry()
    inputs, outputs_ = shape[1], getattr(layer, "out_channels", 6)
    inp, out = run.table.atoms("in", inputs), run.table.atoms("out", outputs_)
    x = Value(shape, inp.view(1, -1, *[1] * (len(shape) - 2)), State.PENDING)
    outcome = weighted(run, x, meaning, out if masked else None, inputs, outputs_, bias=True)
    (use, bias) = weighted_uses(meaning, outcome, {n: tuple(p.shape) for n, p in layer.named_parameters()}, inputs, outputs_)
    assert (use.parameter, bias.parameter) == ("weight", "bias")
    rows, cols = use.rows.expand(use.shape).flatten(), use.cols.expand(use.shape).flatten()
    layer.bias.data.zero_()
    for element in range(layer.weight.numel()):
        row, column = touched(layer, shape, element)
        assert rows[element] == (out[row] if masked else inp[row * inputs // outputs_])
        assert cols[element] == inp[column]
    assert torch.equal(bias.rows, out if masked else inp.repeat_interleave(outputs_ // inputs))


@torch.no_grad()
def needed_by(hat: HATModel, tasks: tuple[int, ...]) -> dict[str, Tensor]:
    """The elements of every shared parameter whose change is seen in the output of one of ``tasks``: bool, by trying each."""
    args, kwargs = hat.example_inputs
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    before = {t: outputs(hat, args, kwargs, task=t) for t in tasks}
    found = {}
    for name in hat.locks([]):
        parameter = hat.get_parameter(name)
        seen = torch.zeros(parameter.numel(), dtype=torch.bool)
        flat = parameter.data.view(-1)
        for element in range(parameter.numel()):
            old = flat[element].item()
            flat[element] = old + 0.37
            seen[element] = any(not same(before[t], outputs(hat, args, kwargs, task=t)) for t in tasks)
            flat[element] = old
        found[name] = seen.view(parameter.shape)
    return found


@torch.no_grad()
def prepared(name: str, locking: str = "exact") -> HATModel:
    """Task t lacks every third channel, another one in each layer: every group of channels keeps one, so that no path ends."""
    model, inputs = LOCKED[name]()
    hat = converted(model, inputs, locking=locking).double()
    for number, masker in enumerate(maskers(hat)):
        for task, embedding in enumerate(masker.embeddings):
            embedding.fill_(1.0)
            embedding[(number + task) % 3 :: 3] = -1.0
    return hat


@pytest.fixture(autouse=True)
def _one_thread():
    """These networks are too small for threads to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LOCKED)
def test_locked_is_what_a_perturbation_shows(name: str) -> None:
    """No unlocked element ever changes a finished task; every locked one does (nothing in these networks hides it)."""
    hat = prepared(name)
    locks = hat.locks([0])
    assert any(lock.any() for lock in locks.values()) and not all(lock.all() for lock in locks.values())
    for tasks in ((0,), (0, 1)):
        locks, needed = hat.locks(tasks), needed_by(hat, tasks)
        for parameter, lock in locks.items():
            assert not (needed[parameter] & ~lock).any(), f"{parameter}: needed, and not locked"
            assert not (lock & ~needed[parameter]).any(), f"{parameter}: locked, and not needed"


@pytest.mark.parametrize("name", ["linear", "grouped", "transposed"])
def test_paper_locks_contain_the_exact_ones(name: str) -> None:
    exact, paper = prepared(name).locks([0, 1]), prepared(name, "paper").locks([0, 1])
    assert all(not (lock & ~paper[n]).any() for n, lock in exact.items())
    assert any((paper[n] & ~lock).any() for n, lock in exact.items())
    alone, paper_alone = prepared(name).locks([1]), prepared(name, "paper").locks([1])
    assert all(torch.equal(lock, paper_alone[n]) for n, lock in alone.items()), "of one task both rules say the same"


def test_a_fully_live_task_locks_everything_that_counts() -> None:
    hat = prepared("linear")
    fill_masks(hat, 1.0, task=0)
    assert all(lock.all() for lock in hat.locks([0]).values())
    assert not any(lock.any() for lock in hat.locks([]).values())


def test_locks_left_out_are_seen() -> None:
    """The negative control of the brute force itself."""
    hat = prepared("linear")
    name = next(iter(hat.locks([0])))
    needed = needed_by(hat, (0,))
    assert (needed[name] & ~hat.locks([0], without=(name,))[name]).any()
