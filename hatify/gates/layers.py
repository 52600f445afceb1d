"""What a whole layer means to the algebra, and its rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hatify.gates.locks import Use
from hatify.gates.rules import elementwise, movement, norms, reductions
from hatify.gates.rules.base import Call, Gates, Interpreter, Outcome, after_shift, clean, unknown
from hatify.gates.rules.contractions import common_along, or_along
from hatify.gates.table import TOP
from hatify.gates.value import State, Value


@dataclass(frozen=True)
class Layer:
    """What a layer means to the algebra; see the subclasses."""


@dataclass(frozen=True)
class Weighted(Layer):
    """A linear map over channels: becomes a HAT layer with a masker of its own.

    Args:
        spatial: number of trailing spatial dimensions that the map mixes (0 for linear).
        weight: name of the weight, ``(out, in / groups, ...)``.
        bias: name of the bias ``(out,)``, or None.
        transposed: the weight is ``(in, out / groups, ...)``.
        groups: as in a grouped convolution.
        row_locked: the weight is normalised per output before use, so locks are by the output.
        column_grouped: the weight is normalised per input before use (a weight-normed transposed convolution).
        gains: names of further parameters with one element per output (per input for ``column_grouped``).
        lookup: the input holds indices of rows (an embedding).
        pooled: the rows looked up are summed, averaged or reduced to their maximum: a result of two dimensions.
    """

    spatial: int = 0
    weight: str = "weight"
    bias: str | None = "bias"
    transposed: bool = False
    groups: int = 1
    row_locked: bool = False
    column_grouped: bool = False
    gains: tuple[str, ...] = ()
    lookup: bool = False
    pooled: bool = False


@dataclass(frozen=True)
class ChannelNorm(Layer):
    """Statistics per channel (dimension 1), over space and, with ``batch``, over the batch; one copy per task."""

    batch: bool = True


@dataclass(frozen=True)
class MixingNorm(Layer):
    """Statistics across channels: ``kind`` is ``layer``, ``rms`` or ``group``; one copy per task, live channels only."""

    kind: str


@dataclass(frozen=True)
class Elementwise(Layer):
    """Acts on each element alone (activations, dropout, stochastic depth). Parameters, if any, become one copy per task."""


@dataclass(frozen=True)
class Spatial(Layer):
    """Mixes the last ``dims`` dimensions and nothing else (pooling, resizing)."""

    dims: int


@dataclass(frozen=True)
class Moving(Layer):
    """Only moves elements (padding with zeros or copies, shuffles)."""


@dataclass(frozen=True)
class TaskIndexedLayer(Layer):
    """Anything else: one whole copy per task, materialised inputs. Always exact."""

    reason: str = "no rule for its weights"


def other_layer(run: Interpreter, layer: Layer, call: Call, norm_dims: int = 1) -> Outcome:
    """The rule of a layer without a masker. ``norm_dims`` is the number of trailing dimensions a layer norm spans."""
    if isinstance(layer, ChannelNorm):
        return norms.per_channel(run, call, batch=layer.batch)
    if isinstance(layer, MixingNorm):
        rank = call.values()[0].rank
        first = 1 if layer.kind == "group" else rank - norm_dims
        return norms.mixing(run, call, list(range(first, rank)))
    if isinstance(layer, Elementwise):
        return elementwise.unary(run, call)
    if isinstance(layer, Spatial):
        return reductions.spatial(run, call, layer.dims)
    if isinstance(layer, Moving):
        return movement.movement(run, call)
    return unknown(run, call)


def channels(layer: Weighted, shape: tuple[int, ...]) -> tuple[int, int]:
    """Input and output channels of a weighted layer, from its weight's shape."""
    if layer.lookup or not layer.transposed:
        return shape[1] * layer.groups, shape[1] if layer.lookup else shape[0]
    return shape[0], shape[1] * layer.groups


def channel_dim(x: Value, layer: Weighted) -> int:
    """Where the channels of a weighted layer's input (and output) are."""
    return x.rank - layer.spatial - 1


def passes_through(x: Value, layer: Weighted, inputs: int) -> bool:
    """Whether a depthwise layer works on gated channels alone, so that it needs no masker of its own."""
    if layer.lookup or layer.groups != inputs or inputs == 1 or not x.gated:
        return False
    spatial = any(x.varies(d) for d in range(channel_dim(x, layer) + 1, x.rank))
    return bool((x.ids > TOP).all()) and not spatial


@dataclass(frozen=True, eq=False)
class WeightedOutcome:
    """``x`` as the layer reads it, the gates of its output, and the gates of its weight's outputs and inputs, for locks."""

    x: Value
    out: Gates
    rows: Tensor
    cols: Tensor


def weighted(
    run: Interpreter, x: Value, layer: Weighted, atoms: Tensor | None, inputs: int, outputs: int, bias: bool
) -> WeightedOutcome:
    """The rule of a linear map: the input is materialised, the layer's own mask is left pending (applied at once where the result
    also keeps gates of other dimensions, whose soft factor came in with the input).

    ``atoms`` are the gates of the layer's masker, shape ``(outputs,)``, or None for a layer without one (a depthwise layer on gated
    channels, or an output layer).
    """
    if layer.lookup:
        x = clean(run, x)
        ids = torch.full((1,), TOP) if atoms is None else atoms
        shape = (1,) * (1 if layer.pooled else x.rank) + tuple(ids.shape)
        state = State.CLEAN if atoms is None else State.PENDING
        return WeightedOutcome(x, Gates(ids.reshape(shape), state), ids, torch.full((1,), TOP))
    dim = channel_dim(x, layer)
    cols = or_along(run.table, x.ids, dim)
    mixed = list(range(dim, x.rank))
    depthwise = layer.groups == inputs and inputs > 1
    if depthwise and not any(x.varies(d) for d in mixed[1:]):
        own = x.ids.repeat_interleave(outputs // inputs, dim) if x.varies(dim) else x.ids
        rows = cols.repeat_interleave(outputs // inputs) if len(cols) > 1 else cols
        if atoms is None:
            return WeightedOutcome(x, Gates(own, after_shift(x.state) if bias else x.state), rows, cols)
    else:
        if any(x.varies(d) for d in mixed):
            x = clean(run, x)
        own = common_along(run.table, x.ids, mixed)
    gated = bool((own > TOP).any())
    if atoms is None:
        state = State.CLEAN if not gated else State.PENDING if x.state is State.PENDING else State.DIRTY
        return WeightedOutcome(x, Gates(own, state), torch.full((1,), TOP), cols)
    atoms_there = atoms.reshape([outputs if d == dim else 1 for d in range(x.rank)])
    both = run.table.combine("and", atoms_there, own)
    if not gated or x.state is State.PENDING:
        return WeightedOutcome(x, Gates(both, State.PENDING), atoms, cols)
    state = after_shift(x.state) if bias else x.state
    return WeightedOutcome(x, Gates(both, state, factor=atoms_there), atoms, cols)


def weighted_uses(
    layer: Weighted, outcome: WeightedOutcome, shapes: dict[str, tuple[int, ...]], inputs: int, outputs: int
) -> list[Use]:
    """How a weighted layer uses its parameters. ``shapes`` gives the shape of each parameter by its name in the layer."""
    rows, cols = outcome.rows.expand(outputs), outcome.cols.expand(inputs) if not layer.lookup else outcome.cols
    shape = shapes[layer.weight]
    trailing = [1] * (len(shape) - 2)
    top = torch.full((1,) * len(shape), TOP)
    groups = layer.groups
    if layer.lookup:
        read, write = top, rows.reshape(1, -1)
    elif layer.transposed:
        read = cols.reshape(-1, 1, *trailing)
        write = rows.reshape(groups, -1).repeat_interleave(inputs // groups, 0) if groups > 1 else rows.reshape(1, -1)
        write = write.reshape(*write.shape, *trailing)
    else:
        write = rows.reshape(-1, 1, *trailing)
        read = cols.reshape(groups, -1).repeat_interleave(outputs // groups, 0) if groups > 1 else cols.reshape(1, -1)
        read = read.reshape(*read.shape, *trailing)
    grouped = layer.row_locked or layer.column_grouped
    if layer.row_locked:
        read = top
    if layer.column_grouped:
        write = top
    uses = [Use(layer.weight, write, read, shape, grouped=grouped)]
    if layer.bias is not None and layer.bias in shapes:
        uses.append(Use(layer.bias, rows, torch.full((1,), TOP), shapes[layer.bias]))
    for gain in layer.gains:
        along = cols if layer.column_grouped else rows
        size = shapes[gain]
        by = along.reshape(size) if along.numel() == torch.Size(size).numel() else torch.full((1,) * len(size), TOP)
        uses.append(Use(gain, by, torch.full((1,) * len(size), TOP), size, grouped=grouped))
    return uses
