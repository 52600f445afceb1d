"""The inputs that a model is tried on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hatify.model import HATModel


def input_batches(hat: HATModel, seed: int = 0) -> Iterator[list[Tensor]]:
    """The example inputs, and the same model's inputs at another batch size and at one (where the batch is open).

    Where only some inputs have the batch, the others may number its elements (boxes that name their image), so it does not get smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = hat._facts.inputs
    yield [t.clone() for t in examples]
    open_batch = [t for t in examples if t.dim()]
    if not open_batch:
        return
    size = open_batch[0].shape[0]
    names = hat.signature.names
    batched = [t.dim() > 0 and t.shape[0] == size and (n, 0) not in hat._facts.check_sizes.fixed for n, t in zip(names, examples)]
    if not batched[0]:
        return
    alone = all(moves for moves, tensor in zip(batched, examples) if tensor.dim())
    for other in (size + 1, 1) if alone else (size + 1,):
        tensors = []
        for tensor, moves in zip(examples, batched):
            if moves:
                tensor = tensor[torch.arange(other) % size]
                if tensor.dtype.is_floating_point:
                    tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
            tensors.append(tensor)
        yield tensors


def batch_size(tensors: list[Tensor]) -> int:
    return next((int(t.shape[0]) for t in tensors if t.dim()), 0)
