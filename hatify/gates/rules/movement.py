"""Operators that only move elements: the same operator, run on the tensor of ids, says where the gates went."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hatify.gates.rules.base import (
    Call,
    Gates,
    Interpreter,
    Outcome,
    RuleTable,
    after_shift,
    clean_call,
    is_open,
    one_state,
    unknown,
)
from hatify.gates.value import State, Value, compress

NAMES = [
    "view",
    "_unsafe_view",
    "reshape",
    "view_as",
    "reshape_as",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "adjoint",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "unbind",
    "slice",
    "select",
    "narrow",
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "hsplit",
    "vsplit",
    "cat",
    "concat",
    "concatenate",
    "stack",
    "hstack",
    "vstack",
    "roll",
    "unfold",
    "repeat",
    "tile",
    "expand",
    "expand_as",
    "broadcast_to",
    "squeeze",
    "unsqueeze",
    "index",
    "index_select",
    "flip",
    "rot90",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "_pad_circular",
    "im2col",
    "contiguous",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "lift_fresh",
    "repeat_interleave",
    "diagonal",
    "slice_scatter",
    "select_scatter",
    "diagonal_scatter",
    "copy",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "tril",
    "triu",
    "_reshape_alias",
]


def movement(run: Interpreter, call: Call) -> Outcome:
    """Run the operator on the ids. Data-dependent indices pass where the gates do not vary along the indexed dimensions."""
    if pads_with_value(call):
        call = clean_call(run, call)  # a soft factor must not meet the padding value (-inf times a mask)
        ids, _ = _moved(call, pad_value=True)[0]
        return Outcome(call.args, call.kwargs, Gates(ids, State.DIRTY))
    indices_gated = any(v.gated and not v.dtype.is_floating_point for v in call.values()[1:])
    if indices_gated:
        return unknown(run, call)
    if any(isinstance(a, torch.dtype) for a in call.args) or _places_are_open(call):
        return unknown(run, call)
    call, state = one_state(run, call)
    moved = _moved(call)
    if moved is None:
        return unknown(run, call)
    out = [Gates(ids, after_shift(state) if adopted and not _zero_fill(call) else state) for ids, adopted in moved]
    return Outcome(call.args, call.kwargs, out if call.name in MULTIPLE else out[0])


PLACED = {"roll", "select", "slice", "narrow", "pad", "constant_pad_nd", "select_scatter", "slice_scatter"}
"""Movements whose arguments are places, not shapes."""


def open_places(call: Call) -> list[int]:
    """The dimensions along which elements move by numbers that depend on open sizes."""
    if call.name not in PLACED | MULTIPLE or not any(is_open(a) for a in pytree.tree_leaves((call.args, call.kwargs))):
        return []
    subject = call.values()[0]
    positions = {"select": 1, "slice": 1, "narrow": 1, **dict.fromkeys(SPLITS, 2)}
    dim = call.argument(positions[call.name], "dim", 0) if call.name in positions else None
    return [dim % subject.rank] if isinstance(dim, int) else list(range(subject.rank))


def _places_are_open(call: Call) -> bool:
    """Whether elements move by numbers that depend on open sizes, along dimensions where gates differ."""
    return any(call.values()[0].varies(dim) for dim in open_places(call))


def move_tensor(call: Call, pick) -> list[Tensor] | Tensor:
    """The operator run on ``pick(value)`` in place of every tensor operand."""
    args, kwargs = call.map(pick)
    func = torch.reshape if call.name in VIEWS else call.func  # ids need not have the strides of the data
    if call.name in ("view_as", "reshape_as"):
        func, args = torch.reshape, (args[0], args[1].shape)
    return func(*args, **kwargs)


VIEWS = {"view", "_unsafe_view", "_reshape_alias"}
JOINS = {"cat", "concat", "concatenate"}
WRITES_PART = {"slice_scatter", "select_scatter"}
"""Movements that write one operand into a part of another, along one dimension."""
REGROUPING = {*VIEWS, "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
SPLITS = {"split", "split_with_sizes", "chunk", "tensor_split"}
MULTIPLE = {"unbind", *SPLITS, "hsplit", "vsplit"}


def pads_with_value(call: Call) -> bool:
    """Whether a padding holds another number than zero."""
    if call.name not in ("pad", "constant_pad_nd"):
        return False
    if call.name == "constant_pad_nd":
        return bool(call.argument(2, "value", 0))
    return call.argument(2, "mode", "constant") == "constant" and bool(call.argument(3, "value", 0))


def _zero_fill(call: Call) -> bool:
    return call.name in ("pad", "constant_pad_nd", "im2col", "tril", "triu")


def is_index(call: Call, value: Value) -> bool:
    """Whether the operand says where to read, not what."""
    return (
        value is not call.values()[0]
        and not value.dtype.is_floating_point
        and value.constant
        or (call.name in ("index", "index_select", "repeat_interleave") and value is not call.values()[0])
    )


def _moved(call: Call, pad_value: bool = False) -> list[tuple[Tensor, bool]] | None:
    if pad_value:
        position = 2 if call.name == "constant_pad_nd" else 3
        call = Call(call.name, call.func, call.args[:position], {k: v for k, v in call.kwargs.items() if k != "value"})
    subject = call.values()[0]
    blind = False
    for value in call.values()[1:]:
        if is_index(call, value) and value.known is None:
            blind = True
    if blind and not _index_is_blind_safe(call, subject):
        return None

    def pick(value: Value) -> Tensor:
        if is_index(call, value):
            return value.known if value.known is not None else torch.zeros(value.shape, dtype=value.dtype)
        return value.ids.to(torch.float64).expand(value.shape)  # expanded last: views keep the stride 0

    out = move_tensor(call, pick)
    results = list(out) if isinstance(out, list | tuple) else [out]
    return [compress(r) for r in results]


def _index_is_blind_safe(call: Call, subject: Value) -> bool:
    """Whether the result's gates are the same whatever the indices are."""
    if call.name == "index_select":
        return not subject.varies(call.argument(1, "dim"))
    if call.name == "index":
        indices = call.argument(1, "indices")
        used = [d for d, i in enumerate(indices) if i is not None]
        masks = [i for i in indices if isinstance(i, Value) and i.dtype == torch.bool]
        return not masks and not any(subject.varies(d) for d in used)
    return False


def gather(run: Interpreter, call: Call) -> Outcome:
    """``gather(x, dim, index)`` and its like: gates pass where they do not vary along ``dim`` or any other dimension read."""
    subject, dim = call.args[0], call.argument(1, "dim")
    index = call.argument(2, "index")
    others_fixed = all(not subject.varies(d) or subject.shape[d] == index.shape[d] for d in range(subject.rank) if d != dim)
    if index.gated or not isinstance(dim, int) or subject.varies(dim % max(subject.rank, 1)) or not others_fixed:
        return unknown(run, call)
    return Outcome(call.args, call.kwargs, Gates(subject.ids, subject.state))


def as_real(run: Interpreter, call: Call) -> Outcome:
    """Complex numbers as pairs: both of a pair have the number's gate."""
    value = call.values()[0]
    return Outcome(call.args, call.kwargs, Gates(value.ids.unsqueeze(-1), value.state))


def as_complex(run: Interpreter, call: Call) -> Outcome:
    """Pairs as complex numbers: gates pass where both of a pair have the same."""
    value = call.values()[0]
    if value.varies(value.rank - 1):
        return unknown(run, call)
    return Outcome(call.args, call.kwargs, Gates(value.ids.select(-1, 0), value.state))


def register(rules: RuleTable) -> None:
    rules.add(NAMES, movement)
    rules.add(["gather"], gather)
    rules.add(["view_as_real"], as_real)
    rules.add(["view_as_complex"], as_complex)
