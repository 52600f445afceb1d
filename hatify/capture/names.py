"""What nodes are called: by the module that they are in and the operator that they are."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from hatify.capture.questions import is_inside


def scope_of(node: fx.Node) -> str:
    """The path of the module that an exported node was traced in; "" for the model's own code."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"@\d+$", "", path)
    return "" if path.startswith("_") else path.removeprefix("root").removeprefix(".")


def telling_name(operator: Any, scope: str) -> str:
    """The name of a call of an operator."""
    name = getattr(operator, "__name__", str(operator)).split(".")[0].lstrip("_") or "value"
    return f"{scope.replace('.', '_')}_{name}" if scope else name


def line_behind(node: fx.Node) -> str:
    """The user's innermost line behind a node of a program; empty where there is none."""
    trace = node.meta.get("stack_trace") or ""
    places = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)', trace)
    own = [p for p in places if not is_inside(p[0])]
    return f"{own[-1][0]}:{own[-1][1]}: {own[-1][2]}" if own else ""
