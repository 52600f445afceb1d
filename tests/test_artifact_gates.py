"""Gate tables that somebody wrote himself: a few rows can say what takes forever, so what they cost is bounded."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tasks import finish
from test_artifact_safety import refused, reseal
from torch import nn

import hatify
from hatify.artifact.gates import table_from
from hatify.gates import GateTable
from hatify.gates.table import LONGEST

CHANNELS = 8
ROWS = [[0, 0, 0], [1, 0, 0], *([2, m, c] for m in (0, 1) for c in range(CHANNELS))]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = nn.Sequential(nn.Linear(3, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, 2))
    hat = hatify.convert(model, 2, example_inputs=torch.randn(2, 3), verify=False)
    finish(hat, 0)
    return hatify.save(hat, tmp_path_factory.mktemp("gates") / "saved")


def layered(depth: int, width: int) -> list[list[int]]:
    """OR and AND in turns, each of two random expressions of the last layer."""
    draw, rows, last = random.Random(0), list(ROWS), range(2, len(ROWS))
    for level in range(depth):
        start = len(rows)
        rows += [[3 + level % 2, *draw.sample(last, 2)] for _ in range(width)]
        last = range(start, len(rows))
    return rows


def chained(depth: int) -> list[list[int]]:
    """A ladder of two expressions per level, each of both of the level before: as text it would double with each."""
    rows, pair = list(ROWS), (2, 3)
    for level in range(depth):
        rows += [[3 + level % 2, *pair], [3 + level % 2, pair[level % 2], 4 + level % 12]]
        pair = len(rows) - 2, len(rows) - 1
    return rows


def with_rows(original: Path, path: Path, rows: list[list[int]]) -> Path:
    """The saved model, with a table of these rows; all masks and a weight's rows are the last ones."""
    saved = shutil.copytree(original, path / "saved")
    gates = load_file(saved / "gates.safetensors")
    offset, last = len(gates["ids"]), torch.arange(len(rows) - CHANNELS, len(rows), dtype=torch.int32)
    gates |= {"table": torch.tensor(rows, dtype=torch.int32), "ids": torch.cat([gates["ids"].clamp(max=2), last])}
    save_file(gates, saved / "gates.safetensors")
    tree = json.loads((saved / "model.json").read_text())
    for module in tree["modules"]:
        if module["kind"] == "mask":
            module["ids"][0] = offset
    for use in tree["uses"]:
        if use["rows"][1] == [CHANNELS, 1]:
            use["rows"][0] = offset
    (saved / "model.json").write_text(json.dumps(tree))
    reseal(saved)
    return saved


def test_expressions_that_share_their_parts_without_end_are_refused(original: Path, tmp_path: Path) -> None:
    error = refused(with_rows(original, tmp_path, layered(20, 96)))
    assert "gates.safetensors: table" in str(error.where)


def test_programs_of_too_many_elements_are_refused(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hatify.artifact.gates.ELEMENTS", 0)
    error = refused(with_rows(original, tmp_path, layered(15, 8)))
    assert "gates.safetensors: table" in str(error.where)


@pytest.mark.parametrize("rows", [chained(40), chained(1500), layered(6, 8)], ids=["doubling", "deep", "shared"])
def test_what_can_be_computed_is(rows: list, original: Path, tmp_path: Path) -> None:
    hat = hatify.load(with_rows(original, tmp_path, rows))
    assert len(repr(hat)) < 100 * LONGEST
    assert hat(torch.randn(2, 3), task=0).shape == (2, 2)
    hat.train()
    hat(torch.randn(2, 3), task=1).sum().backward()


def test_a_stored_table_says_what_the_table_says() -> None:
    table = GateTable()
    a, b, c = (table.atoms(name, 4) for name in "abc")
    gates = table.combine("and", table.combine("or", table.combine("or", a, b), c), table.combine("or", a, c.roll(1)))
    stored = table_from(table.stored([*"abc"]), [*"abc"], dict.fromkeys("abc", 4), "gates.safetensors")
    assert len(stored) == len(table) and stored.describe(gates) == table.describe(gates)
    assert [stored.step(i) for i in range(len(table))] == [table.step(i) for i in range(len(table))]
    assert torch.equal(stored.stored([*"abc"]), table.stored([*"abc"]))
