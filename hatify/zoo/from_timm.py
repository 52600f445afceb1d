"""timm: every name, and the smallest model of each family (a module of ``timm.models``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hatify.zoo.entry import Entry

SMALLEST = Path(__file__).with_name("timm_smallest.json")
"""What :func:`smallest_models` found, since it takes minutes: family -> name."""
LARGE = 512
"""Pixels of a side. A proof holds the activations of several training steps; with larger images they are more than a desk has."""
_DROPS = ({"drop_path_rate": 0.1, "drop_rate": 0.1}, {"drop_rate": 0.1}, {})


def entries() -> Iterator[Entry]:
    """Every name of timm's registry."""
    for family, names in families().items():
        for name in names:
            yield Entry("timm", name, family, partial(build, name), size(name))


def size(name: str) -> int | None:
    """The side of the images to try a name with: the smallest that timm says it takes, where its own are larger than :data:`LARGE`."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    if config is None or config.fixed_input_size or not config.min_input_size or max(config.input_size[1:]) <= LARGE:
        return None
    height, width = config.min_input_size[1:]
    return height if height == width else None


def representatives() -> dict[str, str]:
    """The smallest model of each family, by name; found anew for families that the shipped list does not have."""
    known = json.loads(SMALLEST.read_text(encoding="utf-8"))
    found = {}
    for family, names in families().items():
        found[family] = known[family] if known.get(family) in names else smallest(names)
    return found


def families() -> dict[str, list[str]]:
    """Names by the module of ``timm.models`` that defines them."""
    import timm

    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__
        if module.startswith("timm.models."):  # others have registered theirs, hatify too
            found.setdefault(module.removeprefix("timm.models."), []).append(name)
    return dict(sorted(found.items()))


def build(name: str) -> nn.Module:
    """The model with timm's random weights; training is stochastic as far as the model has drop rates."""
    import timm

    for drops in _DROPS:
        try:
            return timm.create_model(name, pretrained=False, **drops)
        except TypeError as error:  # not every model has both
            if not any(option in str(error) for option in drops):
                raise
    raise AssertionError("unreachable: the last attempt has no options")


def smallest(names: list[str]) -> str:
    """The name with the fewest parameters; models are built without weights.

    Names that cannot be built on the meta device are built with weights.
    """
    return min(names, key=lambda name: (parameters(name), name))


def parameters(name: str) -> int:
    """The number of parameters of a name."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return sum(p.numel() for p in model.parameters())


def write_smallest() -> None:
    """Finds the smallest model of every family of the installed timm, and keeps their names beside this file."""
    found = {family: smallest(names) for family, names in families().items()}
    SMALLEST.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_smallest()
