"""Laws of hand-written HAT networks: parity, equality with converted ones, zero drift, locks."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import hand_networks
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hand_networks import CONFIG, HAT, INPUTS, PLAIN, Depthwise, draw_copies, draw_masks, made, maskers, outputs
from tasks import uncarried
from torch import nn

import hatify
from hatify.errors import TaskError
from hatify.modules import HATEmbedding, HATLinear, HATPayload, TaskIndexedParameter, eager, task_indexed_class
from hatify.modules.eager import MOST_USES
from hatify.modules.hand_written import locks

NETWORKS = list(INPUTS)


def drift(network, x, without=()):
    """How far task 0 moves when everything it does not own becomes noise; ``without`` loses its locks."""
    before = outputs(network, x)
    kept = locks(network, [0])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if not tensor.is_floating_point() or ".tasks.0" in name or ".embeddings.0" in name:
                continue
            noise = torch.rand(tensor.shape, generator=generator) * 2
            lock = kept.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
            tensor.copy_(noise if name in without else torch.where(lock, tensor, noise))
    return (outputs(network, x) - before).abs().max().item()


# laws


@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_without_a_task_it_is_the_plain_network_to_the_bit(net, training):
    hat, plain = net(HAT).train(training), net(PLAIN).train(training)
    plain.load_state_dict({k: v for k, v in hat.state_dict().items() if k in plain.state_dict()})
    x = INPUTS[net]()
    out, expected = hat(HATPayload(x.clone())), plain(x.clone())
    assert torch.equal(out.data, expected) and torch.equal(hat(x.clone()), plain(x.clone()))
    assert out.mask is None and out.task_id is None
    out.data.square().sum().backward()
    expected.square().sum().backward()
    own = dict(hat.named_parameters())
    assert all(torch.equal(p.grad, own[name].grad) for name, p in plain.named_parameters())


@pytest.mark.parametrize("net", [n for n in NETWORKS if n is not Depthwise])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_it_equals_the_converted_network_to_the_bit(net, scale):
    x = INPUTS[net]()
    converted = hatify.convert(net(PLAIN), 3, example_inputs=x, heads="hat", verify=False)
    draw_copies(draw_masks(converted))
    converted = uncarried(converted)  # a network written by hand masks where its author does
    hand = net(HAT)
    missing, _ = hand.load_state_dict(converted.state_dict(), strict=False)
    assert not missing
    for training in (False, True):
        expected = converted.train(training)(x.clone(), task=1, mask_scale=scale or (1e9 if training else None))
        out = hand.train(training)(HATPayload(x.clone(), 1, scale or (1e9 if training else None))).data
        assert torch.equal(out, expected)


@pytest.mark.parametrize("net", NETWORKS)
def test_zero_drift_and_drift_without_one_lock(net):
    network, x = made(net), INPUTS[net]()
    assert sum(int((~lock).sum()) for lock in locks_after_run(network, x).values()) > 0
    assert drift(copy.deepcopy(network), x) == 0.0
    weights = [n for n in locks(network, [0]) if n.rpartition(".")[2].startswith("weight")]
    for name in weights:
        assert drift(copy.deepcopy(network), x, without=(name,)) > 0, name


def locks_after_run(network, x):
    outputs(network, x)
    return locks(network, [0])


@pytest.mark.parametrize("net", NETWORKS)
def test_unlocked_weights_have_no_gradient_of_a_finished_task(net):
    network, x = made(net), INPUTS[net]()
    network.eval()(HATPayload(x, 0)).data.square().sum().backward()
    found = locks(network, [0])
    assert not all(lock.all() for lock in found.values())
    for name, lock in found.items():
        grad = network.get_parameter(name).grad
        assert grad is not None and (grad[~lock] == 0).all(), name


def test_paper_locks_cover_exact_ones():
    network = made(hand_networks.MLP)
    outputs(network, torch.randn(3, 6))
    exact, paper = locks(network, [0, 1]), locks(network, [0, 1], paper=True)
    assert all((paper[n] | ~exact[n]).all() for n in exact) and any((paper[n] != exact[n]).any() for n in exact)
    assert not any(lock.any() for lock in locks(network, []).values())


# task-indexed parts, copies


def test_copies_do_not_share_storage():
    modules = (*(made(net) for net in NETWORKS), TaskIndexedParameter(torch.zeros(3).expand(2, 3), CONFIG))
    for network in modules:
        tensors = [t for t in (*network.parameters(), *network.buffers()) if t.numel()]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_a_deepcopy_has_maskers_of_its_own_and_its_locks():
    network, x = made(hand_networks.MLP), torch.randn(3, 6)
    before = outputs(network, x)
    expected = locks(network, [0])
    copied = copy.deepcopy(network)
    draw_masks(network, seed=9)
    assert torch.equal(outputs(copied, x), before)
    assert all(torch.equal(lock, expected[name]) for name, lock in locks(copied, [0]).items())
    assert not torch.equal(outputs(network, x), before)
    del network
    gc.collect()
    assert all(torch.equal(lock, expected[name]) for name, lock in locks(copied, [0]).items())
    assert drift(copied, x) == 0.0


def test_pickles_run_and_know_nothing_of_gates():
    network, x = made(hand_networks.MLP), torch.randn(3, 6)
    before = outputs(network, x)
    file = io.BytesIO()
    torch.save(network, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert not {m.key for m in maskers(again)} & {m.key for m in maskers(network)}
    assert all(lock.all() for lock in locks(again, [0]).values())
    assert torch.equal(outputs(again, x), before) and torch.equal(outputs(pickle.loads(pickle.dumps(network)), x), before)
    assert drift(again, x) == 0.0


def test_task_indexed_parameter_head_and_slope():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gamma = HATLinear(4, 6, CONFIG), TaskIndexedParameter(torch.rand(6), CONFIG)
            self.act = task_indexed_class(nn.PReLU)(6, CONFIG)
            self.body = nn.Sequential(HATLinear(6, 6, CONFIG), nn.Tanh(), nn.Dropout(0.0))
            self.head = task_indexed_class(nn.Linear)(6, 3, CONFIG)

        def forward(self, x):
            return self.head((self.act(self.fc(x)) * self.gamma(x)).forward_by(self.body))

    network, x = draw_masks(Net()), torch.randn(5, 4)
    assert network(HATPayload(x, 1)).mask is None
    assert drift(network, x) == 0.0
    head = network.head.tasks[1]
    hidden = network.body(network.act(network.fc(HATPayload(x, 1))) * network.gamma.of(1))
    assert torch.equal(network(HATPayload(x, 1)).data, head(hidden.data))


# gradients, NaN


@pytest.mark.parametrize("net", NETWORKS)
def test_gradients_reach_the_embeddings_of_the_task_alone(net):
    network = made(net).train()
    network(HATPayload(INPUTS[net](), 1, 2.0)).data.square().sum().backward()
    for masker in maskers(network):
        assert masker.embeddings[0].grad is None and masker.embeddings[1].grad.abs().sum() > 0


def test_a_finished_task_is_binary_whatever_the_scale():
    network, x = made(hand_networks.ConvNet), torch.randn(2, 3, 8, 8)
    for masker in maskers(network):
        masker.finished.add(0)
    assert torch.equal(network.eval()(HATPayload(x, 0, 0.5)).data, outputs(network, x))
    assert not torch.equal(network(HATPayload(x, 1, 0.5)).data, outputs(network, x, 1))


@pytest.mark.parametrize("scale", [None, 1e4])
def test_nan_in_a_dead_channel_reaches_neither_outputs_nor_gradients(scale):
    network = draw_masks(nn.Sequential(HATLinear(6, 12, CONFIG), nn.ReLU(), HATLinear(12, 4, CONFIG)))
    x = torch.randn(5, 6)
    before = network(HATPayload(x, 1, scale)).data
    dead = ~network[0].masker.live(1)
    with torch.no_grad():
        network[0].bias[dead] = float("nan")
        network[2].weight[:, dead] = 7.0
    out = network(HATPayload(x, 1, scale)).data
    assert torch.equal(out, before)
    out.square().sum().backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(grads) == (4 if scale is None else 6) and all(torch.isfinite(g).all() for g in grads)


def test_what_was_looked_at_without_gradients_still_has_them():
    layer, head = HATLinear(4, 6, CONFIG), HATLinear(6, 2, CONFIG)
    h = layer(HATPayload(torch.randn(5, 4), 0, 2.0))
    with torch.no_grad():
        assert not h.data.requires_grad
        head(h)
    head(h).data.sum().backward()
    assert layer.masker.embeddings[0].grad is not None and layer.weight.grad is not None


def test_activation_checkpointing_recomputes_the_same():
    block = draw_masks(nn.Sequential(HATLinear(4, 6, CONFIG), HATLinear(6, 6, CONFIG), HATLinear(6, 6, CONFIG)))

    def residual(h):
        return block[2](torch.relu(h) + block[1](h)).data

    grads = []
    for run in (residual, lambda h: torch.utils.checkpoint.checkpoint(residual, h, use_reentrant=False)):
        block.zero_grad()
        run(block[0](HATPayload(torch.ones(5, 4), 0, 2.0))).sum().backward()
        grads.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    assert len(grads[0]) == 9 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


# uses


def test_uses_are_recorded_once_and_bounded():
    layer, x = draw_masks(HATLinear(6, 6, CONFIG)), HATPayload(torch.randn(5, 6), 0)
    for _ in range(3):
        layer(layer(x))
    assert len(layer.seen) == 2
    wide = [draw_masks(HATLinear(2, 6, CONFIG), seed=i) for i in range(MOST_USES + 5)]
    for other in wide:
        layer(other(HATPayload(torch.randn(5, 2), 0)))
    assert len(layer.seen) == 1 and locks(layer, [0])["weight"].all()


def test_layers_without_a_run_and_raw_parameters_are_locked_whole():
    network = nn.ModuleDict({"seen": HATLinear(4, 4, CONFIG), "unseen": HATLinear(4, 4, CONFIG)})
    network.register_parameter("raw", nn.Parameter(torch.ones(4)))
    draw_masks(network)
    network["seen"](HATPayload(torch.randn(2, 4), 0)) * network.raw
    found = locks(network, [0])
    assert found["raw"].all() and found["unseen.weight"].all() and not found["seen.weight"].all()


def test_a_tied_weight_is_locked_where_either_use_locks_it():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.head = HATEmbedding(9, 6, CONFIG), HATLinear(6, 6, CONFIG), HATLinear(6, 9, CONFIG)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.mix(self.table(x)))

    network, x = draw_masks(Tied()), torch.arange(9)[None]
    assert drift(network, x) == 0.0
    with pytest.raises(TaskError, match="by hand"):
        network.table(HATPayload(x, 0)) @ network.table.weight.t()


def test_weights_normalised_before_use_lock_by_rows():
    network = nn.Sequential(HATLinear(4, 6, CONFIG), nn.Tanh(), nn.utils.parametrizations.weight_norm(HATLinear(6, 3, CONFIG)))
    assert drift(draw_masks(network), torch.randn(5, 4)) == 0.0


def test_plans_are_kept():
    network, x = made(hand_networks.Attention), torch.randn(2, 7, 5)
    outputs(network, x)
    plans = len(eager._plans)
    for _ in range(3):
        outputs(network, x, 1)
    assert len(eager._plans) == plans


def test_a_layer_along_tokens_applies_the_features_factor_once() -> None:
    """As in a converted network: the features' soft factor came in with the sum, the layer's own is added."""
    a, b, mix = HATLinear(6, 8, CONFIG), HATLinear(6, 8, CONFIG), HATLinear(4, 5, CONFIG)
    with torch.no_grad():
        for layer in (a, b, mix):
            layer.masker.embeddings[0].normal_()
    x = torch.randn(3, 4, 6)
    payload = HATPayload(x, task_id=0, mask_scale=3.0)
    got = mix((a(payload) + b(payload)).transpose(1, 2)).data
    masks = [layer.masker(0, 3.0) for layer in (a, b, mix)]
    inner = F.linear(x, a.weight, a.bias) * masks[0] + F.linear(x, b.weight, b.bias) * masks[1]
    torch.testing.assert_close(got, F.linear(inner.transpose(1, 2), mix.weight, mix.bias) * masks[2])
    live = (masks[0] > 0.5) | (masks[1] > 0.5)
    binary = mix((a(HATPayload(x, task_id=0)) + b(HATPayload(x, task_id=0))).transpose(1, 2)).data
    assert not live.all() and torch.equal(binary[:, ~live], torch.zeros_like(binary[:, ~live]))
