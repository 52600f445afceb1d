"""What models do around a computation: recomputation, checks of arguments, hooks on gradients."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tasks import Plain
from torch import nn
from torch.utils.checkpoint import checkpoint

import hatify
from hatify.capture import tree
from hatify.capture.aside import set_aside
from hatify.errors import CaptureError
from hatify.verification import VerificationError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, norm: bool = False) -> None:
        super().__init__()
        self.first, self.out, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 3), reentrant
        self.block = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.out(x + checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, norm: bool) -> None:
    proof = hatify.convert(Checkpointed(reentrant, norm), 2, example_inputs=X).verification
    assert (proof.parity, proof.parity_train, proof.gradients, proof.drift) == (0.0, 0.0, 0.0, 0.0)


def test_a_reentrant_checkpoint_that_is_traced_as_it_is_has_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(tree, "CheckpointFunction", None)
    with pytest.raises(VerificationError, match="gradients inf"):
        hatify.convert(Checkpointed(True), 2, example_inputs=X)


class Policy(nn.Module):
    """Distributions look at their arguments' values, to check them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mean, self.log_std = nn.Linear(8, 16), nn.Linear(16, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.distributions.Normal(self.mean(torch.tanh(self.first(x))), self.log_std.exp())
        return found.log_prob(action).sum(-1), found.entropy().sum(-1)


def test_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off for good
    hat = hatify.convert(Policy(), 2, example_inputs=(X, X[:, :3]))
    assert hat.verification.parity == hat.verification.parity_train == 0.0
    with pytest.raises(ValueError):  # outside of a conversion they go on checking
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))


class Hooked(nn.Module):
    """Reverses a gradient by a hook."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.first, self.out, self.asks = nn.Linear(8, 16), nn.Linear(16, 3), asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        if h.requires_grad if self.asks else torch.is_grad_enabled():
            h.register_hook(lambda gradient: -gradient)
        return self.out(h)


@pytest.mark.parametrize("asks", [False, True])
def test_a_hook_on_a_gradient_is_refused_with_its_line(asks: bool) -> None:
    with pytest.raises(CaptureError, match="registers a hook on a gradient") as refused:
        hatify.convert(Hooked(asks), 2, example_inputs=X, verify=False)
    assert "test_aside.py" in str(refused.value)
    value = torch.ones(1, requires_grad=True)
    value.register_hook(lambda gradient: gradient * 2)  # and the tensors of others are as before
    value.sum().backward()
    assert value.grad == 2 and "requires_grad" not in vars(torch.Tensor)


def test_hooks_that_are_left_behind_are_noted() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3))
    model[0].register_full_backward_pre_hook(lambda module, gradients: tuple(g * 2 for g in gradients))
    model[1].register_full_backward_hook(lambda module, given, gradients: given)
    model[2].weight.register_hook(lambda gradient: gradient * 2)
    hat = hatify.convert(model, 2, example_inputs=X)
    notes = [note for note in hat.report.notes if "hooks" in note]
    assert [note.partition("\n")[2] for note in notes] == ["1", "2.weight"]
    model.train()(X).sum().backward(), hat.train()(X).sum().backward()
    assert torch.equal(hat.get_parameter("0.weight").grad, model[0].weight.grad)  # a layer's own hooks go along


def held_by_torch() -> tuple:
    return (
        torch.SymBool.__bool__,
        torch.autograd.Function.__dict__["apply"],
        torch.is_grad_enabled,
        torch.Tensor.register_hook,
        torch.autograd.grad,
        torch.compiler.is_exporting,
        torch.distributions.Distribution._validate_args,
    )


def test_conversions_in_several_threads_leave_torch_as_it_was() -> None:
    before = held_by_torch()
    models = [nn.Sequential(nn.Linear(8, 8 + i), nn.ReLU(), nn.Linear(8 + i, 3)) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        hats = list(threads.map(lambda model: hatify.convert(model, 2, example_inputs=X), models))
    assert all(hat.verification.ok for hat in hats)
    assert held_by_torch() == before and "requires_grad" not in vars(torch.Tensor)


def test_two_traces_at_once_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what was set aside second is put back last."""
    places = (
        (torch.Tensor, "register_hook"),
        (torch.autograd, "grad"),
        (torch.distributions.Distribution, "_validate_args"),
        (torch.nn.modules.transformer, "_detect_is_causal_mask"),
    )
    for owner, name in places:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    before = held_by_torch()
    first, second = set_aside(), set_aside()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    with contextlib.suppress(AttributeError):
        second.__exit__(None, None, None)
    assert held_by_torch() != before


class Mapped(nn.Module):
    """``torch.vmap`` over layers, which an ordinary call may share."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first, self.out, self.shared = nn.Linear(8, 16), nn.Linear(8, 3), shared
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        mapped = torch.vmap(self.block)(h)
        return self.out(mapped + self.block(h) if self.shared else mapped)


@pytest.mark.parametrize("shared", [False, True])
def test_layers_under_vmap(shared: bool) -> None:
    model = Mapped(shared)
    hat = hatify.convert(model, 2, example_inputs=X)
    assert hat.verification.ok and hat.verification.control > 0
    larger = torch.randn(9, 8)
    assert torch.equal(hat.eval()(larger), model.eval()(larger))


class Differentiates(Mapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_(True)
        energy = self.first(x).tanh().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.layer(packed)[1][0][-1])


@pytest.mark.parametrize(
    ("make", "inputs", "what"),
    [
        (lambda: Differentiates(False), (X,), "forward differentiates"),
        (Packs, (torch.randn(4, 5, 8), torch.tensor([5, 3, 2, 4])), "packed sequences"),
    ],
)
def test_what_a_graph_has_no_place_for_is_refused_with_its_line(make, inputs: tuple, what: str) -> None:
    with pytest.raises(CaptureError, match=what) as refused:
        hatify.convert(make(), 2, example_inputs=inputs)
    assert "test_aside.py" in str(refused.value)


def test_threads_that_train_beside_a_conversion() -> None:
    errors: list[Exception] = []
    steps: list[int] = []
    done = threading.Event()

    def train() -> None:
        while not done.is_set():
            steps.append(len(steps))
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
    before = len(steps)
    hatify.convert(Plain(8), 2, example_inputs=X, verify=False)
    during = len(steps) - before
    done.set()
    thread.join()
    assert errors == [] and during > 0


def test_inputs_do_not_require_gradients() -> None:
    class Asks(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 3 if x.requires_grad else x)

    assert hatify.verify(hatify.convert(Asks(8), 2, example_inputs=X)).ok
