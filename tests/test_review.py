"""What a review found: trainers behind hooks, own train and eval that write, threads that train beside a conversion."""

import threading
from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch import nn

import hatify
from hatify.errors import CallError, CaptureError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "a b")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.first(x)))


class Trainer:
    def __init__(self, net: nn.Module) -> None:
        self.net, self.lock, self.seen = net, threading.Lock(), []
        net.first.register_forward_hook(lambda module, args, out: self.look(out))

    def look(self, out: torch.Tensor) -> None:
        with self.lock:
            self.seen.append(out.shape)


def test_a_trainer_that_holds_what_cannot_be_copied() -> None:
    net = Net()
    trainer = Trainer(net)
    assert hatify.verify(hatify.convert(net, 2, example_inputs=X)).ok
    assert trainer.seen == [] and trainer.net is net


@pytest.mark.parametrize("holding", [lambda m: OrderedDict(a=m), lambda m: deque([m]), lambda m: Pair(m, 1)])
def test_other_containers_in_closures(holding) -> None:
    class Holds(Net):
        def __init__(self) -> None:
            super().__init__()
            held = holding(self.first)
            self.run = lambda x: (held["a"] if isinstance(held, dict) else held[0])(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.run(x)))

    proof = hatify.verify(hatify.convert(Holds(), 2, example_inputs=X), tightness=True)
    assert proof.ok and proof.tightness


class Merges(Net):
    """As adapters do."""

    merged = False

    def train(self, mode: bool = True) -> "Merges":
        super().train(mode)
        if self.merged == mode:
            self.first.weight.data.add_(-1.0 if mode else 1.0)
            self.merged = not mode
        return self


class Caches(Net):
    kept = None

    def train(self, mode: bool = True) -> "Caches":
        super().train(mode)
        self.kept = None if mode else (self.first.weight * 2).detach()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.first.weight * 2 if self.kept is None else self.kept
        return self.out(torch.relu(nn.functional.linear(x, weight)))


@pytest.mark.parametrize("kind", [Merges, Caches])
def test_an_own_eval_that_writes_or_computes_weights(kind: type[nn.Module]) -> None:
    model = kind()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CaptureError, match=r"\.eval\(\) (writes|computes)"):
        hatify.convert(model, 2, example_inputs=X)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_threads_that_train_beside_a_conversion() -> None:
    errors: list[Exception] = []
    done = threading.Event()

    def train() -> None:
        while not done.is_set():
            x = X.clone().requires_grad_(True)
            y = x * 2
            try:
                y.register_hook(lambda gradient: gradient)
                torch.autograd.grad(y.sum(), x)
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=train)
    thread.start()
    hatify.convert(Net(), 2, example_inputs=X, verify=False)
    done.set()
    thread.join()
    assert errors == []


def test_inputs_do_not_require_gradients() -> None:
    class Asks(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 3 if x.requires_grad else x)

    assert hatify.verify(hatify.convert(Asks(), 2, example_inputs=X)).ok


norm = nn.LayerNorm(8)


def test_autograd_functions_with_tables_and_methods_of_a_global_s_name() -> None:
    table = torch.linspace(0, 1, 5)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x / x.norm() * table[2]

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Uses(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(Scaled.apply(self.first(x)))

    assert hatify.verify(hatify.convert(Uses(), 2, example_inputs=X)).ok


def test_only_sizes_of_one_that_were_tried_are_taken() -> None:
    class Flips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x.flip(3).flip(2) if x.shape[2] * x.shape[3] > 2 else x)

    model = Flips().eval()
    hat = hatify.convert(model, 2, example_inputs=torch.randn(2, 3, 9, 11)).eval()
    for sizes in ((1, 1), (3, 3), (1, 3)):
        x = torch.randn(2, 3, *sizes)
        assert torch.equal(hat(x), model(x))
    with pytest.raises(CallError):
        hat(torch.randn(2, 3, 1, 2))
