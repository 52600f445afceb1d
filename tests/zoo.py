"""The part of the zoo that every run of the tests proves: small models of a third of the families."""

from __future__ import annotations

from hatify.zoo.catalogue import entries
from hatify.zoo.entry import Entry

_TIMM = """
test_vit test_vit_relpos test_byobnet test_convnext test_efficientnet test_nfnet test_mambaout test_resnet resnet18 resnetv2_18
deit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_tiny_patch16_dinov3_qkvb mobilenetv3_small_050 regnetx_002 densenet121
hrnet_w18_small xcit_nano_12_p8_224 mobilevit_xxs ghostnet_050 ese_vovnet19b_slim_dw starnet_s050 shvit_s1 fasternet_t0
lcnetv2_small pit_ti_224 visformer_tiny legacy_seresnet18 levit_128s cspnext_tiny cs3darknet_focus_s hgnetv2_b0
inception_next_atto hardcorenas_b fastvit_t8 repvit_m1 skresnet18 iformer_t swiftformer_xs
"""
_TORCHVISION = """
shufflenet_v2_x0_5 googlenet lraspp_mobilenet_v3_large squeezenet1_1 mobilenet_v3_small mnasnet0_5 alexnet resnet18 mobilenet_v2
regnet_x_400mf efficientnet_b0
"""
_TRANSFORMERS = "bert llama t5 gpt2 albert roberta distilbert opt mistral gemma gpt_neox vit whisper siglip"
_KEYS = [
    f"{source}/{name}"
    for source, names in (("timm", _TIMM), ("torchvision", _TORCHVISION), ("transformers", _TRANSFORMERS))
    for name in names.split()
]
_ALL = {entry.key: entry for entry in entries()}

ZOO: dict[str, Entry] = {key: _ALL[key] for key in _KEYS}
