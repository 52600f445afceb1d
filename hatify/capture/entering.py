"""A model's own ``train()`` and ``eval()``, called on a copy that shares its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hatify.errors import CaptureError
from hatify.modules.continuous import is_continuous


def enter_mode(root: nn.Module, model: nn.Module, training: bool) -> list[str]:
    """``train()`` or ``eval()`` of a copied tree, which shares its weights with ``model``; these and their flags are as before afterwards.

    Returns:
        The parameters that it would have frozen or thawed.

    Raises:
        CaptureError: the model's own writes to weights (adapters that are merged in eval mode), or computes tensors.
    """
    flags = [(name, parameter, parameter.requires_grad) for name, parameter in root.named_parameters()]
    own = [m for m in root.modules() if type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval]
    try:
        if own:
            _enter_by_own_code(root, model, training, own)
        else:
            root.train(training)
        return [name for name, parameter, flag in flags if parameter.requires_grad != flag]
    finally:
        for _, parameter, flag in flags:
            parameter.requires_grad_(flag)


def _enter_by_own_code(root: nn.Module, model: nn.Module, training: bool, own: list[nn.Module]) -> None:
    tensors = (*root.named_parameters(), *root.named_buffers())
    held = {n: t for n, t in tensors if not (t.is_meta or isinstance(t, FakeTensor))}  # of these there are values
    before = {n: t.detach().clone() for n, t in held.items()}
    known = _held_tensors(root)
    root.train(training) if training else root.eval()
    written = [n for n, t in held.items() if not (torch.equal(t, before[n]) or _same_with_nan(t, before[n]))]
    made = [name for key, (name, t) in _held_tensors(root).items() if key not in known and is_continuous(t)]
    if not written and not made:
        return
    with torch.no_grad():
        for name in written:
            held[name].data.copy_(before[name])
    mode = "train" if training else "eval"
    does = f"writes to weights: {', '.join(written[:3])}" if written else f"computes {', '.join(made[:3])}"
    raise CaptureError(
        f"{type(model).__name__}.{mode}() {does}",
        where=type(next((m for m in own if m is not root), model)).__name__,
        why="weights that differ between the modes cannot be learnt or locked, and what is computed from them would stay as it was",
        fix="compute it in forward, in both modes; adapters: merge_weights=False, or merge them for good before converting",
    )


def _same_with_nan(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _held_tensors(root: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """The tensors that modules hold in attributes, by ``id``, with a name."""
    return {
        id(t): (f"{path}.{name}".lstrip("."), t)
        for path, module in root.named_modules()
        for name, t in (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
        if isinstance(t, Tensor)
    }
