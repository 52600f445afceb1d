"""What a model's code takes from types: ``.to(x.dtype)`` against ``.float()``, ``torch.finfo(x.dtype).min``, ``if x.dtype == torch.half``.

A trace has the types of its inputs in it. So a model that reads a type is traced in the other ones, too, and under autocast, on fake
tensors (no memory). Constants and casts that differ then are read from a type when the network runs; what differs otherwise is refused
there.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hatify.calling import Signature
from hatify.capture.captured import Captured, Way
from hatify.capture.casts import is_cast
from hatify.capture.export import export_mode
from hatify.capture.layouts import in_order_alike
from hatify.capture.regions import enter_autocast
from hatify.capture.tree import copy_tree
from hatify.capture.twins import Follower, Unlike, dtypes_of
from hatify.errors import CaptureError
from hatify.modules.types import type_of_parameters

TYPES = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
AUTOCAST = Way(torch.float32, torch.bfloat16), Way(torch.float32, torch.float16)


def follow_dtypes(captured: Captured, model: nn.Module, signature: Signature, training: bool, brief: bool = False) -> bool:
    """Notes in ``node.meta["typed"]`` which arguments of a node are taken from the type of what, and in ``captured.unlike`` in which types
    the model takes another path. The model is traced once more in each; only where its code, or the graph, knows of a type at all.

    Args:
        brief: the other mode is alike in all types, so two of them tell.

    Returns:
        Whether it is alike in all types.
    """
    own = type_of_parameters(model)
    if own is None or own not in TYPES or not _knows_types(captured, own):
        return True
    casts = [Way(t) for t in TYPES if t != own]
    ways = [casts[0], AUTOCAST[0]]
    if (captured.reads or _made(captured, own)) and not brief:  # code that never looks at a type takes no branch on it
        ways += casts[1:]
    if not brief and (captured.reads or any(n.target is enter_autocast for n in captured.graph.nodes)):
        ways.append(AUTOCAST[1])
    twins: dict[Way, Captured] = {}
    for way in ways:
        try:
            twins[way] = _traced(model, captured, signature, training, own, way)
        except CaptureError as error:
            captured.unlike[way] = f"{error.where or type(model).__name__}: {error.what}"
    for twin in (*twins.values(), *twins.values()):  # what the last one puts into the graph, the first one gets
        in_order_alike(captured.graph, twin.graph, left_out=lambda node: node.op == "get_attr" or is_cast(node))
    follower = Follower(captured, Way(own))
    for way, twin in twins.items():
        try:
            follower.add(way, twin)
        except Unlike as unlike:
            captured.unlike[way] = unlike.args[0]
    follower.settle()
    alike = not captured.unlike and not any(t.choices for n in captured.graph.nodes for t in n.meta.get("typed", {}).values())
    if alike or not brief:
        return alike
    captured.unlike.clear()
    for node in captured.graph.nodes:
        node.meta.pop("typed", None)
        if "kept" in node.meta:  # by an in-place operator
            node.meta["typed"] = dict(node.meta["kept"])
    return follow_dtypes(captured, model, signature, training)


def _knows_types(captured: Captured, own: torch.dtype) -> bool:
    """Whether the code looked at a type, or the graph holds the model's own: in an argument, or as that of a tensor which the code made."""
    return bool(captured.reads) or _made(captured, own) or any(own in dtypes_of(n) for n in captured.graph.nodes)


def _made(captured: Captured, own: torch.dtype) -> bool:
    return any(c.dtype == own for c in captured.constants.values())


def _traced(model: nn.Module, captured: Captured, signature: Signature, training: bool, own: torch.dtype, way: Way) -> Captured:
    device = captured.inputs[0].device.type if captured.inputs else "cpu"
    as_there = {"open_sizes": captured.open_sizes, "repeats": captured.repeats}
    with torch.autocast(device, dtype=way.autocast or torch.bfloat16, enabled=way.autocast is not None):
        if way.dtype == own:
            return export_mode(model, signature, captured.inputs, training, **as_there)
        try:
            tree, inputs = _cast(model, captured.inputs, way.dtype)
            return export_mode(tree, signature, inputs, training, **as_there)
        except CaptureError:  # code that looks at values
            if any(p.is_meta for p in model.parameters()):
                raise
            tree, inputs = _cast(model, captured.inputs, way.dtype, values=True)
            return export_mode(tree, signature, inputs, training, **as_there)


def _cast(model: nn.Module, inputs: list[Tensor], dtype: torch.dtype, values: bool = False) -> tuple[nn.Module, list[Tensor]]:
    """The model and its inputs in another type, as fake tensors if not with their ``values``."""
    tree, done = copy_tree(model), {}
    mode = contextlib.nullcontext() if values else FakeTensorMode(allow_non_fake_inputs=True)

    def cast(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            fake = tensor.detach() if values else mode.from_tensor(tensor.detach(), static_shapes=True)
            done[id(tensor)] = fake.to(dtype) if tensor.is_floating_point() else fake
            if isinstance(tensor, nn.Parameter):
                done[id(tensor)] = nn.Parameter(done[id(tensor)], tensor.requires_grad)
        return done[id(tensor)]

    with mode:
        for module in tree.modules():
            for shelf in (module._parameters, module._buffers):
                shelf.update({n: cast(t) for n, t in shelf.items() if t is not None})
        return tree, [cast(t) for t in inputs]
