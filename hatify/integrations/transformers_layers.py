"""transformers' own layers that have to stay whole."""

from transformers.pytorch_utils import Conv1D

from hatify.registry import Weighted, register

register(Conv1D, Weighted(transposed=True))
