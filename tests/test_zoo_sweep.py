"""A sweep survives what its models do, records it, and does not do it twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo_networks

from hatify.zoo import page, records, snapshots
from hatify.zoo.records import FAILED, PROVED, REFUSED, Record
from hatify.zoo.sweep import Limits, Watcher, sweep


class Heard(Watcher):
    def __init__(self) -> None:
        self.ran: list[str] = []
        self.kept: list[str] = []

    def ended(self, record: Record, again: bool) -> None:
        (self.ran if again else self.kept).append(record.name)


def _sweep(directory: Path, *names: str, asked: str = "proof", **options) -> tuple[dict[str, Record], Heard]:
    heard = Heard()
    found = sweep([zoo_networks.entry(name) for name in names], asked, directory, watcher=heard, **options)
    return {record.name: record for record in found}, heard


def test_every_ending_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    names = ("crash", "leave", "broken", "Undecided", "Forgetful", "Good")
    found, heard = _sweep(tmp_path, *names, jobs=2)
    assert list(found) == list(names) and set(heard.ran) == set(names)
    assert found["Good"].verdict == PROVED and found["Good"].proof["ok"] and found["Good"].proof["batch_sizes"] == [2, 3, 1]
    assert found["crash"].verdict == FAILED and "signal 11" in found["crash"].reason["what"]
    assert found["leave"].verdict == FAILED and "code 3" in found["leave"].reason["what"]
    assert "a last word" in found["leave"].reason["where"]
    assert found["broken"].verdict == FAILED and "no such size" in found["broken"].reason["what"]
    assert found["broken"].reason["step"] == "build"
    assert found["Undecided"].verdict == REFUSED and "zoo_networks.py" in found["Undecided"].reason["where"]
    assert found["Forgetful"].verdict == FAILED and found["Forgetful"].proof["parity"] > 0

    again, heard = _sweep(tmp_path, *names)
    assert heard.kept == ["broken", "Undecided", "Forgetful", "Good"], "a result of the same code is not run again"
    assert set(heard.ran) == {"crash", "leave"}, "what a machine ended is no result of the code"
    assert again["Good"] == found["Good"]


def test_limits_of_time_and_memory(tmp_path: Path) -> None:
    found, _ = _sweep(tmp_path, "hang", limits=Limits(seconds=8.0))
    assert found["hang"].verdict == FAILED and "8 seconds" in found["hang"].reason["what"]
    assert found["hang"].reason["step"] == "build"
    found, _ = _sweep(tmp_path, "hoard", limits=Limits(memory=4 * 2**30))
    assert found["hoard"].verdict == FAILED and "memory" in json.dumps(found["hoard"].reason)
    assert not found["hoard"].current("proof"), "with more memory it may end otherwise"


def test_a_record_holds_as_long_as_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = _sweep(tmp_path, "Good", asked="conversion")
    record = found["Good"]
    assert record.verdict == "converted" and record.proof is None
    assert record.current("conversion") and not record.current("proof")
    assert "conversion.py" in record.files and not any(name.startswith("cli/") for name in record.files)
    real = records.digest_of
    monkeypatch.setattr(records, "digest_of", lambda name: "changed" if name == "conversion.py" else real(name))
    assert not record.current("conversion")
    monkeypatch.setattr(records, "digest_of", lambda name: "changed" if name == "cli/main.py" else real(name))
    assert record.current("conversion")
    monkeypatch.setattr(records, "versions", lambda: {"torch": "0"})
    assert not record.current("conversion")


def test_a_proof_answers_for_a_conversion(tmp_path: Path) -> None:
    _sweep(tmp_path, "Good")
    _, heard = _sweep(tmp_path, "Good", asked="conversion")
    assert heard.kept == ["Good"]
    found, heard = _sweep(tmp_path, "Good", asked="proof and tightness")
    assert heard.ran == ["Good"] and 0 < found["Good"].proof["tightness"] <= 1 and found["Good"].proof["leak"] == 0


def test_half_written_records_are_run_again(tmp_path: Path) -> None:
    path = records.path_of(tmp_path, "timm/Good")
    path.parent.mkdir(parents=True)
    path.write_text('{"key": "timm/Go')
    _, heard = _sweep(tmp_path, "Good", asked="conversion")
    assert heard.ran == ["Good"]


def test_snapshots_and_their_page(tmp_path: Path) -> None:
    found, _ = _sweep(tmp_path / "records", "Good", "Undecided", asked="proof and tightness")
    folder = tmp_path / "snapshots"
    for record in found.values():
        snapshots.write(snapshots.snapshot_of(record), folder)
    page.write(folder)
    good, refused = snapshots.read_all(folder)
    assert good["proof"]["drift"] == 0 and good["tightness"] > 0 and good["code"]
    assert refused["verdict"] == "refused" and "data" in refused["reason"]["what"]
    assert snapshots.hat_share(good) == pytest.approx(1 - 12 / (3 * 9 * 6 + 6 + 12 + 6 * 9 * 8 + 8))
    text = (folder / page.NAME).read_text()
    assert "2 models of 1 families: 1 proved, 1 refused" in text
    assert "**refused**" in text and f"{good['tightness']:.3f}" in text
    assert "seconds" not in json.dumps(good)
    # another proof without tightness keeps the one that was measured
    less = {part: value for part, value in good.items() if part != "tightness"}
    snapshots.write(less, folder)
    assert snapshots.read_all(folder)[0] == good
    part = good | {"unreached": 0.372}
    snapshots.write(part, folder)
    page.write(folder)
    assert f"{good['tightness']:.3f} (37 %)" in (folder / page.NAME).read_text()
    snapshots.write(less, folder)
    assert snapshots.read_all(folder)[0] == part, "what the tightness leaves out stays with it"
    snapshots.write(good, folder)
    # a conversion to the same keeps the proof, one to something else does not
    mere = {part: value for part, value in less.items() if part != "proof"} | {"verdict": "converted"}
    snapshots.write(mere, folder)
    assert snapshots.read_all(folder)[0] == good
    snapshots.write(mere | {"code": "0123"}, folder)
    assert snapshots.read_all(folder)[0]["verdict"] == "converted"
