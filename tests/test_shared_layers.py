"""Layers whose weights share memory with a copy: reading leaves it shared, writing parts it."""

import pytest
import torch
from memory import real, shared, weight
from torch import nn

from hatify.modules import copies
from hatify.modules.copies import READERS, copy_module, copy_of, shareable

LAYERS = {
    "linear": (lambda: nn.Linear(64, 64), (4, 64)),
    "linear, tokens": (lambda: nn.Linear(64, 64), (2, 5, 64)),
    "linear, bfloat16": (lambda: nn.Linear(64, 64).bfloat16(), (4, 64)),
    "linear, float64": (lambda: nn.Linear(64, 64).double(), (4, 64)),
    "conv1d": (lambda: nn.Conv1d(64, 64, 3), (2, 64, 16)),
    "conv2d": (lambda: nn.Conv2d(64, 64, 3), (2, 64, 16, 16)),
    "conv2d, 1x1": (lambda: nn.Conv2d(64, 64, 1), (2, 64, 16, 16)),
    "conv2d, depthwise": (lambda: nn.Conv2d(256, 256, 3, groups=256), (2, 256, 8, 8)),
    "conv2d, dilated": (lambda: nn.Conv2d(64, 64, 3, dilation=2), (1, 64, 8, 8)),
    "conv2d, channels last": (lambda: nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last), (1, 64, 8, 8)),
    "conv2d, bfloat16": (lambda: nn.Conv2d(64, 64, 3).bfloat16(), (1, 64, 8, 8)),
    "conv2d, float64": (lambda: nn.Conv2d(64, 64, 3).double(), (1, 64, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(16, 16, 3), (1, 16, 4, 4, 4)),
    "conv transposed": (lambda: nn.ConvTranspose2d(64, 64, 3), (1, 64, 8, 8)),
    "batch norm": (lambda: nn.BatchNorm2d(2048), (2, 2048, 4, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(2048), (4, 2048)),
    "instance norm": (lambda: nn.InstanceNorm2d(2048, affine=True, track_running_stats=True), (2, 2048, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(2048), (4, 2048)),
    "group norm": (lambda: nn.GroupNorm(2, 2048), (2, 2048, 4)),
    "rms norm": (lambda: nn.RMSNorm(2048), (4, 2048)),
    "embedding": (lambda: nn.Embedding(64, 64), None),
    "embedding bag": (lambda: nn.EmbeddingBag(64, 64), None),
    "prelu": (lambda: nn.PReLU(2048), (2, 2048, 4)),
    "bilinear": (lambda: nn.Bilinear(16, 16, 16), (4, 16)),
    "attention": (lambda: nn.MultiheadAttention(64, 4, batch_first=True), (2, 5, 64)),
    "encoder": (lambda: nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), (2, 5, 64)),
}


def _run(module, shape):
    parameter = next(module.parameters())
    x = torch.randint(0, 64, (4, 3)) if shape is None else torch.randn(shape).to(parameter.dtype)
    times = 3 if isinstance(module, nn.MultiheadAttention) else 2 if isinstance(module, nn.Bilinear) else 1
    out = module(*[x] * times)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", LAYERS)
def test_reading_a_layer_leaves_its_memory_shared(name):
    """In eval and in train mode, backward included; else threads that serve one model would part its weights at the same time."""
    make, shape = LAYERS[name]
    module = make()
    copied = copy_module(module)
    weights = [p for p in copied.parameters() if p.nbytes >= copies.PAGE]
    assert weights and all(shared(p) for p in weights)
    for side in (module, copied):
        side.eval()
        with torch.no_grad():
            _run(side, shape)
        _run(side, shape)
        side.train()
        _run(side, shape).sum().backward()
    assert all(shared(p) for p in weights)
    assert all(shared(p) for p in module.parameters() if p.nbytes >= copies.PAGE)


def test_every_reader_is_held_to_it():
    tried = [type(m) for make, _ in LAYERS.values() for m in make().modules()]
    assert all(any(issubclass(t, reader) for t in tried) for reader in READERS)


def test_a_layer_that_asks_for_a_writable_address_has_its_own_memory():
    """oneDNN's LSTM does (the control: seen here), so it is no reader; nor is a module that torch does not know."""
    lstm = nn.LSTM(64, 64).eval()
    kept = lstm.weight_ih_l0
    lstm.weight_ih_l0 = nn.Parameter(copy_of(kept))
    assert shared(lstm.weight_ih_l0)
    with torch.no_grad():
        lstm(torch.randn(2, 2, 64))
    assert not shared(lstm.weight_ih_l0)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight()

    for module in (nn.LSTM(64, 64), nn.GRU(64, 64), Own()):
        assert not list(shareable(module)) and not any(shared(p) for p in copy_module(module).parameters())


def test_a_tensor_that_two_layers_hold_is_shared_only_if_both_may():
    linear, lstm = nn.Linear(64, 256, bias=False), nn.LSTM(64, 64)
    lstm.weight_ih_l0 = linear.weight
    assert not list(shareable(nn.ModuleList([linear, lstm])))
    tied = nn.ModuleList([nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)])
    tied[1].weight = tied[0].weight
    copied = copy_module(tied)
    assert copied[0].weight is copied[1].weight and shared(copied[0].weight)


def test_statistics_are_written_to_one_side_only():
    module = nn.BatchNorm2d(2048)
    copied = copy_module(module)
    assert shared(copied.running_mean)
    before = real(module.running_mean)
    copied(torch.randn(4, 2048, 4, 4) + 3)
    assert torch.equal(module.running_mean, before) and (copied.running_mean - before).abs().min() > 0.1
