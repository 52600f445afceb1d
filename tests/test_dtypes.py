"""What a model's code takes from types: numbers and casts follow the values, other paths are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tasks import draw_masks, finish
from torch import Tensor, nn

import hatify
from hatify.capture import functional
from hatify.capture.captured import Way
from hatify.capture.dtypes import _Follower
from hatify.errors import CallError

HALF, BRAIN, DOUBLE = torch.float16, torch.bfloat16, torch.float64
WAYS = [Way(HALF), Way(BRAIN), Way(DOUBLE), Way(torch.float32, BRAIN), Way(torch.float32, HALF)]


class Tokens(nn.Module):
    """Tokens ``x`` of shape (batch, 3, 4), and a mask of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.body(x, mask))

    def scores(self, x: Tensor) -> Tensor:
        return self.query(x) @ x.transpose(1, 2)


class MaskedFill(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(x)
        return scores.masked_fill(mask[:, None] == 0, torch.finfo(scores.dtype).min).softmax(-1) @ x


class Additive(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(x)
        return (scores + (1 - mask[:, None].to(scores.dtype)) * torch.finfo(scores.dtype).min).softmax(-1) @ x


class HalfOfTheLimit(Tokens):
    """A number that is no limit itself."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(x)
        return scores.masked_fill(mask[:, None] == 0, torch.finfo(scores.dtype).min / 2).softmax(-1) @ x


class Eps(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(x)
        return torch.log(x + torch.finfo(x.dtype).eps)


class ThereAndBack(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.scores(x).float().softmax(-1).to(x.dtype) @ x


class Twice(Tokens):
    """Two casts in a row."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.scores(x).float().to(x.dtype) @ x


class LikeTheValues(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + torch.linspace(0, 1, 8).to(x)


class LikeTheWeights(Tokens):
    """T5's norm: in float32 it has no cast at all."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.gain.dtype in (HALF, BRAIN):
            x = x.to(self.gain.dtype)
        return self.gain * x


class OwnTable(Tokens):
    """A tensor of the forward's own, in a type of its own: ``.half()`` does not reach it."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * (torch.tensor([3.0, 5.0, 7.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float32) * 3.3).sqrt().to(x.dtype)


class Picks(Tokens):
    """It picks by the values of a buffer, which a trace on empty ones does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor([True, False, True]))

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.log(F.relu(x[:, self.kept]) + torch.finfo(x.dtype).eps)


class Clamped(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        x = 100 * x
        if x.dtype == HALF:
            x = torch.clamp(x, min=-50, max=50)
        return x


class AsksAutocast(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.sin() if torch.is_autocast_enabled("cpu") else x.cos()


class InTraining(Tokens):
    """In train mode another graph, with a number of its own."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return (
            (x.sin() + 0.01 * torch.finfo(x.dtype).eps ** 0.5).float().to(x.dtype)
            if self.training
            else x + torch.finfo(x.dtype).eps
        )


class DroppedOut(Tokens):
    """A cast before what takes a number by mode."""

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        p = F.dropout(self.scores(x).float().to(x.dtype), 0.5, self.training)
        return F.dropout(p.float(), 0.25, self.training).softmax(-1).to(x.dtype) @ x


class ClampedInTraining(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return Clamped.body(self, x.sin(), mask) if self.training else x


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
REFUSED = {Clamped: {WAYS[0], WAYS[4]}, AsksAutocast: {WAYS[3], WAYS[4]}}


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 1, 0], [0, 0, 0]])


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, hatify.HATModel]:
    torch.manual_seed(0)
    model = make().eval()
    return model, hatify.convert(copy.deepcopy(model), 2, example_inputs=given()).eval()


def within(way: Way) -> AbstractContextManager:
    return nullcontext() if way.autocast is None else torch.autocast("cpu", dtype=way.autocast)


def seeded(model: nn.Module, *given: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(*given)


def checked(model: nn.Module, hat: hatify.HATModel, way: Way) -> None:
    """Equal to the original without a task, its type and finite with one."""
    x, mask = given()
    model, hat, x = copy.deepcopy(model).to(way.dtype), copy.deepcopy(hat).to(way.dtype), x.to(way.dtype)
    draw_masks(hat)
    for training in (False, True):
        with within(way):
            wanted, found = (seeded(m.train(training), x, mask) for m in (model, hat))
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
            for scale in (None, 20.0):
                found = hat(x, mask, task=0, mask_scale=scale)
                assert found.dtype == wanted.dtype and found.isfinite().all()
                found.float().sum().backward()
            wanted.float().sum().backward()


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


def test_an_extracted_task_notes_which_types_take_another_path() -> None:
    for make, ways in ((Eps, ()), (Clamped, REFUSED[Clamped])):
        _, hat = pair(make)
        finish(hat, 1)
        notes = hatify.extract(hat, 1).extraction["notes"]
        assert len(notes) == len(ways) and all(any(str(way) in note for note in notes) for way in ways)


@pytest.mark.parametrize("make", FOLLOWING, ids=lambda cls: cls.__name__)
def test_without_it_the_numbers_of_float32_stay(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what is frozen is wrong in some type."""
    monkeypatch.setattr(_Follower, "settle", lambda follower: None)
    model, hat = pair(make)
    wrong = 0
    for way in WAYS:
        try:
            checked(model, hat, way)
        except (AssertionError, RuntimeError):
            wrong += 1
    assert wrong


@pytest.mark.parametrize("make", REFUSED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("loaded", [False, True], ids=["converted", "loaded"])
def test_another_path_is_refused_where_it_is_taken(make: type, loaded: bool, tmp_path: Path) -> None:
    model, hat = pair(make)
    assert hat.verification.ok and any("takes another path" in note for note in hat.report.notes)
    if loaded:
        hatify.save(hat, tmp_path / "saved")
        hat = hatify.load(tmp_path / "saved").eval()
    for way in WAYS:
        if way not in REFUSED[make]:
            checked(model, hat, way)
            continue
        for task in (None, 0):
            cast, x = copy.deepcopy(hat).to(way.dtype), given()[0].to(way.dtype)
            with within(way), pytest.raises(CallError, match=f"another path {way}") as refused:
                cast(x, given()[1], task=task)
            assert "test_dtypes.py" in refused.value.where


def test_a_refusal_names_a_call_that_works() -> None:
    torch.manual_seed(0)
    model, (x, mask) = Clamped().eval().to(HALF), given()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=(x.to(HALF), mask)).eval()
    assert torch.equal(hat(x.to(HALF), mask), model(x.to(HALF), mask)) and "clamp" in hat.code
    with pytest.raises(CallError, match="another path in torch.float32"):
        copy.deepcopy(hat).float()(x, mask)


def test_a_model_that_reads_no_type_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(*args: object) -> None:
        raise AssertionError("traced in another type")

    monkeypatch.setattr("hatify.capture.dtypes._traced", traced)
    hatify.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2, example_inputs=torch.randn(3, 4), verify=False)
    with pytest.raises(AssertionError, match="another type"):
        pair(Eps)


def test_a_path_of_train_mode_is_refused_in_train_mode() -> None:
    model, hat = pair(ClampedInTraining)
    model, hat, (x, mask) = model.to(HALF), hat.to(HALF), given()
    assert torch.equal(hat(x.to(HALF), mask), model(x.to(HALF), mask))
    with pytest.raises(CallError, match="another path in torch.float16"):
        hat.train()(x.to(HALF), mask)


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


class SharedHead(nn.Module):
    """The gradient of ``x`` is a sum of many, which another order rounds otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 0), (torch.float64, 0), (HALF, 16), (BRAIN, 16)])
def test_gradients_may_differ_by_the_rounding_of_the_type(dtype: torch.dtype, steps: int) -> None:
    hat = hatify.convert(SharedHead().to(dtype), 2, example_inputs=torch.randn(5, 4, dtype=dtype))
    report = hat.verification
    assert report.ok and report.rounding == max(1e-4, steps * torch.finfo(dtype).eps)
    report.gradients = report.rounding
    assert not report.ok
    report.gradients = 0.9 * report.rounding
    assert report.ok


class RootMeanSquare(nn.Module):
    """A norm with the default of its type, over values so small that it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x) * 0.01))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BRAIN, DOUBLE])
def test_a_norm_over_live_channels_has_torchs_own_default(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hat = hatify.convert(RootMeanSquare(), 2, example_inputs=torch.randn(5, 4), verify=False).eval().to(dtype)
    draw_masks(hat)
    finish(hat, 0)
    x, live = torch.randn(5, 4, dtype=dtype), hat.maskers["first"].live(0)
    assert 0 < live.sum() < 8
    kept = [F.rms_norm((hat.first(x) * 0.01)[:, live], (int(live.sum()),), hat.norm.tasks[0].weight[live])]
    wanted = kept[0] @ hat.head.tasks[0].weight[:, live].T + hat.head.tasks[0].bias
    for found in (
        hat(x, task=0),
        hatify.extract(hat.float(), 0).to(dtype)(x),
        hatify.extract(hat.float(), 0, slim=True).to(dtype)(x),
    ):
        torch.testing.assert_close(found, wanted)
        hat.to(dtype)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)], ids=lambda n: type(n).__name__)
def test_an_extracted_norm_follows_the_type(norm: nn.Module) -> None:
    torch.manual_seed(0)
    hat = hatify.convert(nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 3)), 2, example_inputs=torch.randn(5, 4), verify=False)
    draw_masks(hat.eval())
    finish(hat, 0)
    plain, x = hatify.extract(hat, 0), torch.randn(5, 4)
    for way in WAYS:
        with within(way):
            found = copy.deepcopy(plain).to(way.dtype)(x.to(way.dtype))
            torch.testing.assert_close(found, copy.deepcopy(hat).to(way.dtype)(x.to(way.dtype), task=0))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, DOUBLE])
def test_a_model_that_was_cast_can_be_verified(dtype: torch.dtype) -> None:
    _, hat = pair(MaskedFill)
    report = hatify.verify(hat.to(dtype))
    assert report.ok and report.parity == report.parity_train == report.drift == 0.0
    assert [t.dtype for t in hat.example_inputs[0]] == [dtype, torch.int64]


def test_inputs_are_not_cast_behind_the_back_of_code_that_looks_at_types() -> None:
    class Scales(Tokens):
        def body(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask[..., None] if mask.dtype == torch.int64 else x

    model, hat = pair(Scales)
    x, mask = given()
    assert torch.equal(hat(x, mask), model(x, mask))
    for call in ((x, mask.bool()), (x.double(), mask)):
        with pytest.raises(CallError, match="looks at types"):
            hat(*call)
    assert torch.equal(hat.double()(x.double(), mask), model.double()(x.double(), mask))


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


class Normed(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.layer_norm(x * 0.01, (8,), eps=torch.finfo(x.dtype).eps)


class OnlyInTraining(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.clamp(-0.1, 0.1) if self.training and x.dtype == BRAIN else x


class Measures(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.clamp(-0.1, 0.1) if x.element_size() == 2 else x


class AsksWhich(Tokens):
    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == HALF
        return x.clamp(-0.1, 0.1) if half else x


class Gives(Tokens):
    def forward(self, x: Tensor, mask: Tensor) -> tuple:
        return super().forward(x, mask), torch.finfo(self.embed(x).dtype).max

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "way", "training"),
    [(Normed, WAYS[1], False), (OnlyInTraining, WAYS[1], True), (OnlyInTraining, WAYS[3], True), (Measures, WAYS[0], False),
     (AsksWhich, WAYS[4], False), (Gives, WAYS[2], False)],
)  # fmt: skip
def test_other_paths_are_refused(make: type, way: Way, training: bool) -> None:
    _, hat = pair(make)
    x, mask = given()
    assert hat.verification.ok
    hat = hat.to(way.dtype).train(training)
    with within(way), pytest.raises(CallError, match="another path"):
        hat(x.to(way.dtype), mask)


@pytest.mark.parametrize("dtype", [BRAIN, DOUBLE])
def test_a_model_converted_in_another_type_follows_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, (x, mask) = MaskedFill().eval().to(dtype), given()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=(x.to(dtype), mask)).eval()
    for way in WAYS[3:]:
        checked(model, hat, way)
