"""Masks that layers and norms carry in their weights: the same results, activations less."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from tasks import converted, draw_masks, maskers, outputs, same, small, uncarried
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from hatify import ChannelNorm, HATModel, registry
from hatify.calling import flatten
from hatify.rewrite import carrying

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Two convolutions with a norm between, and what stands behind the norm."""

    def __init__(self, behind: object, norm: object = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)
        self.act = behind if isinstance(behind, nn.Module) else None
        self.behind = None if isinstance(behind, nn.Module) else behind

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = self.act(x) if self.act is not None else self.behind(x)
        return self.head(F.relu(self.next(x)).mean((2, 3)))


class ActNorm(nn.BatchNorm2d):
    """A norm with an activation of its own, as timm has them."""

    def __init__(self, channels: int, act: object = F.relu) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


CARRIED = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "pooling": nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2)),
    "average": lambda x: F.avg_pool2d(x, 2),
    "nothing": nn.Identity(),
}
NOT_CARRIED = {
    "gelu": nn.GELU(),
    "silu": F.silu,
    "tanh": nn.Tanh(),
    "relu6": nn.ReLU6(),
    "two readers, one not masked": lambda x: F.relu(x) * x.mean((2, 3), keepdim=True).sigmoid(),
    "a number added": lambda x: F.relu(x + 1),
}


def network(behind: object, norm: object = nn.BatchNorm2d) -> HATModel:
    torch.manual_seed(0)
    model = Body(behind, norm)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    hat = converted(model, IMAGES)
    draw_masks(hat)
    return hat


def carriers(hat: HATModel, which: str = "mask") -> list[str]:
    """Which layers and norms carry the masks of their outputs (or ``inputs``) in eval mode, by their paths."""
    graph = carrying.carrying(hat, hat.graph, hat.maskers)
    return [] if graph is None else [n.target for n in graph.nodes if which in n.kwargs]


def carries(hat: HATModel) -> bool:
    return "norm" in carriers(hat)


def step(hat: HATModel, scale: float) -> list[Tensor]:
    """Output, gradients and statistics of a soft pass in train mode."""
    hat.train()
    hat.zero_grad()
    out = hat(IMAGES, task=0, mask_scale=scale)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    buffers = [b.clone() for n, b in hat.named_buffers() if ".tasks.0." in n]
    return [out.detach(), *(p.grad for p in hat.parameters() if p.grad is not None), *buffers]


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_carried_mask_is_the_mask(name: str, scale: float) -> None:
    hat = network(CARRIED[name])
    other = uncarried(hat)
    assert carries(hat)
    for a, b in zip(step(hat, scale), step(other, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_does_not_commute_with_a_factor_is_masked_where_it_stands(name: str) -> None:
    assert not carries(network(NOT_CARRIED[name]))


def test_what_is_wrongly_carried_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a mask carried through GELU gives something else."""
    monkeypatch.setattr(carrying, "HOMOGENEOUS", (*carrying.HOMOGENEOUS, nn.GELU))
    hat = network(NOT_CARRIED["gelu"])
    other = uncarried(hat)
    assert carries(hat)
    assert not torch.allclose(step(hat, 1.0)[0], step(other, 1.0)[0], atol=1e-3)


@pytest.mark.parametrize(("act", "expected"), [(F.relu, True), (F.silu, False), (torch.sigmoid, False)])
def test_a_norm_of_ones_own_is_tried(act: object, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a class of norms commutes with a factor is not known by its name."""
    monkeypatch.setitem(registry._DESCRIPTIONS, ActNorm, lambda norm: ChannelNorm())
    assert carries(network(nn.Identity(), lambda channels: ActNorm(channels, act))) == expected


@pytest.mark.parametrize("name", CARRIED)
def test_a_finished_task_gives_the_same_bits_either_way(name: str) -> None:
    hat = network(CARRIED[name])
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    sealed = outputs(hat, (IMAGES,), task=0)
    with torch.enable_grad():
        assert same([hat(IMAGES, task=0).detach()], sealed)
    assert same(outputs(uncarried(hat), (IMAGES,), task=0), sealed)


def test_an_overflow_in_a_dead_channel_reaches_no_finished_task() -> None:
    """Infinity times zero is NaN: where weights that a later task may train are read, masks are applied where they stand."""
    hat = network(nn.ReLU())
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    before = outputs(hat, (IMAGES,), task=0)
    dead = ~maskers(hat)[0].live(0)
    hat.conv.weight.data[dead] = 3e38
    assert not hat.conv(IMAGES).isfinite().all()
    assert same(outputs(hat, (IMAGES,), task=0), before)
    with torch.enable_grad():
        assert same([hat(IMAGES, task=0).detach()], before)


def test_copies_and_new_tasks_carry_too() -> None:
    hat = network(nn.ReLU())
    hat.add_tasks(1)
    other = copy.deepcopy(hat)
    assert carries(other)
    assert same(step(hat, 3.0), step(other, 3.0))


class Two(nn.Module):
    """A layer, what is done with its result, and what reads that; ``(batch, 5, 6)`` in, ``(batch, 5, 3)`` out."""

    def __init__(self, between: Callable[[Tensor], Tensor], layer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.between = layer, between
        self.second, self.head = nn.Linear(width, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.between(self.first(x)))))


class Attention(nn.Module):
    """Two heads of two channels, from one layer; the product with the values by torch's function or by matrix products."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.proj, self.head = fused, nn.Linear(6, 12), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q * 0.5 @ k.transpose(-1, -2), -1) @ v
        return self.head(x + self.proj(y.transpose(1, 2).flatten(2)))


class Separate(nn.Module):
    """Attention with a layer each for queries, keys and values: the masks of queries and keys are both layers'."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Product(nn.Module):
    """The product of two layers' results, which has one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)
        self.second, self.head = nn.Linear(4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.left(x) * self.right(x))))


class Convolutions(nn.Module):
    """Convolutions with strides and groups, without a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(5, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 12, 3, groups=4, padding=1, padding_mode="replicate")
        self.depthwise = nn.Conv1d(12, 24, 3, groups=12, padding=1, bias=False)
        self.conv2 = nn.Conv1d(24, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.grouped(F.silu(self.conv1(x))))
        return self.head(torch.tanh(self.conv2(F.gelu(self.depthwise(x)))).mean(2))


def twice(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * b


LAYERS = {
    "views": (
        lambda: Two(lambda x: x.reshape(*x.shape[:-1], 2, 4).transpose(-1, -2).flatten(-2), nn.Linear(6, 8), 8),
        "first second",
    ),
    "a part": (lambda: Two(lambda x: x[..., 2:6], nn.Linear(6, 8), 4), "second"),
    "read twice": (lambda: Two(lambda x: x + torch.relu(x), nn.Linear(6, 8), 8), "second"),
    "two halves multiplied": (lambda: Two(twice, nn.Linear(6, 8), 4), "second"),
    "a rounded quotient": (lambda: Two(lambda x: torch.div(x, 0.1, rounding_mode="floor"), nn.Linear(6, 8), 8), "second"),
    "relu in place": (lambda: Two(nn.ReLU(inplace=True), nn.Linear(6, 8), 8), "second"),
    "gate": (lambda: Two(F.glu, nn.Linear(6, 8), 4), "second"),
    "gelu": (lambda: Two(F.gelu, nn.Linear(6, 8), 8), "second"),
    "attention": (lambda: Attention(fused=True), "qkv proj"),
    "attention by products": (lambda: Attention(fused=False), "qkv proj"),
    "attention by three layers": (Separate, "query key value"),
    "product": (Product, "left second"),
    "convolutions": (Convolutions, ""),
}
INPUTS = {
    "a part": "second", "read twice": "second", "two halves multiplied": "second", "gate": "second", "gelu": "second",
    "a rounded quotient": "second", "relu in place": "second", "convolutions": "grouped conv2",
}  # fmt: skip
"""What carries the mask of its output, and what that of its input."""


def drawn(make: Callable[[], nn.Module], batch: int) -> tuple[HATModel, Tensor]:
    torch.manual_seed(0)
    hat, x = converted(make(), torch.randn(2, 5, 6)), torch.randn(batch, 5, 6)
    draw_masks(hat)
    return hat, x


def soft_step(hat: HATModel, args: tuple, kwargs: dict, scale: float) -> dict[str, Tensor]:
    """Outputs and gradients of a soft pass of task 0 in train mode, in double precision."""
    args, kwargs = pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, (args, kwargs))
    hat.double().train()
    torch.manual_seed(3)
    outs = [o for o in flatten(hat(*args, **kwargs, task=0, mask_scale=scale))[0] if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    return found | {name: p.grad for name, p in hat.named_parameters() if p.grad is not None}


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """In what two soft steps differ by more than masks' single precision explains."""
    assert a.keys() == b.keys()
    unit = max(float(v.abs().max()) for v in b.values() if v.numel())
    return [name for name in a if a[name].numel() and float((a[name] - b[name]).abs().max()) > 1e-6 * unit]


@pytest.mark.parametrize("batch", [1, 100])  # weights have more elements than what the layers give, or fewer
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_carries_the_masks_of_what_becomes_of_its_result(name: str, batch: int) -> None:
    make, carrying_out = LAYERS[name]
    hat, x = drawn(make, batch)
    assert carriers(hat) == carrying_out.split()
    assert carriers(hat, "inputs") == INPUTS.get(name, "").split()
    other = uncarried(hat)
    assert not differ(soft_step(hat, (x,), {}, 3.0), soft_step(other, (x,), {}, 3.0))


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("name", LAYERS)
def test_a_finished_task_gives_the_same_bits_whatever_layers_carry(name: str, batch: int) -> None:
    hat, x = drawn(LAYERS[name][0], batch)
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    sealed = outputs(hat, (x,), task=0)
    assert same(outputs(uncarried(hat), (x,), task=0), sealed)
    with torch.enable_grad():
        assert same([hat(x, task=0).detach()], sealed)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("gelu", lambda m: m.setattr(carrying, "OPERATORS", {*carrying.OPERATORS, "gelu"})),
        ("gelu", lambda m: m.setitem(carrying.LINEAR, "gelu", (0,))),
        ("two halves multiplied", lambda m: m.setattr(carrying, "set", lambda: _Never(), raising=False)),
    ],
    ids=["not homogeneous", "not linear", "two factors, a mask each"],
)
def test_what_a_layer_carries_wrongly_is_seen(name: str, patch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls."""
    patch(monkeypatch)
    hat, x = drawn(LAYERS[name][0], 100)
    assert carriers(hat)[0] == "first"
    other = uncarried(hat)
    assert differ(soft_step(hat, (x,), {}, 3.0), soft_step(other, (x,), {}, 3.0))


class _Never(set):
    """Has nothing in it, whatever is added."""

    def add(self, element: object) -> None: ...


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_the_same_with_masks_carried(name: str) -> None:
    hat, args, kwargs = small(name)
    draw_masks(hat)
    other = uncarried(hat)
    assert not differ(soft_step(hat, args, kwargs, 3.0), soft_step(other, args, kwargs, 3.0))


def test_a_mask_made_where_gradients_are_off_has_gradients_behind_it() -> None:
    """A frozen part under ``no_grad`` may be the first to ask for a mask that the rest of the pass trains through."""
    hat, args, kwargs = small("frozen_stem")
    draw_masks(hat)
    for network in (hat, uncarried(hat)):
        found = soft_step(network, args, kwargs, 3.0)
        assert found["trainable_stem.masker.embeddings.0"].abs().max() > 0


class Frozen(nn.Module):
    """A layer and a norm whose gradients are switched off around the call, not their masks'."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = self.first(x)
            b = self.norm(a + 1)
        return self.head(F.relu(self.second(F.relu(a) + F.relu(b))))


@pytest.mark.parametrize("batch", [1, 100])
def test_no_mask_moves_into_a_region_without_gradients(batch: int) -> None:
    hat, x = drawn(Frozen, batch)
    assert carriers(hat) == ["second"]
    other = uncarried(hat)
    assert not differ(soft_step(hat, (x,), {}, 3.0), soft_step(other, (x,), {}, 3.0))


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


@torch.library.custom_op("hatify_tests::relu", mutates_args=())
def not_relu(x: Tensor) -> Tensor:
    return torch.tanh(x)


not_relu.register_fake(torch.empty_like)
not_relu.register_autograd(
    lambda ctx, g: g * (1 - ctx.saved_tensors[0] ** 2), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output)
)


def test_an_operator_is_not_known_by_its_name_alone() -> None:
    hat, x = drawn(lambda: Two(lambda x: not_relu(x), nn.Linear(6, 8), 8), 100)
    assert carriers(hat) == ["second"]


@pytest.mark.parametrize(
    ("act", "expected"), [(F.relu, True), (F.hardtanh, False), (partial(F.hardtanh, min_val=-20.0, max_val=20.0), False)]
)
def test_a_norm_that_clips_large_values_does_not_carry(act: object, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._DESCRIPTIONS, ActNorm, lambda norm: ChannelNorm())
    assert carries(network(nn.Identity(), lambda channels: ActNorm(channels, act))) == expected


def _of_one_size(x: Tensor) -> Tensor:
    if x.shape[-1] != 6:
        raise ValueError("not mine")
    return x


class Counting(nn.BatchNorm2d):
    """A norm that keeps something of each call outside its buffers."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


@pytest.mark.parametrize("make", [partial(ActNorm, act=_of_one_size), Counting])
def test_a_norm_that_cannot_be_tried_or_remembers_calls_does_not_carry(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (ActNorm, Counting):
        monkeypatch.setitem(registry._DESCRIPTIONS, kind, lambda norm: ChannelNorm())
    assert not carries(network(nn.Identity(), make))


def test_half_precision_overflows_in_no_dead_channel() -> None:
    hat, x = drawn(lambda: Two(torch.square, nn.Linear(6, 8), 8), 100)
    hat.half()
    dead = hat.maskers["first"].embeddings[0].argmin()
    with torch.no_grad():
        hat.maskers["first"].embeddings[0][dead] = -6.0
        hat.first.bias[dead] = 300.0  # its square is more than half precision has
    assert carriers(hat, "inputs") == ["second"]
    assert hat.train()(x.half(), task=0, mask_scale=20.0).isfinite().all()


def test_zeros_of_a_finished_task_keep_their_sign() -> None:
    hat, x = drawn(lambda: Two(lambda x: torch.copysign(torch.ones(()), torch.relu(x) * -2), nn.Linear(6, 8), 8), 100)
    assert carriers(hat)[0] == "first"  # while masks are soft
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    assert same(outputs(hat, (x,), task=0), outputs(uncarried(hat), (x,), task=0))
