"""A finished task's evaluation reads the protected values: nothing that becomes of the tensors themselves can reach it."""

from __future__ import annotations

import pytest
import torch
from tasks import outputs, same
from torch import Tensor, nn
from training import inputs, network

import hatify
from hatify import HATModel
from hatify.learning import guard, reading
from hatify.learning.reading import Reading

NAMES = ("resnet", "vit", "densenet", "conv1d", "text_cnn", "weight_norm", "projected_lstm")


def finished(name: str) -> tuple[HATModel, tuple]:
    """A network of which task 0 is finished, with about half of the channels live, and inputs."""
    torch.manual_seed(0)
    hat = network(name)
    with torch.no_grad():
        for masker in hat.maskers.values():
            masker.embeddings[0].normal_()
    with hat.learning(0, schedule="constant"):
        pass
    return hat.eval(), inputs(name, 4)


def spoil(hat: HATModel, value: float, lock: bool) -> None:
    """A bare write, which no counter shows, to every shared weight where it is locked, or where it is not."""
    locks = hat.locks([0])
    for name, where in locks.items():
        data = hat.get_parameter(name).data
        data.masked_fill_(where if lock else ~where, value)


@pytest.mark.parametrize("name", NAMES)
def test_it_sees_nothing_of_bare_writes(name: str) -> None:
    hat, x = finished(name)
    before = outputs(hat, x, task=0)
    spoil(hat, 1e30, lock=False)
    assert same(outputs(hat, x, task=0), before)
    spoil(hat, 3.0, lock=True)
    assert same(outputs(hat, x, task=0), before)


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_what_the_tensors_give(name: str) -> None:
    """The pass with gradients reads the tensors."""
    hat, x = finished(name)
    with torch.enable_grad():
        expected = hat(*x, task=0)
    expected = [t.detach() for t in ([expected] if isinstance(expected, Tensor) else expected)]
    assert same(outputs(hat, x, task=0), expected)


def test_without_it_a_bare_write_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: neither are the values read, nor is anything put back."""
    hat, x = finished("resnet")
    before = outputs(hat, x, task=0)
    spoil(hat, 3.0, lock=True)
    monkeypatch.setattr(guard.Guard, "before_forward", lambda *_, **__: None)
    assert not same(outputs(hat, x, task=0), before)


def test_weights_are_read_and_what_a_normaliser_couples_is_looked_at() -> None:
    def rest(name: str) -> set[str]:
        hat, x = finished(name)
        outputs(hat, x, task=0)
        return {entry.name for entry in hat._guard._readings[0].rest}

    assert rest("resnet") == set()
    assert any("weight_v" in n or "original1" in n for n in rest("weight_norm"))
    assert any("weight_hh" in n for n in rest("projected_lstm"))


def test_the_tensors_are_back_after_an_error() -> None:
    hat, x = finished("resnet")
    outputs(hat, x, task=0)
    held = dict(hat.named_parameters())
    layer = next(m for m in hat.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[Tensor] = []

    def fail(module: nn.Module, args: tuple) -> None:
        seen.append(hat.conv1.weight)
        raise RuntimeError("in the middle")

    handle = layer.tasks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        outputs(hat, x, task=0)
    handle.remove()
    assert seen[0] is not held["conv1.weight"], "the values were in place"
    assert all(p is held[n] for n, p in hat.named_parameters())


def test_other_weights_of_functional_call_are_read() -> None:
    hat, x = finished("resnet")
    other = {"conv1.weight": torch.zeros_like(hat.conv1.weight)}
    with torch.no_grad():
        plain = hat(*x, task=0)
        assert not torch.equal(torch.func.functional_call(hat, other, x, {"task": 0}), plain)
        assert torch.equal(hat(*x, task=0), plain)


@pytest.mark.parametrize("mode", ["train", "gradients", "unlocked on purpose"])
def test_elsewhere_the_tensors_are_read(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hat, x = finished("resnet")
    entered: list[bool] = []
    monkeypatch.setattr(Reading, "__enter__", lambda self: entered.append(True))
    monkeypatch.setattr(Reading, "__exit__", lambda self, *_: None)
    outputs(hat, x, task=0)
    assert entered.pop()
    hat.train(mode == "train")
    if mode == "unlocked on purpose":
        hat.begin_task(1, schedule="constant", locked_task_ids=[])
        hat.eval()
    with torch.set_grad_enabled(mode == "gradients"):
        hat(*x, task=0)
    assert not entered


class Mixer(nn.Module):
    """Layers along tokens, whose values do not lie in order: their product is one of torch's that ask whether gradients are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.tokens(x.permute(0, 2, 1)))
        return x, self.head(x.permute(0, 2, 1).contiguous().permute(0, 2, 1))


def test_with_gradients_and_without_the_last_bit_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Mixer().eval(), torch.randn(3, 16, 2)
    hat = hatify.convert(model, tasks=2, example_inputs=x, verify=False)
    with torch.no_grad():
        for masker in hat.maskers.values():
            masker.embeddings[0].normal_()
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()

    def passes() -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            for _ in range(3):  # weights with masks in them are kept from the second call on
                without = hat(x, task=0)
        return list(without), [y.detach() for y in hat(x, task=0)]

    assert same(*passes())
    hat._guard.refresh()
    monkeypatch.setattr(reading, "as_learned", lambda value, tensor: value)
    assert not same(*passes())
