"""``.half()``, ``.to(torch.bfloat16)`` and ``.double()`` of a network in memory: binary masks, protected values, finite weights."""

from __future__ import annotations

import pytest
import torch
from hand_networks import HAT, INPUTS, ConvNet, draw_masks
from torch import Tensor, nn
from torch.optim import SGD
from training import SMALLEST, defenceless, equal, inputs, learn, loss_of, network, step

import hatify
from hatify import HATPayload
from hatify.calling import flatten
from hatify.errors import NonFiniteError
from hatify.modules import Masker
from hatify.modules.masker import live_channels

CASTS = {
    "half": (torch.float16, lambda net: net.half()),
    "bfloat16": (torch.bfloat16, lambda net: net.to(torch.bfloat16)),
    "double and half": (torch.float16, lambda net: net.double().half()),
    "half and float": (torch.float32, lambda net: net.half().float()),
}
EDGES = {0: [1e-30, -1e-30, 1e-9, -1e-9, 1.0, -1.0], 1: [-0.5, -0.50001, -0.50002]}
"""Embeddings at the edge: what is positive and rounds to zero; where nothing is positive, the largest and what rounds to it."""


def put_at_the_edge(maskers: list[Masker], task: int = 0) -> None:
    with torch.no_grad():
        for masker in maskers:
            for t, values in ({task: EDGES[0]} if task else EDGES).items():
                count = min(len(values), masker.channels)
                masker.embeddings[t][:count] = torch.tensor(values[:count])
                if t == 1:
                    masker.embeddings[t][count:] = -1.0


def maskers_of(net: nn.Module) -> list[Masker]:
    return [m for m in net.modules() if isinstance(m, Masker)]


def live(net: nn.Module) -> list[Tensor]:
    return [m.live(t).clone() for m in maskers_of(net) for t in range(len(m.embeddings))]


def cast(values: tuple, dtype: torch.dtype) -> tuple:
    return tuple(v.to(dtype) if v.is_floating_point() else v for v in values)


@torch.no_grad()
def outputs(net: nn.Module, name: str, task: int, dtype: torch.dtype) -> list[Tensor]:
    batch, training = cast(inputs(name, 5, key=99), dtype), net.training
    found = [t.clone() for t in flatten(net.eval()(*batch, task=task))[0]]
    net.train(training)
    return found


def test_plain_rounding_would_change_masks() -> None:
    """The negative control of the numbers."""
    for task in EDGES:
        values = torch.tensor(EDGES[task])
        assert not torch.equal(live_channels(values.half()), live_channels(values))
    assert not torch.equal(live_channels(torch.tensor(EDGES[1]).bfloat16()), live_channels(torch.tensor(EDGES[1])))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "control"])
@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("name", ["resnet", *SMALLEST, "by hand"])
def test_no_binary_mask_changes(name: str, how: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(Masker, "_apply", nn.Module._apply)
    net = draw_masks(ConvNet(HAT)) if name == "by hand" else network(name)
    put_at_the_edge(maskers_of(net))
    before = live(net)
    dtype, change = CASTS[how]
    change(net)
    assert all(e.dtype == dtype for m in maskers_of(net) for e in m.embeddings)
    assert equal(live(net), before) == kept
    assert all(set(m(t).unique().tolist()) <= {0.0, 1.0} for m in maskers_of(net) for t in range(2))


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
@pytest.mark.parametrize("name", SMALLEST)
def test_a_finished_task_of_a_cast_network_never_changes_again(name: str, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not protected:
        defenceless(monkeypatch)
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.1))
    with hat._guard.opened():
        put_at_the_edge(list(hat.maskers.values()))
    masks = [m.live(0) for m in hat.maskers.values()]
    hat.to(torch.bfloat16)
    before = outputs(hat, name, 0, torch.bfloat16)
    assert equal([m.live(0) for m in hat.maskers.values()], masks)
    optimizer = SGD(hat.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with hat.learning(2, optimizer, steps_per_epoch=3) as run:
        for key in range(3):
            step(hat, run, optimizer, cast(inputs(name, 4, key=key), torch.bfloat16))
    assert equal(outputs(hat, name, 0, torch.bfloat16), before) == protected
    with torch.no_grad():
        for parameter in hat.parameters():
            parameter.data += 1.0
    assert equal(outputs(hat, name, 0, torch.bfloat16), before) == protected


def test_the_mask_of_before_comes_back_after_a_cast_in_retraining() -> None:
    name = SMALLEST[0]
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.1))
    with hat._guard.opened():
        put_at_the_edge(list(hat.maskers.values()))
    masks = [m.live(0) for m in hat.maskers.values()]
    run = hat.begin_task(0, SGD(hat.parameters(), lr=0.1), steps_per_epoch=3)
    with torch.no_grad():
        for masker in hat.maskers.values():
            masker.embeddings[0].neg_()
    assert not equal([m.live(0) for m in hat.maskers.values()], masks)
    hat.half()
    assert run.retraining and not equal([m.live(0) for m in hat.maskers.values()], masks)
    hat.abandon_task()
    assert equal([m.live(0) for m in hat.maskers.values()], masks)


def test_a_network_written_by_hand_is_followed() -> None:
    """Nobody tells the guard of the cast; it sees it."""
    torch.manual_seed(0)
    net = draw_masks(ConvNet(HAT)).train()
    x = INPUTS[ConvNet]()
    optimizer = SGD(net.parameters(), lr=0.1)
    with hatify.Learning(net, 0, optimizer, steps_per_epoch=2) as run:
        for _ in range(2):
            out = net(HATPayload(x, task_id=0, mask_scale=run.scale)).data
            optimizer.zero_grad()
            (loss_of(out) + run.regularization()).backward()
            optimizer.step()
    net.double().eval()
    with torch.no_grad():
        before = net(HATPayload(x.double(), task_id=0)).data.clone()
        for tensor in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
            tensor.data += 1.0
        assert torch.equal(net(HATPayload(x.double(), task_id=0)).data, before)


def test_a_weight_that_would_be_infinite_is_refused_before_anything_is_cast() -> None:
    name = SMALLEST[0]
    hat = network(name)
    parameter, where = next((p, n) for n, p in hat.named_parameters() if p.dim() > 1)
    with torch.no_grad():
        parameter.view(-1)[0] = 7e4
    with pytest.raises(NonFiniteError) as caught:
        hat.half()
    assert caught.value.where == where and "bfloat16" in caught.value.fix
    assert {p.dtype for p in hat.parameters()} == {torch.float32} and float(parameter.detach().view(-1)[0]) == 7e4
    hat.to(torch.bfloat16)
    assert all(bool(p.isfinite().all()) for p in hat.parameters())
    with torch.no_grad():
        parameter.view(-1)[0] = 6e4
    hat.half()
