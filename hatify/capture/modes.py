"""Both modes of a model: one graph where they agree, two over the same modules where they do not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.calling import Signature
from hatify.capture.aside import hooks_left
from hatify.capture.caches import known_caches
from hatify.capture.captured import ByMode, Captured
from hatify.capture.dtypes import follow_dtypes
from hatify.capture.export import export_mode
from hatify.capture.layouts import in_order_alike, spelled_out, taken_out
from hatify.capture.selections import words
from hatify.errors import CaptureError

NUMBERS = (bool, int, float)
ONE_AT_A_TIME = threading.RLock()
"""Tracing sets functions of torch's aside, for all threads."""


def capture(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], doubled: bool = True, open_sizes: bool = True, repeats: bool = True
) -> tuple[Captured, Captured | None, list[str]]:
    """Captures ``model`` on example inputs, in ``eval`` and in ``train`` mode.

    Returns the eval capture, the train capture where it differs by more than constants (else None), and notes. A batch of one is
    ``doubled``, so that the batch size stays open; other sizes do not without ``open_sizes``. Without ``repeats`` every block is traced.

    Raises:
        CaptureError: eval mode cannot be traced.
    """
    with ONE_AT_A_TIME, _untouched(model), known_caches():
        return _both_modes(model, args, kwargs, doubled, open_sizes, repeats)


SHELVES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The user's own hooks run while tracing and may store what they see on the model; that is taken back.

    Raises:
        CaptureError: forward wrote parameters, buffers or modules of the model itself, not of the copy that was traced. They are back.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    shelves = [(path, shelf, dict(shelf)) for path, m in model.named_modules() for n in SHELVES if (shelf := vars(m).get(n))]
    written: list[str] = []
    try:
        yield
    finally:
        for module, held in before:
            now = vars(module)
            if now.keys() != held.keys() or any(now[k] is not v for k, v in held.items()):
                now.clear()
                now.update(held)
        for path, shelf, held in shelves:
            changed = [k for k in held.keys() | shelf.keys() if shelf.get(k) is not held.get(k)]
            if changed:
                written += [f"{path}.{k}".lstrip(".") for k in changed]
                shelf.clear()
                shelf.update(held)
    if written:
        raise CaptureError(
            f"forward of {type(model).__name__} writes to its modules past its own tree",
            where=", ".join(sorted(written)[:4]),
            why="it reaches them by a global or by a list of a class, so that a copy of the model is not alone",
            fix="let forward reach them by self: for module in self.modules()",
        )


def _both_modes(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], doubled: bool, open_sizes: bool, repeats: bool
) -> tuple[Captured, Captured | None, list[str]]:
    _check_dense(model)
    signature, inputs = Signature.from_call(model.forward, args, kwargs)
    evaluated = _capture_open_batch(model, signature, inputs, doubled, training=False, open_sizes=open_sizes, repeats=repeats)
    notes = hooks_left(model, evaluated.leaves)
    notes += _freezing(evaluated, "eval")
    try:
        trained = _capture_open_batch(
            model, signature, inputs, doubled, training=True, open_sizes=evaluated.open_sizes, repeats=evaluated.repeats
        )
    except CaptureError as error:
        notes.append(
            f"train mode cannot be traced ({error.where}); train mode runs the code of eval mode, with its layers in train mode\n{error}"
        )
        evaluated.eval_only = True
        follow_dtypes(evaluated, model, signature, training=False)
        notes += [*_asking(evaluated), *_keeping(evaluated), *words(evaluated.selections), *_elsewhere(evaluated)]
        return evaluated, None, notes
    notes += _freezing(trained, "train")
    evaluated.asks.update(trained.asks)
    evaluated.own_modes.update(trained.own_modes)
    evaluated.selections.update(trained.selections)
    notes += [*_asking(evaluated), *_keeping(evaluated, trained), *words(evaluated.selections)]
    evaluated.reads_whole += trained.reads_whole
    read_alike = set(trained.reads) <= set(evaluated.reads)
    merged = read_alike and _merge(evaluated, trained)  # else types are followed mode by mode
    alike = follow_dtypes(evaluated, model, signature, training=False) and read_alike
    if merged:
        return evaluated, None, [*notes, *_elsewhere(evaluated)]
    follow_dtypes(trained, model, signature, training=True, brief=alike)
    notes += dict.fromkeys((*_elsewhere(evaluated), *_elsewhere(trained)))
    notes.append("train and eval mode differ in structure: two graphs over the same modules")
    return evaluated, trained, notes


def _check_dense(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is not torch.strided:
            raise CaptureError(
                f"{name} is a {str(tensor.layout).removeprefix('torch.')} tensor",
                where=name,
                why="torch traces few operators on such tensors, and cannot compare them to the bit",
                fix=f"register it dense: {name}.to_dense()",
            )


def _keeping(*captures: Captured) -> list[str]:
    names = ", ".join(dict.fromkeys(name for captured in captures for name in captured.kept))
    return (
        [f"forward keeps tensors in attributes, which a converted network does not: have it return them\n{names}"] if names else []
    )


def _freezing(captured: Captured, mode: str) -> list[str]:
    names = ", ".join(captured.frozen)
    return [f"its own {mode}() freezes or thaws parameters, which hat.{mode}() does not\n{names}"] if names else []


def _asking(captured: Captured) -> list[str]:
    places = list(dict.fromkeys(place for asks in captured.asks.values() for place in asks))
    if not places:
        return []
    return [f"asks whether gradients are on: without a task, and where some are off, its own code runs\n{', '.join(places)}"]


def _elsewhere(captured: Captured) -> list[str]:
    return [f"takes another path {way}: calls are refused there\n{line}" for way, line in captured.unlike.items()]


def _capture_open_batch(
    model: nn.Module,
    signature: Signature,
    inputs: list[Tensor],
    doubled: bool,
    training: bool,
    open_sizes: bool = True,
    repeats: bool = True,
) -> Captured:
    batched = [t for t in inputs if t.dim() > 0]
    if doubled and batched and all(t.shape[0] == 1 for t in batched):
        try:
            pairs = [t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t for t in inputs]
            return export_mode(model, signature, pairs, training, open_sizes=open_sizes, repeats=repeats)
        except CaptureError:
            pass  # the leading dimension is no batch: captured as it is
    return export_mode(model, signature, inputs, training, open_sizes=open_sizes, repeats=repeats)


def _merge(evaluated: Captured, trained: Captured) -> bool:
    """Writes constants that differ between two otherwise equal graphs into ``evaluated`` as :class:`ByMode`."""
    put = in_order_alike(evaluated.graph, trained.graph)
    merged = _merged(evaluated, trained)
    if not merged:
        taken_out(put)
    return merged


def _merged(evaluated: Captured, trained: Captured) -> bool:
    a, b = list(evaluated.graph.nodes), list(trained.graph.nodes)
    if len(a) != len(b) or evaluated.output != trained.output:
        return False
    twin = dict(zip(a, b))
    if {k: twin[v] for k, v in evaluated.writes.items()} != trained.writes:
        return False
    changes: list[tuple[fx.Node, tuple[tuple, dict], tuple[tuple, dict]]] = []
    for x, y in zip(a, b):
        if x.op != y.op or getattr(x.target, "function", x.target) != getattr(y.target, "function", y.target):
            return False
        differs: list[bool] = []
        own = spelled_out(x, y)
        try:
            by_mode = _zip(own, spelled_out(y, x), twin, differs)
        except _Different:
            return False
        if differs:
            changes.append((x, own, by_mode))
    for node, own, by_mode in changes:
        node.args, node.kwargs = own
        node.meta["by_mode"] = by_mode
    return all(_same_constant(v, trained.constants.get(k)) for k, v in evaluated.constants.items())


def _same_constant(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


class _Different(Exception):
    """The graphs differ by more than numbers."""


def _zip(a: Any, b: Any, twin: dict[fx.Node, fx.Node], differs: list[bool]) -> Any:
    if isinstance(a, fx.Node):
        if not isinstance(b, fx.Node) or twin[a] is not b:
            raise _Different
        return a
    if isinstance(a, list | tuple):
        if not isinstance(b, list | tuple) or len(a) != len(b):
            raise _Different
        return type(a)(_zip(x, y, twin, differs) for x, y in zip(a, b)) if not hasattr(a, "_fields") else a
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            raise _Different
        return {k: _zip(v, b[k], twin, differs) for k, v in a.items()}
    if a is b or a == b:
        return a
    if isinstance(a, NUMBERS) and isinstance(b, NUMBERS) and type(a) is type(b):
        differs.append(True)
        return ByMode(train=b, eval=a)
    raise _Different
