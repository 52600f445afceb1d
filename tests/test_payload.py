"""Payloads: when masks are applied, what each operation does, what is refused."""

from __future__ import annotations

import doctest
from functools import partial

import hand_networks
import pytest
import torch
import torch.nn.functional as F
from hand_networks import CONFIG, PLAIN, draw_masks
from torch import nn

import hatify
from hatify.errors import TaskError
from hatify.modules import HATConfig, HATEmbedding, HATLinear, HATPayload, TaskIndexedLayerNorm, hat_class, payload

# the paper's example


def test_figure_1_and_the_docstring_run():
    assert doctest.testmod(payload).failed == 0


# laziness


def test_activations_and_movement_leave_the_mask_pending():
    layer = draw_masks(HATLinear(4, 6, CONFIG))
    x = torch.randn(5, 4)
    plain = F.linear(x, layer.weight, layer.bias)
    h = layer(HATPayload(x, 0, 2.0))
    for moved in (h.forward_by(nn.ReLU()), F.relu(h), h.relu(), torch.relu(h)):
        assert torch.equal(moved.unmasked_data, plain.relu())
        assert torch.equal(moved.data, torch.where(moved.mask > 0, plain.relu(), 0 * plain) * moved.mask)
    shaped = h.reshape(5, 2, 3).permute(1, 0, 2).unsqueeze(1)[1]
    assert torch.equal(shaped.mask, h.mask.reshape(5, 2, 3).permute(1, 0, 2).unsqueeze(1)[1])
    assert torch.equal(shaped.unmasked_data, plain.reshape(5, 2, 3).permute(1, 0, 2).unsqueeze(1)[1])


def test_sums_of_equal_gates_stay_pending_and_the_mask_is_applied_once():
    layer = draw_masks(HATLinear(4, 6, CONFIG))
    h = layer(HATPayload(torch.randn(5, 4), 0, 2.0))
    both = h + h.relu()
    assert torch.equal(both.unmasked_data, h.unmasked_data + h.unmasked_data.relu())
    assert torch.equal(both.mask, h.mask)
    other = draw_masks(HATLinear(4, 6, CONFIG), seed=3)(HATPayload(torch.randn(5, 4), 0, 2.0))
    union = h + other
    assert union.mask is None and torch.equal(union.data, h.data + other.data)
    assert union.relu().mask is None


def test_constants_take_on_gates_and_payloads_or_tensors_stand_on_either_side():
    h = draw_masks(HATLinear(4, 6, CONFIG))(HATPayload(torch.randn(5, 4), 0))
    raw, constant = h.unmasked_data, torch.rand(6) + 1
    for out, expected in (
        (h + constant, raw + constant), (constant + h, constant + raw), (constant - h, constant - raw),
        (h * constant, raw * constant), (constant / h, None),
        (h / 2, raw / 2), (2 * h, 2 * raw), (1 - h, 1 - raw), (-h, -raw), (h**2, raw**2),
        (h / constant, raw / constant), (torch.clamp(h, min=constant), raw.clamp(min=constant)),
    ):  # fmt: skip
        assert torch.equal((out.data == 0).all(0), ~(h.mask[0] > 0))
        assert expected is None or torch.equal(out.data[:, h.mask[0] > 0], expected[:, h.mask[0] > 0])
    product = h @ torch.ones(6, 2)
    assert product.mask is None and torch.equal(product.data, h.data @ torch.ones(6, 2))


def test_live_norms_equal_the_norm_of_the_live_channels():
    layer, norm = draw_masks(HATLinear(4, 6, CONFIG)), TaskIndexedLayerNorm(6, CONFIG)
    h = layer(HATPayload(torch.randn(5, 4), 0))
    alive = h.mask[0] > 0
    expected = F.layer_norm(h.unmasked_data[:, alive], (int(alive.sum()),))
    assert torch.allclose(norm(h).data[:, alive], expected, atol=1e-6) and (norm(h).data[:, ~alive] == 0).all()
    assert torch.allclose(F.layer_norm(h, (6,)).data[:, alive], expected, atol=1e-6)
    assert torch.allclose(h.forward_by(nn.LayerNorm(6, elementwise_affine=False)).data[:, alive], expected, atol=1e-6)


# refusals


def test_different_tasks_or_scales_do_not_meet():
    layer, x = HATLinear(4, 4, CONFIG), torch.randn(2, 4)
    for other in (HATPayload(x, 1), HATPayload(x, 0, 3.0), HATPayload(x)):
        for meet in (lambda a, b: a + b, lambda a, b: torch.cat([a, b]), torch.matmul):
            with pytest.raises(TaskError, match="different tasks"):
                meet(layer(HATPayload(x, 0)), other)


@pytest.mark.parametrize(
    "plain, fix",
    [
        (nn.Linear(4, 4), "HATLinear"), (nn.Conv1d(2, 2, 1), "HATConv1d"), (nn.BatchNorm1d(4), "BatchNorm1d"),
        (nn.PReLU(), "PReLU"), (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.BatchNorm1d(4, affine=False), "BatchNorm1d"),
    ],
)  # fmt: skip
def test_plain_layers_with_weights_are_refused_by_name(plain, fix):
    x = HATPayload(torch.randn(2, 4), 0)
    with pytest.raises(TaskError, match=fix):
        x.forward_by(plain)
    if not isinstance(plain, nn.PReLU | nn.MultiheadAttention):
        with pytest.raises(TaskError):
            plain(x)


def test_impossible_tasks_scales_and_writes_are_refused():
    x = torch.randn(2, 4)
    for bad in (-1, True, "0", 1.5):
        with pytest.raises(TaskError):
            HATPayload(x, bad)
    with pytest.raises(TaskError, match="positive"):
        HATPayload(x, 0, 0.0)
    with pytest.raises(TaskError, match="0 to 2"):
        _ = HATLinear(4, 4, CONFIG)(HATPayload(x, 3)).data
    with pytest.raises(TaskError, match="0 to 2"):
        TaskIndexedLayerNorm(4, CONFIG)(HATPayload(x, 3))
    for coupled in (nn.utils.parametrizations.spectral_norm(HATLinear(4, 4, CONFIG)), HATEmbedding(4, 4, CONFIG, max_norm=1.0)):
        with pytest.raises(TaskError, match="task_indexed_class"):
            coupled(HATPayload(x, 0))
    with pytest.raises(TaskError, match="in place"):
        x += HATPayload(x, 0)
    with pytest.raises(TaskError, match="not another payload"):
        HATPayload(HATPayload(x, 0), 0)


# other operations


def test_functions_without_a_rule_get_the_masked_tensor():
    h = draw_masks(HATLinear(4, 6, CONFIG))(HATPayload(torch.randn(5, 4), 0, 2.0))
    for out, expected in (
        (h.forward_by(lambda t: t.sort(-1).values), h.data.sort(-1).values), (torch.cumprod(h, 1), torch.cumprod(h.data, 1)),
        (h > 0, h.data > 0), (torch.topk(h, 2)[0], torch.topk(h.data, 2)[0]), (F.softmax(h, -1), F.softmax(h.data, -1)),
        (h.sum(), h.data.sum()), (F.normalize(h), F.normalize(h.data)), (h[h > 0], h.data[h.data > 0]),
    ):  # fmt: skip
        assert torch.allclose(out.data, expected, atol=1e-6)
    h = draw_masks(HATLinear(4, 6, CONFIG))(HATPayload(torch.randn(5, 4), 0, 2.0))
    assert h.forward_by(partial(F.leaky_relu, negative_slope=0.1)).mask is not None
    assert h.to(torch.float64).mask is not None and h.to("cpu", torch.int64).mask is None
    assert type(torch.zeros_like(h)) is torch.Tensor and h.size(1) == 6 and len(h) == 5


def test_a_clean_payload_clamped_by_a_tensor_is_masked_again():
    h = draw_masks(HATLinear(4, 6, CONFIG))(HATPayload(torch.randn(5, 4), 0))
    alive = h.mask[0] > 0
    h.sum()  # from here on the masked tensor is what operations work on
    clamped = torch.clamp(h, min=torch.full((6,), 0.5))
    assert (clamped.data[:, ~alive] == 0).all() and (clamped.data[:, alive] >= 0.5).all()


def test_attention_by_function_equals_explicit_products():
    layers = [draw_masks(HATLinear(4, 6, CONFIG), seed=i) for i in range(3)]
    x = HATPayload(torch.randn(2, 5, 4), 0)
    q, k, v = (layer(x).reshape(2, 5, 2, 3).transpose(1, 2) for layer in layers)
    out = F.scaled_dot_product_attention(q, k, v)
    explicit = (q @ k.mT * 3**-0.5).softmax(-1) @ v
    assert (
        torch.allclose(out.data, explicit.data, atol=1e-6)
        and torch.equal(out.mask, explicit.mask)
        and torch.equal(out.mask, v.mask)
    )


def test_in_place_layers_write_into_the_payload():
    h = HATLinear(4, 6, CONFIG)(HATPayload(torch.randn(5, 4), 0))
    raw = h.unmasked_data.clone()
    out = h.forward_by(nn.ReLU(inplace=True))
    assert torch.equal(out.data, raw.relu()) and torch.equal(h.data, raw.relu())


def test_a_converted_model_takes_and_gives_payloads():
    hat = hatify.convert(hand_networks.MLP(PLAIN), 2, example_inputs=torch.randn(2, 6), verify=False)
    x = torch.randn(3, 6)
    out = hat(HATPayload(x, task_id=1, mask_scale=20.0))
    assert isinstance(out, HATPayload) and out.task_id == 1 and torch.equal(out.data, hat(x, task=1, mask_scale=20.0))
    held = HATPayload({"logits": x}, task_id=1)
    assert held.data["logits"] is x and "dict" in repr(held)


def test_other_configurations_and_classes():
    sparse = HATConfig(num_tasks=1, mask_init="sparse")
    doubled = hat_class(nn.Conv3d)(2, 4, 1, sparse)
    assert doubled(HATPayload(torch.randn(1, 2, 2, 2, 2), 0)).mask.shape == (1, 4, 2, 2, 2)
