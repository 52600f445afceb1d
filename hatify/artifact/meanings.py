"""What a layer means to the algebra, as data."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from typing import Any

from ..gates.layers import ChannelNorm, Elementwise, Layer, MixingNorm, Moving, Spatial, TaskIndexedLayer, Weighted
from .constants import constant_from
from .fields import Fields

__all__ = ["meaning_from", "meaning_to"]

KINDS = {c.__name__: c for c in (Weighted, ChannelNorm, MixingNorm, Elementwise, Spatial, Moving, TaskIndexedLayer)}


def meaning_to(meaning: Layer | None) -> dict[str, Any] | None:
    """A description by its class and fields."""
    if meaning is None:
        return None
    values = {f.name: getattr(meaning, f.name) for f in dataclass_fields(meaning) if getattr(meaning, f.name) != f.default}
    return {"kind": type(meaning).__name__, **{k: {"tuple": list(v)} if isinstance(v, tuple) else v for k, v in values.items()}}


def meaning_from(fields: Fields) -> Layer | None:
    """The description again.

    Raises:
        ArtifactError: an unknown kind or field, or a value of the wrong type.
    """
    if fields.data is None:
        return None
    cls = KINDS[fields.at("kind").one_of(*KINDS)]
    known = {f.name: f for f in dataclass_fields(cls)}
    fields.only("kind", *known)
    values: dict[str, Any] = {}
    for name, part in fields.pairs():
        if name == "kind":
            continue
        value = part.data if isinstance(part.data, str) else part.decoded(constant_from, "a constant")
        text = known[name].type
        kinds = {"int": int, "bool": bool, "str": str, "str | None": (str, type(None)), "tuple[str, ...]": tuple}[str(text)]
        if not isinstance(value, kinds) or (kinds is int and isinstance(value, bool)):
            raise part.wrong(str(value)[:60], str(text))
        if isinstance(value, tuple) and not all(isinstance(v, str) for v in value):
            raise part.wrong(str(value)[:60], "names")
        values[name] = value
    return fields.decoded(lambda _: cls(**values), "a description")
