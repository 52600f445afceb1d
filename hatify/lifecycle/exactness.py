"""Where an extracted network begins to differ from its task: rounding, node by node."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from hatify.model import HATModel


def inexact_nodes(hat: HATModel, task: int, module: fx.GraphModule, tensors: list[Tensor], values: list[Any]) -> list[str]:
    """Names of the nodes whose results are not equal to the bit although those of their operands are.

    Both graphs run once, in eval mode. Nodes are compared by name, where both have them in the same shape, at the positions that are not
    zero in ``module``: what the task does not use is zero there and anything in ``hat``, until a mask removes it.

    Args:
        tensors: the flat inputs of ``hat``.
        values: the same, one per placeholder of ``module``.
    """
    context = hat.binary_context(task)
    original, extracted = _Recorder(hat), _Recorder(module)
    training = module.training
    module.eval()
    try:
        original.run(*tensors, context)
        extracted.run(*values)
    finally:
        module.train(training)
    differs: dict[fx.Node, bool] = {}
    begins = []
    for node in module.graph.nodes:
        below = any(differs.get(operand, False) for operand in node.all_input_nodes)
        here = _different(original.found.get(node.name), extracted.found.get(node.name))
        differs[node] = below or here
        if here and not below:
            begins.append(node.name)
    return begins


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the tensors that its nodes give."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.found: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.op in ("call_module", "call_function") and isinstance(result, Tensor):
            self.found[node.name] = result.detach().clone()  # a layer may go on working in place
        return result


def _different(expected: Tensor | None, got: Tensor | None) -> bool:
    if expected is None or got is None or expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    same = (expected == got) | (expected.isnan() & got.isnan()) if got.dtype.is_floating_point else expected == got
    return bool((~same & (got != 0)).any())
