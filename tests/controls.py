"""Negative controls: the check must see a lock or a mask that is missing."""

from __future__ import annotations

import torch

from hatify import HATModel
from hatify.modules import HATRecurrent, Mask
from hatify.verification import measure_drift

TRIES = 8
"""Dead units of a random network can hide one lock or mask, so a few are tried, each on its own."""


def drift_without_a_lock(hat: HATModel) -> float | None:
    """The first drift with the locks of one parameter left out, the last layers first; None where nothing is shared."""
    locks = hat.locks(range(hat.config.num_tasks))
    names = [n for n in reversed(hat._facts.uses) if bool(locks[n].any())]
    return _first_drift([{"without_locks": [n]} for n in names], hat)


def drift_without_a_mask(hat: HATModel) -> float | None:
    """The first drift with one mask node, or one masker of a recurrent layer, left out, the last first; None where there is none."""
    names = [n for n, m in hat.room.masks.named_children() if isinstance(m, Mask)][::-1]
    names = [f"{p}.{n}" for p, m in hat.named_modules() if isinstance(m, HATRecurrent) for n in m.maskers] + names
    return _first_drift([{"without_masks": [n]} for n in names], hat)


def _first_drift(omissions: list[dict], hat: HATModel) -> float | None:
    found = None
    for omission in omissions[:TRIES]:
        found = measure_drift(hat, **omission)[0]
        if found > 0:
            break
    return found


def assert_checks_can_fail(hat: HATModel) -> None:
    """With one lock, or one mask node, taken away, the check finds drift."""
    before = {k: v.clone() for k, v in hat.state_dict().items()}
    lock, mask = drift_without_a_lock(hat), drift_without_a_mask(hat)
    assert lock is None or lock > 0, "no drift without a lock"
    assert mask is None or mask > 0, "no drift without a mask node"
    assert all(torch.equal(v, before[k]) for k, v in hat.state_dict().items()), "the check changed the model"
