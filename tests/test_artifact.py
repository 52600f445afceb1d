import hashlib
import json
import os
import threading

import pytest
import timm
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import nn

import hatify
from hatify.artifact import reading, tensors
from hatify.artifact.digests import PIECE, Digests, entry_of
from hatify.artifact.reading import read_tensors
from hatify.artifact.tree import TreeReader
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
    assert hatify.verify(again).parity == 0.0
    x, y = example()
    tied.eval(), again.eval()
    assert torch.equal(tied(x, y), again(x, y))
    assert again.source is None


def test_the_directory_holds_what_it_says_and_no_pickle(tied, tmp_path):
    path = hatify.save(tied, tmp_path / "saved")
    files = {"model.json", "model.safetensors", "gates.safetensors", "example_inputs.safetensors", "graph.py", "README.md"}
    assert set(os.listdir(path)) == files | {"config.json"}
    assert tied.code.strip() in (path / "graph.py").read_text()
    config = json.loads((path / "config.json").read_text())
    assert config["torch_version"] == torch.__version__ and config["hatify_version"] == hatify.__version__
    assert config["source"] is None and config["settings"] == tied.settings and set(config["files"]) == files
    for name, entry in config["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: hatify\ntags:\n- hatify\n") and "| tasks | 3 |" in card


def test_half_precision_comes_back_as_such(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).to(torch.bfloat16)
    inputs = torch.randn(2, 4, dtype=torch.bfloat16)
    hat = hatify.convert(model, tasks=2, example_inputs=inputs, verify=False)
    hatify.save(hat, tmp_path / "saved")
    equal_states(hat, hatify.load(tmp_path / "saved"))


def test_keyword_inputs_come_back(tmp_path):
    x, y = example()
    hat = hatify.convert(Tied(), tasks=2, example_inputs={"y": y, "x": x}, verify=False)
    hatify.save(hat, tmp_path / "saved")
    again = hatify.load(tmp_path / "saved")
    assert torch.equal(again.eval()(x=x, y=y), hat.eval()(x=x, y=y))


def test_finished_tasks_come_back_finished(tmp_path):
    hat = hatify.convert(Tied(), tasks=3, example_inputs=example(), verify=False)
    hat.room.status.finished.add(1)
    again = hatify.load(hatify.save(hat, tmp_path / "saved"))
    assert again.finished_tasks == {1}


def test_loading_leaves_the_random_numbers_alone(tied, tmp_path):
    hatify.save(tied, tmp_path / "saved")
    state = torch.get_rng_state()
    hatify.load(tmp_path / "saved")
    assert torch.equal(state, torch.get_rng_state())


def test_aliases_and_views_are_stored_once_and_come_back(tied, tmp_path):
    path = hatify.save(tied, tmp_path / "saved")
    stored = load_file(path / "model.safetensors")
    assert "first.weight" in stored and "second.weight" not in stored
    again = hatify.load(path)
    assert again.get_parameter("second.weight") is again.get_parameter("first.weight")
    assert torch.equal(again.get_buffer("part"), tied.get_buffer("part"))


def test_files_are_those_of_the_safetensors_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(3, 4, generator=generator),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "wide": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(3, generator=generator).bfloat16(),
        "lazy": torch._lazy_clone(torch.randn(2000, generator=generator)),
        "inf": torch.tensor([float("inf"), float("nan"), -0.0]),
    }
    entry = tensors.write_tensors(tmp_path / "x.safetensors", state)
    assert torch._C._is_cow_tensor(state["lazy"])  # writing it does not take memory for good
    theirs = load_file(tmp_path / "x.safetensors")
    expected = {k: (v.dtype, tuple(v.shape)) for k, v in state.items()}
    mine = read_tensors(tmp_path / "x.safetensors", expected, entry)
    for key, value in state.items():
        for other in (theirs[key], mine[key]):
            assert other.dtype == value.dtype and other.shape == value.shape
            assert torch.equal(other.nan_to_num(7), value.nan_to_num(7)), key
    save_file({"x": torch.arange(3)}, tmp_path / "y.safetensors")
    entry = entry_of((tmp_path / "y.safetensors").read_bytes())
    assert read_tensors(tmp_path / "y.safetensors", {"x": (torch.int64, (3,))}, entry)["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE + 70000])
def test_a_large_file_has_a_digest_per_piece_and_a_small_one_the_usual(size):
    data = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    pieces = {
        word: {word: [digest(data[i : i + PIECE]).hexdigest() for i in range(0, size, PIECE)], "bytes": size}
        for word, digest in (("pieces", hashlib.sha256), ("blake3", blake3))
    }
    whole = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": size}
    for word in (None, "sha256", "pieces", "blake3"):
        wanted = whole if size <= PIECE or word == "sha256" else pieces[word or "blake3"]
        assert entry_of(data, word) == wanted
        with Digests(word) as digests:  # however it comes: three bytes, the small, the large
            view, start, steps = memoryview(data), 0, (3, 5000, PIECE // 3, 1 << 20)
            while start < size:
                step = steps[start % len(steps)]
                digests.add(view[start : start + step])
                start += step
            assert digests.entry() == wanted and digests.done == size


@pytest.mark.parametrize("of_format_3", [False, True])
def test_a_byte_of_a_large_file_is_refused_by_its_piece(tmp_path, of_format_3):
    state = {"a": torch.randn(PIECE // 4), "b": torch.randn(PIECE // 4), "c": torch.randn(7)}
    path = tmp_path / "x.safetensors"
    entry = tensors.write_tensors(path, state)
    assert len(entry["blake3"]) == 3
    if of_format_3:
        entry = entry_of(path.read_bytes(), "pieces")
        assert len(entry["pieces"]) == 3
    expected = {k: (v.dtype, tuple(v.shape)) for k, v in state.items()}
    taken = read_tensors(path, expected, entry)
    assert taken.keys() == state.keys() and all(torch.equal(taken[k], v) for k, v in state.items())
    for place, text in ((PIECE - 1, f"bytes 0 to {PIECE}"), (PIECE, f"bytes {PIECE} to {2 * PIECE}"), (-1, f"to {entry['bytes']}")):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        (tmp_path / "y.safetensors").write_bytes(content)
        with pytest.raises(ArtifactError, match=text):
            read_tensors(tmp_path / "y.safetensors", expected, entry)


def test_where_the_system_knows_less_the_same_is_written_and_read(tmp_path, monkeypatch):
    state = {"a": torch.randn(PIECE // 4), "b": torch.randn(PIECE // 4), "c": torch.randn(()), "d": torch.randn(5)}
    wanted = tensors.write_tensors(tmp_path / "x.safetensors", state)
    monkeypatch.setattr("hatify.artifact.atomic._SYNC_FILE_RANGE", None)
    monkeypatch.delattr(os, "writev", raising=False)
    assert tensors.write_tensors(tmp_path / "y.safetensors", state) == wanted
    monkeypatch.setattr(reading, "_READERS", 1)
    monkeypatch.delattr(os, "preadv", raising=False)
    assert all(torch.equal(v, state[k]) for k, v in read_tensors(tmp_path / "y.safetensors", None, wanted).items())


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = tensors.write_tensors(path, {"a": torch.randn(PIECE), "b": torch.randn(PIECE)})
    with reading.TensorFile(path, None, entry) as file:
        found = file.found()
        assert next(found)[0] == "a"
        with path.open("r+b") as other:
            other.truncate(PIECE)
        with pytest.raises(ArtifactError, match="ends too early"):
            next(found)


def test_a_model_without_values_is_not_stored(tied, tmp_path):
    path = hatify.save(tied, tmp_path / "saved")
    meta = hatify.load(path, device="meta")
    assert all(p.is_meta for p in (*meta.parameters(), *meta.buffers())) and meta.finished_tasks == tied.finished_tasks
    assert [(n, p.shape, p.dtype) for n, p in meta.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in tied.named_parameters()
    ]
    with pytest.raises(ArtifactError, match="meta device"):
        hatify.save(meta, tmp_path / "again")


@pytest.mark.parametrize("when", ["save", "load"])
def test_another_floating_point_type(tied, tmp_path, when):
    path = hatify.save(tied, tmp_path / "saved", **({"dtype": torch.bfloat16} if when == "save" else {}))
    again = hatify.load(path, **({"dtype": torch.bfloat16} if when == "load" else {}))
    want = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tied.state_dict().items()}
    got = again.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want)
    assert tied.get_parameter("first.weight").dtype == torch.float32
    inputs, _ = again.example_inputs
    assert all(i.dtype == torch.bfloat16 for i in inputs)
    assert torch.equal(again.eval()(*inputs, task=1), hatify.load(path, dtype=torch.bfloat16).eval()(*inputs, task=1))
    assert ("stored in | torch.bfloat16" in (path / "README.md").read_text()) == (when == "save")
    for wrong in (torch.int8, torch.float8_e5m2, "float16"):
        with pytest.raises(ArtifactError, match="floating-point"):
            hatify.load(path, dtype=wrong)


@pytest.mark.parametrize("when", ["save", "load"])
def test_another_type_changes_no_binary_mask(tied, tmp_path, when):
    import copy

    hat = copy.deepcopy(tied)
    rounded = {0: [1e-9, -1e-9, 1.0, 0.0, -1.0, 2.0], 1: [-0.5, -0.50001, -3.0, -0.50002, -0.6, -7.0]}
    with torch.no_grad():
        for masker in hat.maskers.values():
            for task, values in rounded.items():
                masker.embeddings[task].copy_(torch.tensor(values))
    path = hatify.save(hat, tmp_path / "saved", **({"dtype": torch.float16} if when == "save" else {}))
    again = hatify.load(path, **({"dtype": torch.float16} if when == "load" else {}))
    for name, masker in hat.maskers.items():
        other = again.maskers[name]
        assert all(torch.equal(masker.live(t), other.live(t)) for t in range(3))
        assert all(
            not torch.equal(e.half(), o) for e, o in zip(masker.embeddings[:2], other.embeddings[:2])
        )  # plain rounding would
        assert torch.equal(masker.embeddings[2].half(), other.embeddings[2])


@pytest.mark.parametrize("when", ["save", "load"])
def test_a_number_that_the_type_does_not_reach_is_refused_by_name(tied, tmp_path, when):
    import copy

    hat = copy.deepcopy(tied)
    with torch.no_grad():
        hat.get_parameter("third.weight")[0, 0] = 7e4
    with pytest.raises(ArtifactError) as caught:
        path = hatify.save(hat, tmp_path / "saved", **({"dtype": torch.float16} if when == "save" else {}))
        hatify.load(path, dtype=torch.float16)
    read = "" if when == "save" else f"{path / 'model.safetensors'}: "
    assert caught.value.where == f"{read}third.weight" and "bfloat16" in caught.value.fix
    assert (tmp_path / "saved").exists() == (when == "load")
    hatify.save(hat, tmp_path / "wide", dtype=torch.bfloat16)


@pytest.mark.parametrize("way", ["argument", "with", "default"])
def test_values_go_to_the_device_that_is_asked_for_and_to_the_default_one(tied, tmp_path, way):
    """``meta`` stands for any other device: nothing of the reading happens there."""
    path = hatify.save(tied, tmp_path / "saved")
    if way == "argument":
        hat = hatify.load(path, device="meta")
    elif way == "with":
        with torch.device("meta"):
            hat, here = hatify.load(path), hatify.load(path, device="cpu")
        equal_states(tied, here)
    else:
        torch.set_default_device("meta")
        try:
            hat = hatify.load(path)
        finally:
            torch.set_default_device(None)
    assert {t.device.type for t in (*hat.parameters(), *hat.buffers())} == {"meta"}
    assert hat.finished_tasks == tied.finished_tasks
    equal_states(tied, hatify.load(path))


def test_what_is_loaded_in_inference_mode_can_be_trained(tied, tmp_path):
    path = hatify.save(tied, tmp_path / "saved")
    with torch.inference_mode():
        hat = hatify.load(path)
    assert not any(t.is_inference() for t in (*hat.parameters(), *hat.buffers()))
    equal_states(tied, hat)


def test_weights_are_not_read_on_when_the_rest_is_refused(tied, tmp_path, monkeypatch):
    """They are read beside the graphs: the first error stands, and no thread stays."""
    path = hatify.save(tied, tmp_path / "saved")
    before, filled = threading.active_count(), []
    monkeypatch.setattr(TreeReader, "fill", lambda self, key, tensor: filled.append(key))

    def refuse(*arguments, **options):
        raise ArtifactError("the graphs are wrong")

    monkeypatch.setattr("hatify.artifact.description.graph_from", refuse)
    with pytest.raises(ArtifactError, match="the graphs are wrong"):
        hatify.load(path)
    assert threading.active_count() == before and not filled
    monkeypatch.undo()

    def unread(file, path, parts, start):
        if path.name.startswith("model") and start > 8:  # the header is read
            raise OSError(5, "the weights are wrong")
        read(file, path, parts, start)

    read = reading._read
    monkeypatch.setattr(reading, "_read", unread)
    with pytest.raises(ArtifactError, match="the weights are wrong") as caught:
        hatify.load(path)
    assert "model.safetensors" in caught.value.where and threading.active_count() == before


def test_large_weights_are_split(tied, tmp_path):
    path = hatify.save(tied, tmp_path / "saved", max_shard_size=300)
    shards = [n for n in os.listdir(path) if n.startswith("model-")]
    assert len(shards) > 2 and "model.safetensors.index.json" in os.listdir(path)
    equal_states(tied, hatify.load(path))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    (path / shards[0]).unlink()
    with pytest.raises(ArtifactError, match=shards[0]):
        hatify.load(path)


@pytest.mark.parametrize("size", ["huge", "5 parrots", "0GB", 0, -1, True, 2.5, None])
def test_a_size_that_is_none_is_refused_before_anything_is_written(tied, tmp_path, size):
    with pytest.raises(ArtifactError, match="max_shard_size"):
        hatify.save(tied, tmp_path / "saved", max_shard_size=size)
    assert not (tmp_path / "saved").exists()


def test_a_session_is_stored_as_it_stands_but_not_a_second_training_of_a_finished_task(tmp_path):
    torch.manual_seed(0)
    hat = hatify.convert(Tied(), tasks=3, example_inputs=example(), verify=False)
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    hat.begin_task(0, optimizer, steps_per_epoch=2)
    again = hatify.load(hatify.save(hat, tmp_path / "during"))
    assert again.finished_tasks == set() and again.room.status.begun == {0}
    equal_states(hat, again)
    hat.finish_task()
    hat.begin_task(1, optimizer, steps_per_epoch=2)
    second = hatify.load(hatify.save(hat, tmp_path / "second"))
    assert second.finished_tasks == {0}
    hat.abandon_task()
    hat.begin_task(0, optimizer, steps_per_epoch=2, locked_task_ids=[])
    with pytest.raises(ArtifactError, match=r"hat\.finish_task\(\) or hat\.abandon_task\(\)"):
        hatify.save(hat, tmp_path / "again")
    hat.abandon_task()
    hatify.save(hat, tmp_path / "again")


def test_more_tasks_are_stored_too(tied, tmp_path):
    import copy

    hat = copy.deepcopy(tied)
    hat.add_tasks(2)
    again = hatify.load(hatify.save(hat, tmp_path / "saved"))
    equal_states(hat, again)
    again.add_tasks(1)
    x, y = example()
    assert torch.equal(again.eval()(x, y, task=4), hat.eval()(x, y, task=4)) and again.config.num_tasks == 6


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second, self.head = self.first, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x))) + 1))


def test_a_layer_under_two_names_comes_back(tmp_path):
    hat = hatify.convert(Twice(), tasks=2, example_inputs=torch.randn(3, 4), verify=False)
    again = hatify.load(hatify.save(hat, tmp_path / "saved"))
    equal_states(hat, again)
    x = torch.randn(5, 4)
    assert torch.equal(again.eval()(x, task=1), hat.eval()(x, task=1))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_trains_before_and_after(tmp_path, norm):
    """Its power iteration is outside of the gradients, and writes over what it reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2)).train()
    x = torch.randn(3, 4)
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    assert hat.verification.gradients == 0.0
    again = hatify.load(hatify.save(hat, tmp_path / "saved"))
    for task in (None, 0):
        found = []
        for one in (hat, again):
            one.train().zero_grad()
            one(x, task=task).square().sum().backward()
            found.append([p.grad for p in one.parameters() if p.grad is not None])
        assert len(found[0]) == len(found[1]) > 0 and all(map(torch.equal, *found))
    equal_states(hat, again)


def test_a_task_that_was_being_learned_is_not_active_without_its_session(tmp_path):
    hat = hatify.convert(nn.Linear(4, 2), tasks=2, example_inputs=torch.randn(3, 4), verify=False)
    run = hat.begin_task(task=1, optimizer=torch.optim.SGD(hat.parameters(), 0.1), steps_per_epoch=3)
    again = hatify.load(hatify.save(hat, tmp_path / "saved"))
    assert hat.active_task == 1 and again.active_task is None
    resumed = again.begin_task(task=1, optimizer=torch.optim.SGD(again.parameters(), 0.1), steps_per_epoch=3)
    resumed.load_state_dict(run.state_dict())
    hat.finish_task()
    again.finish_task()
    assert hat.active_task is again.active_task is None


class Overflows(nn.Module):
    """Powers of negative numbers, which are none."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.first(x).pow(1.5))


def test_a_proof_whose_control_is_not_finite_is_stored(tmp_path):
    torch.manual_seed(0)
    hat = hatify.convert(Overflows(), tasks=2, example_inputs=torch.randn(16, 5, 4))
    hatify.save(hat, tmp_path / "saved")
    assert hatify.load(tmp_path / "saved").verification.control == hat.verification.control > 1e300
