"""torch.export with leaf markers, brought into the form that the rest of hatify reads."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from hatify.calling import Signature, flatten
from hatify.capture.captured import Captured, FixedSize, ShapeGuard
from hatify.capture.functional import copied, line_of_write, make_functional, mutated, written_through_leaves
from hatify.capture.questions import noted_questions
from hatify.capture.regions import SWITCHES, enter_autocast, exit_autocast
from hatify.capture.selections import known_selections
from hatify.capture.tree import LEAF, FunctionCall, arguments, clear_calls, copy_tree, forget_call, mark_functions, mark_leaves
from hatify.errors import CaptureError

DROPPED = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range", "_assert_async"}


REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Regions that the exporter keeps as a body of their own, and how many settings come before the body."""


class _Seen:
    """The output's structure; an object of its own, since the exporter undoes assignments to modules."""

    structure: Any = None


class _Flat(nn.Module):
    """The model with tensors in and tensors out, whatever its own structures are."""

    def __init__(self, root: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.root = root
        self.signature = signature
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.signature.rebuild(list(tensors))
        held = [(m, name, b) for m in self.root.modules() for name, b in m._buffers.items() if b is not None]
        out, self.seen.structure = flatten(self.root(*args, **kwargs))
        for module, name, buffer in held:  # a buffer written by assignment (one of another shape is a cache)
            new = module._buffers.get(name)
            if new is not buffer and new is not None and new.shape == buffer.shape and new.dtype == buffer.dtype:
                buffer.copy_(new)
                module._buffers[name] = buffer
        return tuple(out)


def export_mode(
    model: nn.Module,
    signature: Signature,
    inputs: list[Tensor],
    training: bool,
    stubs: dict[str, Any] | None = None,
    open_sizes: bool = True,
) -> Captured:
    """Captures one mode of ``model`` (which is neither run nor changed). ``stubs`` are outputs that stand for modules, by path;
    ``open_sizes`` False fixes all sizes but the batch from the start.

    Raises:
        CaptureError: with the user's source line, where tracing stops.
    """
    through: set[str] = set()
    while True:
        captured, written = _export_once(model, signature, inputs, training, stubs or {}, open_sizes, through)
        if not written - through:
            return captured
        through |= written  # a leaf that gives its input back (dropout in eval mode), which is then written to


def _export_once(
    model: nn.Module,
    signature: Signature,
    inputs: list[Tensor],
    training: bool,
    stubs: dict[str, Any],
    open_sizes: bool,
    through: set[str],
) -> tuple[Captured, set[str]]:
    """One capture, and the paths of leaves whose aliasing it lost although it matters."""
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    root = copy_tree(model)
    root.train(training) if training else root.eval()
    leaves = mark_leaves(root, stubs, through)
    flat = _Flat(root, signature)
    try:
        with noted_questions() as asks, known_selections(root, model) as selections:
            program, opened = _export(flat, inputs, model, open_sizes)
        captured = _read(program, signature, flat.seen.structure, inputs)
        written = written_through_leaves(captured.graph)
        if written - through:
            return captured, written
        writes = make_functional(captured.graph, {n for n, _ in model.named_buffers(remove_duplicate=False)}, parameters)
        if writes is None:  # writes through views: PyTorch's own functionalisation
            with _quiet():
                program = program.run_decompositions({})
            if program.graph_signature.parameters_to_mutate:
                names = list(program.graph_signature.parameters_to_mutate.values())
                raise _writes_parameter(names, line_of_write(captured.graph, parameters))
            captured = _read(program, signature, flat.seen.structure, inputs)
            writes = make_functional(captured.graph, set(), parameters)
            if writes is None:
                raise CaptureError(
                    f"{type(model).__name__} writes into tensors in a way that cannot be made functional",
                    where=next((n.meta["line"] for n in captured.graph.nodes if mutated(n) is not None), None),
                    fix="write x = x.op() instead of x.op_() there",
                )
        captured.writes.update(writes)
        _drop_dead(captured)
    finally:
        clear_calls()
    captured.leaves = leaves
    captured.open_sizes = opened
    captured.asks = {training: asks}
    captured.selections = selections
    return captured, set()


def _export(flat: _Flat, inputs: list[Tensor], model: nn.Module, open_sizes: bool) -> tuple[ExportedProgram, bool]:
    """The exported program, and whether all sizes were left open to it."""
    with _quiet(), torch.enable_grad(), mark_functions(), _undecided_masks():
        first: Exception | None = None
        if open_sizes:
            try:
                shapes = tuple({d: Dim.AUTO for d in range(t.dim())} for t in inputs)
                return torch.export.export(flat, tuple(inputs), dynamic_shapes=(shapes,), strict=False), True
            except Exception as error:
                first = error
        try:  # code that needs actual sizes (a loop over them, a cache keyed on them): only the batch stays open
            shapes = tuple({0: Dim.AUTO, **{d: None for d in range(1, t.dim())}} if t.dim() else {} for t in inputs)
            return torch.export.export(flat, tuple(inputs), dynamic_shapes=(shapes,), strict=False), False
        except Exception as error:
            raise _explain(first or error, model, flat.root) from (first or error)


def _explain(error: Exception, model: nn.Module, root: nn.Module) -> CaptureError:
    """The user's own line out of an exporter's error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and "/hatify/" not in f.filename]
    line = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}" if frames else type(model).__name__
    reason = str(error).strip().splitlines()
    first = next((text for text in reason if text.strip()), type(error).__name__)
    data_dependent = "data-dependent" in str(error) or "Unbacked" in str(error) or "unbacked" in str(error)
    ways = (
        "take the decision out of forward (torch.where instead of if, a fixed number of steps), or keep the module whole: "
        "hatify.register(ThatModule, hatify.TaskIndexedLayer())"
    )
    found = CaptureError(
        f"{type(model).__name__} cannot be traced" + (": its control flow depends on data" if data_dependent else ""),
        where=line,
        why=f"{type(error).__name__}: {first[:300]}",
        fix=ways,
    )
    found.module = _failing_module(error, root)
    return found


def _failing_module(error: Exception, root: nn.Module) -> str | None:
    """The path of the innermost module whose forward was running."""
    paths = {id(m): path for path, m in root.named_modules()}
    innermost = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            innermost = paths[id(owner)]
        trace = trace.tb_next
    return innermost


@contextlib.contextmanager
def _undecided_masks() -> Iterator[None]:
    """torch's transformer looks into the values of a mask to choose a fused kernel; while tracing it takes the caller's word."""
    room = torch.nn.modules.transformer
    original = room._detect_is_causal_mask
    room._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        room._detect_is_causal_mask = original


class _quiet:
    """Keeps the exporter's own logging and warnings out of the user's way."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        self._streams = contextlib.ExitStack()
        self._streams.enter_context(contextlib.redirect_stdout(io.StringIO()))
        self._streams.enter_context(contextlib.redirect_stderr(io.StringIO()))  # partial graphs, printed on failure

    def __exit__(self, *exc: Any) -> None:
        self._streams.close()
        logging.disable(logging.NOTSET)
        self._warnings.__exit__(*exc)


def _read(program: ExportedProgram, signature: Signature, structure: Any, inputs: list[Tensor]) -> Captured:
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
            target = f"constant_{len(captured.constants)}"
            captured.constants[target] = value
            new = graph.create_node("get_attr", target)
        _note(new, node)
        if new.meta["val"] is None:
            new.meta["val"] = captured.constants[target]
        return new

    env = _Env(read)
    env.update(first)
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "call_function":
            _copy_function(graph, env, node)
        elif node.op == "output":
            results = node.args[0]
            buffers = spec.buffers_to_mutate
            values = [r for r in results if not (isinstance(r, fx.Node) and r.name in buffers)]
            for r in results:
                if isinstance(r, fx.Node) and r.name in buffers:
                    captured.writes[buffers[r.name].removeprefix("root.")] = env[r]
            graph.output(tuple(env[v] if isinstance(v, fx.Node) else v for v in values))
    captured.fixed_sizes = _fixed_sizes(signature, placeholders)
    captured.guards = _guards(placeholders)
    return captured


def _writes_parameter(names: list[str], line: str | None) -> CaptureError:
    """The refusal of a forward that writes into parameters."""
    return CaptureError(
        f"forward writes into the parameter {', '.join(n.removeprefix('root.') for n in dict.fromkeys(names))}",
        where=line,
        why="all tasks share it; only a module that is kept whole can have one copy of it per task",
        fix="nn.Embedding(..., max_norm=...) or nn.EmbeddingBag(..., max_norm=...) instead of the function; otherwise keep the module "
        "whole: hatify.register(ThatModule, hatify.TaskIndexedLayer())",
    )


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


def _copy_function(graph: fx.Graph, env: dict[fx.Node, Any], node: fx.Node) -> None:
    if node.target is LEAF:
        env[node] = _leaf_node(graph, env, node)
        return
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in DROPPED:
        return
    if node.target is torch.ops.aten.copy.default:
        env[node] = copied(graph, env[node.args[0]], env[node.args[1]], {"scope": _scope(node), "line": ""})
        return
    if str(node.target) in REGIONS:
        env[node] = _region(graph, env, node)
        return
    if node.target is operator.getitem and isinstance(env[node.args[0]], list):
        env[node] = env[node.args[0]][node.args[1]]
        return
    new = graph.create_node("call_function", node.target, *_mapped(env, node), name=_telling_name(node))
    _note(new, node)
    env[node] = new


def _region(graph: fx.Graph, env: dict[fx.Node, Any], node: fx.Node) -> list:
    """The user's own ``torch.no_grad()`` or ``torch.autocast()`` region, inlined between two switches that restore what was before."""
    settings = REGIONS[str(node.target)]
    given, body, operands = node.args[:settings], node.args[settings], iter(node.args[settings + 1 :])
    if settings == 1:
        before = graph.call_function(torch.is_grad_enabled)
        graph.call_function(torch._C._set_grad_enabled, given)
    else:
        before = graph.call_function(enter_autocast, given)
    inner: dict[fx.Node, Any] = {}
    results: list = []
    for sub in env[body].graph.nodes:
        if sub.op == "placeholder":
            inner[sub] = env[next(operands)]
        elif sub.op == "call_function":
            _copy_function(graph, inner, sub)
        elif sub.op == "output":
            results = [inner[r] for r in sub.args[0]]
        elif sub.op == "get_attr":
            inner[sub] = operator.attrgetter(sub.target)(env[body])
    graph.call_function(torch._C._set_grad_enabled if settings == 1 else exit_autocast, (before,))
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


def _telling_name(node: fx.Node) -> str:
    scope = _scope(node)
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0].lstrip("_") or "value"
    return f"{scope.replace('.', '_')}_{name}" if scope else name


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"@\d+$", "", path)
    return "" if path.startswith("_") else path.removeprefix("root").removeprefix(".")


def _note(new: fx.Node, old: fx.Node) -> None:
    new.meta["val"] = old.meta.get("val")
    new.meta["scope"] = _scope(old)
    trace = old.meta.get("stack_trace") or ""
    places = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)', trace)
    own = [p for p in places if "/hatify/capture/" not in p[0] and "/torch/" not in p[0]]
    new.meta["line"] = f"{own[-1][0]}:{own[-1][1]}: {own[-1][2]}" if own else ""


def _fixed_sizes(signature: Signature, placeholders: list[fx.Node]) -> list[FixedSize]:
    sizes = []
    for name, node in zip(signature.names, placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
                sizes.append(FixedSize(name, dim, int(size)))
    return sizes


def _guards(placeholders: list[fx.Node]) -> list[ShapeGuard]:
    """Guards that the model's own lines put on sizes; those of PyTorch's internals only concern strides and size one."""
    symbols: dict[str, tuple[int, int]] = {}
    environment = None
    for number, node in enumerate(placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                environment = size.node.shape_env
                symbols.setdefault(str(size.node.expr), (number, dim))
    found = []
    for guard in environment.guards if environment is not None else []:
        place = guard.sloc.framework_loc
        filename = getattr(place, "filename", str(place))
        own = "/torch/" not in filename
        expression = environment.simplify(guard.expr)
        free = {str(s) for s in expression.free_symbols}
        if own and free and free <= set(symbols):
            line = f"{filename}:{getattr(place, 'lineno', '?')}: {getattr(place, 'line', '')}"
            found.append(ShapeGuard(str(expression), line, expression, {s: symbols[s] for s in free}))
    return found


def _drop_dead(captured: Captured) -> None:
    kept = set(captured.writes.values())
    for node in reversed(captured.graph.nodes):
        if node.op in ("placeholder", "output") or node.users or node in kept or node.target in SWITCHES:
            continue
        captured.graph.erase_node(node)
