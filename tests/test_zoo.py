"""The zoo: library models convert with parity 0 and drift 0, and to what zoo_snapshots/ says.

``HATIFY_UPDATE_SNAPSHOTS=1 pytest tests/test_zoo.py`` writes the snapshots anew; their difference is for review.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from controls import assert_checks_can_fail
from zoo import ZOO

import hatify
from hatify.snapshot import snapshot

SNAPSHOTS = Path(__file__).parent.parent / "zoo_snapshots"


@pytest.mark.parametrize("name", ZOO)
def test_zoo_model(name: str) -> None:
    entry = ZOO[name]
    model = entry.make()
    hat = hatify.convert(model, 3, example_inputs=entry.inputs(2))
    proof = hat.verification
    assert proof.ok
    assert proof.parity == 0.0 and proof.parity_train == 0.0 and proof.gradients == 0.0 and proof.drift == 0.0 and proof.control > 0
    assert proof.batch_sizes == [2, 3, 1]
    assert [k for k in hat.state_dict() if k in set(model.state_dict())] == list(model.state_dict())
    assert_checks_can_fail(hat)
    found = {"model": entry.source_text, **snapshot(hat)}
    path = SNAPSHOTS / f"{name}.json"
    if os.environ.get("HATIFY_UPDATE_SNAPSHOTS"):
        path.write_text(json.dumps(found, indent=2) + "\n")
    assert path.exists(), f"no snapshot of {name}; HATIFY_UPDATE_SNAPSHOTS=1 writes it"
    assert found == json.loads(path.read_text())


def test_every_snapshot_has_a_model() -> None:
    assert {p.stem for p in SNAPSHOTS.glob("*.json")} == set(ZOO)
