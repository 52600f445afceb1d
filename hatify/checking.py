"""Every problem of a model at once, without converting it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hatify.analysis import analyse
from hatify.calling import Signature
from hatify.capture.export import export_mode
from hatify.conversion import check_materialised, example_call, own_copy
from hatify.errors import CaptureError, HatifyError

MOST = 30
"""Problems that are looked for: what stops the trace that often is not one model any more."""


@dataclass(frozen=True)
class Problem:
    """One finding: ``severity`` is ``error`` (it cannot be converted as it is) or ``note`` (it can, on a lower rung)."""

    what: str
    where: str
    why: str
    fix: str
    severity: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.what}\n  where: {self.where}\n  why:   {self.why}\n  fix:   {self.fix}"


def check(model: nn.Module, example_inputs: Any = None) -> list[Problem]:
    """Lists the problems of a model: what cannot be traced, in both modes (the first 30), and what falls below the HAT rungs.

    A module that stops the trace is replaced by its recorded output, so that what lies behind it is checked too. The model is
    neither changed nor converted (a copy of it is run once, if tracing stops).

    Raises:
        ConversionError: weights are on the meta device.
        ExampleInputsError: example inputs are missing.
    """
    check_materialised(model)
    args, kwargs = example_call(model, example_inputs)
    signature, inputs = Signature.from_call(model.forward, args, kwargs)
    problems: list[Problem] = []
    stubs: dict[str, Any] = {}
    recorded: dict[str, Any] | None = None
    graphs = []
    for training in (False, True):
        mode = "train" if training else "eval"
        while len(problems) < MOST:
            try:
                graphs.append(export_mode(model, signature, inputs, training, stubs))
                break
            except CaptureError as error:
                problems.append(Problem(f"{error.what} ({mode} mode)", _place(error), error.why or "", error.fix or "", "error"))
                recorded = _recorded(model, args, kwargs) if recorded is None else recorded
                if error.module is None or error.module in stubs or error.module not in recorded:
                    break
                stubs[error.module] = recorded[error.module]
    if graphs and not stubs:
        problems += _lower_rungs(graphs, model)
    return problems


def _place(error: CaptureError) -> str:
    return ", ".join(p for p in (error.module, error.where) if p)


def _recorded(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every module's output in one run of a copy."""
    copied = own_copy(model).eval()
    outputs: dict[str, Any] = {}
    for path, module in copied.named_modules():
        module.register_forward_hook(lambda m, i, out, path=path: outputs.__setitem__(path, _shapes(out)))
    try:
        with torch.no_grad():
            copied(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            "the model does not run on its example inputs", why=f"{type(error).__name__}: {error}", fix="other example_inputs"
        ) from error
    return outputs


def _shapes(out: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, out)


def _lower_rungs(graphs: list, model: nn.Module) -> list[Problem]:
    try:
        analysis = analyse(graphs, model)
    except HatifyError as error:
        return [Problem(error.what, error.where or type(model).__name__, error.why or "", error.fix or "", "error")]
    found = []
    for plan in (*analysis.layers.values(), *analysis.parameters.values()):
        if plan.role == "task-indexed":
            found.append(
                Problem(
                    "one copy per task instead of shared weights",
                    plan.path,
                    plan.reason,
                    "@hatify.register its class, if it is a linear map",
                    "note",
                )
            )
    for name, count in analysis.unknown.items():
        why = f"used {count} times: its operands are materialised, its result is live for all tasks"
        found.append(Problem("an operator without a rule", name, why, "none needed: exact, merely conservative", "note"))
    return found
