"""Descriptions that somebody changed, all digests made right again: refused by file and field before anything runs."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from test_artifact_safety import reseal
from torch import Tensor, nn
from torch.utils._sympy import functions

import hatify
from hatify.artifact.expressions import guard_from, guard_to
from hatify.artifact.fields import Fields, parse
from hatify.capture import ShapeGuard
from hatify.errors import ArtifactError


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.lstm(x)[0]))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hat = hatify.convert(Recurrent(), 2, example_inputs=torch.randn(2, 5, 4))
    return hatify.save(hat, tmp_path_factory.mktemp("altered") / "saved")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "saved")


def _module(tree: Any, kind: str) -> Any:
    return next(m for m in tree["modules"] if m["kind"] == kind)


def _sizes(**values: Any) -> Callable[[Any], None]:
    return lambda tree: _module(tree, "recurrent")["attributes"].update(values)


def _every_masker(tree: Any) -> None:
    for entry in (*(m for m in tree["modules"] if m["kind"] == "masker"), *tree["maskers"].values()):
        entry["channels"] = 1 << 38


def _argument(name: str) -> Callable[[Any], None]:
    def alter(tree: Any) -> None:
        next(n for n in tree["graphs"]["eval"] if n["op"] == "placeholder")["target"] = name

    return alter


def _keyword(tree: Any) -> None:
    next(n for n in tree["graphs"]["eval"] if n["op"] == "call_function")["kwargs"] = {"class": 1}


def _surrogate(tree: Any) -> None:
    tree["modules"].append({"path": "d\ud800r", "kind": "none"})


def _same_gates_of_another_shape(tree: Any) -> None:
    mask = _module(tree, "mask")
    mask["own"] = [0, [1, *mask["ids"][1]]]


ALTERED: dict[str, tuple[Callable[[Any], None], str]] = {
    "hidden size": (_sizes(hidden_size=1000), "attributes"),
    "input size": (_sizes(input_size=3), "attributes"),
    "projection": (_sizes(proj_size=2), "attributes"),
    "endless layers": (_sizes(num_layers=1 << 40), "attributes"),
    "names of weights": (_sizes(_flat_weights_names=["forward", "__class__"]), "attributes"),
    "channels": (_every_masker, "maskers"),
    "full width": (_argument("ｓｅｌｆ"), "target"),
    "self": (_argument("self"), "target"),
    "the same argument twice": (_argument("task"), "target"),
    "a keyword": (_keyword, "kwargs"),
    "half a letter": (_surrogate, "path"),
    "questions": (lambda tree: tree.update(asks={"eval": [5, None]}), "asks"),
    "a report of strings": (lambda tree: tree.update(report=dict.fromkeys(tree["report"], "x")), "report"),
    "a proof of strings": (lambda tree: tree["verification"].update(batch_sizes="x"), "verification"),
    "a tensor of numbers": (lambda tree: _module(tree, "recurrent").update(buffers={"place": [1]}), "buffers.place"),
    "another shape": (_same_gates_of_another_shape, "own"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_does_not_fit_is_named_by_file_and_field(saved: Path, name: str) -> None:
    alter, field = ALTERED[name]
    file = saved / "model.json"
    tree = json.loads(file.read_text())
    hatify.load(saved)
    alter(tree)
    file.write_text(json.dumps(tree))
    reseal(saved)
    with pytest.raises(ArtifactError) as caught:
        hatify.load(saved)
    assert caught.value.where.startswith(f"{file}: ") and field in caught.value.where


@pytest.mark.parametrize("field", ["model", "torch_version", "hatify_version"])
def test_a_configuration_of_other_types(saved: Path, field: str) -> None:
    reseal(saved, **{field: [1]})
    with pytest.raises(ArtifactError) as caught:
        hatify.load(saved)
    assert caught.value.where == f"{saved / 'config.json'}: {field}"


@pytest.mark.parametrize(
    "condition",
    [
        ["sympy.Eq", ["sympy.Mod", "s0", 0], 0],
        ["sympy.Eq", ["sympy.Pow", ["sympy.Pow", 1 << 62, 4], 4], 0],
        ["sympy.Eq", 1 << 70, "s0"],
        ["sympy.Add", "s0", 1],
        "s0",
        ["sympy.Ge", ["sympy.floor", ["sympy.Pow", 2.0, 1e18]], "s0"],
        ["sympy.Ge", ["sympy.Mul", *[1 << 62] * 100], "s0"],
        ["sympy.Ge", ["sympy.Pow", ["sympy.Mul", *["s0"] * 60], "s0"], 0],
        ["sympy.Ge", ["sympy.Pow", -1, 0.5], "s0"],
        ["sympy.Ge", ["sympy.Add", *["s0"] * 1000], 0],
    ],
)
def test_a_condition_that_is_none_or_takes_for_ever(condition: Any) -> None:
    assert _guard(["sympy.Eq", ["sympy.Mod", ["sympy.Pow", "s0", 2], 4], 0], 1)
    with pytest.raises(ArtifactError, match="condition"):
        _guard(condition, 1)


def _guard(condition: Any, symbols: int) -> Any:
    places = {f"s{i}": [0, i] for i in range(symbols)}
    return guard_from(Fields({"text": "", "line": "", "condition": condition, "symbols": places}, "model.json"), [symbols])


def test_a_condition_on_many_sizes_takes_no_longer_than_it_is_long() -> None:
    names = [f"s{i}" for i in range(40)]
    power = ["sympy.Pow", ["sympy.Add", *names], 4]
    product = ["sympy.Mul", *(["sympy.Add", name, 1] for name in names)]
    for divided in (["sympy.Mod", power, ["sympy.Add", *names, 1]], ["torch.ModularIndexing", product, names[0], product]):
        start = time.monotonic()
        assert _guard(["sympy.Ge", divided, 0], 40).holds([torch.empty([2] * 40, device="meta")])
        assert time.monotonic() - start < 5  # symbols took minutes


def test_a_size_that_is_a_power_is_no_larger_than_can_be_computed() -> None:
    guard = _guard(["sympy.Ge", ["sympy.Pow", 2, "s0"], 8], 1)
    assert [guard.holds([torch.empty(size, device="meta")]) for size in (2, 3, 1 << 40)] == [False, True, False]


def test_a_stored_condition_is_the_condition() -> None:
    a, b = (sympy.Symbol(name, integer=True, positive=True) for name in "ab")
    conditions = [
        sympy.Eq(functions.Mod(a * b, 6), 0),
        sympy.Ne(functions.FloorDiv(a + 3, b), 2),
        sympy.And(a + 2 * b < 9, sympy.Or(sympy.Max(a, b) >= 4, a**2 > b)),
        sympy.Eq(functions.ModularIndexing(a * b, 2, 3), 1),
        sympy.floor(a / 3 + sympy.Rational(1, 2)) <= b,
        functions.IntTrueDiv(a, b) > 1.5,
        sympy.Eq(functions.FloorDiv(a, b - 2), 1),
    ]
    for condition in conditions:
        guard = ShapeGuard(str(condition), "line", condition, {"a": (0, 0), "b": (0, 1)})
        stored = guard_to(guard)
        again = guard_from(Fields(json.loads(json.dumps(stored)), "model.json"), [2])
        assert guard_to(again) == stored
        for sizes in itertools.product(range(1, 9), repeat=2):
            x = [torch.empty(sizes, device="meta")]
            assert again.holds(x) == (sizes[1] != 2 and guard.holds(x) if condition is conditions[-1] else guard.holds(x))


def test_a_key_that_is_there_twice_is_found_at_once() -> None:
    text = "{" + ", ".join(f'"{i}": 1' for i in (*range(200_000), 199_999)) + "}"
    with pytest.raises(ArtifactError, match="'199999' is there twice"):
        parse(text.encode(), "model.json")  # a search for each key would take an hour
