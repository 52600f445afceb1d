"""The zoo: library models convert with parity 0 and drift 0, and to what zoo_snapshots/ says.

``hatify zoo run --update`` writes the snapshots anew; their difference is for review.
"""

from __future__ import annotations

import json

import pytest
from controls import assert_checks_can_fail
from zoo import ZOO

import hatify
from hatify.snapshot import snapshot
from hatify.zoo import from_timm, page, snapshots
from hatify.zoo.catalogue import entries
from hatify.zoo.proving import TASKS


@pytest.mark.parametrize("key", ZOO)
def test_zoo_model(key: str) -> None:
    entry = ZOO[key]
    model = entry.make()
    hat = hatify.convert(model, TASKS, example_inputs=entry.inputs(model))
    proof = hat.verification
    assert proof.ok
    assert proof.parity == 0.0 and proof.parity_train in (0.0, None) and proof.drift == 0.0 and proof.control > 0
    assert proof.batch_sizes == [2, 3, 1]
    assert [k for k in hat.state_dict() if k in set(model.state_dict())] == list(model.state_dict())
    assert_checks_can_fail(hat)
    path = snapshots.path_of(key)
    assert path.exists(), f"no snapshot of {key}: hatify zoo run {entry.name} --source {entry.source} --update"
    known = json.loads(path.read_text(encoding="utf-8"))
    found = snapshot(hat)
    assert {part: known.get(part) for part in found} == found
    assert known["verdict"] in ("proved", "converted")  # by the sweep that wrote it; here it is proved
    if "proof" in known:
        assert (proof.parity_train is None) == (known["proof"]["parity in train mode"] is None)
        # gradients that are equal on one kind of CPU differ by rounding on another, which takes other kernels; ``proof.ok`` bounds it
        assert known["proof"]["gradients"] in ("equal", "equal up to rounding")


def test_a_third_of_timms_families_is_proved() -> None:
    families = {entry.family for entry in entries("timm")}
    proved = {entry.family for entry in ZOO.values() if entry.source == "timm"}
    assert 3 * len(proved) >= len(families), f"{len(proved)} of {len(families)}"


def test_every_snapshot_has_a_model() -> None:
    known = {entry.key for entry in entries()}
    paths = [path for path in snapshots.directory().glob("*/*") if path.suffix == ".json"]
    assert {f"{path.parent.name}/{path.stem}" for path in paths} <= known
    assert set(ZOO) <= {f"{path.parent.name}/{path.stem}" for path in paths}


def test_the_page_says_what_the_snapshots_say() -> None:
    written = (snapshots.directory() / page.NAME).read_text(encoding="utf-8")
    assert written == page.contents(), "hatify zoo run --update writes the page"


def test_the_smallest_models_are_the_smallest() -> None:
    """The shipped list covers every family, and is right where it can be checked fast."""
    families = from_timm.families()
    chosen = from_timm.representatives()
    assert chosen.keys() == families.keys()
    for family in ("starnet", "pit", "visformer", "tnt"):
        assert chosen[family] == from_timm.smallest(families[family])
    assert from_timm.smallest(["resnet34", "resnet18", "resnet50"]) == "resnet18"


def test_large_images_are_the_smallest_that_timm_names() -> None:
    import timm

    for entry in from_timm.entries():
        config = timm.models.get_pretrained_cfg(entry.name)
        if entry.size is not None:
            assert (entry.size, entry.size) == config.min_input_size[1:] and max(config.input_size) > 512
    assert from_timm.size("gemma4_vit_167m") == 96
    assert from_timm.size("resnet50") is None, "its own images are small"
    assert from_timm.size("vit_large_patch14_dinov2") is None, "takes no others"
    assert from_timm.size("vit_base_patch16_sapiens2") is None, "not square"
