"""The life of ten architectures: forget each task, learn another in its place, prune, grow; the others stay to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from learned import FAMILIES, allowed, answers, changed, converted, learn, learned, state
from tasks import draw_masks, same

import hatify
from hatify import HATModel


@pytest.mark.parametrize("family", FAMILIES)
def test_life_of(family):
    hat = learned(converted(family))
    before = answers(hat, range(3))
    for task in range(3):
        forgets(copy.deepcopy(hat), task, before)
    prunes_to_one(copy.deepcopy(hat), 1, before)
    grows(hat, before)


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
    learn(hat, task)
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


def grows(hat: HATModel, before: dict) -> None:
    assert hat.add_tasks(2) == [3, 4]
    assert all(same(answers(hat, range(3))[t], before[t]) for t in range(3))
    draw_masks(hat, seed=11, tasks=[4])
    fresh = answers(hat, [4])[4]
    learn(hat, 4)
    assert hat.finished_tasks == {0, 1, 2, 4} and not same(answers(hat, [4])[4], fresh)
    assert all(same(answers(hat, range(3))[t], before[t]) for t in range(3))
