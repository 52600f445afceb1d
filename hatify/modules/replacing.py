"""Who is asked before a parameter of a HAT layer is replaced by another, which no lock would know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ASKED: list[Callable[[Tensor, object], None]] = []
"""Called with a parameter and what is to be there instead (None: nothing under this name); they raise where it must stay."""


class AsksBeforeReplacing:
    """Part of a HAT layer: ``layer.weight = nn.Parameter(...)`` passes by here, and what loads with ``assign=True``, prunes or
    parametrizes."""

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("_parameters", {}).get(name)
        if held is not None and value is not held:
            _ask(held, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See :meth:`torch.nn.Module.register_parameter`."""
        for known, held in self._parameters.items():
            if held is param and held is not None and known != name:
                _ask(held, None)
        super().register_parameter(name, param)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        held = self._parameters.get(name)
        if held is not None:
            _ask(held, None)
        super().__delattr__(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict, *rest: Any) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            for name, held in (*self.named_parameters(), *self.named_buffers()):  # type: ignore[attr-defined]
                if prefix + name in state_dict:
                    _ask(held, state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[misc]


def _ask(held: Tensor, new: object) -> None:
    for ask in ASKED:
        ask(held, new)
