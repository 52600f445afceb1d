"""Derivatives forward: what ``torch.func.jvp`` gives of a task agrees with what ``backward`` gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import hatify
from hatify import HATModel

Case = Callable[[], tuple[nn.Module, Tensor]]


def transformer() -> tuple[nn.Module, Tensor]:
    return VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=12, depth=2, num_heads=2), torch.randn(2, 3, 8, 8)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(288, 3)), torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """Torch's fused attention has no derivative forward."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


CASES = {"transformer": transformer, "convolutions": convolutions}


def converted(case: Case, finished: bool) -> tuple[HATModel, Tensor]:
    torch.manual_seed(0)
    model, x = case()
    hat = hatify.convert(model.double(), 2, example_inputs=x.double(), verify=False)
    with torch.no_grad():
        for masker in hat.maskers.values():
            masker.embeddings[0].normal_(std=0.5)
    if finished:
        with hat.learning(0, schedule="constant"):
            pass
    return hat.eval(), x.double()


@pytest.mark.parametrize("finished", [False, True], ids=["soft", "finished"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward_agree(case: Case, finished: bool) -> None:
    """``<u, J v> = <J^T u, v>`` for the Jacobian by the inputs and all parameters, mask embeddings included."""
    hat, x = converted(case, finished)
    call = {"task": 0} if finished else {"task": 0, "mask_scale": 3.0}
    parameters = {name: p.detach() for name, p in hat.named_parameters()}

    def outputs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(hat, parameters, (x,), call)

    along = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(x)
    out, moved = jvp(outputs, (parameters, x), along)
    back, pulled = vjp(outputs, parameters, x)
    u = torch.randn_like(out)
    of_parameters, of_x = pulled(u)
    expected = sum((g * along[0][name]).sum() for name, g in of_parameters.items()) + (of_x * along[1]).sum()
    assert torch.equal(out, back) and moved.abs().max() > 0
    torch.testing.assert_close((moved * u).sum(), expected, rtol=1e-5, atol=1e-8)
    if finished:
        assert torch.equal(out, hat(x, **call)), "a finished task's outputs are the same, whoever asks"
    else:
        masks = [name for name in parameters if "masker.embeddings.0" in name]
        assert any(of_parameters[name].abs().max() > 0 for name in masks), "no mask takes part"


@pytest.mark.parametrize("finished", [False, True], ids=["soft", "finished"])
def test_forward_over_backward(finished: bool) -> None:
    """A Hessian by the inputs, as ``torch.func`` computes it, and the differences of gradients."""
    hat, x = converted(transformer, finished)
    call = {"task": 0} if finished else {"task": 0, "mask_scale": 3.0}

    def loss(x: Tensor) -> Tensor:
        return hat(x.unsqueeze(0), **call).square().sum()

    found = hessian(loss)(x[0]).flatten(3).flatten(0, 2)
    along, small = torch.randn(x[0].numel(), dtype=x.dtype), 1e-5
    (plus, minus) = (grad(loss)(x[0] + step * along.view_as(x[0])) for step in (small, -small))
    torch.testing.assert_close(found @ along, ((plus - minus) / (2 * small)).flatten(), rtol=1e-4, atol=1e-6)
    assert found.abs().max() > 0


FIRST = {
    "jvp": lambda call, x: jvp(call, (x,), (torch.ones_like(x),)),
    "vjp": vjp,
    "gradients of each sample": lambda call, x: vmap(grad(lambda one: call(one.unsqueeze(0)).sum()))(x),
}


@pytest.mark.parametrize("transform", FIRST.values(), ids=FIRST)
def test_a_transform_may_be_the_first_to_call(transform: Callable) -> None:
    """What is made in it, and belongs to it, is not kept for later calls."""
    torch._dynamo.reset()
    hat, x = converted(transformer, finished=True)
    expected = copy.deepcopy(hat)(x, task=0)

    def call(x: Tensor) -> Tensor:
        return hat(x, task=0)

    transform(call, x)
    assert torch.equal(hat(x, task=0), expected)
    assert torch.equal(copy.deepcopy(hat)(x, task=0), expected)
    assert torch.equal(jvp(call, (x,), (x,))[0], expected)
    compiled = torch.compile(hat, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, task=0), expected)


def test_many_directions_at_once() -> None:
    hat, x = converted(transformer, finished=True)
    along = torch.randn(4, *x.shape, dtype=x.dtype)
    together = vmap(lambda v: jvp(lambda x: hat(x, task=0), (x,), (v,))[1])(along)
    torch.testing.assert_close(together, torch.stack([jvp(lambda x: hat(x, task=0), (x,), (v,))[1] for v in along]))
