"""Small networks drawn at random: a program of steps, each of which reads earlier values and appends its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

SIZE, WIDEST = 4, 24
"""Images are SIZE by SIZE; no value gets more channels than WIDEST."""


@dataclass(frozen=True)
class Step:
    """``name`` of :data:`STEPS`; ``x`` and ``y`` count back to the values that it reads; ``number`` is for its own choices."""

    name: str
    x: int = 0
    y: int = 0
    number: int = 0


class Drawn(nn.Module):
    """Runs a program of steps on an image. A step that finds no value to read is skipped.

    The result is a linear layer over the pooled values that nothing has read; with ``features`` these values too.
    """

    def __init__(self, program: list[Step], features: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.program, self.features, self.building = program, features, True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self(inputs(2))
            self.building = False
            for module in self.modules():  # neither scales nor shifts nor statistics are those of a fresh network
                if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.3 * torch.randn(parameter.shape))
        self.eval()

    def layer(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The layer ``name`` of the step at work, made when the network is built."""
        name = f"step{self.step}_{name}"
        if self.building and not hasattr(self, name):
            self.add_module(name, make())
        return getattr(self, name)

    def parameter(self, name: str, *shape: int) -> Tensor:
        """A raw parameter of the step at work."""
        name = f"step{self.step}_{name}"
        if self.building and not hasattr(self, name):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        return getattr(self, name)

    def constant(self, name: str, value: Callable[[], Tensor]) -> Tensor:
        """A buffer of the step at work."""
        name = f"step{self.step}_{name}"
        if self.building and not hasattr(self, name):
            self.register_buffer(name, value())
        return getattr(self, name)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.step = "in"
        values, read = [self.layer("conv", lambda: nn.Conv2d(3, 8, 3, padding=1))(x)], set()
        for number, step in enumerate(self.program):
            self.step = number
            rank, run = STEPS[step.name]
            of_rank = [i for i, v in enumerate(values) if v.dim() == rank][::-1]
            if not of_rank:
                continue
            i = of_rank[step.x % len(of_rank)]
            alike = [j for j in of_rank if values[j].shape == values[i].shape and j != i] or [i]
            j = alike[step.y % len(alike)]
            new = [v for v in run(self, values[i], values[j], step.number) if channels(v) <= WIDEST]
            read |= {i, j} if new and step.name in TWO else {i} if new else set()
            values += new
        self.step = "out"
        ends = [v for i, v in enumerate(values) if i not in read]
        pooled = torch.cat([v.mean((2, 3)) if v.dim() == 4 else v.mean(1) for v in ends], 1)
        out = self.layer("head", lambda: nn.Linear(pooled.shape[1], 3))(pooled)
        return (out, *ends) if self.features else out

    def __repr__(self) -> str:
        return f"Drawn([{', '.join(map(repr, self.program))}], features={self.features})"


def inputs(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))


def channels(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else x.shape[2]


STEPS: dict[str, tuple[int, Callable]] = {}
TWO: set[str] = set()
"""Steps that read two values of one shape."""


def step(rank: int, two: bool = False) -> Callable:
    """Registers a step on images (rank 4) or tokens (rank 3): ``(network, x, y, number) -> new values``."""

    def register(run: Callable) -> Callable:
        STEPS[run.__name__] = rank, run
        TWO.update({run.__name__} if two else ())
        return run

    return register


def _width(number: int) -> int:
    return (4, 6, 8, 12)[number % 4]


def _groups(size: int, number: int) -> int:
    fitting = [g for g in (1, 2, 3, 4, 6) if size % g == 0]
    return fitting[number % len(fitting)]


ACTIVATIONS = (torch.relu, F.gelu, torch.sigmoid, torch.tanh, F.softplus, F.hardswish, lambda x: torch.log1p(x.abs()),
               lambda x: torch.sqrt(x.square() + 0.1), lambda x: x.abs() + 0.5, lambda x: x.clamp(0.2, 1.0))  # fmt: skip


# images: weighted layers


@step(4)
def conv(net, x, y, number):
    size = (1, 3)[number % 2]
    return [net.layer("conv", lambda: nn.Conv2d(channels(x), _width(number), size, padding=size // 2))(x)]


@step(4)
def conv_without_bias(net, x, y, number):
    return [net.layer("conv", lambda: nn.Conv2d(channels(x), _width(number), 1, bias=False))(x)]


@step(4)
def grouped_conv(net, x, y, number):
    groups = _groups(channels(x), number)
    return [net.layer("conv", lambda: nn.Conv2d(channels(x), groups * (1 + number % 3), 3, padding=1, groups=groups))(x)]


@step(4)
def depthwise_conv(net, x, y, number):
    size = channels(x)
    return [net.layer("conv", lambda: nn.Conv2d(size, size * (1 + number % 2), 3, padding=1, groups=size))(x)]


@step(4)
def transposed_conv(net, x, y, number):
    groups = _groups(channels(x), number)
    return [net.layer("conv", lambda: nn.ConvTranspose2d(channels(x), 2 * groups, 3, padding=1, groups=groups))(x)]


@step(4)
def conv_twice(net, x, y, number):
    layer = net.layer("conv", lambda: nn.Conv2d(channels(x), channels(x), 1))
    return [layer(torch.relu(layer(x)))]


@step(4)
def functional_conv(net, x, y, number):
    return [F.conv2d(x, net.parameter("weight", 6, channels(x), 1, 1), net.parameter("bias", 6))]


@step(4)
def standardised_conv(net, x, y, number):
    weight = net.parameter("weight", 6, channels(x), 1, 1)
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.var((1, 2, 3), keepdim=True) + 0.1).sqrt()
    return [F.conv2d(x, weight)]


@step(4)
def linear_over_columns(net, x, y, number):
    return [net.layer("linear", lambda: nn.Linear(x.shape[3], x.shape[3]))(x)]


# images: norms


@step(4)
def batch_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.BatchNorm2d(channels(x)))(x)]


@step(4)
def instance_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.InstanceNorm2d(channels(x), affine=number % 2 == 0))(x)]


@step(4)
def group_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.GroupNorm(_groups(channels(x), number), channels(x)))(x)]


@step(4)
def layer_norm_of_channels(net, x, y, number):
    return [net.layer("norm", lambda: nn.LayerNorm(channels(x)))(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]


@step(4)
def l2_normalised(net, x, y, number):
    return [F.normalize(x, dim=1)]


@step(4)
def standardised_by_hand(net, x, y, number):
    return [(x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-2).sqrt()]


# images: elementwise, joins and gates


@step(4)
def activation(net, x, y, number):
    return [ACTIVATIONS[number % len(ACTIVATIONS)](x)]


@step(4)
def prelu(net, x, y, number):
    return [net.layer("act", lambda: nn.PReLU(channels(x)))(x)]


@step(4)
def dropout(net, x, y, number):
    return [net.layer("drop", lambda: (nn.Dropout, nn.Dropout2d)[number % 2](0.2))(x)]


@step(4, two=True)
def add(net, x, y, number):
    return [x + y]


@step(4, two=True)
def subtract(net, x, y, number):
    return [x - 0.5 * y]


@step(4, two=True)
def multiply(net, x, y, number):
    return [x * y]


@step(4, two=True)
def gate(net, x, y, number):
    return [torch.sigmoid(x) * y]


@step(4, two=True)
def largest(net, x, y, number):
    return [torch.maximum(x, y)]


@step(4, two=True)
def divide(net, x, y, number):
    return [x / (1 + y.abs())]


@step(4, two=True)
def choose(net, x, y, number):
    return [torch.where(x > 0, x, y)]


@step(4, two=True)
def concatenate(net, x, y, number):
    return [torch.cat([x, y], 1)]


@step(4)
def concatenate_constant(net, x, y, number):
    return [torch.cat([x, net.parameter("more", 1, 2, 1, 1).expand(x.shape[0], 2, *x.shape[2:])], 1)]


@step(4)
def squeeze_excite(net, x, y, number):
    down = net.layer("down", lambda: nn.Conv2d(channels(x), 4, 1))
    up = net.layer("up", lambda: nn.Conv2d(4, channels(x), 1))
    return [x * torch.sigmoid(up(torch.relu(down(x.mean((2, 3), keepdim=True)))))]


@step(4)
def efficient_channel_attention(net, x, y, number):
    mixed = net.layer("conv", lambda: nn.Conv1d(1, 1, 3, padding=1))(x.mean((2, 3)).unsqueeze(1))
    return [x * torch.sigmoid(mixed).transpose(1, 2).unsqueeze(-1)]


@step(4)
def spatial_gate(net, x, y, number):
    seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return [x * torch.sigmoid(net.layer("conv", lambda: nn.Conv2d(2, 1, 3, padding=1))(seen))]


@step(4)
def gated_linear_unit(net, x, y, number):
    return [F.glu(x, 1)] if channels(x) % 2 == 0 else []


@step(4)
def layer_scale(net, x, y, number):
    return [x * net.parameter("scale", channels(x), 1, 1)]


@step(4)
def shift(net, x, y, number):
    return [x + net.parameter("shift", 1, channels(x), 1, 1)]


@step(4)
def masked_by_constant(net, x, y, number):
    return [x * net.constant("mask", lambda: (torch.arange(channels(x)) % 3 != number % 3).float().view(1, -1, 1, 1))]


@step(4)
def filled_by_constant(net, x, y, number):
    mask = net.constant("mask", lambda: torch.eye(SIZE).repeat(2, 2)[: x.shape[2], : x.shape[3]] > 0)
    return [x.masked_fill(mask, (-1.0, 0.0)[number % 2])]


@step(4)
def softmax_of_channels(net, x, y, number):
    return [x.softmax(1)]


@step(4)
def channel_attention(net, x, y, number):
    q = F.normalize(x.flatten(2), dim=-1)
    scores = (q @ q.transpose(1, 2)).softmax(-1)
    return [(scores @ x.flatten(2)).view_as(x)]


# images: movement


@step(4)
def halves(net, x, y, number):
    return list(x.chunk(2, 1)) if channels(x) % 2 == 0 else []


@step(4)
def unequal_parts(net, x, y, number):
    first = 1 + number % (channels(x) - 1)
    return list(x.split([first, channels(x) - first], 1)) if channels(x) > 2 else []


@step(4)
def part(net, x, y, number):
    return [x[:, number % channels(x) // 2 :]]


@step(4)
def every_other(net, x, y, number):
    return [x[:, ::2]]


@step(4)
def one_channel(net, x, y, number):
    return [x * x[:, number % channels(x)].unsqueeze(1)]


@step(4)
def channel_shuffle(net, x, y, number):
    groups = _groups(channels(x), number)
    return [x.view(x.shape[0], groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)]


@step(4)
def channels_by_index(net, x, y, number):
    order = net.constant("order", lambda: torch.randperm(channels(x)))
    return [x[:, order]]


@step(4)
def roll(net, x, y, number):
    return [x.roll((1 + number % 2, 1), (1, 3))]


@step(4)
def halves_swapped(net, x, y, number):
    return [x.roll((channels(x) // 2, 1), (1, 2))]


@step(4)
def flip(net, x, y, number):
    return [x.flip(1)]


@step(4)
def padded_channels(net, x, y, number):
    return [F.pad(x, (0, 0, 0, 0, number % 2, 2))]


@step(4)
def pixel_unshuffle(net, x, y, number):
    return [F.pixel_unshuffle(x, 2)] if x.shape[2] % 2 == 0 else []


@step(4)
def pixel_shuffle(net, x, y, number):
    return [F.pixel_shuffle(x, 2)] if channels(x) % 4 == 0 and x.shape[2] < 2 * SIZE else []


@step(4)
def pool(net, x, y, number):
    kind = (F.avg_pool2d, F.max_pool2d)[number % 2]
    return [F.interpolate(kind(x, 3, 1, 1), scale_factor=1.0)]


@step(4)
def mean_over_space(net, x, y, number):
    return [x - x.mean((2, 3), keepdim=True)]


@step(4)
def transposed_space(net, x, y, number):
    return [x.transpose(2, 3)]


@step(4)
def to_tokens(net, x, y, number):
    return [x.flatten(2).transpose(1, 2)]


@step(4)
def patches(net, x, y, number):
    return [F.unfold(x, 2, stride=2).transpose(1, 2)] if x.shape[2] % 2 == 0 else []


# tokens


@step(3)
def linear(net, x, y, number):
    return [net.layer("linear", lambda: nn.Linear(channels(x), _width(number), bias=number % 3 > 0))(x)]


@step(3)
def linear_by_function(net, x, y, number):
    weight = net.parameter("weight", channels(x), 6)
    return [x @ weight if number % 2 else torch.einsum("nlc,cd->nld", x, weight)]


@step(3)
def layer_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.LayerNorm(channels(x), elementwise_affine=number % 3 > 0))(x)]


@step(3)
def rms_norm(net, x, y, number):
    return [net.layer("norm", lambda: nn.RMSNorm(channels(x)))(x)]


@step(3)
def norm_of_heads(net, x, y, number):
    if channels(x) % 2:
        return []
    heads = x.unflatten(2, (2, -1))
    return [net.layer("norm", lambda: nn.LayerNorm(heads.shape[3]))(heads).flatten(2)]


@step(3)
def batch_norm_of_tokens(net, x, y, number):
    return [net.layer("norm", lambda: nn.BatchNorm1d(channels(x)))(x.transpose(1, 2)).transpose(1, 2)]


@step(3)
def activation_of_tokens(net, x, y, number):
    return [ACTIVATIONS[number % len(ACTIVATIONS)](x)]


@step(3, two=True)
def add_tokens(net, x, y, number):
    return [x + y]


@step(3, two=True)
def multiply_tokens(net, x, y, number):
    return [F.silu(x) * y]


@step(3)
def fused_attention(net, x, y, number):
    size = (4, 8)[number % 2]
    q, k, v = (
        net.layer("qkv", lambda: nn.Linear(channels(x), 3 * size))(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return [net.layer("proj", lambda: nn.Linear(size, _width(number)))(out.transpose(1, 2).flatten(2))]


@step(3)
def attention_by_hand(net, x, y, number):
    q, k, v = net.layer("qkv", lambda: nn.Linear(channels(x), 12))(x).chunk(3, -1)
    scores = (q @ k.transpose(1, 2) * 0.5).softmax(-1)
    return [scores @ v]


@step(3, two=True)
def cross_attention(net, x, y, number):
    size = (4, 6)[number % 2]
    q = net.layer("q", lambda: nn.Linear(channels(x), size))(x).unflatten(2, (2, -1)).transpose(1, 2)
    k, v = net.layer("kv", lambda: nn.Linear(channels(x), 2 * size))(y).unflatten(2, (2, 2, -1)).permute(2, 0, 3, 1, 4)
    return [F.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2).reshape(*x.shape[:2], size)]


@step(3)
def torch_attention(net, x, y, number):
    if channels(x) % 2:
        return []
    return [net.layer("attn", lambda: nn.MultiheadAttention(channels(x), 2, batch_first=True))(x, x, x, need_weights=False)[0]]


@step(3)
def token_mixing(net, x, y, number):
    return [net.layer("mix", lambda: nn.Linear(x.shape[1], x.shape[1]))(x.transpose(1, 2)).transpose(1, 2)]


@step(3)
def spatial_gating_unit(net, x, y, number):
    if channels(x) % 2:
        return []
    a, b = x.chunk(2, -1)
    b = net.layer("norm", lambda: nn.LayerNorm(b.shape[-1]))(b)
    return [a * net.layer("mix", lambda: nn.Linear(x.shape[1], x.shape[1]))(b.transpose(1, 2)).transpose(1, 2)]


@step(3)
def class_token(net, x, y, number):
    return [torch.cat([net.parameter("token", 1, 1, channels(x)).expand(x.shape[0], -1, -1), x], 1)]


@step(3)
def without_first_token(net, x, y, number):
    return [x[:, 1:]] if x.shape[1] > 2 else []


@step(3)
def first_token_added(net, x, y, number):
    return [x + x[:, :1]]


@step(3)
def positions(net, x, y, number):
    return [x + net.parameter("positions", 1, x.shape[1], channels(x))]


@step(3)
def conv_over_tokens(net, x, y, number):
    return [net.layer("conv", lambda: nn.Conv1d(channels(x), _width(number), 3, padding=1))(x.transpose(1, 2)).transpose(1, 2)]


@step(3)
def recurrent(net, x, y, number):
    return [net.layer("rnn", lambda: (nn.GRU, nn.LSTM)[number % 2](channels(x), 4, batch_first=True))(x)[0]]


@step(3)
def heads_swapped(net, x, y, number):
    return [x.unflatten(2, (2, -1)).flip(2).flatten(2)] if channels(x) % 2 == 0 else []


@step(3)
def to_image(net, x, y, number):
    return [x.transpose(1, 2).unflatten(2, (2, -1))] if x.shape[1] % 2 == 0 else []


ORDER = sorted(STEPS, key=lambda name: (name not in ("conv", "batch_norm", "activation", "to_tokens", "linear"), name))
"""Simple ones first: what a failure shrinks to."""

programs = st.lists(
    st.builds(
        Step,
        st.sampled_from(ORDER),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 11),
    ),
    min_size=1,
    max_size=9,
)
