"""Layers with fewer channels: the same layer, with the chosen rows and columns of its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hatify.gates.layers import Weighted


def smaller_weight(weight: Tensor, meaning: Weighted, inputs: Tensor, outputs: Tensor, sizes: tuple[int, int]) -> Tensor:
    """A weight with the chosen channels only.

    Args:
        weight: as the layer holds it.
        inputs, outputs: the channels that stay, in order; of a grouped weight each group has as many.
        sizes: channels before, ``(inputs, outputs)``.
    """
    groups = meaning.groups
    if meaning.lookup:
        return weight.index_select(1, outputs)
    if groups == 1:
        first, second = (inputs, outputs) if meaning.transposed else (outputs, inputs)
        return weight.index_select(0, first).index_select(1, second)
    if groups == sizes[0]:  # depthwise: one group per input channel
        return weight.index_select(0, inputs if meaning.transposed else outputs)
    by_first, by_second = (inputs, outputs) if meaning.transposed else (outputs, inputs)
    per_group = sizes[1 if meaning.transposed else 0] // groups
    local = by_second.reshape(groups, -1) - per_group * torch.arange(groups).unsqueeze(1)
    return torch.stack([row[columns] for row, columns in _rows(weight, by_first, local)])


def _rows(weight: Tensor, rows: Tensor, local: Tensor) -> list[tuple[Tensor, Tensor]]:
    per_group = len(rows) // len(local)
    return [(weight[int(r)], local[i // per_group]) for i, r in enumerate(rows)]


def smaller_layer(layer: nn.Module, meaning: Weighted, inputs: Tensor, outputs: Tensor, sizes: tuple[int, int]) -> nn.Module:
    """A weighted layer with the chosen channels only."""
    made = _like(layer)
    weight = layer.get_parameter(meaning.weight)
    _set(made, meaning.weight, weight, smaller_weight(weight.detach(), meaning, inputs, outputs, sizes))
    bias = getattr(layer, meaning.bias, None) if meaning.bias else None
    if bias is not None:
        _set(made, meaning.bias, bias, bias.detach().index_select(0, outputs))
    if hasattr(made, "groups") and meaning.groups == sizes[0] > 1:
        made.groups = len(inputs)
    for name in ("in_features", "in_channels"):
        if hasattr(made, name):
            setattr(made, name, len(inputs))
    for name in ("out_features", "out_channels", "embedding_dim"):
        if hasattr(made, name):
            setattr(made, name, len(outputs))
    return made


def smaller_norm(norm: nn.Module, channels: Tensor) -> nn.Module:
    """A per-channel normalisation, or an activation with one slope per channel, with the chosen channels only."""
    made = _like(norm)
    for name, tensor in (*norm._parameters.items(), *norm._buffers.items()):
        if tensor is None or tensor.dim() != 1 or tensor.numel() == 1:
            continue
        chosen = tensor.detach().index_select(0, channels)
        if isinstance(tensor, nn.Parameter):
            _set(made, name, tensor, chosen)
        else:
            made._buffers[name] = chosen
    for name in ("num_features", "num_parameters"):
        if getattr(made, name, 1) != 1:
            setattr(made, name, len(channels))
    return made


def _like(layer: nn.Module) -> nn.Module:
    """A copy that shares no module; its own tensors are replaced by the caller."""
    memo = {id(t): t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None}
    made = copy.deepcopy(layer, memo)
    return made


def _set(layer: nn.Module, name: str, old: Tensor, value: Tensor) -> None:
    layer._parameters[name] = nn.Parameter(value.clone(), old.requires_grad)
