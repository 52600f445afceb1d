"""The original's own code, run on a converted model's weights without a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hatify.capture.tree import copy_tree

if TYPE_CHECKING:
    from hatify.model import HATModel


def original_of(hat: HATModel) -> nn.Module:
    """The original's own code on the model's weights without a task (shared, not copied)."""
    return OwnCode(hat).model


class OwnCode:
    """The original's modules, holding no weights of their own: each call reads those of the converted model.

    It serves the calls that a graph cannot: a model that asks whether gradients are on (torch's own transformer layers do, and take
    a fused kernel) has one answer in its graph, and the question is asked anew, layer by layer, in each call.
    """

    def __init__(self, hat: HATModel, model: nn.Module | None = None) -> None:
        """``model`` is the code, with any weights (default: the original's, or what its directory holds of it)."""
        self.hat = hat
        if model is None:
            model = hat._facts.stand_in if hat._facts.reference is None else hat._facts.reference
        self.model = copy_tree(model)
        self._places = [self._place(name) for name in hat._facts.original_names]
        self._modes = [(m, hat.get_submodule(p)) for p, m in self.model.named_modules() if p and has_module(hat, p)]
        self._bind()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the original gives in the modes of the converted model; buffers are written where they are."""
        self._bind()
        self.model.training = self.hat.training
        for mine, theirs in self._modes:
            mine.training = theirs.training
        try:
            return self.model(*args, **kwargs)
        finally:
            self._write_back()

    def tried(self, training: bool, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What the model gives in one mode, all of it, and its buffers then; the converted model's own stay as they are."""
        self._bind()
        for mine, _, name in self._places:
            if mine[name] is not None and not isinstance(mine[name], nn.Parameter):
                mine[name] = mine[name].clone()
        self.model.train(training)
        return self.model(*args, **kwargs), [mine[name] for mine, _, name in self._places]

    def all_trainable(self) -> bool:
        """Whether every parameter that can take a gradient does."""
        held = [theirs[name] for _, theirs, name in self._places]
        return all(p.requires_grad for p in held if isinstance(p, nn.Parameter) and p.is_floating_point())

    def _place(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
        """The shelf of the original and that of the converted model on which a tensor is, and its name there."""
        owner, _, attribute = name.rpartition(".")
        module, converted = self.model.get_submodule(owner), self.hat.get_submodule(owner)
        shelf = "_parameters" if attribute in module._parameters else "_buffers"
        return getattr(module, shelf), getattr(converted, shelf), attribute

    def _bind(self) -> None:
        for mine, theirs, name in self._places:
            mine[name] = theirs[name]
        for module in self.model.modules():
            if hasattr(module, "_flat_weights_names"):  # recurrent layers read their weights from a list of their own
                module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]

    def _write_back(self) -> None:
        """A buffer that forward assigned anew is the converted model's too (one of another shape is a cache)."""
        for mine, theirs, name in self._places:
            new, old = mine.get(name), theirs[name]
            if new is not None and new is not old and new.shape == old.shape and new.dtype == old.dtype:
                old.data.copy_(new)


def has_module(hat: HATModel, path: str) -> bool:
    """Whether the converted model has a module at that path of the original."""
    try:
        hat.get_submodule(path)
    except AttributeError:
        return False
    return True
