"""An exported program read as a graph of leaves and glue, whose nodes have telling names."""

from __future__ import annotations

import dis
import operator
import re
from collections.abc import Callable, Collection
from functools import partial
from types import FunctionType
from typing import Any

import torch
from sympy import Eq, Symbol
from sympy.printing.str import StrPrinter
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from hatify.calling import Signature
from hatify.capture.branches import Branch
from hatify.capture.captured import Captured, FixedSize, ShapeGuard
from hatify.capture.enclosed import ENCLOSED, SETTINGS, region_of
from hatify.capture.functional import copied
from hatify.capture.names import scope_of, telling_name
from hatify.capture.regions import enter_autocast, exit_autocast
from hatify.capture.repeats import MARK, REPEAT, Copier
from hatify.capture.tree import LEAF, FunctionCall, arguments, forget_call
from hatify.errors import CaptureError
from hatify.modules.closures import reached
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
            _check_constant(program, value, node)
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
    _check_arguments(graph, {t.untyped_storage()._cdata for t in program.state_dict.values()})
    captured.fixed_sizes = _fixed_sizes(signature, placeholders)
    captured.guards = _guards(signature, placeholders, branches)
    return captured


def _check_constant(program: ExportedProgram, value: Any, node: fx.Node) -> None:
    """That no tensor which the model reads past its modules (in a closure, a view made before) is a parameter: nobody would train it.

    Raises:
        CaptureError: it shares memory with one.
    """
    if not isinstance(value, Tensor):
        return
    memory = value.untyped_storage()._cdata
    shared = (n for n in program.graph_signature.parameters if program.state_dict[n].untyped_storage()._cdata == memory)
    name = next(shared, None)
    if name is not None:
        name = name.removeprefix("root.")
        raise CaptureError(
            f"forward reads the parameter {name}, or a view of it, past the module that owns it",
            where=next((line for user in node.users if (line := _line_of(user))), name),
            why="what is held by a function or in another object stays the original's",
            fix=f"read self.{name} in forward",
        )


def _check_arguments(graph: fx.Graph, memory: Collection[int]) -> None:
    """That no function of the user's holds or is given what has weights: nobody would see them.

    Args:
        memory: of the weights.

    Raises:
        CaptureError: one is.
    """
    for node in graph.nodes:
        given = pytree.tree_leaves((node.args, node.kwargs))
        held = next((a for a in given if isinstance(a, nn.Module) or (callable(a) and not isinstance(a, type))), None)
        role = "an argument"
        if held is None and isinstance(node.target, FunctionCall):
            held, role = _closed_over(node.target.function, memory), "closed over by forward or backward"
        if held is None:
            continue
        kind = type(held).__name__
        raise CaptureError(
            f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} is {role} of a function of your own",
            where=node.meta.get("line") or str(node.target),
            why="what its weights do in there, and in the backward pass, cannot be seen",
            fix="give the function the tensors that it needs, or keep the module that calls it whole: "
            "hatify.register(ThatModule, hatify.TaskIndexedLayer())",
        )


def _closed_over(function: type[torch.autograd.Function], memory: Collection[int]) -> Any:
    """A module or weight that a user's function reads from where it was written, not from its arguments; a table is none."""
    methods = [m for base in function.__mro__ if base is not torch.autograd.Function for m in vars(base).values()]
    functions = [m.__func__ if isinstance(m, staticmethod | classmethod) else m for m in methods]
    own = [f for f in functions if isinstance(f, FunctionType) and not f.__module__.startswith("torch.")]
    by_name = [f.__globals__.get(i.argval) for f in own for i in dis.get_instructions(f) if i.opname == "LOAD_GLOBAL"]
    read = [*own, *(value for value in by_name if isinstance(value, nn.Module | nn.Parameter))]
    return next((value for value in reached(read) if isinstance(value, nn.Module) or _is_weight(value, memory)), None)


def _is_weight(value: Any, memory: Collection[int]) -> bool:
    if not isinstance(value, Tensor):
        return False
    return isinstance(value, nn.Parameter) or value.requires_grad or value.untyped_storage()._cdata in memory


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
    new = graph.create_node("call_function", target, *_mapped(env, node), name=telling_name(node.target, scope_of(node)))
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
    call = forget_call(key)
    args, kwargs = arguments(call, [env[t] for t in tensors], [env[s] if isinstance(s, fx.Node) else s for s in sizes])
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n)
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
    new.meta["line"] = _line_of(old)


def _line_of(node: fx.Node) -> str:
    """The user's innermost line behind a node of a program; empty where there is none."""
    trace = node.meta.get("stack_trace") or ""
    places = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)', trace)
    own = [p for p in places if "/hatify/capture/" not in p[0] and "/torch/" not in p[0]]
    return f"{own[-1][0]}:{own[-1][1]}: {own[-1][2]}" if own else ""


def _fixed_sizes(signature: Signature, placeholders: list[fx.Node]) -> list[FixedSize]:
    sizes = []
    for name, node in zip(signature.names, placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
                sizes.append(FixedSize(name, dim, int(size)))
    return sizes


def _guards(signature: Signature, placeholders: list[fx.Node], branches: list[Branch]) -> list[ShapeGuard]:
    """Guards that the model's own lines put on sizes, and equations of PyTorch's (``x.split(2)`` has as many parts as it had); the other
    guards of its internals concern strides and size one."""
    symbols: dict[str, list[tuple[int, int]]] = {}
    environment = None
    for number, node in enumerate(placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                environment = size.node.shape_env
                symbols.setdefault(str(size.node.expr), []).append((number, dim))
    if environment is None:
        return []
    held = [(environment.replace(branch.condition), branch.line, True) for branch in branches]
    for guard in environment.guards:
        place = guard.sloc.framework_loc
        filename = getattr(place, "filename", str(place))
        expression = environment.simplify(guard.expr)
        if "/torch/" not in filename or isinstance(expression, Eq):
            held.append((expression, f"{filename}:{getattr(place, 'lineno', '?')}: {getattr(place, 'line', '')}", False))
    found: dict[Any, ShapeGuard] = {}
    for expression, line, doubted in held:
        names = [str(s) for s in expression.free_symbols]
        if names and set(names) <= set(symbols):
            first = {name: symbols[name][0] for name in names}
            text = _readable(expression, first, signature)
            found[expression] = ShapeGuard(text, line, expression, first, {n: symbols[n] for n in names} if doubted else None)
    return list(found.values())


def _readable(expression: Any, places: dict[str, tuple[int, int]], signature: Signature) -> str:
    """The condition with ``x.shape[1]`` for a symbol of the exporter's."""
    names = {s: f"{signature.names[places[str(s)][0]]}.shape[{places[str(s)][1]}]" for s in expression.free_symbols}
    return _Infix().doprint(expression.xreplace({s: Symbol(name, integer=True) for s, name in names.items()}))


class _Infix(StrPrinter):
    """``a != b`` instead of sympy's ``Ne(a, b)``."""

    def _print_Relational(self, expression: Any) -> str:
        return f"{self._print(expression.lhs)} {expression.rel_op} {self._print(expression.rhs)}"
