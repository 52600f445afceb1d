"""Which types in a graph are numbers of the code, and which are the model's own: ``.to(x.dtype)`` against ``.float()``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from hatify.calling import Signature
from hatify.capture.captured import Captured
from hatify.capture.export import export_mode
from hatify.capture.tree import copy_tree
from hatify.errors import CaptureError


def follow_dtypes(captured: Captured, model: nn.Module, signature: Signature, training: bool) -> None:
    """Notes in ``node.meta["own_dtype"]`` that the types among a node's arguments follow the model's.

    The model is traced once more in another type (on fake tensors: no memory); what changed with it follows it. Only where the
    graph holds such a type at all.
    """
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    other = torch.float32 if own == torch.float64 else torch.float64
    if own is None or not any(own in _dtypes(n) for n in captured.graph.nodes):
        return
    tree, inputs = _cast(model, captured.inputs, own, other)
    try:
        twin = export_mode(tree, signature, inputs, training, open_sizes=captured.open_sizes)
    except CaptureError:
        return
    nodes, others = list(captured.graph.nodes), list(twin.graph.nodes)
    if [n.target for n in nodes if n.op == "call_function"] != [n.target for n in others if n.op == "call_function"]:
        return
    mine = dict(zip(others, nodes))
    for node, twin_node in zip(nodes, others):
        node.args, node.kwargs = _before_casts((node.args, node.kwargs), (twin_node.args, twin_node.kwargs), mine)
        if own in _dtypes(node) and other in _dtypes(twin_node) and own not in _dtypes(twin_node):
            node.meta["own_dtype"] = own


def _before_casts(own: tuple, twin: tuple, mine: dict) -> tuple:
    """``own`` arguments, reading a value itself where the code did: ``x.float()`` is ``x`` to a trace in float32, and its later
    uses look like uses of the cast."""
    flat, spec = pytree.tree_flatten(own)
    for i, (a, b) in enumerate(zip(flat, pytree.tree_leaves(twin))):
        if (
            isinstance(a, torch.fx.Node)
            and mine.get(b) is not a
            and a.target is torch.ops.aten.to.dtype
            and a.args[0] is mine.get(b)
        ):
            flat[i] = a.args[0]
    return pytree.tree_unflatten(flat, spec)


def _dtypes(node: torch.fx.Node) -> list[torch.dtype]:
    return [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, torch.dtype)]


def _cast(model: nn.Module, inputs: list[Tensor], own: torch.dtype, other: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    tree, mode, done = copy_tree(model), FakeTensorMode(allow_non_fake_inputs=True), {}

    def cast(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
            done[id(tensor)] = fake.to(other) if tensor.dtype == own else fake
            if isinstance(tensor, nn.Parameter):
                done[id(tensor)] = nn.Parameter(done[id(tensor)], tensor.requires_grad)
        return done[id(tensor)]

    with mode:
        for module in tree.modules():
            for shelf in (module._parameters, module._buffers):
                shelf.update({n: cast(t) for n, t in shelf.items() if t is not None})
        return tree, [cast(t) for t in inputs]
