"""Negative controls: the check must see a lock or a mask that is missing."""

from __future__ import annotations

import torch

from hatify import HATModel
from hatify.modules import Mask
from hatify.verification import measure_drift


def heaviest_lock(hat: HATModel) -> str | None:
    """The shared parameter of which one task with random masks locks most; None where nothing is shared."""
    sizes = {name: hat.get_parameter(name).numel() for name in hat._facts.uses}
    return max(sizes, key=sizes.get, default=None)


def drift_without_a_lock(hat: HATModel) -> float | None:
    """Drift with the locks of one parameter left out; None where nothing is shared."""
    name = heaviest_lock(hat)
    return None if name is None else measure_drift(hat, without_locks=[name])[0]


def drift_without_a_mask(hat: HATModel) -> float | None:
    """The largest drift with one mask node left out, over the first few; None where there is no mask."""
    names = [n for n, m in hat.room.masks.named_children() if isinstance(m, Mask)]
    found = None
    for name in names[:6]:
        found = max(found or 0.0, measure_drift(hat, without_masks=[name])[0])
        if found > 0:
            break
    return found


def assert_checks_can_fail(hat: HATModel) -> None:
    """With one lock, or one mask node, taken away, the check finds drift."""
    before = {k: v.clone() for k, v in hat.state_dict().items()}
    lock, mask = drift_without_a_lock(hat), drift_without_a_mask(hat)
    assert lock is None or lock > 0, f"no drift without the lock of {heaviest_lock(hat)}"
    assert mask is None or mask > 0, "no drift without a mask node"
    assert all(torch.equal(v, before[k]) for k, v in hat.state_dict().items()), "the check changed the model"
