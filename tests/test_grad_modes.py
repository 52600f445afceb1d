"""Parity in every grad mode: models whose code takes another path where gradients are off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from controls import assert_checks_can_fail
from networks import NETWORKS
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.proof.differences import difference

TOKENS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 4, [False] * 2 + [True] * 2, [False] * 3 + [True]])
MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


class Encoder(nn.Module):
    """torch's own encoder: a fused kernel per layer where no gradient is wanted, nested tensors where the padding allows."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding).mean(1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Asks(nn.Module):
    """A user's own branch, in both modes; without gradients it gives one output more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.after, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.embed(x))
        if torch.is_grad_enabled():
            return {"out": self.head(torch.tanh(self.after(x)))}
        self.calls = self.calls + 1
        return {"out": self.head(torch.relu(self.after(x))), "calls": self.calls.clone()}


class OwnRegion(nn.Module):
    """A region without gradients, which asks nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.stem(x))
        return self.head(x)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple]] = {
    "encoder": (Encoder, (TOKENS,)),
    "encoder with padding": (Encoder, (TOKENS, PADDED)),
    "self attention": (SelfAttention, (TOKENS,)),
    "a user's branch": (Asks, (TOKENS,)),
}


def made(case: str, **options) -> tuple[nn.Module, HATModel, tuple]:
    torch.manual_seed(1)
    factory, inputs = CASES[case]
    model = factory().eval()
    return model, hatify.convert(copy.deepcopy(model), 2, example_inputs=inputs, **options).eval(), inputs


def flat(out) -> list[Tensor]:
    return list(out.values()) if isinstance(out, dict) else [out]


def differences(model: nn.Module, hat: HATModel, inputs: tuple) -> dict[str, float]:
    """By grad mode."""
    found = {}
    for mode in MODES:
        with mode():
            found[mode.__name__] = difference(flat(model(*inputs)), flat(hat(*inputs)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_grad_mode_gives_what_the_original_gives_there(case: str) -> None:
    model, hat, inputs = made(case)
    proof = hat.verification
    assert proof.ok and proof.parity == proof.parity_no_grad == proof.parity_train == proof.drift == 0.0
    assert differences(model, hat, inputs) == dict.fromkeys(("enable_grad", "no_grad", "inference_mode"), 0.0)
    assert any("asks whether gradients are on" in note for note in hat.report.notes)
    assert_checks_can_fail(hat)


@pytest.mark.parametrize("case", CASES)
def test_the_check_finds_a_graph_that_has_only_one_answer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the graph alone is right with gradients and wrong without."""
    model, hat, inputs = made(case, verify=False)
    monkeypatch.setattr(HATModel, "runs_own_code", False)
    found = differences(model, hat, inputs)
    assert found["enable_grad"] == 0.0 and found["no_grad"] > 0.0 and found["inference_mode"] > 0.0
    report = hatify.verify(hat)
    assert report.parity == 0.0 and report.parity_no_grad > 0.0 and not report.ok


@pytest.mark.parametrize("frozen", ["", "embed", "encoder", "embed|encoder", "embed|encoder|head"])
def test_frozen_parts_take_the_path_that_the_original_takes(frozen: str) -> None:
    """torch's layers ask for their own weights: a frozen one is fused although gradients are on."""
    model, hat, inputs = made("encoder")
    for network in (model, hat):
        for part in frozen.split("|") if frozen else ():
            network.get_submodule(part).requires_grad_(False)
    assert set(differences(model, hat, inputs).values()) == {0.0}
    trainable = {n for n, p in hat.named_parameters() if p.requires_grad}
    assert hatify.verify(hat).ok and trainable == {n for n, p in hat.named_parameters() if p.requires_grad}
    if frozen != "embed|encoder|head":
        for network in (model, hat):
            network(*inputs).sum().backward()
        grads = dict(hat.named_parameters())
        assert all(p.grad is None or torch.equal(p.grad, grads[n].grad) for n, p in model.named_parameters())


@pytest.mark.parametrize("setting", ["autocast", "no fused kernels"])
def test_what_else_the_original_asks_for_is_asked_in_each_call(setting: str) -> None:
    model, hat, inputs = made("encoder", verify=False)
    with torch.no_grad():
        plain = model(*inputs)
        if setting == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected, got = model(*inputs), hat(*inputs)
        else:
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                expected, got = model(*inputs), hat(*inputs)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(expected, got) and not torch.equal(expected, plain)


def noise(model: nn.Module, names: list[str], seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).copy_(torch.randn(model.get_parameter(name).shape, generator=generator))


def test_it_follows_new_weights_and_types() -> None:
    model, hat, inputs = made("encoder", verify=False)
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        before = hat(*inputs)
    noise(model, names), noise(hat, names)
    assert set(differences(model, hat, inputs).values()) == {0.0}
    with torch.no_grad():
        assert not torch.equal(before, hat(*inputs))
    assert set(differences(model.double(), hat.double(), (TOKENS.double(),)).values()) == {0.0}


def test_a_copy_and_a_saved_one_run_on_weights_of_their_own(tmp_path: Path) -> None:
    model, hat, inputs = made("encoder", verify=False)
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        hat(*inputs)
    hatify.save(hat, tmp_path / "saved")
    others = copy.deepcopy(hat), hatify.load(tmp_path / "saved", factory=Encoder)
    for other in others:
        assert set(differences(model, other, inputs).values()) == {0.0}
    changed = copy.deepcopy(model)
    noise(changed, names)
    for other in others:
        noise(other, names)
        assert set(differences(changed, other, inputs).values()) == {0.0}
    assert set(differences(model, hat, inputs).values()) == {0.0}


def test_a_buffer_that_the_original_replaces_is_the_models_own() -> None:
    model, hat, inputs = made("a user's branch")
    with torch.no_grad():
        for _ in range(3):
            assert difference(flat(model(*inputs)), flat(hat(*inputs))) == 0.0
        hat(*inputs, task=0)
    assert hat.calls.item() == model.calls.item() == 3.0


def test_train_mode_asks_too() -> None:
    model, hat, inputs = made("a user's branch")
    model.train(), hat.train()
    assert differences(model, hat, inputs) == dict.fromkeys(("enable_grad", "no_grad", "inference_mode"), 0.0)


def test_tasks_run_in_the_graph_whatever_the_grad_mode() -> None:
    _, hat, inputs = made("encoder", verify=False)
    expected = hat(*inputs, task=1)
    with torch.no_grad():
        assert torch.equal(expected, hat(*inputs, task=1))


def test_the_code_says_so_where_it_happens() -> None:
    _, hat, _ = made("encoder", verify=False)
    said = hat.code.partition("the original's own code")[2]
    assert "TransformerEncoderLayer.forward" in said and "def forward" not in said
    plain = hatify.convert(OwnRegion(), 2, example_inputs=TOKENS, verify=False)
    assert "the original's own code" not in plain.code and not plain.runs_own_code and not plain.report.notes


def test_nothing_that_was_watched_stays_watched() -> None:
    before = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.overrides.has_torch_function
    made("encoder", verify=False)
    assert (torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.overrides.has_torch_function) == before


@pytest.mark.parametrize(
    "name", ["transformer_encoder", "transformer_encoder_norm_first", "transformer_decoder", "multihead_attention"]
)
def test_the_networks_of_the_registry(name: str) -> None:
    network = NETWORKS[name]
    model, inputs = network.make().eval(), network.inputs(3)
    hat = hatify.convert(network.make(), 2, example_inputs=inputs, verify=False).eval()
    for mode in MODES:
        with mode():
            expected, got = (out if isinstance(out, tuple) else (out,) for out in (model(*inputs), hat(*inputs)))
            assert difference(expected, got) == 0.0
