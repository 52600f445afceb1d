import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hatify
from hatify.artifact import directory, tensors
from hatify.artifact.atomic import check_target, new_directory
from hatify.errors import ArtifactError
from hatify.sources import Source


class Tied(nn.Module):
    """Layers that share a weight, a weight that is not contiguous, a buffer that is a view of another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.third = nn.Linear(4, 6)
        self.third.weight = nn.Parameter(torch.randn(6, 4).T.contiguous().T)
        self.register_buffer("table", torch.randn(8))
        self.register_buffer("part", self.table[:4])

    def forward(self, x, y):
        return torch.relu(self.first(x)) + self.second(x) + self.third(y) * (1 + self.part.sum())


def example():
    torch.manual_seed(1)
    return torch.randn(2, 6), torch.randn(2, 4)


@pytest.fixture(scope="module")
def tied():
    torch.manual_seed(0)
    return hatify.convert(Tied(), tasks=3, example_inputs=example(), verify=False)


@pytest.fixture(scope="module")
def from_timm():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    inputs = torch.randn(2, 3, 64, 64)
    hat = hatify.convert(model, tasks=[2, 3], example_inputs=inputs, verify=False)
    hat.source = Source("timm", "test_resnet")
    return hat.eval()


def equal_states(left, right):
    mine, theirs = left.state_dict(), right.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


# Round trips


def test_a_model_of_a_library_comes_back_without_help(from_timm, tmp_path):
    path = hatify.save(from_timm, tmp_path / "saved")
    again = hatify.load(path)
    equal_states(from_timm, again)
    assert again.source == from_timm.source and again.settings == from_timm.settings
    assert again.training == from_timm.training
    (x,), _ = from_timm.example_inputs
    (y,), _ = again.example_inputs
    assert torch.equal(x, y)
    for task in (None, 0, 1):
        assert torch.equal(from_timm(x, task=task), again(x, task=task))


def test_a_model_of_the_user_comes_back_from_its_factory(tied, tmp_path):
    hatify.save(tied, tmp_path / "saved")
    again = hatify.load(tmp_path / "saved", factory=Tied)
    equal_states(tied, again)
    x, y = example()
    tied.eval(), again.eval()
    assert torch.equal(tied(x, y), again(x, y))
    assert again.source is None


def test_the_directory_holds_what_it_says_and_no_pickle(tied, tmp_path):
    hatify.save(tied, tmp_path / "saved")
    names = {"config.json", "model.safetensors", "example_inputs.safetensors", "graph.py"}
    assert set(os.listdir(tmp_path / "saved")) == names
    assert tied.code.strip() in (tmp_path / "saved" / "graph.py").read_text()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["torch_version"] == torch.__version__ and config["hatify_version"] == hatify.__version__
    assert config["source"] is None and config["settings"] == tied.settings


def test_half_precision_comes_back_as_such(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).to(torch.bfloat16)
    inputs = torch.randn(2, 4, dtype=torch.bfloat16)
    hat = hatify.convert(model, tasks=2, example_inputs=inputs, verify=False)
    hatify.save(hat, tmp_path / "saved")
    make = lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))  # noqa: E731
    equal_states(hat, hatify.load(tmp_path / "saved", factory=make))


def test_keyword_inputs_come_back(tmp_path):
    x, y = example()
    hat = hatify.convert(Tied(), tasks=2, example_inputs={"y": y, "x": x}, verify=False)
    hatify.save(hat, tmp_path / "saved")
    again = hatify.load(tmp_path / "saved", factory=Tied)
    assert torch.equal(again.eval()(x=x, y=y), hat.eval()(x=x, y=y))


def test_finished_tasks_come_back_finished(tmp_path):
    hat = hatify.convert(Tied(), tasks=3, example_inputs=example(), verify=False)
    hat.room.status.finished.add(1)
    again = hatify.load(hatify.save(hat, tmp_path / "saved"), factory=Tied)
    assert again.finished_tasks == {1}


def test_loading_leaves_the_random_numbers_alone(tied, tmp_path):
    hatify.save(tied, tmp_path / "saved")
    state = torch.get_rng_state()
    hatify.load(tmp_path / "saved", factory=Tied)
    assert torch.equal(state, torch.get_rng_state())


# Tensors


def test_aliases_are_stored_once_and_come_back_as_aliases(tmp_path):
    weight = torch.randn(3, 4)
    state = {"a": weight, "b": weight, "t": weight.T, "part": weight[:1], "wide": torch.ones(1).expand(5)}
    state["empty"] = torch.zeros(0)
    tensors.write_tensors(tmp_path / "x.safetensors", state)
    assert set(load_file(tmp_path / "x.safetensors")) == {"a", "t", "part", "wide", "empty"}
    again = tensors.read_tensors(tmp_path / "x.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    assert again["a"] is again["b"]


@pytest.mark.parametrize(
    "value",
    [3, {"a": 1}, torch.empty(2, device="meta"), torch.eye(2).to_sparse()],
    ids=lambda v: str(type(v)),
)
def test_what_is_no_plain_tensor_is_refused_by_key(tmp_path, value):
    with pytest.raises(ArtifactError) as caught:
        tensors.write_tensors(tmp_path / "x.safetensors", {"layer._extra_state": value})
    assert caught.value.where == "layer._extra_state"


# Whole or not at all


def test_an_existing_directory_is_kept_unless_asked(tied, tmp_path):
    target = tmp_path / "saved"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="overwrite=True"):
        hatify.save(tied, target)
    assert os.listdir(target) == ["mine.txt"]
    hatify.save(tied, target, overwrite=True)
    assert "mine.txt" not in os.listdir(target)
    assert os.listdir(tmp_path) == ["saved"]


def test_parents_are_made_and_a_link_is_followed(tied, tmp_path):
    hatify.save(tied, tmp_path / "a" / "b" / "saved")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "saved")
    hatify.save(tied, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    hatify.load(tmp_path / "link", factory=Tied)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("point", ["write_tensors", "_swap", "rename"])
def test_a_failure_leaves_everything_as_it_was(tied, tmp_path, monkeypatch, failure, existing, point):
    target = tmp_path / "deep" / "saved"
    if existing:
        target.mkdir(parents=True)
        (target / "mine.txt").write_text("mine")

    def fail(*args, **kwargs):
        raise failure

    if point == "write_tensors":
        monkeypatch.setattr(directory, "write_tensors", fail)
    elif point == "_swap":
        monkeypatch.setattr("hatify.artifact.atomic._swap", fail)
    else:  # the last rename of all, after the old directory has been moved away
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: fail() if str(a).endswith(".tmp") else rename(a, b))
    with pytest.raises(ArtifactError if isinstance(failure, OSError) else type(failure)) as caught:
        hatify.save(tied, target, overwrite=True)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
    assert os.listdir(tmp_path) == (["deep"] if existing else [])
    if existing:
        assert os.listdir(tmp_path / "deep") == ["saved"] and os.listdir(target) == ["mine.txt"]


def test_precious_directories_are_never_replaced(tmp_path, monkeypatch):
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    for path in (".", "..", tmp_path / "work"):
        with pytest.raises(ArtifactError, match="is or contains"):
            check_target(path, overwrite=True)
    assert not check_target("new").exists()


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match="file"):
            check_target(path, overwrite=True)


def test_a_directory_appears_with_the_usual_permissions(tmp_path):
    with new_directory(tmp_path / "new") as temporary:
        (temporary / "x").write_text("x")
        assert not (tmp_path / "new").exists()
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Reading what is not right


@pytest.fixture
def saved(tied, tmp_path):
    return hatify.save(tied, tmp_path / "saved")


def edit(saved, **changes):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"format": "other"}, "format"),
        ({"format": None}, "format"),
        ({"format_version": 99}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"settings": None}, "settings.tasks"),
        ({"settings__tasks": None}, "settings.tasks"),
        ({"settings__tasks": 0}, "settings.tasks"),
        ({"settings__tasks": True}, "settings.tasks"),
        ({"settings__classes": [2]}, "settings.classes"),
        ({"settings__classes": [2, 2, "3"]}, "settings.classes"),
        ({"settings__heads": None}, "settings.heads"),
        ({"settings__locking": 3}, "settings.locking"),
        ({"settings__config": {"no_such_option": 1}}, "settings.config"),
        ({"source": {"kind": "pickle", "name": "x"}}, "source"),
        ({"source": None}, "source"),
        ({"example_inputs": {"kind": "set"}}, "example_inputs"),
        ({"example_inputs": None}, "example_inputs"),
        ({"training": 3}, "training"),
    ],
)
def test_a_wrong_configuration_is_named_by_file_and_field(saved, changes, field):
    edit(saved, **changes)
    with pytest.raises(ArtifactError) as caught:
        hatify.load(saved, factory=Tied)
    assert caught.value.where == f"{saved / 'config.json'}: {field}"


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "null"])
def test_a_configuration_that_is_none(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        hatify.load(saved, factory=Tied)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "example_inputs.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"garbage" * 100])
def test_a_missing_or_broken_file_is_named(saved, name, content):
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        hatify.load(saved, factory=Tied)
    assert name in caught.value.where


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match="no saved model"):
        hatify.load(tmp_path / "nope")


def test_the_model_is_asked_for_when_nobody_knows_it(saved):
    with pytest.raises(ArtifactError) as caught:
        hatify.load(saved)
    assert f"hatify.load({str(saved)!r}, factory=make_model)" in caught.value.fix


def test_a_directory_does_not_decide_which_function_is_called(saved):
    edit(saved, source={"kind": "factory", "name": "os:abort", "kwargs": {}})
    with pytest.raises(ArtifactError) as caught:
        hatify.load(saved)
    assert "from os import abort" in caught.value.fix


def test_the_code_of_the_directory_is_never_run(saved):
    (saved / "graph.py").write_text("raise SystemExit")
    hatify.load(saved, factory=Tied)


def test_another_model_is_refused(saved):
    class Other(Tied):
        def __init__(self):
            super().__init__()
            self.third = nn.Linear(4, 6, bias=False)

    with pytest.raises(ArtifactError, match=r"unexpected.*third\.bias"):
        hatify.load(saved, factory=Other)
    with pytest.raises(ArtifactError, match="does not give a model"):
        hatify.load(saved, factory=lambda: None)


def test_missing_and_misshapen_weights_are_listed(saved):
    state = load_file(saved / "model.safetensors")
    del state["table"]
    state["third.bias"] = torch.zeros(7)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ArtifactError) as caught:
        hatify.load(saved, factory=Tied)
    assert "table" in caught.value.why and "third.bias" in caught.value.why
