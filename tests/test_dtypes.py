"""What a model's code takes from types: numbers and casts follow the values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tasks import draw_masks, finish
from torch import Tensor, nn
from typed_networks import (
    BRAIN,
    DOUBLE,
    HALF,
    WAYS,
    Additive,
    DroppedOut,
    Eps,
    HalfOfTheLimit,
    InTraining,
    LikeTheValues,
    LikeTheWeights,
    MaskedFill,
    OwnTable,
    Picks,
    ThereAndBack,
    Tokens,
    Twice,
    checked,
    given,
    pair,
    within,
)

import hatify
from hatify.capture import functional
from hatify.capture.captured import Way
from hatify.capture.twins import Follower
from hatify.errors import CallError

FOLLOWING = [
    MaskedFill,
    Additive,
    HalfOfTheLimit,
    Eps,
    ThereAndBack,
    Twice,
    LikeTheValues,
    LikeTheWeights,
    OwnTable,
    Picks,
    InTraining,
    DroppedOut,
]


@pytest.fixture(params=FOLLOWING, ids=lambda cls: cls.__name__, scope="module")
def following(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, hatify.HATModel]]:
    yield pair(request.param)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_numbers_and_casts_follow_the_values(following: tuple, way: Way) -> None:
    checked(*following, way)


def test_the_proof_holds_and_nothing_is_refused(following: tuple) -> None:
    _, hat = following
    assert hat.verification.ok and not any(hat._facts.unlike.values())


def test_saved_and_loaded_they_follow_too(following: tuple, tmp_path: Path) -> None:
    model, hat = following
    hatify.save(hat, tmp_path / "saved")
    loaded = hatify.load(tmp_path / "saved").eval()
    assert loaded.code == hat.code
    for way in WAYS:
        checked(model, loaded, way)


def test_saved_and_loaded_in_another_type_they_follow_too(following: tuple, tmp_path: Path) -> None:
    model, hat = following
    x, mask = given()
    hatify.save(hat, tmp_path / "float32")
    hatify.save(hat, tmp_path / "bfloat16", dtype=BRAIN)
    wanted = copy.deepcopy(model).to(BRAIN)(x.to(BRAIN), mask)
    for loaded in (hatify.load(tmp_path / "float32", dtype=BRAIN), hatify.load(tmp_path / "bfloat16")):
        assert torch.equal(loaded.eval()(x.to(BRAIN), mask), wanted)


def test_compiled_as_a_whole_they_follow_too(following: tuple) -> None:
    model, hat = following
    for way in (WAYS[1], WAYS[3]):
        torch.compiler.reset()
        x, mask = given()
        cast, original = copy.deepcopy(hat).to(way.dtype), copy.deepcopy(model).to(way.dtype)
        with within(way), torch.no_grad():
            compiled = torch.compile(cast, backend="eager", fullgraph=True)
            assert torch.equal(compiled(x.to(way.dtype), mask), original(x.to(way.dtype), mask))


@pytest.mark.parametrize("slim", [False, True])
def test_an_extracted_task_follows_too(following: tuple, slim: bool) -> None:
    hat, (x, mask) = copy.deepcopy(following[1]).eval(), given()
    draw_masks(hat)
    finish(hat, 0)
    plain = hatify.extract(hat, 0, slim)
    assert not any("hatify" in str(getattr(node.target, "__module__", "")) for node in plain.graph.nodes)
    for way in WAYS:
        cast, small, given_x = copy.deepcopy(hat).to(way.dtype), copy.deepcopy(plain).to(way.dtype), x.to(way.dtype)
        with within(way), torch.no_grad():
            wanted, found = cast(given_x, mask, task=0), small(given_x, mask)
        assert found.dtype == wanted.dtype and found.isfinite().all()
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("make", FOLLOWING, ids=lambda cls: cls.__name__)
def test_without_it_the_numbers_of_float32_stay(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what is frozen is wrong in some type."""
    monkeypatch.setattr(Follower, "settle", lambda follower: None)
    model, hat = pair(make)
    wrong = 0
    for way in WAYS:
        try:
            checked(model, hat, way)
        except (AssertionError, RuntimeError):
            wrong += 1
    assert wrong


def test_a_model_that_reads_no_type_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(*args: object) -> None:
        raise AssertionError("traced in another type")

    monkeypatch.setattr("hatify.capture.dtypes._traced", traced)
    hatify.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2, example_inputs=torch.randn(3, 4), verify=False)
    with pytest.raises(AssertionError, match="another type"):
        pair(Eps)


class Region(nn.Module):
    """A layer in a region of autocast, whose type is read behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BRAIN):
            y = self.a(x)
        return self.b((y + torch.finfo(y.dtype).eps).to(x.dtype))


def test_a_layer_in_a_region_gives_the_type_of_the_region() -> None:
    x = torch.randn(5, 4)
    torch.manual_seed(0)
    model = Region().eval()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=x).eval()
    assert hat.verification.ok and torch.equal(hat(x), model(x))
    assert torch.equal(hat.double()(x.double()), model.double()(x.double()))


def transformer(name: str, impl: str = "eager") -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    small = dict(vocab_size=40, attn_implementation=impl)
    if name == "t5":
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **small)
        cls = transformers.T5EncoderModel
    else:
        config = transformers.DebertaV2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                              max_position_embeddings=32, relative_attention=True, pos_att_type=["p2c", "c2p"],
                                              **small)  # fmt: skip
        cls = transformers.DebertaV2Model
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (2, 7))
    return cls(config).eval(), {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


@pytest.mark.parametrize("name", ["t5", "deberta"])
def test_transformers_in_every_type(name: str) -> None:
    model, inputs = transformer(name)
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=inputs, verify=False).eval()
    refused = 0
    for way in WAYS:
        cast, original = copy.deepcopy(hat).to(way.dtype), copy.deepcopy(model).to(way.dtype)
        with within(way), torch.no_grad():
            try:
                found, wanted = cast(**inputs).last_hidden_state, original(**inputs).last_hidden_state
            except CallError as error:
                assert name == "t5" and way == Way(HALF) and "modeling_t5.py" in error.where
                refused += 1
                continue
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
            assert cast(**inputs, task=0).last_hidden_state.isfinite().all()
    assert refused == (name == "t5")


def test_deberta_learns_under_autocast() -> None:
    model, inputs = transformer("deberta")
    hat = hatify.convert(model, 2, example_inputs=inputs, verify=False)
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    with hat.learning(task=0, optimizer=optimizer, steps_per_epoch=2) as run:
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=BRAIN):
                loss = hat(**inputs, task=0).last_hidden_state.float().square().mean() + run.regularization()
            loss.backward()
            optimizer.step()
    assert hat.finished_tasks == {0}


class AddsInPlace(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        x += self.gain
        x /= x.float().norm(dim=-1, keepdim=True)
        return x


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_in_place_operators_keep_the_type_of_what_they_write_to(way: Way) -> None:
    checked(*pair(AddsInPlace), way)


def test_without_it_they_take_the_wider_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(functional, "keep_type", lambda graph, new, target, provenance: new)
    with pytest.raises((AssertionError, RuntimeError)):
        checked(*pair(AddsInPlace), WAYS[3])


class ViewsWritten(Tokens):
    """The exporter's own functionalisation takes out what does nothing in float32."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x * 1
        y[:, 0] = 0
        return y.float().exp().to(x.dtype)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_casts_that_do_nothing_in_one_type_are_kept_beside_writes_through_views(way: Way) -> None:
    checked(*pair(ViewsWritten), way)


class Made(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * x.new_tensor([0.5, 0.25, 1.5, 2.0, 3.0, 4.0, 0.125, 8.0])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_tensors_made_in_the_type_of_another_follow_it(way: Way) -> None:
    checked(*pair(Made), way)


@pytest.mark.parametrize("dtype", [BRAIN, DOUBLE])
def test_a_model_converted_in_another_type_follows_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, (x, mask) = MaskedFill().eval().to(dtype), given()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=(x.to(dtype), mask)).eval()
    for way in WAYS[3:]:
        checked(model, hat, way)
