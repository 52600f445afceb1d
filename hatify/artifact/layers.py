"""Which class a layer is stored as: torch's own, a recipe of what it computes, or one that the user brings again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..errors import ArtifactError
from ..modules import HATLayer, HATRecurrent, TaskIndexed
from .fields import Fields
from .known import YOURS, name_of, not_brought
from .lowered import Lowered, Recipe
from .torch_layers import LAYERS, attributes_from, attributes_to, empty_layer, plain_class, settle

__all__ = ["OURS", "LayerReader", "LayerWriter", "class_of"]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a raised layer has in the original."""
    return type(module).plain_class if isinstance(module, HATLayer | HATRecurrent | TaskIndexed) else type(module)


class LayerWriter:
    """Says how each layer is stored. ``recipes`` are those that :mod:`lowering` made, by the id of the layer."""

    def __init__(self, recipes: Mapping[int, Recipe | str], refusals: Mapping[str, str]) -> None:
        self._recipes, self._refusals = recipes, refusals
        self.recipes: list[Recipe] = []

    def is_unnamed(self, module: nn.Module) -> bool:
        """Whether a layer that no graph calls is of a class that torch made for it alone: it keeps its tensors, and nothing else."""
        return parametrize.is_parametrized(module) and class_of(module) is type(module) and id(module) not in self._recipes

    def write(self, module: nn.Module, path: str) -> dict[str, Any]:
        """Class and attributes.

        Raises:
            ArtifactError: none of the ways takes the layer; says why, and the call that helps.
        """
        cls = class_of(module)
        made = module.recipe if isinstance(module, Lowered) else self._recipes.get(id(module))
        name = plain_class(module, cls) if made is None else made
        if isinstance(name, Recipe):
            if name not in self.recipes:
                self.recipes.append(name)
            return {"class": "recipe", "recipe": self.recipes.index(name)}
        try:
            if name is not None:
                own = isinstance(module, HATLayer) and (made is not None or not module.carries)
                return {"class": name, "attributes": attributes_to(module, name), **({"carries": False} if own else {})}
            return {"class": f"{YOURS}{name_of(cls)}", "attributes": _own_attributes(module)}
        except ValueError as error:
            refusal = self._refusals.get(path.partition(".tasks.")[0], "")
            raise ArtifactError(
                f"a layer of the class {cls.__name__} cannot be stored",
                where=path,
                why="\n".join(filter(None, [refusal, f"as an object of its class: {error}"])),
                fix=f"let {cls.__name__} keep numbers and text only on itself, or write it with torch's functions alone",
            ) from error


OURS = ("seen", "masker", "masker_path", "plain_class", "carries", "_hat_slot")
"""What the conversion and the calls keep on a layer: none of its settings."""
_INTERNAL = {*vars(nn.Module()), *OURS}


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    found = {}
    for name, value in vars(module).items():
        if name not in _INTERNAL:
            found[name] = _plain(value, name)
    return found


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and value - value == 0):
        return value
    if type(value) is list:
        return [_plain(v, where) for v in value]
    if type(value) is tuple:
        return {"tuple": [_plain(v, where) for v in value]}
    raise ValueError(f"its {where} is a {type(value).__name__}")


def _from_plain(data: Any) -> Any:
    if type(data) is list:
        return [_from_plain(v) for v in data]
    if type(data) is dict:
        if [*data] != ["tuple"] or type(data["tuple"]) is not list:
            raise ValueError("an unknown kind of value")
        return tuple(_from_plain(v) for v in data["tuple"])
    return data


class LayerReader:
    """Makes layers without parameters. ``known`` are classes that the user passes or has registered."""

    def __init__(self, recipes: list[Recipe], known: Iterable[type[nn.Module]]) -> None:
        self.recipes = recipes
        self.known = {name_of(cls): cls for cls in known}

    def read(self, entry: Fields) -> nn.Module:
        """The layer of an entry.

        Raises:
            ArtifactError: an unknown class, or attributes that it does not have.
        """
        name = entry.get("class", str)
        if name == "recipe":
            number = entry.at("recipe").count(most=len(self.recipes) - 1)
            made = Lowered.__new__(Lowered)
            nn.Module.__init__(made)
            made.__dict__["recipe"] = self.recipes[number]
            return made
        if name in LAYERS:
            return empty_layer(name, attributes_from(entry.at("attributes"), name))
        if not name.startswith(YOURS):
            raise entry.at("class").wrong(repr(name[:100]), "a layer of torch.nn, a recipe, or a class of yours")
        return self._own(entry, name.removeprefix(YOURS))

    def _own(self, entry: Fields, name: str) -> nn.Module:
        cls = self.known.get(name)
        if cls is None:
            raise not_brought(
                entry.at("class"), name, "has layers of your own class", ", or hatify.register({}, ...) before loading"
            )
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for attribute, part in entry.at("attributes").pairs():
            value = part.decoded(_from_plain, "plain data")
            if attribute in _INTERNAL or attribute.startswith("__") or callable(getattr(cls, attribute, None)):
                raise part.wrong(repr(attribute[:60]), "an attribute of its own")
            made.__dict__[attribute] = value
        return made

    def settle(self, modules: Iterable[nn.Module]) -> None:
        """When all children are there."""
        for module in modules:
            if isinstance(module, HATLayer) and "masker" in module._modules:
                module.__dict__.pop("masker", None)

    @staticmethod
    def filled(modules: Iterable[nn.Module]) -> None:
        """When all tensors are there."""
        for module in modules:
            settle(module)
