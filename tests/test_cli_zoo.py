"""``hatify zoo`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zoo_networks
from typer.testing import CliRunner

from hatify.cli.main import app
from hatify.cli.zoo import _update
from hatify.zoo import catalogue, page, snapshots
from hatify.zoo.records import Record

LINES = {
    "model": "net_a",
    "source": "timm",
    "family": "nets",
    "verdict": "proved",
    "parameters": 100,
    "rungs": {
        "hat": {"layers": 2, "parameters": 80, "share": 0.8},
        "row-locked": {"layers": 0, "parameters": 0, "share": 0.0},
        "task-indexed": {"layers": 2, "parameters": 20, "share": 0.2},
        "frozen": {"layers": 0, "parameters": 0, "share": 0.0},
    },
    "task-indexed because": {"normalisation": 4, "output layer": 16},
    "fixed sizes": ["x[1] = 3", "x[2] = 32"],
}
REFUSAL = {"model": "net_b", "source": "timm", "family": "nets", "verdict": "refused", "reason": {"what": "it cannot be traced"}}


def _run(*args: str, code: int = 0):
    result = CliRunner().invoke(app, ["zoo", *args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(snapshots, "_CHECKOUT", tmp_path)
    for lines in (LINES, REFUSAL):
        path = snapshots.path_of(f"timm/{lines['model']}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(lines))
    return tmp_path


def test_what_converts_is_shown_from_the_snapshots(folder: Path) -> None:
    shown = _run().stdout
    row = next(line for line in shown.splitlines() if "net_a" in line)
    assert "nets" in row and "proved" in row and "80.0 %" in row and " 4.0 %" in row and "16.0 %" in row and "x[2] = 32" in row
    assert "it cannot be traced" in next(line for line in shown.splitlines() if "net_b" in line)
    assert "2 models of 1 families: 1 proved, 1 refused; 95.2 % of parameters on the HAT rungs on average" in shown
    assert json.loads(_run("--json").stdout) == [LINES, REFUSAL]
    assert "no snapshots" in _run("--source", "torchvision").stdout


def test_showing_needs_no_torch() -> None:
    code = (
        "import sys\nfrom hatify.cli.main import main\nsys.argv = ['hatify', 'zoo', '--json']\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'timm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_model_is_proved_and_not_twice(tmp_path: Path) -> None:
    args = ["run", "test_efficientnet", "--records", str(tmp_path), "--json", "--timeout", "500"]
    first = _run(*args)
    (record,) = json.loads(first.stdout)
    assert record["key"] == "timm/test_efficientnet" and record["verdict"] == "proved" and record["proof"]["ok"]
    assert "timm/test_efficientnet" in first.stderr
    again = _run(*args)
    assert json.loads(again.stdout) == [record]
    assert "timm/test_efficientnet" not in again.stderr
    summary = _run(*args[:4]).stdout
    assert "1 models of 1 families: 1 proved" in summary


def test_all_names_of_a_library_are_one_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions of every name: full snapshots of the representatives, a line for each name, a page that counts them."""
    good, other, bad = (zoo_networks.entry(name) for name in ("Good", "Forgetful", "Undecided"))
    monkeypatch.setattr(catalogue, "entries", lambda source=None: iter([good, other, bad]))
    monkeypatch.setattr(catalogue, "representatives", lambda source=None: [good])
    _run("run", "--all", "--convert-only", "--update", "--source", "timm", "--records", str(tmp_path / "records"))
    names = snapshots.read_names("timm")
    assert list(names) == ["Good", "Forgetful", "Undecided"]
    assert names["Good"]["verdict"] == "converted" and names["Good"]["hat"] > 0.9 and names["Good"]["code"]
    assert names["Undecided"]["verdict"] == "refused" and "traced" in names["Undecided"]["reason"]
    assert snapshots.path_of("timm/Good").exists() and not snapshots.path_of("timm/Forgetful").exists()
    text = (folder / page.NAME).read_text()
    said = "[All 3 names](timm.json), without a proof: 2 converted, 1 refused; 3 structures, 2 different graphs; not converted, "
    assert (
        f"{said}for reasons in that file: `Undecided`" in text and "at least (`" in text and "Families with names under" not in text
    )
    assert text == page.contents()


def _record(name: str, structure: str | None, **lines: Any) -> Record:
    snapshot = {**{part: LINES[part] for part in ("rungs", "task-indexed because")}, "maskers": 1, "mask nodes": 2, "code": "ab"}
    return Record(f"timm/{name}", "nets", "converted", structure=structure, snapshot=snapshot | lines, files={"model.py": "0"})


def test_names_of_one_structure_are_written_once(tmp_path: Path) -> None:
    counts = {"hat": 60, "row-locked": 0, "task-indexed": 40, "frozen": 0}
    low = {rung: {"layers": 1, "parameters": n, "share": n / 100} for rung, n in counts.items()}
    why = {"raw parameter": 24, "output layer": 16}
    found = [
        _record("a", "s"),
        _record("b", "s"),
        _record("c", None),
        _record("d", "s", code="cd"),  # would be a fault: it is said, not hidden
        _record("low", "t", rungs=low, **{"task-indexed because": why}),
        _record("lower", "t", rungs=low, **{"task-indexed because": why}),
    ]
    path = snapshots.write_names("timm", found, tmp_path)
    assert json.loads(path.read_text())["b"] == {"like": "a"} and path.read_text().count("like") == 2
    names = snapshots.read_names("timm", tmp_path)
    assert list(names) == ["a", "b", "c", "d", "low", "lower"] and names["b"] == names["a"] | {"like": "a"}
    assert names["d"]["code"] == "cd" and "like" not in names["c"]
    assert "reason" not in names["a"] and names["low"]["reason"] == "raw parameter (24)"
    text = page.render([LINES], {"timm": names})
    assert (
        "6 converted; 4 structures, 2 different graphs. 87.3 % of parameters on the HAT rungs on average, 71.4 % at least" in text
    )
    assert "| nets | 2 | `low` | 71.4 % | raw parameter (24) |" in text


def test_a_name_that_did_not_run_keeps_its_line_or_says_so(tmp_path: Path) -> None:
    names = {"a": "nets", "b": "nets", "c": "others", "d": "nets"}
    snapshots.write_names("timm", [_record("a", "s"), _record("d", "s")], tmp_path)
    snapshots.write_names("timm", [_record("b", "t", code="ef"), _record("a", "s", code="cd")], tmp_path, names)
    lines = snapshots.read_names("timm", tmp_path)
    assert list(lines) == list(names) and lines["c"] == {"family": "others", "verdict": "not run"}
    assert [lines[name].get("code") for name in names] == ["cd", "ef", None, "cd"] and lines["d"]["like"] == "a"
    text = page.render([LINES], {"timm": lines})
    assert "[All 4 names](timm.json), without a proof: 3 converted, 1 not run; 2 structures, 2 different graphs." in text


def test_a_budget_ends_a_sweep_and_the_next_one_begins_with_what_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [zoo_networks.entry(name) for name in ("Good", "Forgetful", "Undecided")]
    monkeypatch.setattr(catalogue, "entries", lambda source=None: iter(found))
    monkeypatch.setattr(catalogue, "representatives", lambda source=None: found[:1])
    args = ("--convert-only", "--update", "--source", "timm", "--records", str(tmp_path / "records"))
    _run("run", "Good", *args)
    _run("run", "--all", "--budget", "0", *args)
    verdicts = {name: line["verdict"] for name, line in snapshots.read_names("timm").items()}
    assert verdicts == {"Good": "converted", "Forgetful": "not run", "Undecided": "not run"}
    assert [e.name for e in catalogue.unlisted_first(found)] == ["Forgetful", "Undecided", "Good"]
    _run("run", "--all", "--budget", "10", *args)
    verdicts = {name: line["verdict"] for name, line in snapshots.read_names("timm").items()}
    assert verdicts == {"Good": "converted", "Forgetful": "converted", "Undecided": "refused"}
    _run("run", "Forgetful", "--all", *args)
    assert {name: line["verdict"] for name, line in snapshots.read_names("timm").items()} == verdicts, "lines of others stay"
    assert not snapshots.path_of(found[1].key).exists(), "it is no representative"


def test_what_had_no_time_keeps_its_snapshot(folder: Path) -> None:
    late = Record("timm/net_a", "nets", "failed", reason={"what": "not done after 1 seconds"})
    new = replace(late, key="timm/net_c")
    _update([late, new], False)
    kept = {lines["model"]: lines["verdict"] for lines in snapshots.read_all()}
    assert kept == {"net_a": "proved", "net_b": "refused", "net_c": "failed"}
    _update([replace(late, files={"model.py": "0"})], False)  # a failure of the code itself
    assert {lines["model"]: lines["verdict"] for lines in snapshots.read_all()}["net_a"] == "failed"


def test_a_failure_is_shown_and_is_the_exit_code(tmp_path: Path) -> None:
    ended = _run("run", "test_efficientnet", "--records", str(tmp_path), "--timeout", "1", code=1)
    assert "failed  timm/test_efficientnet" in ended.stdout and "not done after 1 seconds" in ended.stdout
    assert "unexpected" not in ended.stderr, "an exit code is no error of its own"


def test_weights_that_are_never_written_have_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr("hatify.zoo.sweep.sweep", lambda *args, **options: limits.append(options["limits"].memory) or [])
    for options in ([], ["--convert-only"], ["--convert-only", "--memory", "2"]):
        _run("run", "test_efficientnet", *options)
    assert limits[0] > 0 and limits[1:] == [0, 2 * 2**30]


def test_an_interrupted_sweep_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hatify.zoo.sweep.sweep", interrupt)
    said = _run("run", "test_efficientnet", code=130).stderr
    assert "goes on from there" in said and "unexpected" not in said


def test_usage_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no model is called 'resnet_of_my_dreams'" in _run("run", "resnet_of_my_dreams", code=1).stderr
    assert "--convert-only" in _run("run", "--convert-only", "--tightness", code=2).stderr
    monkeypatch.setattr(snapshots, "_CHECKOUT", tmp_path / "nowhere")
    assert "checkout" in _run("run", "test_efficientnet", "--update", code=1).stderr
