"""Layers of other libraries without their libraries: what they compute, as graphs over their own parameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn

from ..calling import Signature, Structure, unflatten
from ..facts import Sizes
from ..gates.layers import Layer, TaskIndexedLayer
from ..registry import register
from ..rewrite.graph import spelled

__all__ = ["BY_ITEM", "Lowered", "Recipe"]


BY_ITEM = ("recipe",)
"""Children that a layer's code asks for by ``self["name"]``: the layer itself has another use for the name."""


@dataclass(eq=False)
class Recipe:
    """What one kind of layer computes; shared by all layers of that kind and their copies.

    ``graphs`` are by mode, ``eval`` and, where it differs, ``train``; their paths are relative to the layer.
    """

    was: str
    graphs: dict[str, fx.Graph]
    outputs: dict[str, Structure]
    signature: Signature
    sizes: Sizes
    meaning: Layer | None
    _code: dict[str, Any] = field(default_factory=dict)

    def called(self) -> set[str]:
        """Paths of the modules inside the layer that its graphs call."""
        return {node.target for graph in self.graphs.values() for node in graph.nodes if node.op == "call_module"}

    def code(self, mode: str) -> Any:
        """The function of a mode: takes the layer and the flat inputs."""
        if mode not in self._code:
            graph = self.graphs[mode]
            graph.on_generate_code(lambda _: partial(spelled, hidden=BY_ITEM))
            made = graph.python_code("self")
            names = dict(made.globals)
            exec(compile(made.src, f"<{self.was}>", "exec"), names)  # the graph's own code, as fx does
            self._code[mode] = names["forward"]
        return self._code[mode]


class Lowered(nn.Module):
    """A layer of another library, or of the user, that needs neither: its parameters under their names, its forward as a recipe."""

    recipe: Recipe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        recipe = self.recipe
        mode = "train" if self.training and "train" in recipe.graphs else "eval"
        tensors = recipe.signature.bind(args, kwargs)
        recipe.sizes(tensors)
        return unflatten(list(recipe.code(mode)(self, *tensors)), recipe.outputs[mode])

    def __getitem__(self, key: int | str) -> Any:
        """A child, parameter or buffer by its name, as generated code spells some."""
        for shelf in (self._modules, self._parameters, self._buffers):
            if str(key) in shelf:
                return shelf[str(key)]
        raise KeyError(key)

    def __deepcopy__(self, memo: dict) -> Lowered:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        state = {k: v for k, v in self.__dict__.items() if k != "recipe"}
        copied.__dict__.update(copy.deepcopy(state, memo))
        copied.__dict__["recipe"] = self.recipe
        return copied

    def extra_repr(self) -> str:
        return f"was {self.recipe.was}"


@register(Lowered)
def _describe(layer: Lowered) -> Layer:
    return layer.recipe.meaning or TaskIndexedLayer()
