"""Blocks that are alike are traced once: the graph is the one that tracing each of them gives, and what differs in anything is traced."""

from __future__ import annotations

import pytest
import torch
from graph_text import text
from torch import Tensor, nn

import hatify
from hatify.capture import capture, repeats, tree
from hatify.capture.watched import reads, watching


@pytest.fixture
def copied(monkeypatch):
    """The paths of the blocks that are copied, in the order of eval and train mode."""
    seen: list[str] = []
    repeat = repeats._Block._repeat
    monkeypatch.setattr(repeats._Block, "_repeat", lambda block, *rest: seen.append(block.path) or repeat(block, *rest))
    return seen


def traced_alone(model: nn.Module, *args: Tensor) -> list[list[str]]:
    """Both graphs of a model, every block traced by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "mark_blocks", lambda *rest: None)
        return [text(graph) for graph in capture(model, args, {})[:2]]


def traced(model: nn.Module, *args: Tensor) -> list[list[str]]:
    return [text(graph) for graph in capture(model, args, {})[:2]]


class Attention(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), drop
        self.register_buffer("bias", torch.arange(9.0).reshape(3, 3))

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) + self.bias[: x.shape[1], : x.shape[1]]
        scores = scores if mask is None else scores + mask
        weights = nn.functional.dropout(scores.softmax(-1), self.drop, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class Layer(nn.Module):
    """A transformer layer with a scale of its own, an in-place activation and a drop rate."""

    def __init__(self, drop: float = 0.1, width: int = 16) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention(0.1)
        self.inside = nn.Sequential(nn.Linear(8, width), nn.ReLU(inplace=True), nn.Dropout(drop), nn.Linear(width, 8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, mask=None):
        attended, weights = self.attention(self.norm(x), mask=mask)
        x = x + attended
        return x + self.scale * self.inside(x), weights


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.layers, self.head = nn.Linear(5, 8), nn.ModuleList(layers), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x):
        x, weights = self.embed(x), []
        for layer in self.layers:
            x, weight = layer(x)
            weights.append(weight)
        return self.head(x.mean(1)), weights[-1]

    def embed(self, x):
        """Asks for gradients by itself, as what a layer gives does."""
        return self.first(x) + self.position


X = torch.randn(2, 3, 5)


def found_by_the_proof(model: nn.Module) -> None:
    """Copies give something else, which the proof finds: then each block is traced."""
    unproved = hatify.convert(model, tasks=2, example_inputs=X, verify=False)
    assert not torch.equal(unproved.eval()(X)[0], model.eval()(X)[0])
    hat = hatify.convert(model, tasks=2, example_inputs=X)
    assert hat.verification.ok and any("past what they are given" in note for note in hat.report.notes)
    assert torch.equal(hat.eval()(X)[0], model.eval()(X)[0])


def test_layers_of_a_transformer_are_traced_once_and_the_graphs_are_the_same(copied):
    model = Stack(*(Layer() for _ in range(4)))
    assert traced(model, X) == traced_alone(model, X)
    assert copied == 2 * ["layers.1", "layers.2", "layers.3"]
    assert hatify.convert(model, tasks=2, example_inputs=X).verification.ok


def test_drop_rates_of_layers_do_not_make_blocks_unlike_but_none_at_all_does(copied):
    model = Stack(Layer(0.1), Layer(0.2), Layer(0.0))
    assert traced(model, X) == traced_alone(model, X)
    assert [path for path in copied if path == "layers.1" or path == "layers.2"] == 2 * ["layers.1"]


def test_a_block_inside_an_unlike_block_is_copied(copied):
    model = Stack(Layer(width=16), Layer(width=12))
    assert traced(model, X) == traced_alone(model, X)
    assert copied == 2 * ["layers.1.attention"]


def test_a_block_that_is_called_again_is_traced_twice_at_most(copied):
    class Recurring(Stack):
        def forward(self, x):
            x = self.embed(x)
            for _ in range(4):
                x, _ = self.layers[0](x)
            return self.head(x.mean(1))

    model = Recurring(Layer())
    assert traced(model, X) == traced_alone(model, X)
    assert copied == 2 * ["layers.0", "layers.0"]


def test_paths_that_are_no_identifiers_name_nodes_all_the_same():
    blocks = {f"block-{number}": nn.Sequential(Stage(), Stage()) for number in range(4)}
    model = nn.Sequential()
    for path, block in blocks.items():
        model.add_module(path, Residual(block))
    x = torch.randn(2, 4, 9, 9)
    assert traced(model, x) == traced_alone(model, x)


class Residual(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return x + self.inside(x)


class Regions(nn.Module):
    """Part of it without gradients, part in another type, part cast into a value that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            fixed = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = self.b(x)
        room = torch.zeros_like(x)
        room.copy_(rough)
        return self.c(fixed + room) + x.mean(), x


def test_regions_inside_a_block_are_copied_with_it(copied):
    model = Stack(Regions(), Regions(), Regions())
    assert traced(model, X) == traced_alone(model, X)
    assert copied[:4] == 2 * ["layers.1", "layers.2"]  # then in other types, since a value is cast
    assert hatify.convert(model, tasks=2, example_inputs=X).verification.ok


class Pairing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


class Paired(Stack):
    """The first pair is one value twice, the second is two that look the same."""

    def forward(self, x):
        x = self.embed(x)
        y = self.layers[0](x, x)
        z = self.layers[1](x, y)
        return self.head(self.layers[2](y, z).mean(1))


def test_one_value_given_twice_is_not_two(copied):
    model = Paired(Pairing(), Pairing(), Pairing())
    assert traced(model, X) == traced_alone(model, X)
    assert copied == 2 * ["layers.2"]


class Stage(nn.Sequential):
    def __init__(self, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, stride, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


def test_sizes_that_are_open_stay_open(copied):
    model = nn.Sequential(*(Stage() for _ in range(3)), Stage(2), Stage(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(2, 4, 19, 19)
    assert traced(model, x) == traced_alone(model, x)
    assert copied == 2 * ["2"]  # what the first is given asks for no gradient; the fourth halves sizes, the fifth halves them again
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    other = torch.randn(3, 4, 26, 31)
    assert torch.equal(hat.eval()(other), model.eval()(other))


class Picking(nn.Module):
    """Which channels it takes is fixed by its buffer's values."""

    def __init__(self, *keep: bool) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 4), nn.Linear(2, 8)
        self.register_buffer("keep", torch.tensor(keep))

    def forward(self, x):
        return self.out(self.into(x)[..., self.keep]), x


def picking() -> nn.Module:
    return Stack(Picking(True, True, False, False), Picking(False, True, True, False))


def test_blocks_whose_buffers_have_other_values_are_unlike(copied):
    model = picking()
    assert traced(model, X) == traced_alone(model, X) and copied == []
    assert hatify.convert(model, tasks=2, example_inputs=X).verification.ok


def test_without_a_look_at_values_another_blocks_channels_would_be_taken(copied, monkeypatch):
    monkeypatch.setattr(repeats, "_values", lambda module: "")
    model = picking()
    assert traced(model, X) != traced_alone(model, X) and copied == 2 * ["layers.1"]
    found_by_the_proof(model)


class Body(nn.Module):
    """A block that is subclassed below: each subclass does something that a copy cannot stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x)), x


class Keeping(Body):
    def forward(self, x):
        self.last = self.a(x)
        return self.b(self.last), x


class Counting(Body):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x):
        self.calls.append(1)
        return super().forward(x)


class Writing(Body):
    """Into what it is given."""

    def forward(self, x):
        x.add_(1.0)
        return super().forward(x)


class Remembering(Body):
    """In a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x):
        self.total.add_(x.mean((0, 1)).detach())
        return super().forward(x)


class Assigning(Remembering):
    """In a buffer, by putting another in its place."""

    def forward(self, x):
        self.total = self.total + x.mean((0, 1)).detach()
        return Body.forward(self, x)


class Closing(Body):
    def __init__(self) -> None:
        super().__init__()
        factor = torch.rand(())
        self.how = lambda x: x * float(factor)

    def forward(self, x):
        return super().forward(self.how(x))


class Hooked(Body):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(self.a)
        self.a.register_forward_hook(lambda module, given, result: result + 1.0)


def _tied() -> nn.Module:
    model = Stack(Body(), Body(), Body())
    model.layers[1].a.weight = model.layers[2].a.weight
    return model


class Given(nn.Module):
    """Something else than tensors decides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, times):
        return self.b(self.a(x)) * times


class Giving(Stack):
    def forward(self, x):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            x = layer(x, number + 1)
        return self.head(x.mean(1))


ALONE = {
    "keeps a tensor": lambda: Stack(Keeping(), Keeping(), Keeping()),
    "counts its calls": lambda: Stack(Counting(), Counting(), Counting()),
    "writes into its input": lambda: Stack(Writing(), Writing(), Writing()),
    "writes a buffer": lambda: Stack(Remembering(), Remembering(), Remembering()),
    "puts another buffer in its place": lambda: Stack(Assigning(), Assigning(), Assigning()),
    "calls a function that may remember": lambda: Stack(Closing(), Closing(), Closing()),
    "has hooks inside": lambda: Stack(Hooked(), Hooked(), Hooked()),
    "shares a weight": _tied,
    "is given other numbers": lambda: Giving(Given(), Given(), Given()),
}


@pytest.mark.parametrize("kind", ALONE)
def test_what_a_copy_cannot_stand_for_is_traced(kind, copied):
    model = ALONE[kind]()
    assert traced(model, X) == traced_alone(model, X)
    assert copied == []


def test_the_plain_block_of_these_is_copied(copied):
    traced(Stack(Body(), Body(), Body()), X)
    assert copied == 2 * ["layers.1", "layers.2"]


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


def numbered(kind: type, around: bool = False) -> nn.Module:
    return Stack(*(Around(kind(i)) if around else kind(i) for i in range(6)))


TOLD_APART = {
    "by what nobody reads": (lambda: numbered(Numbered), [1, 2, 3, 4, 5]),
    "by what is read": (lambda: numbered(Asking), [2, 3, 4, 5]),
    "by what is read past the attributes": (lambda: numbered(Looking), None),
    "by what those who call it read": (lambda: Choosing(*(Told(i) for i in range(6))), [2, 3, 4, 5]),
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

    first, second = nn.ModuleList((Held(), Held()))
    first.default, second.other = 2, 3
    watched = {Held: frozenset({"default", "other", "missing"})}
    with watching(nn.ModuleList((first, second)), watched):
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


AROUND: dict[str, Tensor] = {}


class Reading(Body):
    """What it reads is neither its own nor given to it."""

    def forward(self, x):
        return self.b(self.a(x)) * AROUND["factor"], x


class Surrounding(Stack):
    def forward(self, x):
        AROUND["factor"] = x.mean()
        return super().forward(x)


def test_a_block_that_reads_from_elsewhere_has_every_block_traced(copied):
    model = Surrounding(Reading(), Reading(), Reading())
    assert traced(model, X) == traced_alone(model, X)
    assert copied  # it was tried
    assert hatify.convert(model, tasks=2, example_inputs=X).verification.ok


class Through(Body):
    """Writes through a view of a value of its own."""

    def forward(self, x):
        y = self.a(x) * 1.0
        part = y[..., :4]
        part.add_(1.0)
        return self.b(y) + part.sum(), x


def test_writes_through_views_are_made_functional_as_without_copies():
    model = Stack(Through(), Through(), Through())
    assert traced(model, X) == traced_alone(model, X)
    assert hatify.convert(model, tasks=2, example_inputs=X).verification.ok


def test_tracing_leaves_nothing_behind():
    model = Stack(*(Layer() for _ in range(3)))
    before = [set(vars(module)) for module in model.modules()]
    hatify.convert(model, tasks=2, example_inputs=X, verify=False)
    assert [set(vars(module)) for module in model.modules()] == before
    assert not repeats._TRACED and not repeats._REPEATS
