"""Models that ask whether gradients are on, loaded without their source: torch's layers ask again, the user's own code is missed aloud."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_artifact_safety import EXAMPLES, loads_or_is_refused, mutate, nothing_runs, reseal  # noqa: F401
from test_grad_modes import CASES, PADDED, TOKENS, Asks, differences, made
from torch import nn

import hatify
from hatify.artifact.torch_layers import ACTIVATIONS
from hatify.errors import ArtifactWarning


def layer(**options):
    return nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, **options)


class Own(nn.Module):
    """Glue of all kinds around torch's layers: a raw parameter, statistics, a layer that is used twice, a region without gradients."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(4, 6))
        self.encoder, self.norm = nn.TransformerEncoder(layer(activation=nn.GELU()), 1, nn.LayerNorm(6)), nn.BatchNorm1d(4)
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True), nn.Sequential(nn.Linear(6, 3))

    def forward(self, x, padding=None):
        with torch.no_grad():
            x = x * 1.5
        x = self.encoder(self.norm(x + self.place), src_key_padding_mask=padding)
        for _ in range(2):
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"out": self.head(x.mean(1)), "tokens": x}


MORE = {
    "a layer by itself": (lambda: layer(activation="gelu", norm_first=True), (TOKENS,)),
    "in a sequence": (lambda: nn.Sequential(nn.Linear(6, 6), layer(bias=False), nn.Flatten(), nn.Linear(24, 2)), (TOKENS,)),
    "both sides": (lambda: nn.Transformer(6, 2, 1, 1, 12, batch_first=True), (TOKENS, TOKENS)),
    "own glue": (Own, (TOKENS,)),
    "own glue with padding": (Own, (TOKENS, PADDED)),
}
TORCHS = ["encoder", *(name for name in MORE if name != "own glue")]


@pytest.fixture(scope="module", autouse=True)
def more_cases():
    CASES.update(MORE)
    yield
    for name in MORE:
        del CASES[name]


def loaded(hat, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        return hatify.load(hatify.save(hat, path)).train(hat.training)


@pytest.mark.parametrize("case", TORCHS)
def test_every_grad_mode_gives_what_the_original_gives_without_its_source(case, tmp_path):
    model, hat, inputs = made(case, verify=False)
    again = loaded(hat, tmp_path / "one")
    third = loaded(again, tmp_path / "two")
    expected = dict.fromkeys(("enable_grad", "no_grad", "inference_mode"), 0.0)
    assert differences(model, again, inputs) == differences(model, third, inputs) == expected
    assert again._facts.reference is None and again.state_dict().keys() == hat.state_dict().keys()
    with torch.no_grad():
        assert again.runs_own_code
    again._learn(stand_in=None)  # the negative control: the graph alone takes the other path
    assert not again.runs_own_code
    if case in ("encoder", "own glue with padding"):  # the others are so small that both paths may round alike
        assert differences(model, again, inputs)["no_grad"] > 0.0


def test_it_asks_for_each_weight_and_follows_weights_types_and_copies(tmp_path):
    model, hat, inputs = made("own glue", verify=False)
    again = loaded(hat, tmp_path / "saved")
    for network in (model, again):
        network.encoder.requires_grad_(False)
        with torch.no_grad():
            for number, name in enumerate(n for n, _ in model.named_parameters()):
                parameter = network.get_parameter(name)
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    copied = copy.deepcopy(again)
    for network in (again, copied):
        assert set(differences(model, network, inputs).values()) == {0.0}
    wide = [i.double() for i in inputs]
    assert set(differences(copy.deepcopy(model).double(), copied.double(), wide).values()) == {0.0}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(model(*inputs)["out"], again(*inputs)["out"])
    model(*inputs)["out"].sum().backward(), again(*inputs)["out"].sum().backward()
    grads = dict(again.named_parameters())
    assert all(p.grad is None or torch.equal(p.grad, grads[n].grad) for n, p in model.named_parameters())


def test_statistics_go_on_where_the_own_code_runs(tmp_path):
    model, hat, inputs = made("own glue", verify=False)
    again = loaded(hat, tmp_path / "saved")
    before = again.norm.running_mean.clone()
    for network in (model.train(), again.train()):
        torch.manual_seed(3)
        with torch.no_grad():
            network(*inputs)
    assert torch.equal(model.norm.running_mean, again.norm.running_mean) and not torch.equal(before, again.norm.running_mean)


def test_a_users_own_question_is_not_stored_and_missed_aloud(tmp_path):
    _, hat, inputs = made("a user's branch", verify=False)
    with pytest.warns(ArtifactWarning, match=r"Asks\.forward.*code of its own.*factory") as said:
        path = hatify.save(hat, tmp_path / "saved")
    assert said[0].filename == __file__
    with pytest.warns(ArtifactWarning, match="factory") as said:
        again = hatify.load(path)
    assert said[0].filename == __file__ and not again.runs_own_code
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        known = hatify.load(path, factory=Asks)
    with torch.no_grad():
        assert known.runs_own_code and torch.equal(known(*inputs)["out"], hat(*inputs)["out"])


def test_a_layer_with_a_function_of_the_users_is_not_torchs(tmp_path):
    model = nn.Sequential(layer(activation=torch.tanh), nn.Linear(6, 2))
    hat = hatify.convert(model, 2, example_inputs=TOKENS, verify=False).eval()
    path = hatify.save(hat, tmp_path / "saved")  # MultiheadAttention inside is kept, tanh is captured around it
    again = hatify.load(path).eval()
    assert set(differences(model.eval(), again, (TOKENS,)).values()) == {0.0}
    assert torch.tanh not in ACTIVATIONS.values() and "tanh" in json.dumps(
        json.loads((path / "model.json").read_text())["own_code"]
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    _, hat, _ = made("own glue", verify=False)
    return hatify.save(hat, tmp_path_factory.mktemp("own") / "saved")


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_own_code_with_right_digests_is_refused_or_loads(original, tmp_path_factory, nothing_runs, data):  # noqa: F811
    path = tmp_path_factory.mktemp("json") / "saved"
    path.mkdir()
    for file in original.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tree = json.loads((path / "model.json").read_text())
    mutate(tree["own_code"], data.draw)
    (path / "model.json").write_text(json.dumps(tree))
    reseal(path)
    loads_or_is_refused(path)
