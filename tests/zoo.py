"""The part of the zoo that every run of the tests proves: small models of a third of the families."""

from __future__ import annotations

from hatify.zoo.catalogue import entries
from hatify.zoo.entry import Entry

_TIMM = """
test_vit test_vit_relpos test_byobnet test_convnext test_efficientnet test_nfnet test_mambaout resnet18 resnet50 vit_base_patch16_224
deit_tiny_distilled_patch16_224 beit_base_patch16_224 convnext_tiny swin_tiny_patch4_window7_224 efficientnet_b0 mobilenetv3_small_100
regnety_002 resnext50_32x4d densenet121 inception_v3 hrnet_w18_small resnetv2_50x1_bit mixer_s32_224 vgg11_bn convit_tiny coat_tiny
ghostnet_050 xcit_nano_12_p8_224 halonet_h1 mobilevit_xxs ese_vovnet19b_slim_dw starnet_s050 shvit_s1 fasternet_t0 lcnetv2_small
pit_ti_224 visformer_tiny legacy_seresnet18
"""
_TORCHVISION = "shufflenet_v2_x0_5 googlenet lraspp_mobilenet_v3_large squeezenet1_1 mobilenet_v3_small mnasnet0_5"
_TRANSFORMERS = "bert llama t5"
_KEYS = [
    f"{source}/{name}"
    for source, names in (("timm", _TIMM), ("torchvision", _TORCHVISION), ("transformers", _TRANSFORMERS))
    for name in names.split()
]
_ALL = {entry.key: entry for entry in entries()}

ZOO: dict[str, Entry] = {key: _ALL[key] for key in _KEYS}
