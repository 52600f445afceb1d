"""torch.export with leaf markers, one mode at a time."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch.export import Dim, ExportedProgram

from hatify.calling import Signature, flatten
from hatify.capture.aside import kept_tensors, set_aside
from hatify.capture.branches import noted_branches
from hatify.capture.caches import traces_forgotten
from hatify.capture.captured import Captured
from hatify.capture.casts import is_cast
from hatify.capture.chosen import chosen_in_place
from hatify.capture.effects import has_effect
from hatify.capture.enclosed import clear_regions, enclose, written_across
from hatify.capture.entering import enter_mode
from hatify.capture.functional import line_of_write, make_functional, written_parameters, written_through_leaves
from hatify.capture.in_place import mutated
from hatify.capture.limits import TypeLimits
from hatify.capture.open_calls import OpenCalls
from hatify.capture.plans import plans_left
from hatify.capture.pools import open_pools
from hatify.capture.questions import noted_questions, noted_types
from hatify.capture.reading import read_program
from hatify.capture.refusals import not_functional, untraceable, writes_parameter
from hatify.capture.regions import SWITCHES
from hatify.capture.repeats import NotRepeatable, may_have_looked, watched_blocks
from hatify.capture.selections import check_not_written, known_selections
from hatify.capture.spelled import spelled_sizes
from hatify.capture.statistics import write_statistics
from hatify.capture.tree import called_paths, clear_calls, copy_tree, mark_functions, mark_leaves
from hatify.errors import CaptureError


class _Seen:
    """The output's structure; an object of its own, since the exporter undoes assignments to modules."""

    structure: Any = None
    kept: list[str]


class _Flat(nn.Module):
    """The model with tensors in and tensors out, whatever its own structures are."""

    def __init__(self, root: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.root = root
        self.signature = signature
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for tensor in tensors:
            tensor.is_given = True  # type: ignore[attr-defined]
        args, kwargs = self.signature.rebuild(list(tensors))
        held = [(m, name, b) for m in self.root.modules() for name, b in m._buffers.items() if b is not None]
        attributes = {path: dict(vars(module)) for path, module in self.root.named_modules()}
        out, self.seen.structure = flatten(self.root(*args, **kwargs))
        self.seen.kept = kept_tensors(self.root, attributes)
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
    repeats: bool = True,
) -> Captured:
    """Captures one mode of ``model`` (which is neither run nor changed). ``stubs`` are outputs that stand for modules, by path;
    ``open_sizes`` False fixes all sizes but the batch from the start, ``repeats`` False traces repeated calls one by one from the start.

    Raises:
        CaptureError: with the user's source line, where tracing stops.
    """
    through: set[str] = set()
    while True:
        try:
            with open_pools():
                captured, written = _export_once(model, signature, inputs, training, stubs or {}, open_sizes, through, repeats)
        except (NotRepeatable, CaptureError) as error:
            if not repeats or not (isinstance(error, NotRepeatable) or may_have_looked(error)):
                raise
            repeats = False
            continue
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
    repeats: bool,
) -> tuple[Captured, set[str]]:
    """One capture, and the paths of leaves whose aliasing it lost although it matters."""
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    root = copy_tree(model)
    frozen = enter_mode(root, model, training)
    own_modes = [path for path, module in root.named_modules() if path and module.training != training]
    leaves = mark_leaves(root, stubs, through, repeats)
    flat = _Flat(root, signature)
    try:
        noted = noted_questions(), noted_branches(), known_selections(root, model), noted_types()
        with (
            noted[0] as asks,
            noted[1] as branches,
            noted[2] as selections,
            noted[3] as reads,
            chosen_in_place(),
            watched_blocks(root),
        ):
            program, opened = _export(flat, inputs, model, open_sizes)
        if _is_transformed(program):
            with _quiet():
                program = program.run_decompositions({})
        captured = read_program(program, signature, flat.seen.structure, inputs, branches)
        written = written_through_leaves(captured.graph)
        if written - through:
            return captured, written
        buffers = {n for n, _ in model.named_buffers(remove_duplicate=False)}
        lost: list[str] = []
        writes = make_functional(captured.graph, buffers, parameters, leaves)
        if writes is None:  # what does nothing in this type is not in a functional graph
            lost = [n.meta.get("line", "") for n in captured.graph.nodes if is_cast(n)]
        if writes is None and repeats:
            raise NotRepeatable("what writes through views is made functional by tracing alone")
        if writes is None:  # writes through views: PyTorch's own functionalisation
            line = written_across(captured.graph)
            if line is not None or not enclose(program):
                names = written_parameters(captured.graph, parameters)
                if names:
                    raise writes_parameter(names, line_of_write(captured.graph, parameters))
                raise CaptureError(
                    f"{type(model).__name__} writes through views, and shares memory with a region of torch.no_grad() or torch.autocast()",
                    where=line or next((n.meta["line"] for n in captured.graph.nodes if mutated(n) is not None), None),
                    why="made functional, the write would be lost to the region, or the region to the write",
                    fix="write x = x.op() instead of x.op_() there, or clone() what the region is given",
                )
            try:
                with _quiet():
                    program = program.run_decompositions({})
            except Exception as error:
                line = next((n.meta["line"] for n in captured.graph.nodes if mutated(n) is not None), None)
                raise not_functional(error, model, line) from error
            if program.graph_signature.parameters_to_mutate:
                names = list(program.graph_signature.parameters_to_mutate.values())
                raise writes_parameter(names, line_of_write(captured.graph, parameters))
            captured = read_program(program, signature, flat.seen.structure, inputs, branches)
            writes = make_functional(captured.graph, set(), parameters, leaves)
            if writes is None:
                raise CaptureError(
                    f"{type(model).__name__} writes into tensors in a way that cannot be made functional",
                    where=next((n.meta["line"] for n in captured.graph.nodes if mutated(n) is not None), None),
                    fix="write x = x.op() instead of x.op_() there",
                )
        captured.writes.update(writes)
        check_not_written(selections, captured.writes, model)
        write_statistics(captured, buffers)
        _drop_dead(captured, model)
    finally:
        clear_calls()
        clear_regions()
    captured.leaves = leaves
    captured.open_sizes, captured.repeats = opened, repeats
    captured.asks = {training: asks}
    captured.own_modes = {training: own_modes}
    captured.frozen, captured.kept = frozen, flat.seen.kept
    captured.selections = selections
    captured.reads, captured.reads_whole = [*reads[0], *lost], reads[1]
    return captured, set()


def _export(flat: _Flat, inputs: list[Tensor], model: nn.Module, open_sizes: bool) -> tuple[ExportedProgram, bool]:
    """The exported program, and whether all sizes were left open to it.

    The exporter's memory of operators costs more than it saves where sizes are open; leaves have one of their own (alike.py).
    """
    memory = config.patch(fake_tensor_cache_enabled=False)
    with (
        _quiet(),
        torch.enable_grad(),
        mark_functions(),
        set_aside(),
        spelled_sizes(),
        plans_left(),
        OpenCalls(),
        TypeLimits(),
        memory,
        traces_forgotten(),
    ):
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
            raise untraceable(first or error, model, flat.root, called_paths()) from (first or error)


def _is_transformed(program: ExportedProgram) -> bool:
    """Whether the program holds the beginning and end of a transform (``torch.vmap``), which its decomposition takes out."""
    return any(getattr(n.target, "__module__", "") == "torch._functorch.predispatch" for n in program.graph.nodes)


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


def _drop_dead(captured: Captured, model: nn.Module) -> None:
    kept = set(captured.writes.values())
    for node in reversed(captured.graph.nodes):
        if node.op in ("placeholder", "output") or node.users or node in kept or node.target in SWITCHES or has_effect(node, model):
            continue
        captured.graph.erase_node(node)
