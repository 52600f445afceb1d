"""HAT versions of every timm model, under its name with ``hat_`` before it (the paper's figure 2):

>>> import timm
>>> import hatify.timm_models  # registers the names
>>> net = timm.create_model("hat_resnet18", num_tasks=5)

Importing this module builds and converts nothing; ``create_model`` builds the timm model, with everything that timm offers (``pretrained``,
tags as in ``hat_resnet18.a1_in1k``, ``num_classes``, ``img_size``, ``checkpoint_path``, ...), and converts it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import timm
from timm.models import DefaultCfg, model_entrypoint, register_model

from hatify.errors import ConversionError
from hatify.modules.config import HATConfig

__all__: list[str] = []  # timm's registry adds the names
PREFIX = "hat_"
_MODULE = sys.modules[__name__]
_CONFIG = tuple(field.name for field in fields(HATConfig) if field.name != "num_tasks")
_CONVERT = ("heads", "locking", "norms", "residuals", "example_inputs", "verify", "progress")
default_cfgs: dict[str, DefaultCfg] = {}
"""Where timm's registry looks for the weights that there are for a name."""


def _entrypoint(name: str) -> Callable[..., Any]:
    """What ``timm.create_model`` calls for the HAT version of ``name``."""

    def create(pretrained: bool = False, **options: Any) -> Any:
        from hatify.conversion import convert

        how = {option: options.pop(option) for option in _CONVERT if option in options}
        settings = {option: options.pop(option) for option in _CONFIG if option in options}
        tasks = _tasks(options)
        config = HATConfig(num_tasks=1, **settings)  # checked before anything is built; the count comes with `tasks`
        model = model_entrypoint(name)(pretrained=pretrained, **options)
        described = {
            part: getattr(model, part) for part in ("pretrained_cfg", "default_cfg", "num_classes") if hasattr(model, part)
        }
        hat = convert(model, tasks, config=config, inplace=True, **how)
        for part, value in described.items():  # timm's transforms and scripts read them
            setattr(hat, part, value)
        return hat

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__module__ = __name__
    create.__doc__ = (
        f"`{name}` of timm, converted; takes its arguments, `num_tasks` or `tasks`, and the options of HATConfig and convert."
    )
    return create


def _tasks(options: dict[str, Any]) -> Any:
    given = {option: options.pop(option) for option in ("tasks", "num_tasks") if option in options}
    if len(given) > 1:
        raise ConversionError("num_tasks and tasks say the same", fix='timm.create_model("hat_resnet18", num_tasks=5)')
    return next(iter(given.values()), HATConfig.num_tasks)


def _weights(name: str) -> DefaultCfg | None:
    """The weights that timm knows for a name, with the places they are at written out: the prefix is not part of them."""
    known = getattr(sys.modules[model_entrypoint(name).__module__], "default_cfgs", {}).get(name)
    if not isinstance(known, DefaultCfg):
        return None
    cfgs = {}
    for tag, cfg in known.cfgs.items():
        at = f"timm/{name}.{tag}" if tag else f"timm/{name}"
        cfgs[tag] = replace(cfg, hf_hub_id=at) if cfg.hf_hub_id == "timm/" else cfg
    return replace(known, cfgs=cfgs)


def _register() -> None:
    for name in timm.list_models():
        if name.startswith(PREFIX):
            continue
        create = _entrypoint(name)
        weights = _weights(name)
        if weights is not None:
            default_cfgs[create.__name__] = weights
        setattr(_MODULE, create.__name__, create)
        register_model(create)


_register()
