"""Calls of leaves that are alike are run on fake tensors once: the graph is the same, and what differs in anything is run."""

import pytest
import torch
from torch import nn

import hatify
from hatify.capture import alike, tree


class Repeated(nn.Module):
    """Six convolutions, four of them alike; norms and activations between them, one of which works in place."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)]
        convolutions += [nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 3, padding=1, dilation=2)]
        self.stages = nn.ModuleList(
            nn.Sequential(c, nn.BatchNorm2d(4), nn.ReLU(inplace=i % 2 == 0)) for i, c in enumerate(convolutions)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def runs(monkeypatch):
    """The leaves that are really run on fake tensors, in order."""
    seen: list[str] = []
    run = tree._run_on_fakes
    monkeypatch.setattr(tree, "mark_blocks", lambda *args: None)  # blocks that are alike have tests of their own
    monkeypatch.setattr(tree, "_run_on_fakes", lambda call, *rest: seen.append(call.path) or run(call, *rest))
    return seen


def test_layers_that_are_alike_are_run_once_and_the_graph_is_the_same(runs, monkeypatch):
    x = torch.randn(2, 4, 9, 9)
    torch.manual_seed(0)
    model = Repeated()
    with_memory = hatify.convert(model, tasks=2, example_inputs=x)
    once = list(runs)
    runs.clear()
    monkeypatch.setattr(tree, "likeness", lambda *call: None)
    without = hatify.convert(model, tasks=2, example_inputs=x)
    assert with_memory.code == without.code and hatify.verify(with_memory).ok
    assert len(runs) == 2 * 19 and len(once) < len(runs)
    convolutions = [path for path in once if path.endswith(".0")]
    assert convolutions == 2 * [
        "stages.0.0",
        "stages.1.0",
        "stages.4.0",
        "stages.5.0",
    ]  # in each mode; what the first is given asks for no gradient


class Settings:
    """As the layers of a model share them."""

    def __init__(self, size: int, **more) -> None:
        self.size, self.more = size, more


def test_objects_are_compared_by_their_attributes():
    def key(settings):
        return alike.likeness(Widened(2, how=settings), [torch.zeros(2, 4)], [])

    assert key(Settings(1, names=["a"])) == key(Settings(1, names=["a"])) is not None
    assert len({key(Settings(1)), key(Settings(2)), key(Settings(1, names=[])), key(Settings(True))}) == 4
    within = Settings(1)
    within.more["itself"] = within
    assert key(within) is None and key(Settings(torch.zeros(1))) is None and key(Settings(nn.ReLU())) is None


class Widened(nn.Module):
    """What it gives depends on an attribute alone."""

    def __init__(self, times, how=None) -> None:
        super().__init__()
        self.times = times
        self.how = how

    def forward(self, x):
        return x.repeat(1, self.times)


CHANGES = {
    "attribute": lambda: ((Widened(2), Widened(3)), None),
    "type of an attribute": lambda: ((Widened(1), Widened(True)), None),
    "parameter": lambda: ((nn.Linear(4, 3), nn.Linear(4, 5)), None),
    "dtype of a parameter": lambda: ((nn.Linear(4, 3), nn.Linear(4, 3).double()), None),
    "mode": lambda: ((nn.Dropout().train(), nn.Dropout().eval()), None),
    "class": lambda: ((nn.ReLU(), nn.ReLU6()), None),
    "inside": lambda: ((nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())), None),
    "input": lambda: ((nn.ReLU(), nn.ReLU()), (torch.zeros(2, 4), torch.zeros(3, 4))),
    "strides of the input": lambda: ((nn.ReLU(), nn.ReLU()), (torch.zeros(4, 4), torch.zeros(4, 4).t())),
    "dtype of the input": lambda: ((nn.ReLU(), nn.ReLU()), (torch.zeros(2, 4), torch.zeros(2, 4).double())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_makes_calls_unlike(change):
    (a, b), inputs = CHANGES[change]()
    x, y = inputs or (torch.zeros(2, 4), torch.zeros(2, 4))
    assert alike.likeness(a, [x], []) == alike.likeness(a, [x.clone()], [])
    assert alike.likeness(a, [x], []) != alike.likeness(b, [y], [])
    assert alike.likeness(a, [x], [1]) != alike.likeness(a, [x], [True])


def test_autocast_and_inputs_that_share_memory_make_calls_unlike():
    layer, x, y = nn.ReLU(), torch.zeros(2, 4), torch.zeros(2, 4)
    apart = alike.likeness(layer, [x, y], [])
    assert apart != alike.likeness(layer, [x, x], [])
    with torch.autocast("cpu", torch.bfloat16):
        assert apart != alike.likeness(layer, [x, y], [])


def test_what_cannot_be_compared_is_always_run(runs):
    class Box:
        __slots__ = ("hidden",)

    calls = []
    assert alike.likeness(Widened(2, how=Box()), [torch.zeros(2, 4)], []) is None
    assert alike.likeness(Widened(2, how=lambda x: calls.append(x)), [torch.zeros(2, 4)], []) is None
    assert alike.likeness(Widened(2, how=torch.relu), [torch.zeros(2, 4)], []) is not None
    assert alike.likeness(Widened(2), [torch.zeros(2, 4)], [Box()]) is None

    class Boxed(nn.ReLU):
        def __init__(self) -> None:
            super().__init__()
            self.box = Box()

    hatify.register(Boxed, hatify.Elementwise())
    model = nn.Sequential(nn.Linear(4, 4), Boxed(), Boxed())
    hat = hatify.convert(model, tasks=2, example_inputs=torch.zeros(3, 4))
    assert runs.count("1") == runs.count("2") == 2 and runs.count("0") == 2
    assert hatify.verify(hat).ok
