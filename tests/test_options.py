"""Choices of a conversion: statistics of norms, and masks on residual streams. Both promises hold for each."""

from __future__ import annotations

import pytest
import timm
import torch
from networks import NETWORKS
from torch import Tensor, nn

import hatify
from hatify.errors import ConversionError

RESIDUAL = {
    "resnet": lambda: timm.models.ResNet(
        timm.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=3, channels=(8, 8, 12, 16), stem_width=8
    ),
    "vit": lambda: timm.models.VisionTransformer(img_size=16, patch_size=8, num_classes=3, embed_dim=12, depth=2, num_heads=2),
}
SMALL = ("dense_concat", "encoder_decoder", "functional_weights", "gated", "gmlp", "groupnorm_net", "layer_scale_tokens", "mixer",
         "projected_lstm", "rmsnorm", "shared_layers", "squeeze_excite", "tied_autoencoder", "transformer_encoder_norm_first",
         "unet")  # fmt: skip
CHOICES = [{"norms": "plain"}, {"residuals": "tied"}, {"norms": "plain", "residuals": "tied"}]


def converted(name: str, **options: str) -> hatify.HATModel:
    torch.manual_seed(0)
    size = 16 if name == "vit" else 32
    config = hatify.HATConfig(mask_init="normal")
    return hatify.convert(RESIDUAL[name](), 3, example_inputs=torch.randn(2, 3, size, size), config=config, **options)


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("name", RESIDUAL)
def test_promises(name: str, options: dict[str, str]) -> None:
    proof = converted(name, **options).verification
    assert proof.ok
    assert proof.control > 0


@pytest.mark.parametrize("name", SMALL)
def test_promises_on_small_networks(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    config = hatify.HATConfig(mask_init="normal")
    hat = hatify.convert(network.make(), 3, example_inputs=network.inputs(2), config=config, norms="plain", residuals="tied")
    assert hat.verification.ok


def test_tied_streams_have_one_masker() -> None:
    apart, tied = converted("vit"), converted("vit", residuals="tied")
    stream = {"patch_embed.proj", "blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2"}
    assert stream <= set(apart.maskers)
    assert stream & set(tied.maskers) == {"patch_embed.proj"}
    assert set(apart.maskers) - stream == set(tied.maskers) - stream
    apart, tied = converted("resnet"), converted("resnet", residuals="tied")
    assert tied.code.count("_masked = ") < apart.code.count("_masked = "), "equally masked, a sum stays pending"


@torch.no_grad()
def test_tied_streams_are_as_narrow_as_their_mask() -> None:
    seen: dict[str, Tensor] = {}
    for residuals in ("or", "tied"):
        hat = converted("vit", residuals=residuals).eval()
        hook = hat.norm.register_forward_pre_hook(
            lambda m, args, kwargs, r=residuals: seen.update({r: kwargs["live"]}), with_kwargs=True
        )
        hat(torch.randn(1, 3, 16, 16), task=0)
        hook.remove()
        if residuals == "tied":
            assert torch.equal(seen["tied"].flatten() > 0, hat.maskers["patch_embed.proj"].live(0))
    assert (seen["or"] > 0).sum() > (seen["tied"] > 0).sum()


@torch.no_grad()
def test_plain_statistics() -> None:
    hat = converted("vit", norms="plain", residuals="tied").eval()
    seen: list[Tensor] = []
    hook = hat.norm.register_forward_hook(
        lambda m, args, kwargs, out: seen.extend([args[0], out, "live" in kwargs]), with_kwargs=True
    )
    hat(torch.randn(2, 3, 16, 16), task=0)
    hook.remove()
    x, out, live = seen
    copied = hat.norm.tasks[0]
    assert not live
    assert torch.equal(out, nn.functional.layer_norm(x, copied.normalized_shape, copied.weight, copied.bias, copied.eps))
    assert bool((x == 0).all((0, 1)).any()), "some channel is dead"


def test_saved_and_loaded(tmp_path) -> None:
    hat = converted("vit", norms="plain", residuals="tied")
    hatify.save(hat, tmp_path / "hat")
    again = hatify.load(tmp_path / "hat", factory=RESIDUAL["vit"])
    assert again.code == hat.code
    assert again.code != converted("vit").code
    assert list(again.maskers) == list(hat.maskers)


@pytest.mark.parametrize("options", [{"norms": "dead"}, {"residuals": "and"}, {"locking": "loose"}])
def test_unknown_choices(options: dict[str, str]) -> None:
    with pytest.raises(ConversionError, match=f"{next(iter(options))} is one of"):
        hatify.convert(nn.Linear(2, 2), 2, example_inputs=torch.randn(1, 2), **options)
