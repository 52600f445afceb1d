"""Functions and containers that a model holds: what they close over is the copy's, never the original's."""

import copy
import functools
import threading
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable

import pytest
import torch
from tasks import Plain
from torch import nn

import hatify
from hatify.capture.tree import copy_tree
from hatify.errors import CaptureError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


Pair = namedtuple("Pair", "a b")


class Net(nn.Module):
    """Calls ``middle`` through whatever ``held`` makes of the model."""

    def __init__(self, held: Callable[["Net"], Callable]) -> None:
        super().__init__()
        self.first, self.middle, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm = nn.BatchNorm1d(16)
        self.run = held(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.run(torch.relu(self.first(x)))))


class Holder:
    """A plain object."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


def a_loop(net: Net) -> Callable:
    layers = [net.middle, nn.ReLU()]

    def run(h: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            h = layer(h)
        return h

    return run


def nested(net: Net) -> Callable:
    def inner(h: torch.Tensor) -> torch.Tensor:
        return net.norm(net.middle(h))

    return lambda h: inner(h)


def recursive(net: Net) -> Callable:
    def run(h: torch.Tensor, times: int = 2) -> torch.Tensor:
        return net.middle(h) if times == 0 else run(torch.relu(net.middle(h)), times - 1)

    return run


def an_object(net: Net) -> Callable:
    holder = Holder(net.middle)
    return lambda h: holder(h)


def in_a_dict(net: Net) -> Callable:
    net.layers = {"run": lambda h: net.middle(h)}
    return lambda h: net.layers["run"](h)


HELD: dict[str, Callable[[Net], Callable]] = {
    "closure": lambda net: lambda h: net.middle(h),
    "default": lambda net: lambda h, layer=net.middle: layer(h),
    "keyword default": lambda net: lambda h, *, layer=net.middle: layer(h),
    "partial": lambda net: functools.partial(lambda layer, h: layer(h), net.middle),
    "method": lambda net: net.middle.forward,
    "dict": in_a_dict,
    "loop over a list": a_loop,
    "nested, with a norm": nested,
    "recursive": recursive,
    "object": lambda net: Holder(net.middle),
    "object in a closure": an_object,
}


@pytest.mark.parametrize("held", HELD)
def test_what_a_function_closes_over_is_converted(held: str) -> None:
    model = Net(HELD[held])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hat = hatify.convert(model, 2, example_inputs=X).eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    out = hat(X)
    with torch.no_grad():
        model.middle.weight.add_(1.0)
    assert torch.equal(hat(X), out)
    with torch.no_grad():
        hat.get_parameter("middle.weight").add_(1.0)
    assert not torch.equal(hat(X), out)
    hat.train()(X).sum().backward()
    assert hat.get_parameter("middle.weight").grad.abs().sum() > 0


def test_a_plain_deepcopy_would_run_the_original() -> None:
    """The control."""
    model = Net(HELD["closure"])
    copied = copy.deepcopy(model).eval()
    out = copied(X)
    with torch.no_grad():
        model.middle.weight.add_(1.0)
    assert not torch.equal(copied(X), out)


def test_functions_that_share_a_list_go_on_sharing_it() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)
            seen: list[int] = []
            self.count, self.seen = lambda: seen.append(1), lambda: len(seen)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count()
            return self.out(x) * self.seen()

    model = Counts()
    copied = copy_tree(model)
    copied(X), copied(X)
    assert (copied.seen(), model.seen()) == (2, 0)


@pytest.mark.parametrize("view", [False, True])
def test_a_parameter_in_a_closure_is_refused_with_the_line(view: bool) -> None:
    def held(net: Net) -> Callable:
        weight = net.middle.weight[:] if view else net.middle.weight
        return lambda h: h @ weight.t()

    with pytest.raises(CaptureError, match=r"the parameter middle\.weight") as refused:
        hatify.convert(Net(held), 2, example_inputs=X)
    assert "test_closures.py" in str(refused.value)


class ClosesOver(nn.Module):
    """An autograd function, written in forward, that reads a weight of the model."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.out, self.weight, self.what = nn.Linear(16, 3), nn.Parameter(torch.randn(6, 16)), what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.what == "tensor" else None

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x @ (self.weight if weight is None else weight)

            @staticmethod
            def backward(ctx, grad):
                return grad @ (self.weight if weight is None else weight).t()

        return self.out(Product.apply(x))


@pytest.mark.parametrize("what", ["module", "tensor"])
def test_an_autograd_function_that_closes_over_weights_is_refused(what: str) -> None:
    with pytest.raises(CaptureError, match="closed over by forward or backward") as refused:
        hatify.convert(ClosesOver(what), 2, example_inputs=X)
    assert "test_closures.py" in str(refused.value)


class Applies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


@pytest.mark.parametrize("function", [torch.round, lambda x: x.round(), functools.partial(torch.round, decimals=1)])
def test_an_autograd_function_that_is_given_a_function_is_refused(function: Callable) -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(Applies.apply(function, x))

    with pytest.raises(CaptureError, match="is an argument of a function of your own"):
        hatify.convert(Rounds(), 2, example_inputs=X)


@pytest.mark.parametrize("kept", [dict, list])
def test_activations_that_are_kept_in_containers(kept: type) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
            self.kept = kept()
            self.first.register_forward_hook(lambda module, args, out: self.keep(out))

        def keep(self, out: torch.Tensor) -> None:
            if isinstance(self.kept, dict):
                self.kept["first"] = out
            else:
                self.kept[:] = [out]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.first(x)))

    model = Keeps()
    model(X).sum().backward()
    held = list(model.kept.values() if kept is dict else model.kept)
    hat = hatify.convert(model, 2, example_inputs=X)
    assert torch.equal(hat.eval()(X), model.eval()(X))
    now = list(model.kept.values() if kept is dict else model.kept)
    assert all(type(tensor) is torch.Tensor for tensor in (*held, *now))


def test_a_forward_that_was_replaced_on_a_layer() -> None:
    """It is no ordinary layer any more: traced through, and locked by what it does."""

    class Replaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            layer = self.middle
            layer.forward = lambda h: nn.functional.linear(h, layer.weight.flip(0), layer.bias) + h

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.middle(torch.relu(self.first(x)))))

    hat = hatify.convert(Replaced(), 2, example_inputs=X)
    proof = hatify.verify(hat)
    assert (proof.parity, proof.drift) == (0.0, 0.0) and proof.control > 0


def test_a_weight_that_was_made_a_buffer() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    weight = model[2].weight.detach().clone()
    del model[2].weight
    model[2].register_buffer("weight", weight)
    proof = hatify.verify(hatify.convert(model, 2, example_inputs=X))
    assert (proof.parity, proof.drift) == (0.0, 0.0)


@pytest.mark.parametrize("function", [nn.functional.relu, nn.functional.max_pool2d])
def test_a_library_s_function_stays_itself(function: Callable) -> None:
    model = nn.Linear(6, 3)
    model.activation = function
    assert copy_tree(model).activation is function


class Trainer:
    def __init__(self, net: nn.Module) -> None:
        self.net, self.lock, self.seen = net, threading.Lock(), []
        net.first.register_forward_hook(lambda module, args, out: self.look(out))

    def look(self, out: torch.Tensor) -> None:
        with self.lock:
            self.seen.append(out.shape)


def test_a_trainer_that_holds_what_cannot_be_copied() -> None:
    net = Plain()
    trainer = Trainer(net)
    assert hatify.verify(hatify.convert(net, 2, example_inputs=X)).ok
    assert trainer.seen == [] and trainer.net is net


@pytest.mark.parametrize("holding", [lambda m: OrderedDict(a=m), lambda m: deque([m]), lambda m: Pair(m, 1)])
def test_other_containers_in_closures(holding) -> None:
    class Holds(Plain):
        def __init__(self) -> None:
            super().__init__()
            held = holding(self.first)
            self.run = lambda x: (held["a"] if isinstance(held, dict) else held[0])(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.run(x)))

    proof = hatify.verify(hatify.convert(Holds(), 2, example_inputs=X), tightness=True)
    assert proof.ok and proof.tightness


norm = nn.LayerNorm(6)


def test_autograd_functions_with_tables_and_methods_of_a_global_s_name() -> None:
    table = torch.linspace(0, 1, 5)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x / x.norm() * table[2]

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Uses(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(Scaled.apply(self.first(x)))

    assert hatify.verify(hatify.convert(Uses(), 2, example_inputs=X)).ok
