"""Transforms of ``torch.func`` over a task: gradients of every sample, also beside finished tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import hatify
from hatify import HATConfig, HATModel
from hatify.learning.guard import Guard

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hat() -> HATModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    return hatify.convert(model, 3, example_inputs=X, config=HATConfig(num_tasks=3, mask_init="normal"), verify=False)


def of_each_sample(hat: HATModel, how: dict) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """By one transform, and one after another."""
    parameters = {n: p.detach() for n, p in hat.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(hat, values, (sample[None],), how).square().sum()

    each = [torch.autograd.grad(loss(dict(hat.named_parameters()), s), list(hat.parameters()), materialize_grads=True) for s in X]
    return vmap(grad(loss), in_dims=(None, 0))(parameters, X), [dict(zip(parameters, found)) for found in each]


@pytest.mark.parametrize("how", [{}, {"task": 1, "mask_scale": 3.0}, {"task": 1}, {"task": 0}], ids=str)
@pytest.mark.parametrize("finished", [False, True])
def test_gradients_of_every_sample(hat: HATModel, how: dict, finished: bool) -> None:
    if finished:
        with hat.learning(0, schedule="constant"):
            pass
    at_once, each = of_each_sample(hat.eval(), how)
    assert any(bool(g.any()) for g in each[0].values())
    for number, expected in enumerate(each):
        assert all(torch.allclose(at_once[n][number], g, 1e-4, 1e-5) for n, g in expected.items())


@pytest.mark.parametrize("task", [0, 1])
def test_a_transform_beside_a_finished_task(hat: HATModel, task: int) -> None:
    """Nothing is written where nothing has changed: a transform forbids it."""
    with hat.learning(0, schedule="constant"):
        pass

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(hat, values, (X,), {"task": task}).square().sum()

    values = {n: p.detach() for n, p in hat.named_parameters()}
    found = grad(loss)(values)
    expected = torch.autograd.grad(hat(X, task=task).square().sum(), list(hat.parameters()), materialize_grads=True)
    assert all(torch.allclose(found[n], e, 1e-4, 1e-5) for n, e in zip(values, expected))


def test_writes_that_change_nothing_would_be_refused(hat: HATModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Guard, "_watched", False)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        test_a_transform_beside_a_finished_task(hat, 0)
