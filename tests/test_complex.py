"""Complex weights and writes into slices of complex tensors, as Fourier neural operators have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hatify
from hatify.capture import reading

X = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0))


class Spectral(nn.Module):
    """Two layers that mix the lowest frequencies with complex weights; ``single`` writes one frequency at a time."""

    def __init__(self, single: bool = False) -> None:
        super().__init__()
        self.lift, self.out, self.single = nn.Linear(2, 8), nn.Linear(8, 1), single
        self.local = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))
        self.mix = nn.ParameterList(nn.Parameter(torch.randn(8, 8, 3, dtype=torch.cfloat) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x).transpose(1, 2)
        for local, mix in zip(self.local, self.mix):
            waves = torch.fft.rfft(x)
            mixed = torch.zeros_like(waves)
            if self.single:
                for k in range(3):
                    mixed[:, :, k] = waves[:, :, k] @ mix[:, :, k]
            else:
                mixed[:, :, :3] = torch.einsum("bix,iox->box", waves[:, :, :3], mix)
            x = torch.relu(torch.fft.irfft(mixed, n=x.size(-1)) + local(x))
        return self.out(x.transpose(1, 2))


@pytest.mark.parametrize("single", [False, True])
def test_parity_and_drift(single: bool) -> None:
    model, larger = Spectral(single), torch.randn(2, 24, 2)
    hat = hatify.convert(model, 3, example_inputs=X)
    assert torch.equal(hat.eval()(larger), model.eval()(larger))
    proof = hatify.verify(hat)
    assert (proof.parity, proof.parity_train, proof.gradients, proof.drift) == (0.0, 0.0, 0.0, 0.0)
    for name in ("mix.0", "mix.1"):
        control, _ = hatify.verification.measure_drift(hat, without_locks=[name])
        assert control > 0.0, name


def test_torch_s_own_scatter_has_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(reading, "_WITHOUT_COMPLEX_BACKWARD", ())
    hat = hatify.convert(Spectral(), 2, example_inputs=X, verify=False)
    with pytest.raises(RuntimeError, match="complex"):
        hat(X)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1)],
)
def test_a_finished_task_stays_and_is_extracted(make, tmp_path) -> None:
    hat = hatify.convert(Spectral(), 2, example_inputs=X, config=hatify.HATConfig(num_tasks=2, mask_init="normal"))
    optimizer = make(hat.parameters())
    kept = None
    for task in (0, 1):
        with hat.train().learning(task=task, optimizer=optimizer, steps_per_epoch=4) as run:
            for _ in range(4):
                optimizer.zero_grad(set_to_none=False)
                ((hat(X) - 1).square().mean() + run.regularization()).backward()
                optimizer.step()
        hat.eval()
        if task == 0:
            kept, weight = hat(X, task=0), hat.get_parameter("mix.0").detach().clone()
    assert torch.equal(hat(X, task=0), kept)
    assert not torch.equal(hat.get_parameter("mix.0"), weight)  # what is free has moved
    for slim in (False, True):
        assert torch.allclose(hatify.extract(hat, 0, slim=slim)(X), kept, atol=1e-5)
    assert torch.equal(hatify.load(hatify.save(hat, tmp_path / "hat")).eval()(X, task=0), kept)


def test_a_complex_weight_that_is_not_finite_is_refused() -> None:
    hat = hatify.convert(Spectral(), 2, example_inputs=X, verify=False)
    optimizer = torch.optim.SGD(hat.parameters(), 0.1)
    with pytest.raises(hatify.errors.NonFiniteError), hat.train().learning(task=0, optimizer=optimizer, steps_per_epoch=1):
        hat(X).sum().backward()
        hat.get_parameter("mix.0").grad.mul_(float("inf"))
        optimizer.step()
    assert hat.get_parameter("mix.0").isfinite().all()
