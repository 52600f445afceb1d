"""What a conversion did, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hatify.analysis import Analysis
from hatify.analysis.plan import FROZEN, ROW_LOCKED, RUNGS, TASK_INDEXED
from hatify.capture import Captured
from hatify.modules import HATLayer, HATRecurrent, LiveMask, Mask, TaskIndexed


@dataclass
class ConversionReport:
    """Counts and rows of one conversion; ``parameters`` are elements of the original model, each counted once."""

    tasks: int
    classes: list[int | None]
    rungs: dict[str, dict[str, int]]
    maskers: int
    mask_nodes: int
    gates: int
    fixed_sizes: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    seconds: dict[str, float]
    notes: list[str]
    operators: dict[str, int]
    unknown_operators: dict[str, int]
    two_graphs: bool
    parameters: int = field(default=0)

    def share(self, *rungs: str) -> float:
        """Share of the parameters on the given rungs, between 0 and 1."""
        return sum(self.rungs[r]["parameters"] for r in rungs) / max(self.parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_report(hat, analysis: Analysis, graphs: list[Captured], notes: list[str], seconds: dict[str, float]) -> ConversionReport:
    """The report of a freshly rewritten model."""
    rungs = {rung: {"layers": 0, "parameters": 0} for rung in RUNGS}
    layers: list[dict[str, Any]] = []
    counted: set[int] = set()
    original = set(hat._facts.original_names)

    def add(path: str, names: list[str], was: str, became: str, rung: str, reason: str) -> None:
        size = 0
        for name in names:
            parameter = hat.get_parameter(name)
            if id(parameter) not in counted:
                counted.add(id(parameter))
                size += parameter.numel()
        if names:
            rungs[rung]["layers"] += 1
            rungs[rung]["parameters"] += size
            layers.append({"path": path, "was": was, "became": became, "rung": rung, "parameters": size, "reason": reason})

    for path, plan in analysis.layers.items():
        module = hat.get_submodule(path)
        names = [f"{path}.{n}" for n, _ in module.named_parameters(remove_duplicate=False) if f"{path}.{n}" in original]
        was = module.plain_class.__name__ if isinstance(module, HATLayer | HATRecurrent | TaskIndexed) else type(module).__name__
        add(path, names, was, type(module).__name__, plan.rung, plan.reason)
    for name, plan in analysis.parameters.items():
        became = "TaskIndexedParameter" if plan.rung == TASK_INDEXED else "HAT weight"
        add(name, [name], "Parameter", became, plan.rung, plan.reason)
    used = set(analysis.uses)
    for name in sorted(original):
        try:
            parameter = hat.get_parameter(name)
        except AttributeError:
            continue
        if id(parameter) not in counted:
            reason = "locked as a whole" if name in used else "not used by the graph"
            add(name, [name], "Parameter", "Parameter", ROW_LOCKED if name in used else FROZEN, reason)
    return ConversionReport(
        tasks=hat.config.num_tasks,
        classes=list(hat.settings["classes"] or [None] * hat.config.num_tasks),
        rungs=rungs,
        maskers=len(analysis.sizes),
        mask_nodes=sum(isinstance(m, Mask) for m in hat.modules()),
        gates=sum(isinstance(m, LiveMask) for m in hat.modules()),
        fixed_sizes=[asdict(f) for f in dict.fromkeys(f for g in graphs for f in g.fixed_sizes)],
        layers=layers,
        seconds=dict(seconds),
        notes=[*notes, *analysis.notes],
        operators=dict(analysis.operators.most_common()),
        unknown_operators=dict(analysis.unknown.most_common()),
        two_graphs=len(graphs) > 1,
        parameters=sum(rung["parameters"] for rung in rungs.values()),
    )
