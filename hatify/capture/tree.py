"""A copy of the module tree that shares the weights, with every leaf replaced by a marker."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointFunction

from hatify.capture.alike import again, likeness, looks
from hatify.capture.questions import inside_a_layer
from hatify.capture.repeats import clear_repeats, mark_blocks, repeated_paths
from hatify.errors import CaptureError, HatifyError
from hatify.gates.layers import ChannelNorm, Elementwise, MixingNorm
from hatify.gates.recurrent import Recurrent
from hatify.modules.closures import memory_of, whole_copy
from hatify.registry import Traced, describe

_LIBRARY = torch.library.Library("hatify", "DEF")
_LIBRARY.define("leaf(Tensor[] inputs, SymInt[] sizes, str key) -> Tensor[]")
LEAF = torch.ops.hatify.leaf.default

_APPLY = torch.autograd.Function.__dict__["apply"]
_CALLS: dict[str, LeafCall] = {}
_RESULTS: dict[Hashable, tuple[LeafCall, list[tuple[Any, ...]]]] = {}
_NUMBERS = itertools.count()


MOST_SIZE_OPERATIONS = 16
"""A symbolic size made of more operations than this makes the exporter's reasoning slower than the network is worth."""


class SizesTooLarge(Exception):
    """Symbolic sizes have grown past what can be reasoned about: all but the batch get fixed."""


@dataclass
class LeafCall:
    """One call of a leaf while tracing: where it is, how it was called (and under which autocast) and what it gave."""

    path: str
    twin: nn.Module | FunctionCall | OperatorCall
    args: Any
    static: list[Any]
    out: Any = None
    constants: list[Any] = field(default_factory=list)
    inplace: bool = False
    aliases: list[int] = field(default_factory=list)
    autocast: torch.dtype | None = None


def _stub(recorded: Any) -> Callable:
    return lambda *args, **kwargs: pytree.tree_map(
        lambda t: torch.zeros(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t, recorded
    )


class FunctionCall:
    """A user's ``torch.autograd.Function`` as one operator of the graph: its forward and backward stay its own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)


@dataclass(frozen=True)
class OperatorCall:
    """An operator that would fix the sizes that it is called with, as one that takes sizes. ``result`` makes an empty result for the same
    arguments."""

    operator: torch._ops.OpOverload
    result: Callable[..., Tensor]


class _Sym:
    """Stands for one size among the static arguments."""


def copy_tree(model: nn.Module) -> nn.Module:
    """A deep copy of the tree and of everything held in plain containers and closures, sharing parameters and buffers. Tensors that are
    neither, nor views of them, are state that forward may write to: copied."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memory = {memory_of(t) for t in shared.values()}

    def stands(tensor: Tensor) -> Tensor:
        return tensor if memory_of(tensor) in memory else tensor.detach().clone()

    return whole_copy(model, shared, stands)


def mark_leaves(
    root: nn.Module, stubs: dict[str, Any], through: Collection[str] = (), repeats: bool = True
) -> dict[str, nn.Module]:
    """Replaces the forward of every leaf in ``root`` (a copied tree) by a marker; returns the leaves by path.

    A module of ``stubs`` gives its recorded output instead of being traced; leaves at the paths of ``through`` are traced into. With
    ``repeats``, blocks that are alike are traced once.
    """
    leaves: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is None or id(child) in seen:
                continue
            seen.add(id(child))
            path = f"{prefix}{name}"
            if path in stubs:
                child.__dict__["forward"] = _stub(stubs[path])
            elif describe(child) is not None and path not in through:
                leaves[path] = child
                child.__dict__["forward"] = _Marker(path, copy_tree(child), child)
            else:
                visit(child, f"{path}.")

    visit(root, "")
    if repeats:
        mark_blocks(root, leaves)
    return leaves


@contextlib.contextmanager
def mark_functions() -> Iterator[None]:
    """While tracing, a user's autograd function is one operator too: tracing through it would lose its backward."""

    @classmethod
    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:  # recomputed in the backward pass: the same numbers, and gradients that a graph can have
            run, _, *given = args
            return run(*given)
        if cls.__module__.partition(".")[0] == "torch":
            return _APPLY.__get__(None, cls)(*args, **kwargs)
        return _Marker("", FunctionCall(cls))(*args)

    torch.autograd.Function.apply = apply
    try:
        yield
    finally:
        torch.autograd.Function.apply = _APPLY


class _Marker(Traced):
    """The forward of a leaf while tracing: one operator in the graph. ``twin`` is the leaf with tensors that the exporter leaves alone,
    ``leaf`` itself is traced through where a transform (``torch.vmap``) calls it."""

    def __init__(self, path: str, twin: nn.Module | FunctionCall | OperatorCall, leaf: nn.Module | None = None) -> None:
        self.path, self.twin, self.leaf = path, twin, leaf

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.leaf is not None and torch._C._functorch.peek_interpreter_stack() is not None:
            return type(self.leaf).forward(self.leaf, *args, **kwargs)
        if any(isinstance(a, PackedSequence) for a in (*args, *kwargs.values())):
            raise CaptureError(
                "a layer is given packed sequences",
                why="how long each of them is decides how their elements lie in memory",
                fix="give it the padded sequences, and read its outputs at their lengths",
            )
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [a for a in flat if isinstance(a, Tensor)]
        sizes = [a for a in flat if isinstance(a, torch.SymInt)]
        static = [Tensor if isinstance(a, Tensor) else _Sym if isinstance(a, torch.SymInt) else a for a in flat]
        inplace = bool(getattr(self.twin, "inplace", False)) and bool(tensors)
        key = f"{self.path}#{next(_NUMBERS)}"
        call = _CALLS[key] = LeafCall(self.path, self.twin, spec, static, inplace=inplace, autocast=_autocast_of(tensors))
        out = list(torch.ops.hatify.leaf(tensors, sizes, key))
        flat_out = [out.pop(0) if c is Tensor else c for c in call.constants]
        result = pytree.tree_unflatten(flat_out, call.out)
        if inplace and isinstance(result, Tensor):
            return tensors[0].copy_(result)
        call.inplace = False
        return result


def mark_operator(called: OperatorCall, args: tuple, kwargs: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
    """The call of an operator while tracing."""
    return _Marker("", called)(*args, **kwargs)


def arguments(call: LeafCall, tensors: list, sizes: list) -> tuple[tuple, dict]:
    """``(args, kwargs)`` of a leaf call, with ``tensors`` and ``sizes`` in their places."""
    tensors, sizes = iter(tensors), iter(sizes)
    flat = [next(tensors) if s is Tensor else next(sizes) if s is _Sym else s for s in call.static]
    return pytree.tree_unflatten(flat, call.args)


def call_of(key: str) -> LeafCall:
    """The record of a leaf call by its key."""
    return _CALLS[key]


def called_paths() -> set[str]:
    """The paths of the leaves that have been called, and of the blocks that stand for another's trace."""
    return {call.path for call in _CALLS.values()} | repeated_paths()


def clear_calls() -> None:
    """Drops the records (they hold modules)."""
    _CALLS.clear()
    _RESULTS.clear()
    clear_repeats()


@torch.library.register_fake("hatify::leaf", lib=_LIBRARY)
def _leaf_on_fakes(inputs: list[Tensor], sizes: list[int], key: str) -> list[Tensor]:
    """The results of a leaf as fake tensors, from a call that was alike where there was one."""
    call = _CALLS[key]
    with inside_a_layer(), _autocast_to(call.autocast, inputs):
        return _results_of(call, inputs, sizes)


@contextlib.contextmanager
def _autocast_to(dtype: torch.dtype | None, inputs: list[Tensor]) -> Iterator[None]:
    """Inside of an operator torch has autocast behind it; a layer is called with what was on before."""
    if dtype is None:
        yield
        return
    device = inputs[0].device.type
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_enabled(device, True)  # not torch.autocast, which a trace notes
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.set_autocast_cache_enabled(before[2])


def _autocast_of(tensors: list[Tensor]) -> torch.dtype | None:
    device = tensors[0].device.type if tensors else None
    return torch.get_autocast_dtype(device) if device is not None and torch.is_autocast_enabled(device) else None


def _results_of(call: LeafCall, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    mode = detect_fake_mode(inputs)
    alike = likeness(call.twin, inputs, [*sizes, *call.static, repr(call.args)]) if isinstance(call.twin, nn.Module) else None
    if alike is None:
        return _run_on_fakes(call, mode, inputs, sizes)
    if (mode, alike) in _RESULTS:
        known, results = _RESULTS[mode, alike]
        call.out, call.constants, call.aliases = known.out, known.constants, list(known.aliases)
        return [again(look) for look in results]
    found = _run_on_fakes(call, mode, inputs, sizes)
    _RESULTS[mode, alike] = call, [looks(t) for t in found]
    return found


def _run_on_fakes(call: LeafCall, mode: Any, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Runs the real leaf on fake tensors, parameters included, so that shapes and dtypes are the leaf's own."""
    if isinstance(call.twin, OperatorCall):
        args, kwargs = arguments(call, list(inputs), list(sizes))
        return _noted_results(call, call.twin.result(*args, **kwargs), inputs)
    if isinstance(call.twin, FunctionCall):
        args, _ = arguments(call, list(inputs), list(sizes))
        return _noted_results(call, _APPLY.__get__(None, call.twin.function)(*args), inputs)
    meaning = describe(call.twin)
    if isinstance(meaning, Recurrent) and not meaning.cell and not torch.is_autocast_enabled(inputs[0].device.type):
        return _noted_results(call, _recurrent_results(call.twin, meaning, inputs[0]), inputs)
    if isinstance(meaning, Elementwise | ChannelNorm | MixingNorm):
        kept = _kept_sizes(call, inputs, sizes)
        if kept is not None:
            return kept
    state = {n: t if isinstance(t, FakeTensor) else mode.from_tensor(t, static_shapes=True) for n, t in _named_tensors(call.twin)}
    args, kwargs = arguments(call, list(inputs), list(sizes))
    if hasattr(call.twin, "_flat_weights_names"):  # recurrent layers read their weights from a list of their own
        call.twin.__dict__["_flat_weights"] = [state.get(n) for n in call.twin._flat_weights_names]
    try:
        sizes_kept = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), sizes_kept:
            out = torch.func.functional_call(call.twin, state, args, kwargs)
    except HatifyError:
        raise
    except Exception:  # a layer that looks into its data, kept whole: its shapes are learned from real runs
        out = _probed(call, inputs, sizes)
        if out is None:
            raise
    return _noted_results(call, out, inputs)


def _kept_sizes(call: LeafCall, inputs: list[Tensor], sizes: list[int]) -> list[Tensor] | None:
    """The result of a layer that keeps sizes, or None where it cannot be told so.

    The layer runs on fake tensors of the example's sizes: torch's reasoning about open ones takes many times as long for an activation or
    a norm. What is learned is the result's dtype, order of dimensions and memory.
    """
    x, held = inputs[0], [*call.twin.parameters(), *call.twin.buffers()]
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in (*x.shape, *x.stride())]
    special = any(
        isinstance(s, torch.SymInt) and s.node.hint in (None, 0, 1) for s in (*x.shape, *x.stride())
    )  # no size like others
    if len(inputs) > 1 or sizes or special or any(isinstance(t, FakeTensor) for t in held):
        return None
    shape, stride = tuple(hints[: x.dim()]), tuple(hints[x.dim() :])
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        example = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
        state = {n: mode.from_tensor(t, static_shapes=True) for n, t in _named_tensors(call.twin)}
        args, kwargs = arguments(call, [example], [])
        try:
            out = torch.func.functional_call(call.twin, state, args, kwargs)
        except Exception:  # it looks into its data, or is given what it does not take: the run on open sizes says which
            return None
        if not isinstance(out, Tensor) or out.shape != shape:
            return None
        same, contiguous, dtype = out.stride() == stride, out.is_contiguous(), out.dtype
        alias = out.untyped_storage()._cdata == example.untyped_storage()._cdata
    if alias:
        return _noted_results(call, x, inputs)
    if not same and not contiguous:
        return None
    stride = x.stride() if same else x.new_empty(x.shape).stride()
    return _noted_results(call, torch.empty_strided(x.shape, stride, dtype=dtype, device=x.device), inputs)


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _recurrent_results(twin: nn.RNNBase, meaning: Recurrent, x: Tensor) -> Any:
    """Empty results of a recurrent layer: run on fake tensors it would unroll its steps and fix the sequence's length."""
    passed = meaning.projected or meaning.hidden
    batch = () if x.dim() == 2 else (x.shape[0 if twin.batch_first else 1],)
    stages, dtype = meaning.layers * meaning.directions, twin.weight_ih_l0.dtype
    states = tuple(x.new_empty((stages, *batch, size), dtype=dtype) for size in (passed, meaning.hidden))
    out = x.new_empty((*x.shape[:-1], meaning.directions * passed), dtype=dtype)
    return out, states if meaning.memory else states[0]


def _probed(call: LeafCall, inputs: list[Tensor], sizes: list[int]) -> Any:
    """Empty results of a whole layer whose inside cannot be traced, or None where its result's sizes cannot be told.

    The layer runs on random data of the example's sizes, and again with each open size one larger: a result's size that grows with
    one is that one.
    """
    symbols = list({str(s): s for t in inputs for s in t.shape if isinstance(s, torch.SymInt)}.values())
    if sizes or any(not s.node.expr.is_symbol for s in symbols) or any(p.is_meta for p in call.twin.parameters()):
        return None
    hints = {str(s): s.node.hint for s in symbols}
    runs = [_real_run(call, inputs, {**hints, **grown}) for grown in ({}, *({name: hints[name] + 1} for name in hints))]
    first, *others = [pytree.tree_flatten(run) for run in runs]
    if any(other[1] != first[1] for other in others):
        return None
    leaves: list[Any] = []
    for number, leaf in enumerate(first[0]):
        if not isinstance(leaf, Tensor):
            leaves.append(leaf)
            continue
        shape: list[Any] = list(leaf.shape)
        for symbol, other in zip(symbols, others):
            for dim, size in enumerate(other[0][number].shape):
                if size == leaf.shape[dim] + 1:
                    shape[dim] = symbol
                elif size != leaf.shape[dim]:
                    return None
        leaves.append(inputs[0].new_empty(shape, dtype=leaf.dtype))
    return pytree.tree_unflatten(leaves, first[1])


def _real_run(call: LeafCall, inputs: list[Tensor], hints: dict[str, int]) -> Any:
    shapes = [[hints[str(s)] if isinstance(s, torch.SymInt) else s for s in t.shape] for t in inputs]
    dtypes = [t.dtype for t in inputs]
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        data = [torch.randn(s).to(d) if d.is_floating_point else torch.zeros(s, dtype=d) for s, d in zip(shapes, dtypes)]
        args, kwargs = arguments(call, data, [])
        return copy.deepcopy(call.twin)(*args, **kwargs)


def _noted_results(call: LeafCall, out: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The tensors of a result, fresh where they alias an input; its structure goes into the record."""
    flat, call.out = pytree.tree_flatten(out)
    call.constants = [Tensor if isinstance(t, Tensor) else t for t in flat]
    if any(isinstance(s, torch.SymInt) and s.node.expr.count_ops() > MOST_SIZE_OPERATIONS for t in inputs for s in t.shape):
        raise SizesTooLarge
    given = {t.untyped_storage()._cdata: i for i, t in enumerate(inputs)}
    # what works in place writes its result back, which is seen; see _Marker
    call.aliases = (
        [] if call.inplace else [given[s] for t in flat if isinstance(t, Tensor) and (s := t.untyped_storage()._cdata) in given]
    )
    return [t.clone() if t.untyped_storage()._cdata in given else t for t in flat if isinstance(t, Tensor)]
