"""An exported program read as a graph of leaves and glue, whose nodes have telling names."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from hatify.calling import Signature
from hatify.capture.branches import Branch
from hatify.capture.captured import Captured
from hatify.capture.enclosed import ENCLOSED, SETTINGS, region_of
from hatify.capture.functional import copied
from hatify.capture.hidden import check_arguments, check_constant
from hatify.capture.names import line_behind, scope_of, telling_name
from hatify.capture.plans import is_planned
from hatify.capture.regions import enter_autocast, exit_autocast
from hatify.capture.repeats import MARK, REPEAT, Copier
from hatify.capture.sizes import fixed_sizes, guards_of
from hatify.capture.tree import LEAF, FunctionCall, OperatorCall, arguments, call_of
from hatify.modules.closures import memory_of
from hatify.modules.grouped import EQUIVALENT

DROPPED = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range", "_assert_async"}
"""Checks of the exporter's own: what it assumed of sizes is read from its guards."""


def read_program(
    program: ExportedProgram, signature: Signature, structure: Any, inputs: list[Tensor], branches: list[Branch]
) -> Captured:
    """The graph of a program whose leaves are markers, with the sizes that it fixed and the writes that it names.

    Args:
        structure: of the model's output, whose tensors the program gives flat.
        inputs: the tensors that it was captured with, in the signature's order.
        branches: on sizes, of which the exporter keeps no guard.
    """
    graph = fx.Graph()
    captured = Captured(graph=graph, signature=signature, output=structure, inputs=inputs)
    spec = program.graph_signature
    held = {**spec.inputs_to_parameters, **spec.inputs_to_buffers}
    lifted = spec.inputs_to_lifted_tensor_constants
    user = iter(signature.names)
    placeholders = []
    first: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in held and node.name not in lifted:
            first[node] = graph.placeholder(next(user))
            _note(first[node], node)
            placeholders.append(first[node])

    def read(node: fx.Node) -> Any:
        """A parameter, buffer or constant, read where it is first needed."""
        if node.op == "placeholder" and node.name in held:
            target = held[node.name].removeprefix("root.")
            new = graph.create_node("get_attr", target, name=target.replace(".", "_"))
        else:
            name = lifted.get(node.name)
            value = _constant(program, name) if name else operator.attrgetter(node.target)(program.graph_module)
            if isinstance(value, fx.GraphModule):  # the body of a region, inlined where it is called
                return value
            check_constant(program, value, node)
            target = f"constant_{len(captured.constants)}"
            captured.constants[target] = value
            new = graph.create_node("get_attr", target)
        _note(new, node)
        if new.meta["val"] is None:
            new.meta["val"] = captured.constants[target]
        return new

    env = _Env(read)
    env.update(first)
    placeholders_of = {held[n.name].removeprefix("root."): n for n in program.graph.nodes if n.name in held}
    copier = Copier(graph, lambda name: env[placeholders_of[name]])
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "call_function":
            _copy_function(graph, env, node, copier)
        elif node.op == "output":
            results = node.args[0]
            buffers = spec.buffers_to_mutate
            values = [r for r in results if not (isinstance(r, fx.Node) and r.name in buffers)]
            for r in results:
                if isinstance(r, fx.Node) and r.name in buffers:
                    captured.writes[buffers[r.name].removeprefix("root.")] = env[r]
            graph.output(tuple(env[v] if isinstance(v, fx.Node) else v for v in values))
    check_arguments(graph, {memory_of(t) for t in program.state_dict.values()} - {None})
    captured.fixed_sizes = fixed_sizes(signature, placeholders)
    captured.guards = guards_of(signature, placeholders, branches)
    copier.check()
    return captured


class _Env(dict):
    """New nodes by old; what is missing is read on demand."""

    def __init__(self, read: Callable[[fx.Node], Any]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, node: fx.Node) -> Any:
        self[node] = found = self._read(node)
        return found


def _constant(program: ExportedProgram, name: str) -> Tensor:
    value = program.constants[name]
    return value.detach() if isinstance(value, Tensor) else value


def _copy_function(graph: fx.Graph, env: dict[fx.Node, Any], node: fx.Node, copier: Copier) -> None:
    if node.target is MARK:
        copier.mark([partial(env.__getitem__, v) for v in node.args[0]], node.args[1])
        return
    if node.target is REPEAT:
        env[node] = copier.repeat([partial(env.__getitem__, v) for v in node.args[0]], node.args[1])
        return
    if node.target is LEAF:
        env[node] = _leaf_node(graph, env, node)
        return
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in DROPPED:
        return
    if node.target is torch.ops.aten.copy.default:
        env[node] = copied(graph, env[node.args[0]], env[node.args[1]], {"scope": scope_of(node), "line": ""})
        return
    if str(node.target) in SETTINGS:
        count = SETTINGS[str(node.target)]
        settings, body, operands = node.args[:count], env[node.args[count]], node.args[count + 1 :]
        env[node] = _region(graph, settings, body, [env[o] for o in operands], copier)
        return
    if node.target is ENCLOSED:
        tensors, sizes, key = node.args
        region = region_of(key)
        operands = region.operands([env[t] for t in tensors], [env[s] if isinstance(s, fx.Node) else s for s in sizes])
        env[node] = _region(graph, region.settings, region.body, operands, copier)
        return
    if node.target is operator.getitem and isinstance(env[node.args[0]], list):
        env[node] = env[node.args[0]][node.args[1]]
        return
    if node.target in _WITHOUT_COMPLEX_BACKWARD and node.meta["val"].dtype.is_complex:
        env[node] = _written_as_pairs(graph, env, node)
        return
    target = EQUIVALENT.get(str(node.target), node.target)
    args, kwargs = _mapped(env, node)
    if is_planned(node):
        target, args = torch.functional.einsum, (args[0], *args[1])
    new = graph.create_node("call_function", target, args, kwargs, name=telling_name(node.target, scope_of(node)))
    _note(new, node)
    env[node] = new


_WITHOUT_COMPLEX_BACKWARD = (torch.ops.aten.slice_scatter.default, torch.ops.aten.select_scatter.default)


def _written_as_pairs(graph: fx.Graph, env: dict[fx.Node, Any], node: fx.Node) -> fx.Node:
    """A part of a complex tensor that is written to: torch has a backward for it in pairs of real numbers."""
    (whole, part, dim, *places), kwargs = _mapped(env, node)
    pairs = [graph.call_function(torch.ops.aten.view_as_real.default, (operand,)) for operand in (whole, part)]
    written = graph.call_function(node.target, (*pairs, dim % len(node.meta["val"].shape), *places), kwargs)
    new = graph.call_function(torch.ops.aten.view_as_complex.default, (written,))
    for made, complexes in zip((*pairs, written), (whole, part, node)):
        _note(made, node)
        made.meta["val"] = torch.view_as_real(complexes.meta["val"])
    _note(new, node)
    return new


def _region(graph: fx.Graph, settings: tuple, body: fx.GraphModule, operands: list, copier: Copier) -> list:
    """The user's own ``torch.no_grad()`` or ``torch.autocast()`` region, inlined between two switches that restore what was before."""
    of_gradients = len(settings) == SETTINGS["wrap_with_set_grad_enabled"]
    if of_gradients:
        before = graph.call_function(torch.is_grad_enabled)
        graph.call_function(torch._C._set_grad_enabled, settings)
    else:
        before = graph.call_function(enter_autocast, settings)
    inner: dict[fx.Node, Any] = {}
    operands, results = iter(operands), []
    for sub in body.graph.nodes:
        if sub.op == "placeholder":
            inner[sub] = next(operands)
        elif sub.op == "call_function":
            _copy_function(graph, inner, sub, copier)
        elif sub.op == "output":
            results = [inner[r] for r in sub.args[0]]
        elif sub.op == "get_attr":
            inner[sub] = operator.attrgetter(sub.target)(body)
    graph.call_function(torch._C._set_grad_enabled if of_gradients else exit_autocast, (before,))
    return results


def _mapped(env: dict[fx.Node, Any], node: fx.Node) -> tuple[tuple, dict]:
    return fx.map_arg((node.args, node.kwargs), lambda n: env[n])


def _leaf_node(graph: fx.Graph, env: dict[fx.Node, Any], node: fx.Node) -> list[fx.Node]:
    """A marker turned back into a call of the module; one node per tensor that it returns."""
    tensors, sizes, key = node.args
    call = call_of(key)
    args, kwargs = arguments(call, [env[t] for t in tensors], [env[s] if isinstance(s, fx.Node) else s for s in sizes])
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n)
    if isinstance(call.twin, OperatorCall):
        target = call.twin.operator
        new = graph.create_node("call_function", target, tuple(args), dict(kwargs), name=telling_name(target, scope_of(node)))
        _note(new, node)
        new.meta["val"] = node.meta["val"][0]
        return [new]
    if isinstance(call.twin, FunctionCall):
        new = graph.create_node("call_function", call.twin, tuple(args), {}, name=call.twin.__name__.lower())
        _note(new, node)
    else:
        new = graph.create_node("call_module", call.path, tuple(args), dict(kwargs), name=call.path.replace(".", "_"))
        _note(new, node)
        new.meta["scope"] = call.path
    values = list(node.meta["val"])
    numbered = iter(range(len(values)))
    flat = [next(numbered) if c is Tensor else None for c in call.constants]
    new.meta["out"] = pytree.tree_unflatten(flat, call.out)
    new.meta["aliases"] = [env[tensors[i]] for i in call.aliases]
    if isinstance(new.meta["out"], int):
        new.meta["val"] = values[0]
        return [new]
    new.meta["val"] = values
    nodes = []
    for number in range(len(values)):
        item = new
        for key_ in _path_to(new.meta["out"], number):
            item = graph.call_function(operator.getitem, (item, key_))
            _note(item, node)
            item.meta["scope"] = call.path
        item.meta["val"] = values[number]
        nodes.append(item)
    return nodes


def _path_to(tree: Any, number: int) -> list:
    """Keys that lead to the leaf ``number`` of a nested structure."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, child in items:
        if child == number and not isinstance(child, list | tuple | dict):
            return [key]
        below = _path_to(child, number)
        if below:
            return [key, *below]
    return []


def _note(new: fx.Node, old: fx.Node) -> None:
    new.meta["val"] = old.meta.get("val")
    new.meta["scope"] = scope_of(old)
    new.meta["line"] = line_behind(old)
