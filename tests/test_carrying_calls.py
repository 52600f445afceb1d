"""Masks in weights, whoever calls, from wherever, with whatever done to the network since."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from carrying_networks import IMAGES, LAYERS, differ, drawn, network, soft_step
from tasks import outputs, same, uncarried
from torch import Tensor, nn
from torch.nn.utils import parametrize

FIRST_CALLS = {
    "inference mode": lambda call: torch.inference_mode()(call)(),
    "double by default": lambda call: _with_default(torch.float64, call),
    "another device by default": lambda call: _on_device(torch.device("meta"), call),
    "a transform": lambda call: torch.func.grad(lambda s: call() * s)(torch.ones(())),
}


def _with_default(dtype: torch.dtype, call: Callable) -> None:
    torch.set_default_dtype(dtype)
    try:
        call()
    finally:
        torch.set_default_dtype(torch.float32)


def _on_device(device: torch.device, call: Callable) -> None:
    with device:
        call()


@pytest.mark.parametrize("where", FIRST_CALLS)
@pytest.mark.parametrize("name", ["norm", "attention"])
def test_the_first_call_may_be_anywhere(name: str, where: str) -> None:
    if name == "norm":
        hat, x = network(nn.ReLU()), IMAGES
    else:
        hat, x = drawn(LAYERS[name][0], 100)
    other = uncarried(hat)
    FIRST_CALLS[where](lambda: hat(x, task=0, mask_scale=3.0).sum())
    assert not differ(soft_step(hat, (x,), {}, 3.0), soft_step(other, (x,), {}, 3.0))


@pytest.mark.parametrize("path", ["conv", "norm", "norm.tasks.0", "act"])
def test_whoever_has_hooks_sees_and_changes_what_stands_in_the_code(path: str) -> None:
    hat = network(nn.ReLU())
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    other = uncarried(hat)
    outputs(hat, (IMAGES,), task=0)
    seen: list[Tensor] = []
    for model in (hat, other):
        model.get_submodule(path).register_forward_hook(lambda module, args, out: (seen.append(out.clone()), out + 1)[1])
    assert same(outputs(hat, (IMAGES,), task=0), outputs(other, (IMAGES,), task=0))
    assert same(seen[:1], seen[1:])


class Wrapped(nn.Module):
    """A layer in another one, as adapters have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


CHANGES = {
    "another activation": lambda hat: setattr(hat, "act", nn.GELU()),
    "a wrapper": lambda hat: setattr(hat, "conv", Wrapped(hat.conv)),
    "a forward of its own": lambda hat: setattr(hat.next, "forward", lambda x: torch.tanh(F.conv2d(x, hat.next.weight))),
    "a parametrized copy": lambda hat: parametrize.register_parametrization(hat.norm.tasks[0], "weight", nn.Softplus()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_is_replaced_after_the_first_call_is_what_is_called(change: str) -> None:
    hat = network(nn.ReLU())
    other = uncarried(hat)
    for model in (hat, other):
        model(IMAGES, task=0, mask_scale=3.0)
        CHANGES[change](model)
    a, b = (model(IMAGES, task=0, mask_scale=3.0) for model in (hat, other))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_threads_see_each_other_carry_nothing() -> None:
    hat = network(nn.ReLU())
    hat.eval()
    scales = [1.0, 50.0]
    with torch.no_grad():
        expected = [hat(IMAGES, task=0, mask_scale=s) for s in scales]
    wrong: list[float] = []

    def call(scale: float, result: Tensor) -> None:
        with torch.no_grad():
            wrong.extend(scale for _ in range(100) if not torch.equal(hat(IMAGES, task=0, mask_scale=scale), result))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=call, args=given) for given in zip(scales, expected)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert all(isinstance(p, nn.Parameter) for p in hat.norm.tasks[0]._parameters.values())
