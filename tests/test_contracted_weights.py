"""Parameters that are contracted with data share weights element by element, whoever spells the contraction and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import NETWORKS

import hatify
from hatify.verification import measure_drift

SHARED = {
    "einsum_projections": ["query", "key", "value", "out"],
    "block_diagonal": ["blocks", "more"],
    "position_table_by_product": ["table", "mix"],
    "grouped_experts": ["up", "down"],
    "weight_on_the_left": ["step.weight", "mix"],
}


@pytest.mark.parametrize("name", SHARED)
def test_they_are_locked_element_by_element_and_each_lock_matters(name: str) -> None:
    network = NETWORKS[name]
    hat = hatify.convert(network.make(), 3, example_inputs=network.inputs(2), verify=False)
    rungs = {row["path"]: row["rung"] for row in hat.report.layers}
    assert {rungs[weight] for weight in SHARED[name]} == {"hat"}
    assert measure_drift(hat)[0] == 0.0
    for weight in SHARED[name]:
        assert 0 < hat.locks([0])[weight].float().mean() <= 1
        assert any(measure_drift(hat, without_locks=[weight], seed=seed)[0] > 0 for seed in range(4)), weight


@pytest.mark.parametrize("name", SHARED)
def test_they_are_saved_with_what_calls_them(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    hat = hatify.convert(network.make(), 2, example_inputs=network.inputs(2), verify=False).eval()
    hatify.save(hat, tmp_path / "hat")
    again = hatify.load(tmp_path / "hat").eval()
    assert torch.equal(again(*network.inputs(3), task=1), hat(*network.inputs(3), task=1))
    locks, expected = again.locks([0]), hat.locks([0])
    assert all(torch.equal(locks[weight], expected[weight]) for weight in SHARED[name])
