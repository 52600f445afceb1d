"""The life of eleven architectures: extract each task, forget each, learn another in its place, prune, forget the only one, grow; the
others stay to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from extracting import extracts
from learned import FAMILIES, allowed, answers, changed, converted, learn, learned, state
from tasks import draw_masks, outputs, same
from torch import nn

import hatify
from hatify import HATModel

FOLDS = {"resnet", "densenet", "efficientnet", "resnext", "mobilenet", "unet", "conv1d"}
"""Where every mask folds: the state dict is the architecture's own. Elsewhere a norm over live channels is none of the original's."""


@pytest.mark.parametrize("family", FAMILIES)
def test_life_of(family):
    hat = learned(converted(family))
    before = answers(hat, range(3))
    for task in range(3):
        plain = extracts(hat, task, call_of(family, 5))
        if task == 1:
            loads_into_the_original(family, plain[False], before[task])
    for task in range(3):
        forgets(copy.deepcopy(hat), task, before)
    prunes_to_one(copy.deepcopy(hat), 1, before)
    grows(hat, before)


@pytest.mark.parametrize("family", ["vit", "transformer_encoder"])
def test_with_plain_norms_everything_folds(family):
    hat = learned(converted(family, norms="plain"), tasks=1)
    loads_into_the_original(family, hatify.extract(hat, 0), answers(hat, [0])[0], folds=True)


def call_of(family: str, batch: int) -> tuple[tuple, dict]:
    inputs = FAMILIES[family][1](batch)
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def loads_into_the_original(family: str, plain: nn.Module, expected: list, folds: bool | None = None) -> None:
    """The weights alone are the original architecture's own, or do not load there."""
    fresh = FAMILIES[family][0]().eval()
    if folds is None and family not in FOLDS:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            fresh.load_state_dict(plain.state_dict(), strict=True)
        return
    assert plain.extraction["stayed"] == []
    fresh.load_state_dict(plain.state_dict(), strict=True)
    args, kwargs = call_of(family, 3)
    for a, b in zip(expected, outputs(fresh, args, kwargs), strict=True):
        assert torch.allclose(a, b, 0.0, 1e-5 * max(1.0, float(a.abs().max())))


def forgets(hat: HATModel, task: int, before: dict) -> None:
    others = [t for t in range(3) if t != task]
    may, old = allowed(hat, task, others), state(hat)
    result = hatify.forget_task(hat, task)
    moved = changed(hat, old)
    assert {n for n, where in moved.items() if bool((where & ~may.get(n, torch.tensor(False))).any())} == set()
    assert {n: c.count for n, c in result.items()} == {n: int(where.sum()) for n, where in may.items()}
    weights = [n for n, c in result.items() if c.kind == "weights" and c.count]
    assert any(n in moved for n in weights), "shared weights were not reset"
    after = answers(hat, range(3))
    assert all(same(after[t], before[t]) for t in others)
    assert not same(after[task], before[task])
    draw_masks(hat, seed=9, tasks=[task])
    old = state(hat)
    learn(hat, task, give_back=False)  # else only what its new masks keep would differ
    trained = changed(hat, old)
    assert any(bool((trained[n] & may[n]).any()) for n in weights if n in trained), "freed weights do not train"
    assert all(same(answers(hat, others)[t], before[t]) for t in others)
    assert hat.finished_tasks == {0, 1, 2}


def prunes_to_one(hat: HATModel, kept: int, before: dict) -> None:
    once, apart = copy.deepcopy(hat), hat
    result = hatify.prune(once, keep=[kept])
    assert once.finished_tasks == {kept} and same(answers(once, [kept])[kept], before[kept])
    for task in (0, 2):
        hatify.forget_task(apart, task)
    assert same(answers(apart, [kept])[kept], before[kept])
    locks = once.locks([kept])
    assert all(c.count <= int((~locks[n]).sum()) for n, c in result.items() if c.kind == "weights")
    old = state(once)
    result = hatify.forget_task(once, kept)  # the only one: all that it needed
    assert once.finished_tasks == set() and {n: c.count for n, c in result.items() if n in locks} == {
        n: int(lock.sum()) for n, lock in locks.items() if once.get_parameter(n).requires_grad
    }
    assert {n for n, where in changed(once, old).items() if n in locks and bool((where & ~locks[n]).any())} == set()
    assert not same(answers(once, [kept])[kept], before[kept])


def grows(hat: HATModel, before: dict) -> None:
    assert hat.add_tasks(2) == [3, 4]
    assert all(same(answers(hat, range(3))[t], before[t]) for t in range(3))
    draw_masks(hat, seed=11, tasks=[4])
    fresh = answers(hat, [4])[4]
    learn(hat, 4)
    assert hat.finished_tasks == {0, 1, 2, 4} and not same(answers(hat, [4])[4], fresh)
    assert all(same(answers(hat, range(3))[t], before[t]) for t in range(3))
