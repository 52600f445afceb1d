"""What an architecture converts to, as a few lines that a person can review."""

from __future__ import annotations

import hashlib
from typing import Any

from hatify.errors import without_place
from hatify.model import HATModel


def snapshot(hat: HATModel) -> dict[str, Any]:
    """Rungs (layers, parameters, share), maskers, masks, gates, fixed sizes, operators and a digest of the generated code.

    A change of the rules shows up as a difference of these lines.
    """
    report = hat.report
    rungs = {
        name: {**counts, "share": round(counts["parameters"] / max(report.parameters, 1), 4)}
        for name, counts in report.rungs.items()
    }
    reasons: dict[str, int] = {}
    for row in report.layers:
        if row["rung"] == "task-indexed":
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + row["parameters"]
    return {
        "rungs": rungs,
        "task-indexed because": dict(sorted(reasons.items())),
        "maskers": report.maskers,
        "mask nodes": report.mask_nodes,
        "live masks of norms": report.gates,
        "gate expressions": len(hat._facts.analysis.table),
        "fixed sizes": [f"{f['input']}[{f['dim']}] = {f['size']}" for f in report.fixed_sizes],
        "graphs": 2 if report.two_graphs else 1,
        "operators": dict(sorted(report.operators.items())),
        "operators without a rule": dict(sorted(report.unknown_operators.items())),
        "notes": [without_place(note.splitlines()[0]) for note in report.notes],
        "code": hashlib.sha256(hat.code.encode()).hexdigest()[:16],
    }
