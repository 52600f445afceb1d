"""The last step to a plain module: normalisations over live channels written out, and the graph made a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from hatify.lifecycle.picture import Picture
from hatify.lifecycle.plain import LIVE_NORMS, Plain, tidy
from hatify.modules import live_norms
from hatify.modules.grouped import GROUPED_MM


def module_of(plain: Plain, picture: Picture, name: str = "Extracted") -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph as a module, in eval mode, and what had to take another name. Nothing in it is of hatify."""
    for node in list(plain.graph.nodes):
        if node.target in LIVE_NORMS or node.target is GROUPED_MM:
            write_out(plain.graph, node, picture)
    tidy(plain.graph)
    plain.drop_unused_buffers()
    renamed = _rename_hidden(plain)
    module = fx.GraphModule(plain.root, plain.graph, class_name=name)
    for shelf in ("_parameters", "_buffers", "_modules"):
        # fx keeps what the graph names; the state dict keeps the original's order, unused entries included
        module.__dict__[shelf] = dict(plain.root.__dict__[shelf])
    module._non_persistent_buffers_set = set(plain.root._non_persistent_buffers_set)
    return module.eval(), renamed


def _rename_hidden(plain: Plain) -> dict[str, str]:
    """Children, parameters and buffers that are called like what every GraphModule has (``code``, ``graph``): the generated code reads
    them as attributes, so they cannot keep these names. Returns the new ones."""
    root, empty = plain.root, fx.GraphModule(nn.Module(), fx.Graph())
    empty.extraction = None
    shelves = (root._parameters, root._buffers, root._modules)
    taken = {name for shelf in shelves for name in shelf}
    renamed: dict[str, str] = {}
    for name in sorted(taken):
        new = name
        while hasattr(empty, new) or (new != name and new in taken):
            new += "_"
        if new != name:
            renamed[name] = new
            taken.add(new)
    for shelf in shelves if renamed else ():
        entries = [(renamed.get(name, name), value) for name, value in shelf.items()]  # in the order that they had
        shelf.clear()
        shelf.update(entries)
    root._non_persistent_buffers_set = {renamed.get(name, name) for name in root._non_persistent_buffers_set}
    for node in plain.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            first, dot, rest = node.target.partition(".")
            node.target = renamed.get(first, first) + dot + rest
    return renamed


def write_out(graph: fx.Graph, node: fx.Node, picture: Picture) -> None:
    """A normalisation over live channels as plain operators, the same as :mod:`hatify.modules.live_norms`; or a grouped product."""
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def proxy(value: Any) -> Any:
        return fx.Proxy(value, tracer) if isinstance(value, fx.Node) else value

    with graph.inserting_before(node):
        if node.target is GROUPED_MM:
            operands = (*node.args, *node.kwargs.values())
            out = _grouped_mm(*map(proxy, operands), experts=picture[operands[1]].shape[0])
        else:
            out = _RULES[node.target](*map(proxy, node.args), proxy(node.kwargs["live"]), len(picture[node].shape))
    out.node.meta.update(node.meta)
    node.replace_all_uses_with(out.node)
    graph.erase_node(node)


def _grouped_mm(x: Any, weight: Any, offs: Any, experts: int) -> Any:
    """All rows go through all experts, and each keeps what its own gave: more work than the sorted rows were, but sizes that depend on
    data are nothing that ``torch.export`` or ONNX take."""
    rows = torch.arange(x.size(0), device=x.device)
    out = x.new_zeros((x.size(0), weight.size(2)))
    for expert in reversed(range(experts)):
        out = torch.where((rows < offs[expert]).unsqueeze(1), torch.mm(x, weight[expert]), out)
    return out


def _layer_norm(x: Any, shape: tuple, weight: Any, bias: Any, eps: float, live: Any, rank: int) -> Any:
    dims = list(range(rank - len(shape), rank))
    return _affine(_normalised(x, live, dims, eps, True), weight, bias)


def _rms_norm(x: Any, shape: tuple, weight: Any, eps: float | None, live: Any, rank: int) -> Any:
    eps = _called(x, torch.finfo, _wide(x)).eps if eps is None else eps
    return _affine(_normalised(x, live, list(range(rank - len(shape), rank)), eps, False), weight, None)


def _group_norm(x: Any, groups: int, weight: Any, bias: Any, eps: float, live: Any, rank: int) -> Any:
    grouped = x.unflatten(1, (groups, -1))
    mask = live.expand(-1, x.size(1), *[-1] * (rank - 2)).unflatten(1, (groups, -1))
    out = _normalised(grouped, mask, list(range(2, rank + 1)), eps, True).flatten(1, 2)
    by_channel = (-1, *[1] * (rank - 2))
    return _affine(out, None if weight is None else weight.view(by_channel), None if bias is None else bias.view(by_channel))


_RULES: dict[Callable, Callable] = {
    live_norms.layer_norm: _layer_norm, live_norms.rms_norm: _rms_norm, live_norms.group_norm: _group_norm,
}  # fmt: skip


def _normalised(x: Any, live: Any, dims: list[int], eps: Any, centred: bool) -> Any:
    """Half types are computed in float32, whatever type the module is cast to."""
    wide = x.to(_wide(x))
    mask = live.to(wide.dtype)
    repeats = 1
    for dim in dims:
        repeats = (x.size(dim) // mask.size(dim)) * repeats
    count = mask.sum(dims, keepdim=True) * repeats
    count = torch.where(count > 0, count, torch.ones_like(count))
    if centred:
        wide = torch.where(mask > 0, wide - wide.sum(dims, keepdim=True) / count, 0.0)
    variance = (wide.square() * mask).sum(dims, keepdim=True) / count
    return (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def _wide(x: fx.Proxy) -> fx.Proxy:
    """The type that a norm of ``x`` is computed in."""
    return _called(x, torch.promote_types, x.dtype, torch.float32)


def _called(x: fx.Proxy, function: Callable, *args: Any) -> fx.Proxy:
    """A call of what takes types, which no proxy reaches by itself."""
    return x.tracer.create_proxy("call_function", function, args, {})


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
