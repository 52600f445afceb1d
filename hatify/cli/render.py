"""Reports for people: tables and trees on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ..errors import few
from .tree import Branch, collapse, grow

__all__ = [
    "layer_tree",
    "print_conversion",
    "print_demonstration",
    "print_extraction",
    "print_inspection",
    "print_proof",
    "print_with_facts",
]

_COLOURS = {"hat": "green", "row-locked": "cyan", "task-indexed": "yellow", "frozen": "red"}
_LOG_WIDTH = 140  # where there is no terminal to ask


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_LOG_WIDTH)


def print_conversion(hat: Any, model: str, weights: str, path: Path, seconds: dict[str, float]) -> None:
    """Everything about a conversion: what became of the layers, what was proved, and where it was written."""
    console, report = _console(), hat.report
    console.print(layer_tree(model, report.layers))
    console.print()
    console.print(_rungs(report.rungs))
    console.print()
    facts: list[tuple[str, str | Text]] = [("weights", _weights(weights)), ("tasks", _tasks(report))]
    facts.append(("masks", f"{report.maskers:,} maskers, {report.mask_nodes:,} mask nodes inserted"))
    facts.append(("fixed sizes", _sizes(report.fixed_sizes)))
    if report.two_graphs:
        facts.append(("graphs", "two, over the same modules: training differs from evaluation"))
    if report.unknown_operators:
        named = ", ".join(f"{name} ({count})" for name, count in report.unknown_operators.items())
        facts.append(("unknown operators", f"{named}: masked before, live for every task behind"))
    facts += _proof(hat.verification)
    facts.append(("seconds", ", ".join(f"{step} {value:.1f}" for step, value in seconds.items())))
    notes = [*report.notes, *(hat.verification.notes if hat.verification is not None else [])]
    facts += [("note", str(note)) for note in dict.fromkeys(map(str, notes))]
    facts.append(("written to", Text(str(path), style="bold")))
    _facts(console, facts)


def print_proof(proof: Any) -> None:
    """What was measured, without a conversion around it."""
    _facts(_console(), [*_proof(proof), *(("note", note) for note in proof.notes)])


_SHOWN = 6


def print_extraction(report: dict[str, Any], written: list[str]) -> None:
    """What became of one task's network, and where it was written."""
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    facts: list[tuple[str, str | Text]] = [
        ("task", str(report["task"])),
        ("parameters", f"{after:,} of {before:,}" if after != before else f"{after:,}"),
    ]
    if report["slim"]:
        kept, of = (sum(layer[key] for layer in report["slimmed"]) for key in ("kept", "of"))
        facts.append(("channels", f"{kept:,} of {of:,} kept, in {len(report['slimmed'])} layers"))
    facts += [
        ("masks", f"{len(report['folded'])} folded into weights, {len(report['stayed'])} stayed"),
        *_reasons("mask stays", report["stayed"]),
        *_reasons("kept whole", report["whole"]),
        ("difference", "0 (equal to the bit)" if report["bit_equal"] else f"{report['difference']:.3g}: rounding"),
    ]
    if report["inexact"]:
        facts.append(("begins at", few(report["inexact"], _SHOWN)))
    facts += [("renamed", f"{name} is {new}") for name, new in report["renamed"].items()]
    facts += [("note", note) for note in report["notes"]]
    facts += [("written to", Text(path, style="bold")) for path in written]
    _facts(_console(), facts)


def _reasons(label: str, entries: list[dict[str, str]]) -> list[tuple[str, str]]:
    """One line per reason, with the nodes that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for entry in entries:
        by_reason.setdefault(entry["why"], []).append(entry["node"])
    return [(label, f"{few(nodes, _SHOWN)}: {why}") for why, nodes in by_reason.items()]


def print_demonstration(shown: Any, plot: Path | None) -> None:
    """The table of accuracies after every step, and what it proves."""
    table = Table(title="accuracy by task", title_justify="left")
    table.add_column("")
    for task in range(len(shown.rows[0].accuracies)):
        table.add_column(f"task {task}", justify="right")
    table.add_column("weights used", justify="right")
    for row in shown.rows:
        if row is shown.rows[-1]:
            table.add_section()
        table.add_row(row.step, *("-" if a is None else f"{a:.2f} %" for a in row.accuracies), f"{row.used:.1f} %")
    console = _console()
    console.print(table)
    changed = Text("CHANGED", style="bold red")
    equal = "equal to the bit"
    facts: list[tuple[str, str | Text]] = [
        ("model", f"{shown.model}, {shown.parameters:,} parameters, converted by hatify"),
        ("forgetting", f"{shown.forgetting:.2f} %"),
        ("earlier tasks", equal if shown.learned_equal else changed),
        ("forgotten", ", ".join(f"{count:,} {kind}" for kind, count in shown.freed.items()) + " of task 0 reset"),
        ("the other tasks", equal if shown.forgotten_equal else changed),
        ("seconds", f"{shown.seconds:.0f}"),
    ]
    _facts(console, facts if plot is None else [*facts, ("picture", str(plot))])


def print_with_facts(shown: Any, facts: dict[str, str]) -> None:
    """Something that knows how to draw itself, and a few lines below it."""
    console = _console()
    console.print(shown)
    _facts(console, list(facts.items()))


def _facts(console: Console, facts: list[tuple[str, Any]]) -> None:
    for label, fact in facts:
        console.print(Text(f"{label:<18}", style="cyan") + Text.assemble(fact), soft_wrap=True)


def _weights(weights: str) -> str:
    return weights if weights != "random" else "random (--pretrained or --checkpoint FILE for trained ones)"


def _tasks(report: Any) -> str:
    counts = [count for count in report.classes or [] if count is not None]
    return f"{report.tasks}" + (f", with {', '.join(map(str, counts))} classes" if counts else "")


def _sizes(sizes: list[dict[str, Any]]) -> str:
    if not sizes:
        return "none"
    return ", ".join(f"{size['input']} dim {size['dim']} is {size['size']}" for size in sizes)


def _proof(proof: Any) -> list[tuple[str, str | Text]]:
    if proof is None:
        return [("verification", Text("skipped: neither parity nor drift was checked", style="yellow"))]
    colour = "green" if proof.ok else "bold red"
    verdict = "proved" if proof.ok else "FAILED"
    return [
        ("verification", Text(verdict, style=colour)),
        ("parity, eval", _error(proof.parity)),
        ("parity, no grad", _error(proof.parity_no_grad)),
        ("parity, train", _error(proof.parity_train)),
        ("gradients, train", _gradients(proof.gradients, proof.rounding)),
        ("drift", _error(proof.drift)),
        ("control", _control(proof.control)),
    ]


def _error(value: float | None) -> str | Text:
    if value is None:
        return Text("not measured", style="yellow")
    return "0 (equal to the bit)" if value == 0 else Text(f"{value:.3g}", style="bold red")


def _gradients(value: float | None, rounding: float) -> str | Text:
    if not value:
        return _error(value)
    return f"{value:.1g} relative: rounding" if value < rounding else Text(f"{value:.3g} relative", style="bold red")


def _control(value: float | None) -> str | Text:
    if value is None:
        return Text("not measured", style="yellow")
    said = f"{value:.3g} drift with locks taken off"
    return f"{said}: the check can fail" if value else Text(f"{said}: the check would see nothing", style="yellow")


def _rungs(rungs: dict[str, dict[str, int]]) -> Table:
    table = Table(title="what stands on which rung", title_justify="left")
    table.add_column("rung")
    for column in ("layers", "parameters", "share"):
        table.add_column(column, justify="right")
    total = sum(rung["parameters"] for rung in rungs.values())
    for name, rung in rungs.items():
        share = f"{100 * rung['parameters'] / total:.1f} %" if total else "-"
        table.add_row(Text(name, style=_COLOURS.get(name, "")), f"{rung['layers']:,}", f"{rung['parameters']:,}", share)
    return table


def layer_tree(model: str, layers: list[dict[str, Any]]) -> Tree:
    """What became of each layer. Siblings that became the same are one entry, parameters added."""
    root = Tree(Text(model, style="bold"))
    _add(root, collapse(grow(layers)))
    return root


def _add(tree: Tree, branch: Branch) -> None:
    for label, child in branch.children.items():
        line = Text(label)
        if child.count > 1:
            line.append(f"  ({child.count} alike)", style="dim")
        for entry in child.entries:
            rung, was, became = entry.get("rung", ""), entry.get("was", ""), entry.get("became", "")
            line.append(f"  {was} -> " if became != was else "  ").append(became, style=_COLOURS.get(rung, ""))
            if entry.get("parameters"):
                line.append(f"  {entry['parameters']:,}", style="dim")
            if entry.get("reason"):
                line.append(f"  {entry['reason']}", style="dim italic")
        _add(tree.add(line), child)


def print_inspection(shown: dict[str, Any]) -> None:
    """Code, node table and fixed sizes of a converted model."""
    console = _console()
    if console.is_terminal:
        console.print(Syntax(shown["code"].strip(), "python", theme="ansi_dark", background_color="default"))
    else:  # a file gets the code as it is, without padding
        console.print(Text(shown["code"].strip()), soft_wrap=True)
    console.print()
    table = Table(title="nodes", title_justify="left")
    columns = ("name", "op", "target", "shape", "gates", "state", "scope")
    for column in columns:
        table.add_column(column, overflow="fold")
    for node in shown["nodes"]:
        table.add_row(*(Text("" if node.get(column) is None else str(node[column])) for column in columns))
    console.print(table)
    console.print()
    console.print(Text("fixed sizes  ", style="cyan") + Text(_sizes(shown["fixed_sizes"])), soft_wrap=True)
    console.print(Text("one layer in words: --layer PATH", style="dim"))
