"""The sharp edges of the mask algebra, each as a law on the smallest network that falls over it."""

from __future__ import annotations

import copy

import edge_networks as edges
import pytest
import torch
import torch.nn.functional as F
from tasks import converted, draw_masks, fill_masks, finish, maskers, outputs, same, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hatify
from hatify import HATModel
from hatify.errors import CallError
from hatify.modules import Mask, TaskIndexed
from hatify.verification import measure_drift

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def holds(model: nn.Module, inputs: Tensor, seeds: int = 6) -> HATModel:
    """Parity and zero drift under several masks; the check sees what happens without locks."""
    hat = converted(model, inputs)
    report = hatify.verify(hat)
    assert report.parity == 0.0 and report.parity_train in (0.0, None) and not report.gradients
    drifts, controls = zip(*(measure_drift(hat, seed=seed) for seed in range(seeds)))
    assert drifts == (0.0,) * seeds
    assert any(controls), "blind: no drift without locks either"
    return hat


def drifts_without_its_mask(hat: HATModel, seeds: int = 6) -> bool:
    """The negative control: one mask node less, and a finished task drifts."""
    names = [n for n, m in hat.hat.masks.named_children() if isinstance(m, Mask)]
    return any(measure_drift(hat, without_masks=[n], seed=s)[0] > 0 for n in names for s in range(seeds))


# reductions along gated dimensions


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm1d(4), nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 4)], ids=lambda n: type(n).__name__
)
def test_statistics_never_see_a_dead_position(norm: nn.Module) -> None:
    hat = holds(edges.TokensNormed(copy.deepcopy(norm)), TOKENS)
    assert drifts_without_its_mask(hat)


def test_heads_in_the_batch_of_a_batchnorm() -> None:
    holds(edges.HeadsInBatch(), TOKENS)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6), nn.GroupNorm(1, 8)], ids=lambda n: type(n).__name__)
def test_a_subnetwork_is_an_ordinary_smaller_network(norm: nn.Module) -> None:
    """Statistics over live channels equal those of a network that has no other channels."""
    hat = converted(nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3)), VECTORS)
    draw_masks(hat, seed=3)
    live = maskers(hat)[0].live(0)
    assert 0 < live.sum() < 8
    x = F.linear(VECTORS, hat[0].weight[live], hat[0].bias[live])
    own, head = hat[1].tasks[0], hat[2].tasks[0]
    if isinstance(norm, nn.LayerNorm):
        x = F.layer_norm(x, [int(live.sum())], own.weight[live], own.bias[live])
    elif isinstance(norm, nn.RMSNorm):
        x = F.rms_norm(x, [int(live.sum())], own.weight[live], 1e-6)
    else:
        x = F.group_norm(x, 1, own.weight[live], own.bias[live])
    torch.testing.assert_close(hat(VECTORS, task=0), F.linear(x, head.weight[:, live], head.bias))


def test_a_masker_keeps_at_least_one_live_channel() -> None:
    hat = converted(edges.TokensNormed(nn.LayerNorm(8)), TOKENS)
    fill_masks(hat, -1.0)
    assert all(m.live(0).any() for m in maskers(hat))
    for scale in (None, 1.0, 400.0):
        assert hat(TOKENS, task=0, mask_scale=scale).isfinite().all()


# in-place code


def test_writes_through_views_and_in_place_leaves() -> None:
    holds(edges.WritesThroughViews(), VECTORS)


# the two facts of «clean»


def test_a_soft_factor_is_applied_once() -> None:
    """After a sum, what comes next (a shift, a norm, a concatenation with constants) is zeroed where dead, never scaled again."""
    constant = torch.randn(2)
    after = {
        "sigmoid": (torch.sigmoid, torch.sigmoid, 8),
        "cat": (lambda x: torch.cat([x, constant.expand(len(x), 2)], 1),) * 2 + (10,),
        "relu": (torch.relu, torch.relu, 8),
    }
    for what, expected, width in after.values():
        hat = converted(edges.Between(what, width), VECTORS)
        draw_masks(hat)
        a, b = (torch.sigmoid(3.0 * m.embeddings[0]) for m in (hat.maskers["a"], hat.maskers["b"]))
        x = expected(hat.a(VECTORS) * a + hat.b(VECTORS) * b)
        after_mask = torch.sigmoid(3.0 * hat.maskers["after"].embeddings[0])
        wanted = hat.head.tasks[0](torch.tanh(hat.after(x)) * after_mask)
        torch.testing.assert_close(hat(VECTORS, task=0, mask_scale=3.0), wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("clean", [True, False])
def test_a_soft_factor_of_another_dimension_is_applied_once(clean: bool, bias: bool) -> None:
    """Tokens are mixed and features keep their gates, whose factor came in with a sum (materialised) or is still pending."""
    hat = holds(edges.MixesTokens(clean, bias), TOKENS)
    draw_masks(hat, seed=2)
    for scale in (3.0, None):
        a, b, mix = (hat.maskers[name](0, scale) for name in ("a", "b" if clean else "a", "mix"))
        features = torch.maximum(a, b) if clean else a
        x = hat.a(TOKENS) * a + hat.b(TOKENS) * b if clean else hat.a(TOKENS)
        x = hat.mix(x.transpose(1, 2)).transpose(1, 2)
        if clean:
            x = torch.sin(torch.where(features > 0, x * mix[:, None], 0.0))
        else:
            x = torch.sin(x) * torch.minimum(mix[:, None], features)
        wanted = hat.head.tasks[0](x.mean(1))
        torch.testing.assert_close(hat(TOKENS, task=0, mask_scale=scale), wanted)


# zero-preserving is a property of the arguments

SHIFTS = {
    "hardtanh": lambda x: F.hardtanh(x, 0.5, 2),
    "threshold": nn.Threshold(0.1, 0.3),
    "alpha dropout": nn.AlphaDropout(0.3),
    "feature alpha dropout": nn.FeatureAlphaDropout(0.3),
    "sigmoid": torch.sigmoid,
    "softplus": nn.Softplus(),
    "cos": torch.cos,
    "clamp": lambda x: x.clamp(min=0.05),
    "clamp by a parameter": edges.ParameterBetween(lambda x, low: torch.clamp(x, min=low)),
    "maximum with a parameter": edges.ParameterBetween(torch.maximum),
    "a parameter minus it": edges.ParameterBetween(lambda x, p: p - x),
    "parameter where": edges.ParameterBetween(lambda x, p: torch.where(x > 0.3, x, p)),
    "lerp": edges.ParameterBetween(lambda x, p: torch.lerp(x, p.expand_as(x), 0.3)),
    "rsub": lambda x: 1 - x,
    "masked_fill": lambda x: x.masked_fill(x > 1, 2.0),
    "where": lambda x: torch.where(x > -9, x + 0.5, 0.2),
    "log1p": lambda x: x.abs().add(0.2).log(),
    "softmax": lambda x: x.softmax(0),
    "pad": lambda x: F.pad(x, (1, 0), value=0.7)[:, 1:],
    "power zero": lambda x: x**0,
}


@pytest.mark.parametrize("name", SHIFTS)
def test_what_is_not_zero_at_zero_is_masked_again(name: str) -> None:
    holds(edges.Between(copy.deepcopy(SHIFTS[name])).eval(), VECTORS, seeds=3)


def test_the_arguments_decide() -> None:
    """relu and hardtanh(-1, 1) keep a clean value clean; hardtanh(0.5, 2) needs one mask more."""
    nodes = [len(list(converted(edges.Between(f), VECTORS).hat.masks.children())) for f in (F.hardtanh, SHIFTS["hardtanh"])]
    assert nodes[1] == nodes[0] + 1


# constants


def test_constant_channels_are_live_in_locks() -> None:
    hat = holds(edges.Coordinates(), IMAGES)
    draw_masks(hat, seed=1)
    lock = hat.locks([0])["conv.weight"][:, :, 0, 0]
    live = maskers(hat)[1].live(0)
    assert torch.equal(lock[:, 6:], live[:, None].expand(6, 2))
    assert not torch.equal(lock[:, :6], live[:, None].expand(6, 6))


def test_a_class_token_among_gated_tokens() -> None:
    holds(edges.ClassTokenAfterMixing(), TOKENS)


def test_constants_summed_with_gated_channels() -> None:
    holds(edges.ConstantsUnderACommonGate(), VECTORS)


def test_dead_queries_attend_uniformly() -> None:
    holds(edges.UniformAttention(), TOKENS, seeds=12)


# normalised weights, tables and buffers that forward writes


def test_a_weight_normed_transposed_conv_is_locked_by_its_input() -> None:
    normed = parametrizations.weight_norm(nn.ConvTranspose1d(5, 6, 2))
    hat = holds(nn.Sequential(nn.Conv1d(4, 5, 1), nn.Tanh(), normed, nn.Tanh(), nn.Conv1d(6, 2, 1)), TOKENS)
    draw_masks(hat, seed=2)
    lock = hat.locks([0])["2.parametrizations.weight.original1"]
    live = maskers(hat)[0].live(0)
    assert torch.equal(lock, live.view(-1, 1, 1).expand_as(lock)) and not lock.all()


def test_a_spectrally_normed_layer_has_one_copy_per_task() -> None:
    hat = holds(
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), VECTORS
    )
    assert isinstance(hat[0], TaskIndexed)
    assert any(k.startswith("0.tasks.1.parametrizations.weight.") and k.endswith("_u") for k in hat.state_dict())


def test_max_norm_writes_only_the_tasks_own_table() -> None:
    tokens = torch.arange(6).view(2, 3)
    hat = converted(nn.Sequential(nn.Embedding(6, 5, max_norm=0.5), nn.Linear(5, 3)), tokens)
    before = {k: v.clone() for k, v in hat.state_dict().items()}
    hat(tokens, task=1)
    changed = {k for k, v in hat.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.tasks.1.weight"}


def test_a_buffer_that_forward_writes_has_one_copy_per_task() -> None:
    hat = converted(edges.Seen(), VECTORS)
    before = outputs(hat, (VECTORS,), task=0)
    hat.train()
    hat(VECTORS, task=1)
    assert hat.hat.indexed.mean.of(1).abs().sum() > 0
    hat.eval()
    assert same(before, outputs(hat, (VECTORS,), task=0))
    assert not hat.mean.any(), "the buffer without a task was written"


# booleans, integers, indices


def test_choices_are_made_on_materialised_values() -> None:
    hat = holds(edges.Chosen(), VECTORS)
    assert drifts_without_its_mask(hat)


# finished tasks


@pytest.mark.parametrize("training", [False, True])
def test_a_finished_tasks_masks_are_binary_whatever_the_scale(training: bool) -> None:
    hat = converted(edges.TwoLayers(), VECTORS).train(training)
    draw_masks(hat)
    binary = outputs(hat.eval(), (VECTORS,), task=0)
    hat.train(training)
    assert not same(binary, outputs(hat, (VECTORS,), task=0, mask_scale=1.0))
    finish(hat, 0)
    for scale in (None, 0.1, 1.0, 400.0):
        assert same(binary, outputs(hat, (VECTORS,), task=0, mask_scale=scale))
        assert same(binary, [hat(hatify.HATPayload(VECTORS, task_id=0, mask_scale=scale)).data])


def test_live_is_a_positive_embedding() -> None:
    hat = converted(edges.TwoLayers(), VECTORS)
    with torch.no_grad():
        maskers(hat)[0].embeddings[0].copy_(torch.tensor([1e-30, 0.0, -1e-30, 5.0, -0.0, 1.0, -3.0, 0.0]))
    assert maskers(hat)[0].live(0).tolist() == [True, False, False, True, False, True, False, False]


# parity per grad mode


def test_torchs_own_transformer_is_captured_with_gradients_on() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        hat = converted(copy.deepcopy(model), TOKENS)  # converted in another mode than it runs in
    assert torch.equal(model(TOKENS), hat(TOKENS))


def test_requires_grad_and_no_grad_regions_are_kept() -> None:
    hat, args, kwargs = small("frozen_stem")
    frozen = {n for n, p in hat.named_parameters() if not p.requires_grad}
    assert {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.tasks.0.weight"} <= frozen
    assert not any(n.startswith(("conv.", "fc.", "trainable_stem")) for n in frozen)
    assert torch.is_grad_enabled()
    assert hatify.verify(hat).gradients == 0.0


# what the capture assumed


def test_gates_on_open_dimensions_are_worked_out_at_run_time_sizes() -> None:
    """A convolution's channels folded into space, at other sizes than the example's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(2))
    hat = holds(model, IMAGES)
    draw_masks(hat)
    larger = torch.randn(3, 3, 6, 10)
    assert same([model.eval()(larger)], outputs(hat, (larger,)))
    before = outputs(hat, (larger,), task=0)
    with torch.no_grad():
        for name, lock in hat.locks([0]).items():
            parameter = hat.get_parameter(name)
            parameter.copy_(torch.where(lock, parameter, torch.randn(parameter.shape)))
    assert same(before, outputs(hat, (larger,), task=0))


def test_a_branch_on_sizes_is_refused_with_its_line() -> None:
    hat, (x,), _ = small("branch_on_shape")
    with pytest.raises(CallError) as refused:
        hat(x.transpose(2, 3))
    assert "conv.py" in str(refused.value) and "if" in str(refused.value)


# what is around a leaf


@pytest.mark.parametrize(
    "kind", ["forward hook", "forward pre-hook", "weight norm", "orthogonal", "adapter", "hook on the network"]
)
def test_a_leaf_with_something_around_it_is_not_its_plain_class(kind: str) -> None:
    model = edges.TwoLayers()
    if kind == "forward hook":
        model.second.register_forward_hook(lambda module, args, out: out * 2 + 1)
    elif kind == "forward pre-hook":
        model.second.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    elif kind == "weight norm":
        parametrizations.weight_norm(model.second)
    elif kind == "orthogonal":
        parametrizations.orthogonal(model.second)
    elif kind == "adapter":
        model.second = edges.LowRank(model.second)
    else:
        model.register_forward_hook(lambda module, args, out: out.cos())
    expected = copy.deepcopy(model).eval()(VECTORS)
    assert same([expected], outputs(holds(model, VECTORS), (VECTORS,)))
