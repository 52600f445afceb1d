"""Models whose own ``train()`` leaves layers in eval mode: batch norms that are frozen on purpose."""

import copy

import pytest
import torch
from tasks import Plain
from torch import nn

import hatify
from hatify.errors import CaptureError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.other, self.out = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.norm.eval(), self.block.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.other(self.drop(self.block(torch.relu(self.norm(self.first(x)))))))


def converted() -> tuple[Frozen, hatify.HATModel]:
    model = Frozen()
    return model, hatify.convert(model, 2, example_inputs=X)


def step(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return model.train()(X)


def test_train_mode_is_the_original_s() -> None:
    model, hat = converted()
    assert torch.equal(step(model), step(hat))
    assert (hat.norm.training, hat.block[1].training, hat.other.training) == (False, False, True)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, hat.get_buffer(name)), name


def test_without_its_own_train_another_function_is_learned() -> None:
    """The control."""
    model, hat = converted()
    nn.Module.train(hat)
    torch.manual_seed(1)
    assert not torch.equal(step(model), hat(X))


def test_statistics_of_a_frozen_norm_stay_in_every_task() -> None:
    _, hat = converted()
    frozen = {n: b.clone() for n, b in hat.named_buffers() if n.startswith(("norm.", "block.1."))}
    moved = {n: b.clone() for n, b in hat.named_buffers() if n.startswith("other.tasks.0.running")}
    assert frozen and moved
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    with hat.train().learning(task=0, optimizer=optimizer, steps_per_epoch=3) as run:
        for _ in range(3):
            optimizer.zero_grad()
            (hat(X).square().mean() + run.regularization()).backward()
            optimizer.step()
    assert all(torch.equal(b, frozen[n]) for n, b in hat.named_buffers() if n in frozen)
    assert not any(torch.equal(b, moved[n]) for n, b in hat.named_buffers() if n in moved)


def test_a_copy_and_a_stored_model_keep_it(tmp_path) -> None:
    model, hat = converted()
    hat.train().save_pretrained(tmp_path / "hat")
    for other in (copy.deepcopy(hat), hatify.load(tmp_path / "hat"), hatify.load(tmp_path / "hat").eval().train()):
        assert not other.norm.training and other.other.training
        assert torch.equal(step(other), step(model))


class Freezes(nn.Module):
    """A backbone whose ``train()`` freezes its stem, and a counter that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.calls = torch.zeros(1)

    def train(self, mode: bool = True) -> "Freezes":
        super().train(mode)
        self.stem.requires_grad_(not mode)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.out(torch.relu(self.stem(x)))


def test_the_model_s_own_flags_and_state_are_left_alone() -> None:
    model = Freezes()
    flags = [p.requires_grad for p in model.parameters()]
    hat = hatify.convert(model, 2, example_inputs=X)
    assert [p.requires_grad for p in model.parameters()] == flags and model.calls == 0
    assert any("freezes" in note and "stem.weight" in note for note in hat.report.notes)
    model.train()  # the control
    assert [p.requires_grad for p in model.parameters()] != flags


class Merges(Plain):
    """As adapters do."""

    merged = False

    def train(self, mode: bool = True) -> "Merges":
        super().train(mode)
        if self.merged == mode:
            self.first.weight.data.add_(-1.0 if mode else 1.0)
            self.merged = not mode
        return self


class Caches(Plain):
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
