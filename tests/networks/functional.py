"""Operations between the layers: activations, in-place writes, partial functions, dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import floats, network


@network("inplace", floats(3, 8, 8))
class InPlaceNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.bn1(self.conv1(x))
        y = self.relu(shortcut)  # `shortcut` is rectified too, and used below
        y = self.conv2(y)
        y += shortcut
        y.relu_()
        z = self.conv3(y)
        z.mul_(0.7).add_(y, alpha=0.1)
        tail = z[:, 6:]
        tail.neg_().add_(0.2)  # writes through the view into z
        z[:, 2] = z[:, 3] * 0.5
        z[:, :2].sigmoid_()  # last: its backward needs what it wrote
        return self.fc(z.mean((2, 3)))


@network("prelu", floats(3, 8, 8))
class PReLUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.act1 = nn.PReLU(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.act2 = nn.PReLU()
        self.rrelu = nn.RReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        return self.fc(self.rrelu(self.act2(self.conv2(x))).mean((2, 3)))


@network("gated", floats(10))
class GatedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 32)
        self.a = nn.Linear(16, 12)
        self.b = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.fc1(x), dim=-1)
        return self.fc2(self.a(x) * torch.sigmoid(self.b(x)))


@network("softplus_log_sqrt", floats(3, 8, 8))
class PartialFunctions(nn.Module):
    """sqrt, log and division: a materialised zero among their operands is an infinity or a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 12, 1)
        self.hidden = nn.Linear(12, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.conv1(x)).sqrt()
        y = self.conv2(x).exp()
        x = (x + 1.0).log() / (y + F.relu(self.conv3(x)))
        energy = x.pow(2).sum((2, 3)).sqrt()
        x = x.mean((2, 3)) / energy  # 0/0 in a dead channel
        return self.fc(torch.reciprocal(self.hidden(x).abs() + 0.5))


@network("hardtanh_threshold", floats(3, 8, 8))
class NotZeroPreserving(nn.Module):
    """Activations whose f(0) depends on their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.threshold = nn.Threshold(0.1, 0.3)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.hardtanh = nn.Hardtanh()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.conv1(x), 0.5, 2)
        x = self.threshold(self.conv2(x))
        x = self.hardtanh(self.conv3(x)).clamp(min=0.05)
        return self.fc(F.hardsigmoid(x).mean((2, 3)))


@network("alpha_dropout", floats(10))
def alpha_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 16),
        nn.SELU(),
        nn.AlphaDropout(0.2),
        nn.Linear(16, 16),
        nn.SELU(),
        nn.FeatureAlphaDropout(0.1),
        nn.Linear(16, 5),
    )


@network("functional_dropout", floats(3, 8, 8))
class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.drop = nn.Dropout2d(0.2)
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.conv(x))).mean((2, 3))
        x = F.dropout(F.relu(self.fc1(x)), p=0.3, training=self.training)
        return self.fc2(x)


@network("always_dropout", floats(10))
class MonteCarloDropout(nn.Module):
    """F.dropout with its default training=True: random in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(torch.relu(self.fc1(x)), 0.3))


class StochasticDepth(nn.Module):
    """Drops whole samples of a residual branch in train mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        noise = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x / keep * (noise + keep).floor()


@network("drop_path_user", floats(3, 8, 8))
class DropPathUser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.GELU(), StochasticDepth(p)) for p in (0.1, 0.4)
        )
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


@network("learned_temperature", floats(10))
class LearnedTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 5)
        self.log_temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x))) * self.log_temperature.exp().clamp(max=100)


@network("scalar_params", floats(3, 8, 8))
class ScalarParameters(nn.Module):
    """ReZero scales, a StarReLU and a learned mix of two branches: zero-dimensional parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 12, 1)
        self.alpha = nn.Parameter(torch.tensor(0.3))
        self.scale = nn.Parameter(torch.tensor([0.9]))
        self.shift = nn.Parameter(torch.tensor([-0.4]))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * F.relu(self.conv1(x)) ** 2 + self.shift
        mix = torch.sigmoid(self.alpha)
        x = x + self.alpha * (mix * self.conv2(x) + (1 - mix) * self.conv3(x))
        return self.fc(x.mean((2, 3)))


class ScaledSign(torch.autograd.Function):
    """Sign with a straight-through gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


@network("autograd_function", floats(10))
class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ScaledSign.apply(self.fc1(x)))


@network("attention_pool_masked", floats(6, 8))
class MaskedPooling(nn.Module):
    """Comparisons, masked_fill with -inf, where: boolean values computed from activations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.score = nn.Linear(12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.embed(x))
        scores = self.score(x).squeeze(-1)
        keep = scores >= scores.mean(dim=1, keepdim=True)
        weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
        x = torch.where(x > 0, x, 0.1 * x)
        return self.fc((weights.unsqueeze(-1) * x).sum(1))


@network("weight_on_the_left", floats(6, 10))
class WeightOnTheLeft(nn.Module):
    """A layer's weight times tokens that are laid out as columns, its bias added later: the layer itself is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.step = nn.Linear(16, 12)
        self.mix = nn.Parameter(torch.randn(9, 6) * 0.4)  # over tokens
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x)).transpose(1, 2)
        x = F.softplus(self.step.weight @ x + self.step.bias[:, None])
        x = torch.tanh(self.mix @ x.transpose(1, 2))
        return self.fc(x.mean(1))


@network("affine_residuals", floats(9, 6))
class AffineResiduals(nn.Module):
    """``addcmul`` as a channel's scale and shift, as a gated residual, and with a base that other channels write to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.shift = nn.Parameter(torch.randn(16) * 0.3)
        self.fc2 = nn.Linear(16, 16)
        self.fc3 = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        x = torch.addcmul(self.shift, self.scale, x)
        x = torch.addcmul(x, self.scale, x.sin(), value=0.5)
        x = torch.addcmul(x, torch.tanh(self.fc2(x)), self.fc3(x))
        return self.fc(x.mean(1))
