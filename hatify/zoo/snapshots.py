"""``zoo_snapshots/``: what each model converts to, one readable file each. They ship with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatify.errors import ArtifactError, without_place
from hatify.zoo.records import CONVERTED, FAILED, PROVED, REFUSED, Record

_PACKAGED = Path(__file__).with_name("packaged_snapshots")
_CHECKOUT = Path(__file__).parents[2] / "zoo_snapshots"
HEAD = "output layer"
"""Why output layers are task-indexed."""
_ORDER = {PROVED: 0, CONVERTED: 1, REFUSED: 2, FAILED: 3}


def directory() -> Path:
    """Where the snapshots are: in the checkout that this package runs from, else in the package itself."""
    return _CHECKOUT if _CHECKOUT.is_dir() else _PACKAGED


def check_writable() -> None:
    """Whether there is a checkout to write snapshots to.

    Raises:
        ArtifactError: hatify runs from an installed package, whose files nobody reviews.
    """
    if not _CHECKOUT.is_dir():
        raise ArtifactError(
            "snapshots are written in a checkout only",
            where=str(_CHECKOUT.parent),
            why="they are reviewed like code, and this hatify is an installed package",
            fix="clone the repository, pip install -e . there, and run hatify zoo run --update",
        )


def read_all(folder: Path | None = None) -> list[dict[str, Any]]:
    """All snapshots, by source, family and name."""
    paths = (folder or directory()).glob("*/*.json")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(found, key=lambda s: (s["source"], s["family"], _ORDER[s["verdict"]], s["model"]))


def path_of(key: str, folder: Path | None = None) -> Path:
    return (folder or directory()) / f"{key}.json"


def snapshot_of(record: Record) -> dict[str, Any]:
    """The lines of a record that depend on the rules alone: no time, no memory, no machine."""
    lines: dict[str, Any] = {"model": record.name, "source": record.source, "family": record.family, "verdict": record.verdict}
    if record.reason:
        lines["reason"] = {part: without_place(text) for part, text in record.reason.items() if part != "step"}
    if record.parameters is not None:
        lines["parameters"] = record.parameters
    if record.proof is not None:
        lines["proof"] = _proof(record.proof)
        if record.proof.get("tightness") is not None:
            lines["tightness"] = round(record.proof["tightness"], 3)
        if record.proof.get("unreached"):
            lines["unreached"] = round(record.proof["unreached"], 3)
    return {**lines, **(record.snapshot or {})}


def _proof(proof: dict[str, Any]) -> dict[str, Any]:
    gradients = proof["gradients"]
    said = (
        "not compared"
        if gradients is None
        else "equal"
        if gradients == 0
        else "equal up to rounding"
        if gradients < proof["rounding"]
        else "differ"
    )
    return {
        "parity": proof["parity"],
        "parity without gradients": proof["parity_no_grad"],
        "parity in train mode": proof["parity_train"],
        "gradients": said,
        "drift": proof["drift"],
        "batch sizes": proof["batch_sizes"],
        "notes": [note.splitlines()[0] for note in proof["notes"]],
    }


def write(lines: dict[str, Any], folder: Path | None = None) -> Path:
    """Replaces the snapshot of a model.

    A tightness that was measured before stays where it was not measured now, and a proof where a mere conversion gives the same code,
    gates and operators.
    """
    path = path_of(f"{lines['source']}/{lines['model']}", folder)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("verdict") == PROVED:
        lines = _with_what_holds(lines, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    return path


def _with_what_holds(lines: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """New lines, with what a proof before them said and they do not contradict."""
    if lines["verdict"] == CONVERTED:
        same = all(known.get(part) == value for part, value in lines.items() if part != "verdict")
        return known if same else lines
    if lines["verdict"] == PROVED and "tightness" in known and "tightness" not in lines:
        at = list(lines).index("proof") + 1
        items = list(lines.items())
        measured = [(part, known[part]) for part in ("tightness", "unreached") if part in known]
        return dict([*items[:at], *measured, *items[at:]])
    return lines


def write_names(source: str, found: list[Record], folder: Path | None = None, names: Mapping[str, str] | None = None) -> Path:
    """All names of a library in one file, a line each: verdict, share on the HAT rungs, maskers, mask nodes, digest of the code.

    A name of the same structure as one before it says only that, and by which name. What was not found now keeps the line that it has;
    without one it says that it was not run.

    Args:
        names: every name of the library with its family, in order; by default those that were found.
    """
    first: dict[str, Record] = {}
    lines: dict[str, dict[str, Any]] = {}
    for record in found:
        like = record if record.structure is None else first.setdefault(record.structure, record)
        same = like is not record and (like.verdict, like.snapshot) == (record.verdict, record.snapshot)
        lines[record.name] = {"like": like.name} if same else _name_line(snapshot_of(record))
    known = _name_lines(source, folder)
    for name, family in (names or {}).items():
        lines.setdefault(name, known.get(name, {"family": family, "verdict": NOT_RUN}))
    order = list(names) if names is not None else list(lines)
    path = names_path(source, folder)
    written = (f"  {json.dumps(name)}: {json.dumps(lines[name])}" for name in order)
    path.write_text("{\n" + ",\n".join(written) + "\n}\n", encoding="utf-8")
    return path


def read_names(source: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """What :func:`write_names` wrote, by name, with all that a name shares with another one; empty where it did not."""
    lines = _name_lines(source, folder)
    return {name: {**lines[line["like"]], **line} if "like" in line else line for name, line in lines.items()}


def _name_lines(source: str, folder: Path | None) -> dict[str, dict[str, Any]]:
    path = names_path(source, folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def names_path(source: str, folder: Path | None = None) -> Path:
    return (folder or directory()) / f"{source}.json"


NOT_RUN = "not run"
"""The verdict of a name that no sweep has reached yet."""
LOW = 0.95
"""A share on the HAT rungs under which the reason is kept with the name."""


def _name_line(lines: dict[str, Any]) -> dict[str, Any]:
    verdict = CONVERTED if lines["verdict"] == PROVED else lines["verdict"]
    if "rungs" not in lines:
        return {"family": lines["family"], "verdict": verdict, "reason": reason(lines)}
    share = hat_share(lines)
    return {
        "family": lines["family"],
        "verdict": verdict,
        "hat": round(share, 4),
        **({"reason": reason(lines)} if share < LOW else {}),
        "maskers": lines["maskers"],
        "mask nodes": lines["mask nodes"],
        "code": lines["code"],
    }


def hat_share(lines: dict[str, Any]) -> float | None:
    """The share of parameters on the HAT rungs, output layers aside: each task has classes of its own. None for what does not convert."""
    rungs = lines.get("rungs")
    if rungs is None:
        return None
    heads = lines["task-indexed because"].get(HEAD, 0)
    shared = sum(rung["parameters"] for rung in rungs.values()) - heads
    return (rungs["hat"]["parameters"] + rungs["row-locked"]["parameters"]) / max(shared, 1)


def reason(lines: dict[str, Any]) -> str:
    """Why a model does not convert, or why part of it is not shared, in one line."""
    if "reason" in lines:
        return " ".join(lines["reason"].get(part, "").splitlines()[0] for part in ("what", "why") if lines["reason"].get(part))
    lower = {name: count for name, count in lines.get("task-indexed because", {}).items() if name != HEAD}
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(lower.items(), key=lambda item: -item[1]))
