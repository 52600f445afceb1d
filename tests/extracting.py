"""Finished tasks without training: random masks, and copies of their own, for tests of what comes after."""

from __future__ import annotations

import copy

import torch
from tasks import outputs, same
from torch import nn
from torch.utils._pytree import tree_map_only

import hatify
from hatify import HATModel

EXACT = 1e-9
"""Relative to the largest output, in float64."""


@torch.no_grad()
def finished(hat: HATModel, task: int, live: float = 0.6, seed: int = 0) -> HATModel:
    """Finishes ``task`` with a share ``live`` of every masker's channels live, and noise in all that is its own."""
    generator = torch.Generator().manual_seed(seed + 101 * task)
    for masker in hat.maskers.values():
        draw = torch.rand(masker.channels, generator=generator)
        masker.embeddings[task].copy_(torch.where(draw <= draw.quantile(live), 1.0, -1.0))
        masker.finished.add(task)
    maskers = {id(e) for m in hat.maskers.values() for e in m.embeddings}
    for _, copies in hat.task_copies():
        for tensor in copies(task):
            if not tensor.dtype.is_floating_point:
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            else:  # running statistics
                tensor.mul_(0.5 + torch.rand(tensor.shape, generator=generator))
    assert not maskers & {id(t) for _, copies in hat.task_copies() for t in copies(task)}
    hat.room.status.finished.add(task)
    return hat


def extracts(hat: HATModel, task: int, *calls: tuple[tuple, dict]) -> dict[bool, nn.Module]:
    """Takes a task out baked and slim (``False`` and ``True`` in what is returned). Both give what the task gives, for the example
    inputs and every call in ``calls``, and say truly how exact and how small they are.

    The numbers are compared in float64, where what remains of rounding is far from what a mask or a channel makes.
    """
    found, wide = {}, copy.deepcopy(hat).double()
    for slim in (False, True):
        plain = found[slim] = hatify.extract(hat, task, slim=slim)
        told = plain.extraction
        args, kwargs = hat.example_inputs
        assert not told["bit_equal"] or same(outputs(hat, args, kwargs, task=task), outputs(plain, args, kwargs))
        for given in (hat.example_inputs, *calls):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, given)
            expected, got = outputs(wide, args, kwargs, task=task), outputs(copy.deepcopy(plain).double(), args, kwargs)
            assert [a.shape for a in expected] == [b.shape for b in got]
            for a, b in zip(expected, got):
                assert torch.allclose(a, b, 0.0, EXACT * max(1.0, float(a.abs().max()))), (slim, float((a - b).abs().max()))
        assert told["task"] == task and told["slim"] == slim
        assert told["parameters"]["after"] == sum(p.numel() for p in plain.parameters()) <= told["parameters"]["before"]
        assert all(entry["why"] for entry in (*told["stayed"], *told["whole"]))
        assert all(layer["live"] <= layer["kept"] <= layer["of"] or layer["kept"] == 1 for layer in told["slimmed"])
        if any(layer["kept"] < layer["of"] for layer in told["slimmed"]):
            assert told["parameters"]["after"] < told["parameters"]["before"]
    return found
