"""Recurrent layers: what masks folded into weights do, against steps written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from hand_networks import CONFIG
from networks import NETWORKS
from tasks import converted, draw_masks, finish, maskers, outputs, same, small, total
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import hatify
from hatify import HATGRU, HATLSTM, HATRNN, HATPayload
from hatify.errors import TaskError
from hatify.gates.recurrent import folds
from hatify.inspection import describe_layer
from hatify.modules import HATRecurrent, hat_class

SEQUENCE = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
RECURRENT = ["text_gru", "text_lstm", "rnn_cell_loop", "stacked_both_ways", "projected_lstm", "encoder_decoder", "given_states",
             "cells_with_readout"]  # fmt: skip


class Fused(nn.Module):
    """A GRU whose every output is read."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0]).sum(1)


class Stepped(nn.Module):
    """The same in steps; each state is also read in between."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, scores = None, 0
        for step in range(5):
            hidden = self.cell(x[:, step], hidden)
            scores = scores + self.head(hidden)
        return scores


@pytest.mark.parametrize("name", RECURRENT)
def test_all_but_the_head_stands_on_the_first_rung(name: str) -> None:
    hat, _, _ = small(name)
    assert {row["reason"] for row in hat.report.layers if row["rung"] != "hat"} <= {"output layer", "normalisation"}
    assert any(isinstance(m, HATRecurrent) for m in hat.modules())


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_soft_masks_by_hand(scale: float) -> None:
    """Outputs and gradients of equation 1 inside a recurrence: every step reads the masked state, and keeps its own."""
    hat = converted(Fused(), SEQUENCE)
    draw_masks(hat)
    hat.train()
    gru, head = hat.gru, hat.head.tasks[0]
    mask = gru.maskers["l0"](0, scale)
    hidden, scores = torch.zeros(3, 6), 0
    for step in range(5):
        a = SEQUENCE[:, step] @ gru.weight_ih_l0.T + gru.bias_ih_l0
        b = (hidden * mask) @ gru.weight_hh_l0.T + gru.bias_hh_l0
        (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
        update, new = torch.sigmoid(az + bz), torch.tanh(an + torch.sigmoid(ar + br) * bn)
        hidden = (1 - update) * new + update * hidden
        scores = scores + head(hidden * mask)
    got = hat(SEQUENCE, task=0, mask_scale=scale)
    torch.testing.assert_close(got, scores)
    read = [gru.maskers["l0"].embeddings[0], gru.weight_hh_l0, gru.weight_ih_l0, gru.bias_hh_l0]
    for ours, theirs in zip(torch.autograd.grad(total(got), read), torch.autograd.grad(total(scores), read)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [None, 1.0, 5.0])
def test_steps_are_the_fused_layer(scale: float | None) -> None:
    """The soft factor does not gather from step to step, though every state is also read masked."""
    fused, stepped = converted(Fused(), SEQUENCE), converted(Stepped(), SEQUENCE)
    draw_masks(fused)
    state = {k.replace("gru", "cell").replace("_l0", "").replace(".l0.", ".units."): v for k, v in fused.state_dict().items()}
    stepped.load_state_dict({k: v for k, v in state.items() if "extra_state" not in k}, strict=False)
    assert stepped.state_dict().keys() == state.keys()
    fused.train(scale is not None), stepped.train(scale is not None)
    expected = fused(SEQUENCE, task=1, mask_scale=scale)
    torch.testing.assert_close(stepped(SEQUENCE, task=1, mask_scale=scale), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def spoil(hat, what: float) -> int:
    """Writes ``what`` into every element of recurrent layers that task 0 does not need, but for columns that read the layer's own
    input: there a mask node stands, and its zeros meet the weight as in any other layer."""
    spoiled = 0
    locks = hat.locks([0])
    for path, layer in hat.named_modules():
        for fold in folds(layer.meaning()) if isinstance(layer, HATRecurrent) else ():
            lock = locks[f"{path}.{fold.parameter}"]
            free = ~lock if fold.cols != () else ~lock & ~lock.any(1, keepdim=True)
            getattr(layer, fold.parameter)[free] = what
            spoiled += int(free.sum())
    return spoiled


@pytest.mark.parametrize("what", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("name", ["stacked_both_ways", "projected_lstm", "cells_with_readout"])
def test_what_dead_units_hold_reaches_nobody(name: str, what: float) -> None:
    """Neither outputs nor gradients of a finished task; in the folded weights a product with zero would keep a NaN."""
    hat, args, kwargs = small(name)
    draw_masks(hat)
    for masker in maskers(hat):
        masker.embeddings[0].data.sign_()  # at scale 400 a dead unit's factor is exactly zero
    before = outputs(hat, args, kwargs, task=0)
    assert spoil(hat, what) > 0
    assert same(before, outputs(hat, args, kwargs, task=0))
    hat.train()
    total(hat(*args, **kwargs, task=0, mask_scale=400.0)).backward()
    assert all(p.grad.isfinite().all() for p in hat.parameters() if p.grad is not None)
    assert any(m.embeddings[0].grad is not None for m in maskers(hat))


def test_the_no_task_path_draws_the_dropout_of_the_plain_layer() -> None:
    network = NETWORKS["stacked_both_ways"]
    hat, plain = converted(network.make(), network.inputs(4)), network.make()
    for module in (hat, plain):
        module.train()
    (x,) = network.inputs(4)
    torch.manual_seed(7)
    expected = plain(x)
    torch.manual_seed(7)
    assert torch.equal(hat(x), expected)
    torch.manual_seed(8)
    assert not torch.equal(hat(x), expected)


def test_a_saved_model_has_its_maskers(tmp_path) -> None:
    network = NETWORKS["projected_lstm"]
    hat, args, kwargs = small("projected_lstm")
    draw_masks(hat)
    hatify.save(hat, tmp_path / "saved")
    loaded = hatify.load(tmp_path / "saved", factory=network.make).eval()
    assert same(outputs(hat, args, kwargs, task=1), outputs(loaded, args, kwargs, task=1))
    assert same(outputs(hat, args, kwargs, task=1), outputs(copy.deepcopy(hat), args, kwargs, task=1))


def test_a_layer_in_words() -> None:
    hat, _, _ = small("projected_lstm")
    words = describe_layer(hat, "lstm")
    assert "lstm: recurrent, on the rung hat" in words
    assert "its output live (lstm.l0_projected[0:6]) and its input live (lstm.l0[0:10])" in words  # weight_hr_l0


@pytest.mark.parametrize("made", [HATRNN, HATGRU, HATLSTM])
def test_by_hand_states_may_be_anything(made) -> None:
    """States as tensors and as payloads; no task is the plain layer."""
    layer = made(4, 6, batch_first=True, config=CONFIG)
    plain = layer.plain_class(4, 6, batch_first=True)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    first = torch.randn(1, 3, 6)
    states = (first, first * 2) if made is HATLSTM else first
    expected, _ = plain(SEQUENCE, states)
    assert torch.equal(layer(HATPayload(SEQUENCE), states)[0].data, expected)
    assert torch.equal(layer(SEQUENCE, states)[0], expected)
    assert torch.allclose(layer(HATPayload(SEQUENCE, 0), states)[0].data, expected), "a task with every unit live"
    out, states = layer(HATPayload(SEQUENCE, 0))
    again, _ = layer(HATPayload(SEQUENCE, 0), states)
    assert again.mask is not None and again.data.shape == out.data.shape


def test_by_hand_what_cannot_be_masked_says_so() -> None:
    layer = HATGRU(4, 6, config=CONFIG)
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with pytest.raises(TaskError, match="padded"):
        layer(HATPayload(packed, 0))
    with pytest.raises(TaskError, match="no task 3"):
        layer(HATPayload(SEQUENCE, 3))
    assert set(hat_class(nn.LSTMCell)(4, 6, CONFIG).maskers) == {"units"}


@pytest.mark.parametrize("name", ["text_gru", "text_lstm", "stacked_both_ways", "projected_lstm"])
def test_sequences_of_any_length(name: str) -> None:
    """The length stays open: nothing unrolls the steps while the network is captured."""
    hat, (x,), _ = small(name)
    plain = NETWORKS[name].make().eval()
    longer = torch.cat([x, x[:, :3]], 1)
    for sequence in (x, longer, x[:, :2]):
        with torch.no_grad():
            assert torch.equal(hat(sequence), plain(sequence))
            assert hat(sequence, task=0).isfinite().all()


@pytest.mark.parametrize("name", ["text_gru", "projected_lstm", "cells_with_readout"])
def test_a_second_task_leaves_the_first_as_it_was(name: str) -> None:
    """Trained with momentum and weight decay through the session, not only under noise."""
    hat, args, kwargs = small(name)
    draw_masks(hat)
    optimizer = torch.optim.AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    first = None
    for task in (0, 1):
        hat.train()
        with hat.learning(task=task, optimizer=optimizer, schedule="linear", steps_per_epoch=3) as run:
            for _ in range(3):
                optimizer.zero_grad()
                (total(hat(*args, **kwargs)).square() + run.regularization()).backward()
                optimizer.step()
        hat.eval()
        first = outputs(hat, args, kwargs, task=0) if first is None else first
        assert same(first, outputs(hat, args, kwargs, task=0))
    assert not same(first, outputs(hat, args, kwargs, task=1))


@pytest.mark.parametrize("name", ["text_gru", "stacked_both_ways", "projected_lstm", "cells_with_readout"])
def test_what_is_extracted_is_plain(name: str) -> None:
    """Masks folded into the plain layer's weights for good, and no trace of hatify."""
    hat, args, kwargs = small(name)
    draw_masks(hat)
    finish(hat, 0)
    plain = hatify.extract(hat, 0).eval()
    assert not any("hatify" in type(m).__module__ for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close([plain(*args, **kwargs)], outputs(hat, args, kwargs, task=0), rtol=1e-5, atol=1e-6)
    layer = next(m for m in plain.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase))
    assert any((p == 0).any() for p in layer.parameters()) and not any("masker" in n for n, _ in layer.named_parameters())
