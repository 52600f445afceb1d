"""Weights that are computed before they are used: each parameter on the highest rung that what couples it allows."""

from __future__ import annotations

import torch
from tasks import small

from hatify.analysis.coupling import merged
from hatify.verification import prove_by_gradients


def test_each_parameter_on_its_rung() -> None:
    hat, _, _ = small("computed_weights")
    rungs = {row["path"]: row["rung"] for row in hat.report.layers}
    assert rungs["conv1.weight"] == rungs["conv2.weight"] == "row-locked"
    assert rungs["conv1.bias"] == rungs["scaled.weight"] == rungs["scaled.bias"] == "hat"
    assert rungs["scaled.scale"] == "task-indexed", "one number that every row reads"
    assert rungs["sphere.weight"] == "task-indexed", "coupled across rows and columns"
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0
    assert prove_by_gradients(hat, without_locks=["conv1.weight"]).leak > 0


def test_a_standardised_row_locks_as_a_whole() -> None:
    hat, _, _ = small("computed_weights")
    with torch.no_grad():
        hat.maskers["conv1"].embeddings[0].copy_(torch.tensor([1.0, -1.0] * 5))
    lock = hat.locks([0])["conv1.weight"]
    assert lock[::2].all() and not lock[1::2].any()


def test_groups_join_through_common_elements() -> None:
    """0-1, 2-3 and 1-2 are one group; what nothing couples stays alone; order does not matter."""
    for pairs in ([(0, 1), (2, 3), (1, 2)], [(3, 2), (2, 1), (1, 0)]):
        a, b = torch.tensor(pairs).t()
        assert merged(None, a, b, 6).tolist() == [0, 0, 0, 0, 4, 5]
    chain = torch.arange(99)
    assert not merged(None, chain + 1, chain, 100).any()
    assert merged(torch.tensor([0, 0, 2, 2]), torch.tensor([3]), torch.tensor([1]), 4).tolist() == [0, 0, 0, 0]
