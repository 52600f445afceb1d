"""The original's own code as data, for the calls that the converted graph cannot serve.

torch's transformer layers ask in each call whether gradients are on, each for its own weights, before they take a fused kernel; a graph
has one answer in it. Such layers are kept whole, as torch's classes; what is around them is captured. So a model that asks through
torch's layers alone gives the same without its source. One that asks in the user's own code does not, and says so.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..capture import capture
from ..conversion import on_meta
from ..errors import ArtifactError, ArtifactWarning, HatifyError
from ..gates.layers import TaskIndexedLayer
from ..original import OwnCode, has_module, original_of
from ..proof.differences import difference
from ..registry import register
from .fields import Fields
from .gates import Ids
from .layers import LayerWriter
from .lowered import Lowered, Recipe
from .lowering import Lowering, read_recipe
from .torch_layers import attributes_of, plain_class
from .tree import TreeReader, TreeWriter

if TYPE_CHECKING:
    from ..model import HATModel

__all__ = ["describe_own_code", "own_code_from", "warn_without"]

ASKING = ("Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer", "TransformerDecoderLayer",
          "MultiheadAttention")  # fmt: skip
"""torch's modules whose forward asks."""

KINDS = ("scope", "list", "dict", "parameters", "plain", "same", "none")

FAILURES = (HatifyError, ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError)
"""Why code cannot be stored: it cannot be captured, or what was captured does not run alone. The reason goes into the warning."""

_KNOWN: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""What was found for each conversion, as the recipes of its layers."""


class Whole(nn.Module):
    """Mixed into a layer of torch that is not traced into."""


register(Whole, TaskIndexedLayer())


def describe_own_code(
    hat: HATModel, lowering: Lowering, layers: LayerWriter, recipe_to: Callable[[Recipe], dict[str, Any]]
) -> dict[str, Any] | None:
    """What goes into ``model.json``, or None where the graph serves all calls, or the code cannot be stored (a warning says why)."""
    facts = hat._facts
    if not any(facts.asks.values()):
        return None
    try:
        recipe, tree = (_of_loaded if facts.reference is None else _of_original)(hat, lowering)
        writer = TreeWriter(tree, layers, Ids(), whole=recipe is None, called=recipe and recipe.called())
    except FAILURES as error:
        warn_without(hat, getattr(error, "why", None) or str(error), stacklevel=6)
        return None
    return {"recipe": None if recipe is None else recipe_to(recipe), "modules": writer.entries}


def warn_without(hat: HATModel, why: str, stacklevel: int) -> None:
    """Says that some calls of a model need its source."""
    asking = ", ".join(dict.fromkeys(place for places in hat._facts.asks.values() for place in places))
    warnings.warn(
        f"{hat._facts.name} asks whether gradients are on ({asking}), and its directory does not hold its own code: {why}. Without a task "
        "and with gradients off, what is loaded takes the path with gradients, which may differ from the original's; "
        "hatify.load(directory, factory=make_model) takes the original's",
        ArtifactWarning,
        stacklevel=stacklevel,
    )


def _of_loaded(hat: HATModel, lowering: Lowering) -> tuple[Recipe | None, nn.Module]:
    tree = hat._facts.stand_in
    if tree is None:
        raise ValueError("neither did the one that it was loaded from")
    return (tree.recipe if isinstance(tree, Lowered) else None), tree


def _of_original(hat: HATModel, lowering: Lowering) -> tuple[Recipe | None, nn.Module]:
    facts = hat._facts
    if facts not in _KNOWN:
        try:
            _KNOWN[facts] = _found(hat)
        except FAILURES as error:
            _KNOWN[facts] = error
    if isinstance(_KNOWN[facts], Exception):
        raise _KNOWN[facts]
    recipe, tree = _KNOWN[facts]
    for path in () if recipe is None else recipe.called():
        mine = hat.get_submodule(path) if has_module(hat, path) else None
        theirs = mine.recipe if isinstance(mine, Lowered) else lowering.recipes.get(id(mine))
        if theirs is not None:
            lowering.recipes[id(tree.get_submodule(path))] = theirs
    return recipe, tree


def _found(hat: HATModel) -> tuple[Recipe | None, nn.Module]:
    """The code around the layers that are kept whole (None: the model is such a layer), and the modules; proved by running it."""
    facts = hat._facts
    original = original_of(hat)
    if any(t.device.type != "cpu" for t in (*original.parameters(), *original.buffers())):
        original = copy.deepcopy(original).cpu()
    args, kwargs = facts.signature.rebuild([t.cpu() for t in facts.inputs])
    recipe = None
    if not _storable(original):
        kept = _keep(original)
        _check_asks(facts.asks, original, kept)
        with torch.random.fork_rng(devices=[]):
            evaluated, trained, _ = capture(original, args, kwargs)
        recipe = read_recipe(original, evaluated, trained, None)
        for path in kept:
            part = original.get_submodule(path)
            part.__class__ = type(part).__mro__[2]  # what it was
    tree = on_meta(original)
    _prove(hat, recipe, tree)
    return recipe, tree


def _keep(original: nn.Module) -> list[str]:
    """Marks the outermost modules that are kept whole; their paths."""
    kept: list[str] = []
    for path, module in original.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in kept) or not _storable(module):
            continue
        module.__class__ = type(type(module).__name__, (Whole, type(module)), {"__module__": type(module).__module__})
        kept.append(path)
    return kept


def _storable(module: nn.Module) -> bool:
    """Whether it asks and is torch's own, all the way down."""
    if plain_class(module) not in ASKING:
        return False
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return False
        if type(part) is nn.ModuleList:
            continue
        name = plain_class(part)
        if name is None:
            return False
        try:
            attributes_of(part, name)
        except ValueError:
            return False
    return True


def _check_asks(asks: Mapping[bool, list[str]], original: nn.Module, kept: list[str]) -> None:
    """Whether all that asks is kept whole."""
    for place in dict.fromkeys(place for places in asks.values() for place in places):
        name, _, method = place.rpartition(".")
        owners = [path for path, module in original.named_modules() if type(module).__name__ == name]
        inside = [any(path == outer or path.startswith(f"{outer}.") for outer in kept) for path in owners]
        if not (method == "forward" and owners and all(inside)):
            raise ValueError(f"{place} is code of its own")


def stand_in(recipe: Recipe | None, tree: nn.Module) -> nn.Module:
    """The modules as one that computes what the original does."""
    if recipe is None or isinstance(tree, Lowered):
        return tree
    made = Lowered.__new__(Lowered)
    nn.Module.__init__(made)
    for shelf in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        made.__dict__[shelf] = tree.__dict__[shelf]
    made.__dict__["recipe"] = recipe
    return made


def _prove(hat: HATModel, recipe: Recipe | None, tree: nn.Module) -> None:
    """Both modes, with and without gradients: equal to the original's own code, to the bit."""
    args, kwargs = hat.example_inputs
    device = next((p.device for p in hat.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, (args, kwargs))
    codes = OwnCode(hat), OwnCode(hat, stand_in(recipe, tree))
    for training in (False, True) if hat.can_train else (False,):
        for gradients in (True, False):
            found = []
            for code in codes:
                with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
                    torch.manual_seed(0)
                    found.append([t for t in pytree.tree_leaves(code.tried(training, args, kwargs)) if isinstance(t, Tensor)])
            if difference(*found) != 0.0:
                raise ValueError("what was captured of it does not give what it gives")


def own_code_from(tree: TreeReader, recipe: Recipe | None, fields: Fields, names: list[str]) -> nn.Module:
    """The modules again, as one; ``names`` are the tensors of the original.

    Raises:
        ArtifactError: they are not the original's.
    """
    for entry in fields.at("modules").items():
        entry.at("kind").one_of(*KINDS)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = tree.module(owner)
        if module is None or (attribute not in module._parameters and attribute not in module._buffers):
            raise fields.at("modules").wrong(f"no {name[:100]}", "every tensor of the original")
    if recipe is None and plain_class(tree.root) is None:
        raise ArtifactError("a field is wrong", where=f"{fields.file}: {fields.path}.recipe", why="it is missing", fix="save again")
    tree.layers.filled(tree.modules())
    return stand_in(recipe, tree.root)
