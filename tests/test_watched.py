"""Blocks that are told apart by attributes are alike where nobody asks for these."""

from __future__ import annotations

import pytest
import torch
from repeating import Body, Stack, X, found_by_the_proof, traced, traced_alone
from timm.layers import DropPath
from torch import Tensor, nn

import hatify
from hatify.capture import repeats
from hatify.capture.watched import reads, watching


class Numbered(Body):
    """Knows its place, as the layers of language models do, and does not ask for it."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.kind = index, "even" if index % 2 == 0 else "odd"

    def forward(self, x):
        return super().forward(x)


class Asking(Numbered):
    """Asks for one of the two things that tell it apart."""

    def forward(self, x):
        y, x = super().forward(x)
        return (y * 2 if self.kind == "odd" else y), x


class Looking(Numbered):
    """Past its attributes."""

    def forward(self, x):
        y, x = super().forward(x)
        return y * (1 + vars(self)["index"]), x


class Moving(Numbered):
    """Writes to what tells it apart."""

    def forward(self, x):
        self.index += 1
        return super().forward(x)


class Around(nn.Module):
    """A block around another, whose answer is its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, nn.Linear(8, 8)

    def forward(self, x):
        y, x = self.inner(x)
        return self.after(y), x


PARITY: dict[str, str] = {}


class Told(Numbered):
    """Is told what it is by whoever calls it."""

    def forward(self, x):
        y, x = super().forward(x)
        return (y * 2 if PARITY["now"] == "odd" else y), x


class Choosing(Stack):
    """Asks its layers what they are, and tells them by a global."""

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            PARITY["now"] = layer.kind
            x, _ = layer(x)
        return self.head(x.mean(1))


class Reckoning(Body):
    """Reads the rate of a layer instead of calling it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(rate)

    def forward(self, x):
        y, x = super().forward(self.drop(x))
        return y * (1 - self.drop.p), x


class Keeping(nn.Module):
    """Stochastic depth in place: what drops nothing gives its input itself, which is then written to."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), DropPath(rate)

    def forward(self, x):
        y = self.a(x)
        kept = self.drop(y)
        kept += 1.0
        return self.b(y) + kept, x


def numbered(kind: type, around: bool = False) -> nn.Module:
    return Stack(*(Around(kind(i)) if around else kind(i) for i in range(6)))


TOLD_APART = {
    "by what nobody reads": (lambda: numbered(Numbered), [1, 2, 3, 4, 5]),
    "by what is read": (lambda: numbered(Asking), [2, 3, 4, 5]),
    "by what is read past the attributes": (lambda: numbered(Looking), None),
    "by what those who call it read": (lambda: Choosing(*(Told(i) for i in range(6))), [2, 3, 4, 5]),
    "by whether they drop anything": (lambda: Stack(*(Keeping(rate) for rate in (0.1, 0.2, 0.0, 0.0))), None),
    "by drop rates that they read": (lambda: Stack(*(Reckoning(rate) for rate in (0.1, 0.2, 0.1))), [2]),
    "by what is written": (lambda: numbered(Moving), []),
    "by what is read inside": (lambda: numbered(Asking, around=True), [2, 3, 4, 5]),
}


@pytest.mark.parametrize("how", TOLD_APART)
def test_blocks_that_are_told_apart_are_alike_where_their_code_does_not_ask(how, copied):
    make, expected = TOLD_APART[how]
    model = make()
    classes = {type(m): dict(vars(type(m))) for m in model.modules()}
    assert traced(model, X) == traced_alone(model, X)
    if expected is not None:  # else it was tried, and given up
        assert [path for path in copied if path.count(".") == 1] == 2 * [f"layers.{i}" for i in expected]
    assert all(dict(vars(cls)) == held for cls, held in classes.items())
    assert [getattr(m, "index", None) for m in model.modules()] == [getattr(m, "index", None) for m in make().modules()]
    assert hatify.convert(model, tasks=2, example_inputs=X).verification.ok


def test_without_a_look_at_reads_another_blocks_path_would_be_taken(copied, monkeypatch):
    """The control."""
    monkeypatch.setattr(repeats, "reads", lambda block: set())
    model = numbered(Asking)
    assert traced(model, X) != traced_alone(model, X)
    found_by_the_proof(model)


class Frozen(type):
    def __setattr__(cls, name, value):
        raise TypeError("closed")


class Varied(Body):
    """Holds a number in some, and a tensor or an array in others."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        return super().forward(x * torch.as_tensor(self.value, dtype=x.dtype))


class Closed(Numbered, metaclass=Frozen):
    pass


class Balanced(Numbered):
    """Leaves a loss in a list that it was not given, as a router does."""

    def forward(self, x):
        LOSSES.append(x.mean() * 0.1)
        return super().forward(x)


class Balancing(Stack):
    def forward(self, x):
        LOSSES.clear()
        y, weights = super().forward(x)
        return y + sum(LOSSES), weights


class Filling(Numbered):
    """Writes to a list that it is given."""

    def forward(self, x, found):
        y, x = super().forward(x)
        found.append(len(found) + 1)
        return y, x


class Filled(Stack):
    def forward(self, x):
        x, count = self.embed(x), 0
        for layer in self.layers:
            found: list[int] = []
            x, _ = layer(x, found)
            count += len(found)
        return self.head(x.mean(1)) * count


class Listed(Numbered):
    """Leaves its result in a list that it was not given."""

    def forward(self, x):
        y, x = super().forward(x)
        LOSSES.append(y)
        return y, x


def test_blocks_that_leave_their_results_elsewhere_are_traced_one_by_one_where_the_proof_asks_for_it(copied):
    model = Balancing(*(Listed(i) for i in range(4)))
    model.head = nn.Linear(8, 8)
    model.forward = lambda x: (LOSSES.clear(), Stack.forward(model, x)[0] + sum(LOSSES).mean(1))[1]
    hat = hatify.convert(model, tasks=2, example_inputs=X)
    assert hat.verification.ok and any("past what they are given" in note for note in hat.report.notes)
    assert torch.equal(model.eval()(X), hat.eval()(X))
    assert copied  # it was tried first


class Defaulting(Numbered):
    """Some have the class's own value."""

    scale = 1.0

    def __init__(self, index: int) -> None:
        super().__init__(index)
        if index % 2:
            self.scale = float(index)

    def forward(self, x):
        y, x = super().forward(x)
        return y * self.scale, x


LOSSES: list[Tensor] = []
PAST_IT = {
    "by another kind of value": lambda: Stack(*(Varied(v) for v in (1.0, torch.rand(8), 2.0, torch.rand(8)))),
    "by a default": lambda: numbered(Defaulting),
    "of a class that takes no attributes": lambda: numbered(Closed),
    "through a list of losses": lambda: Balancing(*(Balanced(i) for i in range(4))),
    "through an argument": lambda: Filled(*(Filling(i) for i in range(4))),
}


@pytest.mark.parametrize("how", PAST_IT)
def test_what_passes_by_the_attributes_is_not_lost(how):
    model = PAST_IT[how]()
    assert traced(model, X) == traced_alone(model, X)
    assert hatify.convert(model, tasks=2, example_inputs=X).verification.ok


def test_watched_attributes_are_what_they_were():
    class Held(nn.Module):
        default = 1

    first, second, third = held = nn.ModuleList(Held() for _ in range(3))
    first.default, second.other, third.missing = 2, 3, 4
    watched = [(module, frozenset({name})) for module, name in ((first, "default"), (second, "other"), (third, "missing"))]
    with watching(held, watched):
        assert (first.default, second.default, second.other, Held.default) == (2, 1, 3, 1)
        assert not hasattr(first, "other") and getattr(second, "missing", 5) == 5
        assert reads(first) == {("", "default"), ("", "other")}  # who asks whether it is there has read it
        assert reads(second) == {("", "default"), ("", "other"), ("", "missing")} and "other" not in vars(second)
        second.default = 7
        second.missing = nn.Parameter(torch.ones(1))
        del second.other
        with pytest.raises(AttributeError):
            del second.other
        assert second.missing is dict(second.named_parameters())["missing"]
    assert (first.default, second.default, Held.default) == (2, 7, 1) and not hasattr(second, "other")
    assert set(vars(Held)) & {"default", "other", "missing"} == {"default"}
