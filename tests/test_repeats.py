"""Blocks that are alike are traced once: the graph is the one that tracing each of them gives, and what differs in anything is traced."""

from __future__ import annotations

import pytest
import torch
from repeating import Body, Stack, X, found_by_the_proof, traced, traced_alone
from torch import Tensor, nn

import hatify
from hatify.capture import repeats


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
