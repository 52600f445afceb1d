"""Where a model comes from: a name that one of the libraries knows, or a function of the user's.

>>> parse_source("resnet50").build(pretrained=True)           # timm
>>> parse_source("torchvision:resnet18").build(checkpoint="weights.pt")
>>> parse_source("my_package.models:make_model").build()

The libraries are imported only when a name of theirs is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .checkpoints import load_checkpoint
from .errors import CheckpointError, HatifyError, UnknownModelError
from .example_inputs import find_example_inputs

__all__ = ["Source", "find_example_inputs", "load_checkpoint", "parse_source"]

KINDS = ("timm", "torchvision", "transformers", "factory")
_TIMM_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Source:
    """A recipe for the architecture of a model; weights are a question of ``build``.

    Attributes:
        kind: "timm", "torchvision", "transformers" or "factory".
        name: the library's name of the model, a directory with ``config.json``, or "package.module:factory".
        kwargs: keyword arguments for the constructor; ``img_size`` is translated to what the library takes,
            and left out for models of any image size. JSON-able.
    """

    kind: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As the user would write it: "resnet50", "torchvision:resnet18", "my.module:factory"."""
        return self.name if self.kind in ("timm", "factory") else f"{self.kind}:{self.name}"

    def build(self, pretrained: bool = False, checkpoint: str | os.PathLike[str] | None = None) -> nn.Module:
        """A new model: random weights, the library's weights (``pretrained``), or those of a file.

        Raises:
            UnknownModelError: no such model.
            CheckpointError: the weights cannot be had or do not fit.
        """
        if pretrained and checkpoint is not None:
            raise CheckpointError("pretrained weights and a checkpoint exclude each other", fix="give one of the two")
        builder = _BUILDERS[self.kind]
        if not pretrained:
            model = builder(self, False)
        else:
            try:
                model = builder(self, True)
            except HatifyError:
                raise
            # Every library has its own errors for a missing file, network or set of weights.
            except Exception as error:
                raise CheckpointError(
                    "the pretrained weights cannot be had",
                    where=self.text,
                    why=f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:400],
                    fix="check the connection and the name, or give a file: --checkpoint (checkpoint=...)",
                ) from error
        if not isinstance(model, nn.Module):
            raise UnknownModelError(
                "the source does not give a model",
                where=self.text,
                why=f"it returned a {type(model).__name__}, not a torch.nn.Module",
                fix="name a function (or class) that returns the model",
            )
        if checkpoint is not None:
            load_checkpoint(model, checkpoint)
        return model

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; ``Source.from_json`` reads it."""
        return {"kind": self.kind, "name": self.name, "kwargs": self.kwargs}

    @staticmethod
    def from_json(data: Any) -> Source:
        """Reads what ``to_json`` wrote.

        Raises:
            UnknownModelError: the data does not describe a source.
        """
        fits = (
            isinstance(data, dict)
            and data.get("kind") in KINDS
            and isinstance(data.get("name"), str)
            and isinstance(data.get("kwargs", {}), dict)
        )
        if not fits:
            raise UnknownModelError(
                "a stored source cannot be read",
                where=str(data)[:200],
                why=f"kind must be one of {', '.join(KINDS)}",
            )
        return Source(data["kind"], data["name"], dict(data.get("kwargs", {})))


def parse_source(text: str, img_size: int | None = None) -> Source:
    """Reads a model name as the command line takes it.

    Args:
        text: a timm name, ``torchvision:NAME``, ``transformers:DIR`` or ``package.module:factory``.
        img_size: height and width of the images, for models that are built for one size.

    Raises:
        UnknownModelError: no such model, with the nearest names.
    """
    kwargs = {} if img_size is None else {"img_size": int(img_size)}
    prefix, _, rest = text.partition(":")
    if prefix == "torchvision":
        known = _library("torchvision", text).models.list_models()
        if rest not in known:
            raise _unknown(text, "torchvision", rest, known, "torchvision:")
        return Source("torchvision", rest, kwargs)
    if prefix == "transformers":
        return Source("transformers", os.path.abspath(rest), {**_read_config(rest, text), **kwargs})
    if prefix == "timm":
        text = rest
    elif not text.startswith(_TIMM_SCHEMES) and _FACTORY.fullmatch(text):
        _factory(text)
        return Source("factory", text, kwargs)
    if not text.startswith(_TIMM_SCHEMES):
        _check_timm(text)
    return Source("timm", text, kwargs)


def _check_timm(name: str) -> None:
    timm = _library("timm", name)
    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        fallback = None
        if os.path.isdir(name) and os.path.isfile(os.path.join(name, "config.json")):
            fallback = f"to convert a transformers directory, write transformers:{name}"
        raise _unknown(name, "timm", architecture, timm.list_models(), "", fallback)
    if dot and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise _unknown(name, "timm", name, tagged, "")


def _unknown(
    text: str, library: str, name: str, known: Iterable[str], prefix: str, fallback: str | None = None
) -> UnknownModelError:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    fix = f"did you mean {', '.join(prefix + other for other in close)}?" if close else None
    return UnknownModelError(
        f"unknown model {text!r}",
        where=library,
        why=f"{library} has no model of that name",
        fix=fix or fallback or "write a timm name, torchvision:NAME, transformers:DIR or package.module:factory",
    )


def _library(name: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnknownModelError(
            f"{text!r} needs {name}, which is not installed", why=str(error), fix=f"pip install {name}"
        ) from error


# One builder per kind


def _build_timm(source: Source, pretrained: bool) -> nn.Module:
    timm = _library("timm", source.text)
    return _sized(lambda **kwargs: timm.create_model(source.name, pretrained=pretrained, **kwargs), "img_size", source)


def _build_torchvision(source: Source, pretrained: bool) -> nn.Module:
    models = _library("torchvision", source.text).models
    weights: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    config = inspect.signature(models.get_model_builder(source.name)).parameters
    if "weights_backbone" in config and not pretrained:
        weights["weights_backbone"] = None  # detection and segmentation would download a backbone
    return _sized(lambda **kwargs: models.get_model(source.name, **weights, **kwargs), "image_size", source)


def _sized(build: Callable[..., nn.Module], spelling: str, source: Source) -> nn.Module:
    """Builds with the image size where the constructor takes one; other models take images of any size."""
    kwargs = dict(source.kwargs)
    size = kwargs.pop("img_size", None)
    if size is None:
        return build(**kwargs)
    try:
        return build(**kwargs, **{spelling: size})
    except TypeError as error:
        if f"argument '{spelling}'" not in str(error) and f"argument: '{spelling}'" not in str(error):
            raise
        return build(**kwargs)


def _build_transformers(source: Source, pretrained: bool) -> nn.Module:
    transformers = _library("transformers", source.text)
    kwargs = dict(source.kwargs)
    config, size = kwargs.pop("config", None), kwargs.pop("img_size", None)
    if config is None:
        config = _read_config(source.name, source.text)["config"]
    try:
        config = transformers.CONFIG_MAPPING[config["model_type"]].from_dict({**config, **kwargs})
    except KeyError as error:
        raise UnknownModelError(
            "the configuration names a model type that transformers does not have",
            where=source.text,
            why=f"model_type is {config.get('model_type')!r}",
            fix="write a function that returns the model, and give package.module:function",
        ) from error
    for part in (config, getattr(config, "vision_config", None)):
        if size is not None and getattr(part, "image_size", None) is not None:
            part.image_size = size
    names = getattr(config, "architectures", None) or ["AutoModel"]
    cls = getattr(transformers, names[0], transformers.AutoModel)
    if pretrained:
        return cls.from_pretrained(source.name, config=config, local_files_only=True)
    return cls.from_config(config) if cls is transformers.AutoModel else cls(config)


def _read_config(directory: str, text: str) -> dict[str, Any]:
    """The configuration goes into the source itself, so that a saved conversion outlives the directory."""
    path = Path(directory, "config.json")
    fix = "give a directory that model.save_pretrained(DIR) wrote"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownModelError(f"unknown model {text!r}", where=str(path), why=error.strerror, fix=fix) from error
    except ValueError as error:
        raise UnknownModelError(f"unknown model {text!r}", where=str(path), why=f"no JSON: {error}", fix=fix) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UnknownModelError(f"unknown model {text!r}", where=str(path), why="it has no model_type", fix=fix)
    return {"config": config}


def _build_factory(source: Source, pretrained: bool) -> nn.Module:
    factory = _factory(source.name)
    kwargs = dict(source.kwargs)
    try:
        takes = set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        takes = set()
    if "img_size" not in takes:
        kwargs.pop("img_size", None)
    if pretrained:
        if "pretrained" not in takes:
            raise CheckpointError(
                "the factory has no pretrained weights",
                where=source.name,
                why="it takes no argument `pretrained`",
                fix="let it load the weights itself, or give a file with --checkpoint (checkpoint=...)",
            )
        kwargs["pretrained"] = True
    return factory(**kwargs)


def _factory(text: str) -> Callable[..., Any]:
    module_name, _, qualname = text.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        # An import that fails inside the user's module is reported as such, not as an unknown name.
        missing = getattr(error, "name", None) or ""
        absent = module_name == missing or module_name.startswith(missing + ".")
        raise UnknownModelError(
            f"unknown model {text!r}" if absent else f"the module of {text!r} cannot be imported",
            where=module_name,
            why=str(error),
            fix="run from the directory that holds the module, or install it",
        ) from error
    for part in qualname.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise _unknown(text, module_name, part, names, f"{module_name}:")
        found = getattr(found, part)
    return found


_BUILDERS: dict[str, Callable[[Source, bool], nn.Module]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "transformers": _build_transformers,
    "factory": _build_factory,
}
