"""``zoo_snapshots/README.md``: all snapshots on one page, for people."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from hatify.zoo.records import CONVERTED, PROVED, VERDICTS
from hatify.zoo.snapshots import LOW, NOT_RUN, directory, hat_share, read_all, read_names, reason

NAME = "README.md"
WIDTH = 160
"""Characters of a reason; all of it is in the model's file."""
_HEAD = """# What converts

One file for each model: rungs, maskers, mask nodes, gates, fixed sizes, operators, what was proved, and a digest of the generated code.
`hatify zoo run --update` proves the models again and writes the files and this page; a change of the rules is a readable difference here.

*HAT* is the share of parameters on the HAT rungs (element or row locks), output layers aside,
which each task has of its own; *tightness* is the share of locked weights that a finished
task feels (an unlocked weight that it feels would be a leak, and no proof), in brackets the share of locked weights that it leaves
out, for no input tried could show whether they count: taps of dilated convolutions that met padding only, experts that no token chose,
rows of tables that no index named; *open* means that other image sizes or lengths are taken.

Where slack is left: of DETR, the values of the first decoder layer are never felt, for the queries that they are made of are zeros; OPT has
one weight as table and output layer, and the rows of tokens that no input named are felt by one of the two alone (1.000 where all are
named).
"""


def write(folder: Path | None = None) -> Path:
    path = (folder or directory()) / NAME
    path.write_text(contents(folder), encoding="utf-8")
    return path


def contents(folder: Path | None = None) -> str:
    """What the page of a folder has to say."""
    snapshots = read_all(folder)
    return render(snapshots, {source: read_names(source, folder) for source in {lines["source"] for lines in snapshots}})


def render(snapshots: list[dict[str, Any]], names: dict[str, dict[str, Any]]) -> str:
    """The page as Markdown; ``names`` are what all names of a library convert to, by source."""
    parts = [_HEAD]
    for source in dict.fromkeys(lines["source"] for lines in snapshots):
        parts.append(_section(source, [lines for lines in snapshots if lines["source"] == source], names.get(source, {})))
    return "\n".join(parts)


def summary(snapshots: list[dict[str, Any]]) -> str:
    """Counts of verdicts and the mean share, in a line."""
    counts = Counter(lines["verdict"] for lines in snapshots)
    families = len({lines["family"] for lines in snapshots})
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    shares = [share for lines in snapshots if (share := hat_share(lines)) is not None]
    mean = f"; {100 * sum(shares) / len(shares):.1f} % of parameters on the HAT rungs on average" if shares else ""
    return f"{len(snapshots)} models of {families} families: {said}{mean}."


def sizes(lines: dict[str, Any]) -> str:
    """The fixed sizes without the channels of images, which are fixed everywhere."""
    fixed = [size for size in lines.get("fixed sizes", ()) if not size.endswith("[1] = 3")]
    return ", ".join(fixed) or ("open" if "rungs" in lines else "")


def _section(source: str, snapshots: list[dict[str, Any]], names: dict[str, Any]) -> str:
    rows = [
        f"## {source}",
        "",
        summary(snapshots),
        *(["", _of_names(source, names), *_low_families(names)] if names else []),
        "",
        "| family | model | verdict | parameters | HAT | tightness | fixed sizes | one copy per task, or why not |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    return "\n".join([*rows, *map(_row, snapshots), ""])


def _of_names(source: str, names: dict[str, Any]) -> str:
    """All names in a line, those that do not convert by name."""
    counts = Counter(line["verdict"] for line in names.values())
    said = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in (*VERDICTS, NOT_RUN) if counts[verdict])
    structures = sum("like" not in line and line["verdict"] != NOT_RUN for line in names.values())
    graphs = len({line["code"] for line in names.values() if "code" in line})
    others = [f"`{name}`" for name, line in names.items() if line["verdict"] not in (CONVERTED, NOT_RUN)]
    rest = f"; not converted, for reasons in that file: {', '.join(others)}" if others else ""
    shares = {name: line["hat"] for name, line in names.items() if "hat" in line}
    least = min(shares, key=shares.__getitem__, default=None)
    head = f"[All {len(names):,} names]({source}.json), without a proof: {said}"
    text = f"{head}; {structures:,} structures, {graphs:,} different graphs{rest}."
    if least is not None:
        text += f" {100 * sum(shares.values()) / len(shares):.1f} % of parameters on the HAT rungs on average,"
        text += f" {100 * shares[least]:.1f} % at least (`{least}`)."
    return text


def _low_families(names: dict[str, Any]) -> list[str]:
    """The families with names of a low share: how many, the lowest, and what has one copy per task there."""
    of: dict[str, dict[str, dict[str, Any]]] = {}
    for name, line in names.items():
        if line.get("hat", 1.0) < LOW:
            of.setdefault(line["family"], {})[name] = line
    rows = []
    for family, lines in of.items():
        name = min(lines, key=lambda n: lines[n]["hat"])
        rows.append(f"| {family} | {len(lines)} | `{name}` | {100 * lines[name]['hat']:.1f} % | {lines[name]['reason']} |")
    title = f"Families with names under {100 * LOW:.0f} %, how many, and the one with the lowest share:"
    head = ["", title, "", "| family | names | least | HAT | one copy per task |", "|---|---:|---|---:|---|"]
    return [*head, *rows] if rows else []


def _row(lines: dict[str, Any]) -> str:
    share, tight, count = hat_share(lines), lines.get("tightness"), lines.get("parameters")
    unreached = lines.get("unreached", 0.0)
    verdict = lines["verdict"] if lines["verdict"] == PROVED else f"**{lines['verdict']}**"
    cells = [
        lines["family"],
        f"[{lines['model']}]({lines['source']}/{lines['model']}.json)",
        verdict,
        "" if count is None else f"{count:,}",
        "" if share is None else f"{100 * share:.1f} %",
        "" if tight is None else f"{tight:.3f}" + (f" ({100 * unreached:.0f} %)" if unreached >= 0.005 else ""),
        sizes(lines),
        textwrap.shorten(reason(lines), WIDTH, placeholder=" …").replace("|", "\\|"),
    ]
    return "| " + " | ".join(cells) + " |"
