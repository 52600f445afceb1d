"""Example inputs for models whose library says what they take. Values are random, from a fixed seed.

A guess would be checked by nobody: where the library does not say, the user is asked.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExampleInputsError

__all__ = ["find_example_inputs"]

_SEED = 0
_TOKENS = 16
_SAMPLES = 16_000  # one second of speech
_IMAGE = 224
_VIDEO = 112

Call = tuple[tuple[Any, ...], dict[str, Any]]


def find_example_inputs(model: nn.Module, batch: int = 2, img_size: int | None = None) -> Call:
    """The arguments ``(args, kwargs)`` of a call that the model takes.

    Args:
        model: a model of timm, torchvision or transformers, or of a class derived from one of theirs.
        batch: batch size.
        img_size: height and width of images. Models of other libraries are taken for image classifiers
            (``[batch, 3, img_size, img_size]``) when it is given.

    Returns:
        Positional arguments (timm, torchvision) or keywords (transformers), on the device and (floating ones)
        in the dtype of the model's parameters.

    Raises:
        ExampleInputsError: the model does not say what it takes.
    """
    make = _Maker(model, batch, img_size)
    # By the names of the modules that define its classes: nothing has to be imported to find out.
    families = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    kwargs: dict[str, Any] | None = None
    args: tuple[Any, ...] | None = None
    if "transformers" in families and hasattr(model, "main_input_name") and hasattr(model, "config"):
        kwargs = _transformers(model, make)
    elif "torchvision" in families:
        args = _torchvision(model, make)
    elif "timm" in families:
        args = _timm(model, make)
    elif img_size is not None:
        args = (make.image(3, img_size),)
    if args is None and kwargs is None:
        raise _missing(model)
    return args or (), kwargs or {}


class _Maker:
    """Random tensors where and as the model wants them."""

    def __init__(self, model: nn.Module, batch: int, img_size: int | None) -> None:
        floating = [p for p in model.parameters() if p.is_floating_point()]
        self.device = floating[0].device if floating else torch.device("cpu")
        self.dtype = floating[0].dtype if floating else torch.float32
        self.batch = batch
        self.img_size = img_size
        self._generator = torch.Generator().manual_seed(_SEED)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self._generator).to(self.device, self.dtype)

    def image(self, channels: int, size: Any) -> Tensor:
        size = self.img_size or size
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return self.floats(channels, height, width)

    def tokens(self, vocabulary: int, length: int, avoid: set[int]) -> Tensor:
        ids = torch.randint(0, vocabulary, (self.batch, length), generator=self._generator)
        allowed = next((token for token in range(vocabulary) if token not in avoid), 0)
        for token in avoid:  # padding, and ends of sentences, have a meaning of their own to many models
            ids[ids == token] = allowed
        return ids.to(self.device)


def _timm(model: Any, make: _Maker) -> tuple[Any, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, dict) or not config.get("input_size"):
        return None
    channels, *size = config["input_size"]
    # What the model was built with wins over what its weights were trained with.
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    first = config.get("first_conv")
    first = (first[0] if isinstance(first, (list, tuple)) and first else first) or ""
    with suppress(AttributeError):  # not every first layer is a convolution that says so
        seen = model.get_submodule(first).in_channels if isinstance(first, str) else channels
        channels = channels if seen in (4 * channels, 16 * channels) else seen  # that of blocks of pixels, folded into channels
    return (make.image(channels, built or size),)


def _torchvision(model: Any, make: _Maker) -> tuple[Any, ...] | None:
    names = [cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("torchvision.models.")]
    if not names:
        return None
    name = names[0].removeprefix("torchvision.models.")
    if name.startswith("video"):
        return (make.floats(3, *_video_size(model, names[0], make.img_size)),)
    if name.startswith("detection") and hasattr(
        model, "transform"
    ):  # a list of images, each of its own size; a backbone takes a batch
        return (list(make.image(3, _IMAGE).unbind()),)
    if name.startswith("optical_flow"):
        return make.image(3, 128), make.image(3, 128)
    trained = [crop for crop, _ in _published(names[0]) if isinstance(crop, int)]
    return (make.image(3, getattr(model, "image_size", None) or min(trained, default=_IMAGE)),)


def _video_size(model: Any, module: str, img_size: int | None) -> tuple[int, int, int]:
    position = getattr(model, "pos_encoding", None)
    if hasattr(position, "spatial_size"):  # built for one size, kept as a number of patches
        stride = model.conv_proj.stride
        height, width = (n * s for n, s in zip(position.spatial_size, stride[1:]))
        return position.temporal_size * stride[0], height, width
    least = min((smallest[0] for _, smallest in _published(module)), default=1)
    size = img_size or max(_VIDEO, least)
    return 16, size, size


def _published(module: str) -> list[tuple[Any, tuple[int, int]]]:
    """What a module of torchvision says of the weights that are published for its models: the size of the images that they are shown, and
    the smallest that they take."""
    from torchvision.models import WeightsEnum

    kinds = [kind for kind in vars(sys.modules[module]).values() if inspect.isclass(kind) and issubclass(kind, WeightsEnum)]
    weights = [weight for kind in kinds for weight in kind]
    return [(getattr(w.transforms, "keywords", {}).get("crop_size"), w.meta["min_size"]) for w in weights if "min_size" in w.meta]


def _transformers(model: Any, make: _Maker) -> dict[str, Any] | None:
    config = model.config
    takes = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {}
    main = model.main_input_name
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None)
    if main == "input_ids":
        kwargs[main] = _ids(text, make)
        if vision is not None and "pixel_values" in takes:
            kwargs["pixel_values"] = _pixels(vision, make)
    elif main == "pixel_values":
        kwargs[main] = _pixels(vision or config, make)
    elif main == "input_values" and _numbers(config, "max_length", "num_mel_bins"):
        kwargs[main] = make.floats(config.max_length, config.num_mel_bins)  # a spectrogram
    elif main == "input_values":
        channels = getattr(config, "audio_channels", None)
        kwargs[main] = make.floats(*([channels] if channels else []), _SAMPLES)
    elif main == "input_features" and _numbers(config, "num_mel_bins", "max_source_positions"):
        kwargs[main] = make.floats(config.num_mel_bins, 2 * config.max_source_positions)
    elif main == "input_features" and _numbers(config, "feature_projection_input_dim"):
        kwargs[main] = make.floats(64, config.feature_projection_input_dim)
    elif main == "input_features" and _numbers(config, "input_feat_per_channel", "input_channels"):
        kwargs[main] = make.floats(64, config.input_feat_per_channel * config.input_channels)
    else:
        return None
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        kwargs["decoder_input_ids"] = _ids(text, make)
    if "use_cache" in takes:
        kwargs["use_cache"] = False  # a cache is an object of its own, not a tensor
    return kwargs


def _ids(config: Any, make: _Maker) -> Tensor:
    positions = getattr(config, "max_position_embeddings", None) or 0
    length = min(_TOKENS, positions) if positions > 0 else _TOKENS  # some say -1 for any number
    specials = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    avoid = {token for name in specials if isinstance(token := getattr(config, name, None), int)}
    return make.tokens(config.vocab_size, length, avoid)


def _pixels(config: Any, make: _Maker) -> Tensor:
    size = getattr(config, "image_size", None) or _IMAGE
    image = make.image(getattr(config, "num_channels", None) or 3, size)
    frames = getattr(config, "num_frames", None)
    return image if not frames else image[:, None].repeat_interleave(frames, dim=1)


def _numbers(config: Any, *names: str) -> bool:
    return all(isinstance(getattr(config, name, None), int) for name in names)


def _missing(model: nn.Module) -> ExampleInputsError:
    return ExampleInputsError(
        "example inputs are missing",
        where=type(model).__qualname__,
        why="the model is not one of timm, torchvision or transformers that says what it takes",
        fix="hatify.convert(model, example_inputs=torch.randn(2, 3, 224, 224))\n"
        "several arguments are a tuple, example_inputs=(x, y); keywords a dict, example_inputs={'x': x}",
    )
