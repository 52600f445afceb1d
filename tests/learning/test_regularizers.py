"""Regularization (equation 5 and the original term) and compensation (equation 3) against formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from training import SMALLEST, inputs, learn, network, step

import hatify
from hatify import HATConfig, HATModel
from hatify.errors import TaskError
from hatify.modules import Masker
from hatify.modules.masker import LEAST, soft_mask

NAME, SCALE = SMALLEST[0], 3.0


def used_by_others(masker: Masker, task: int, finished: set[int]) -> Tensor:
    """a^{<t}: the largest of the others' binary masks."""
    used = torch.zeros(masker.channels)
    for other in finished - {task}:
        used = torch.maximum(used, (masker.embeddings[other] > 0).float())
    return used


def equation_5(hat: HATModel, task: int, quota=None, weights=None) -> Tensor:
    total = torch.zeros(())
    for name, masker in hat.maskers.items():
        a = torch.sigmoid(SCALE * masker.embeddings[task])
        free = 1 - used_by_others(masker, task, hat.finished_tasks)
        allowed = 1 / hat.config.num_tasks if quota is None else quota[name] if isinstance(quota, dict) else quota
        share = (a * free).sum() / free.sum() if free.sum() > 0 else torch.zeros(())
        total = total + (weights or {}).get(name, 1.0) * torch.clamp(share - allowed, min=0)
    return total


def original(hat: HATModel, task: int, quota: float = 0.0, weights=None) -> Tensor:
    taken, free_channels = torch.zeros(()), torch.zeros(())
    for name, masker in hat.maskers.items():
        free = (1 - used_by_others(masker, task, hat.finished_tasks)) * (weights or {}).get(name, 1.0)
        taken = taken + (torch.sigmoid(SCALE * masker.embeddings[task]) * free).sum()
        free_channels = free_channels + free.sum()
    return torch.clamp(taken / free_channels - quota, min=0)


@pytest.fixture(scope="module")
def hat() -> HATModel:
    hat = network(NAME)
    optimizer = SGD(hat.parameters(), lr=0.1)
    for task in (0, 2):
        learn(hat, NAME, task, optimizer)
    return hat


@pytest.mark.parametrize("task", [0, 1, 3])
def test_per_layer(hat: HATModel, task: int) -> None:
    names = list(hat.maskers)
    quotas = {names[0]: 0.05, **{n: 0.3 for n in names[1:]}}
    for quota in (None, 0.0, 0.4, 1.0, quotas):
        for weights in (None, {names[0]: 2.5, names[1]: 0.0}):
            found = hatify.regularization(hat, task, SCALE, quota=quota, weights=weights)
            torch.testing.assert_close(found, equation_5(hat, task, quota, weights))
    assert found.dtype is torch.float32 and found.shape == ()
    assert hatify.regularization(hat, 1, SCALE) > 0 and hatify.regularization(hat, 1, SCALE, quota=1.0) == 0


@pytest.mark.parametrize("task", [0, 1])
def test_network_wide(hat: HATModel, task: int) -> None:
    names = list(hat.maskers)
    for quota in (0.0, 0.2):
        for weights in (None, {names[0]: 2.5, names[1]: 0.0}):
            found = hatify.regularization(hat, task, SCALE, kind="network", quota=quota, weights=weights)
            torch.testing.assert_close(found, original(hat, task, quota, weights))


def test_quota_of_named_maskers_only(hat: HATModel) -> None:
    """The others keep 1 / T."""
    first = next(iter(hat.maskers))
    quotas = {n: 1 / hat.config.num_tasks for n in hat.maskers}
    found = hatify.regularization(hat, 1, SCALE, quota={first: 0.9})
    torch.testing.assert_close(found, equation_5(hat, 1, {**quotas, first: 0.9}))


def test_a_masker_without_free_channels_costs_nothing() -> None:
    hat = network(NAME)
    with torch.no_grad():
        for masker in hat.maskers.values():
            masker.embeddings[0].fill_(1.0)
    learn(hat, NAME, 0, SGD(hat.parameters(), lr=0.0))
    for kind in ("layer", "network"):
        term = hatify.regularization(hat, 1, SCALE, kind=kind)
        assert term == 0 and term.isfinite()
        term.backward()


def test_a_session_multiplies_by_its_weight() -> None:
    hat = network(NAME)
    optimizer = SGD(hat.parameters(), lr=0.1)
    options = {"kind": "network", "quota": 0.1, "weights": {next(iter(hat.maskers)): 3.0}}
    with hat.learning(1, optimizer, steps_per_epoch=3, weight=0.7, **options) as run:
        step(hat, run, optimizer, inputs(NAME, 4))
        expected = 0.7 * hatify.regularization(hat, 1, run.scale, **options)
        torch.testing.assert_close(run.regularization(), expected)
    with pytest.raises(TaskError):
        run.regularization()


def compensated(embedding: Tensor, scale: float, config: HATConfig) -> Tensor:
    """Equation 3 in float64, of the gradient that autograd gives to the sum."""
    e = embedding.detach().double().requires_grad_()
    (q,) = torch.autograd.grad(torch.sigmoid(scale * e).sum(), e)
    e = e.detach()
    wide = torch.cosh((scale * e).clamp(-config.max_exponent, config.max_exponent)) + 1
    narrow = torch.cosh(e.clamp(-config.max_embedding, config.max_embedding)) + 1
    return (config.max_mask_scale * wide / (scale * narrow) * q).float()


@pytest.mark.parametrize("clamps", [(6.0, 50.0), (1.5, 4.0), (0.5, 80.0)])
@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0, 20.0])
def test_compensation_is_equation_3(scale: float, clamps: tuple[float, float]) -> None:
    """Both clamps included; below the point where float32 has no numbers between the mask and 1, and above that where masks are zero."""
    config = HATConfig(max_mask_scale=100.0, max_embedding=clamps[0], max_exponent=clamps[1])
    embedding = torch.linspace(-8, 8, 33)
    embedding = embedding[scale * embedding < 10].requires_grad_()
    mask = soft_mask(embedding, scale, config)
    mask.sum().backward()
    expected = compensated(embedding, scale, config)
    zero = torch.sigmoid(scale * embedding.detach().double()) < LEAST
    torch.testing.assert_close(embedding.grad[~zero], expected[~zero], rtol=1e-3, atol=0.0)
    assert not mask[zero].any() and not embedding.grad[zero].any()


def test_without_compensation_it_is_autograd() -> None:
    embedding = torch.linspace(-3, 3, 13, requires_grad=True)
    (found,) = torch.autograd.grad(soft_mask(embedding, 4.0, HATConfig(gradient_compensation=False)).sum(), embedding)
    (expected,) = torch.autograd.grad(torch.sigmoid(4.0 * embedding).sum(), embedding)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.01, 100.0, 400.0, 1e6])
def test_no_overflow_in_half_precision(dtype: torch.dtype, scale: float) -> None:
    """cosh(12) is infinite in float16, cosh(90) in float32."""
    embedding = torch.linspace(-6, 6, 25, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mask = soft_mask(embedding, scale, HATConfig())
    mask.sum().backward()
    assert mask.dtype is torch.float32 and bool(mask.isfinite().all()) and bool(embedding.grad.isfinite().all())


def test_embeddings_are_clamped_after_every_step() -> None:
    hat = network(NAME)
    optimizer = SGD(hat.parameters(), lr=1e3)
    with hat.learning(1, optimizer, schedule="constant", max_scale=2.0) as run:
        optimizer.zero_grad()
        (1e3 * run.regularization()).backward()
        optimizer.step()
        largest = max(float(m.embeddings[1].detach().abs().max()) for m in hat.maskers.values())
        assert largest == hat.config.max_embedding


def test_what_a_session_remembers_is_never_stale() -> None:
    hat = network("text_cnn")
    optimizer = SGD(hat.parameters(), lr=0.05)
    learn(hat, "text_cnn", 0, optimizer)
    saved = {k: v.clone() for k, v in hat.state_dict().items()}
    with hat.learning(1, optimizer, schedule="constant", max_scale=3.0) as run:

        def fresh() -> bool:
            return torch.equal(run.regularization(), hatify.regularization(hat, 1, 3.0))

        assert fresh()
        step(hat, run, optimizer, inputs("text_cnn", 4))
        assert fresh()
        first = run.regularization()
        hat.load_state_dict(saved)
        assert fresh() and not torch.equal(run.regularization(), first)
        hat.load_state_dict({k: v.clone() for k, v in saved.items()}, assign=True)
        assert fresh()
        masker = next(iter(hat.maskers.values()))
        changed = {k: v.clone() for k, v in saved.items()}
        (name,) = [n for n, p in hat.named_parameters() if p is masker.embeddings[0]]
        changed[name] = -changed[name]
        before = run.regularization()
        hat.load_state_dict(changed, overwrite=True)  # another task's masks: other channels are free
        assert fresh() and not torch.equal(run.regularization(), before)
        hat.double()
        assert fresh()
        hat.float()
