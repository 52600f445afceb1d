"""A conversion on disk: safetensors and JSON. No pickle, and reading it runs no code that it names."""

from .directory import load, save

__all__ = ["load", "save"]
