"""transformers: small models from configurations that are made on the spot, one for each habit of the library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from hatify.zoo.entry import Entry

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_WIDTH, "vocab_size": 99, "max_position_embeddings": 64}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {**_WIDTH, "image_size": 32, "patch_size": 8}
_SEQUENCES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# name of the family: (class of the model, class of the configuration, its settings)
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_TEXT, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99, "max_position_embeddings": 64},
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 16}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "norm_rel_ebd": "layer_norm"},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_SEQUENCES, **_SPECIALS, "vocab_size": 99, "max_position_embeddings": 64},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "vocab_size": 99,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "sliding_window": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "image_size": 64},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 5],
            "decoder_hidden_size": 32,
            "image_size": 64,
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_TEXT, "eos_token_id": 98}, "vision_config": _IMAGE, "projection_dim": 16},
    ),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": {**_TEXT, "projection_size": 32}, "vision_config": _IMAGE}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQUENCES, **_SPECIALS, "vocab_size": 99, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            **_WIDTH,
            "conv_dim": (16, 16),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "vit_mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **_IMAGE,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
    ),
}


def entries() -> Iterator[Entry]:
    """One small model of each family."""
    made: dict[str, Callable[[], nn.Module]] = {name: partial(_build, *parts) for name, parts in _MODELS.items()}
    made["detr"] = _build_detr
    for name, build in sorted(made.items()):
        yield Entry("transformers", name, name, build)


def _build(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    transformers = _library()
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def _build_detr() -> nn.Module:
    transformers = _library()
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, use_pretrained_backbone=False, num_queries=5, **_SEQUENCES
    )
    return transformers.DetrForObjectDetection(config)


def _library() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of the zoo is downloaded
    import transformers

    return transformers
