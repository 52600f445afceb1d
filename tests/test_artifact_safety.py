"""What is not as it was written is refused with its file and field; nothing of a directory is ever run."""

import builtins
import copy
import hashlib
import json
import os
import shutil
import sys
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import hatify
from hatify.artifact import fields
from hatify.artifact.config import VERSION, seal
from hatify.errors import ArtifactError, ArtifactWarning

EXAMPLES = int(os.environ.get("HATIFY_FUZZ", "150"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Net(nn.Module):
    """A bit of everything that a description holds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.drop(self.bn(self.conv(x))) * self.scale
        x = torch.relu(x) + x.roll(1, 1)
        return {"logits": self.head(x.mean((2, 3)))}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    hat = hatify.convert(Net(), tasks=2, example_inputs=torch.randn(2, 3, 6, 6), verify=False)
    return hatify.save(hat, tmp_path_factory.mktemp("safety") / "saved", max_shard_size=400)


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "saved")


def reseal(path, **changes):
    """What somebody would do who means harm: all digests are right again."""
    config = json.loads((path / "config.json").read_text())
    for name in config["files"]:
        if (path / name).is_file():
            data = (path / name).read_bytes()
            config["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    (path / "config.json").write_text(json.dumps(seal(config)))


def refused(path, **options):
    with pytest.raises(ArtifactError) as caught:
        hatify.load(path, **options)
    return caught.value


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"format": "other"}, "format"),
        ({"format": ...}, "format"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": 0}, "format_version"),
        ({"unknown": 1}, ""),
        ({"settings": ...}, "settings"),
        ({"settings__tasks": ...}, "settings.tasks"),
        ({"settings__tasks": 0}, "settings.tasks"),
        ({"settings__tasks": True}, "settings.tasks"),
        ({"settings__classes": [2]}, "settings.classes"),
        ({"settings__classes": [2, "3"]}, "settings.classes[1]"),
        ({"settings__heads": ...}, "settings.heads"),
        ({"settings__locking": 3}, "settings.locking"),
        ({"settings__norms": "none"}, "settings.norms"),
        ({"settings__config__no_such_option": 1}, "settings.config"),
        ({"settings__config__mask_init": 3}, "settings.config.mask_init"),
        ({"settings__config__num_tasks": 3}, "settings.config.num_tasks"),
        ({"source": {"kind": "pickle", "name": "x"}}, "source"),
        ({"source": ...}, "source"),
        ({"example_inputs": "x"}, "example_inputs"),
        ({"example_inputs": [{"dtype": "save", "shape": [2]}]}, "example_inputs[0].dtype"),
        ({"training": 3}, "training"),
        ({"active_task": 2}, "active_task"),
        ({"weights": ["other.safetensors"]}, "weights[0]"),
        ({"files__graph.py__sha256": "x"}, "files.graph.py.sha256"),
        ({"files__graph.py": {"blake3": ["0" * 64], "bytes": 9}}, "files.graph.py.blake3"),
        ({"files__graph.py": {"blake3": ["0" * 64], "bytes": 1 << 30}}, "files.graph.py.blake3"),
        ({"files__graph.py": {"blake3": ["0" * 64, "x"], "bytes": 1 << 25}}, "files.graph.py.blake3[1]"),
        ({"files__graph.py": {"blake3": ["0" * 64], "sha256": "0" * 64, "bytes": 9}}, "files.graph.py"),
        ({"files__graph.py": {"pieces": ["0" * 64] * 2, "bytes": 1 << 25}}, "files.graph.py"),
        ({"files__graph.py": {"bytes": 9}}, "files.graph.py.sha256"),
        ({"files__graph.py": {"blake3": ["0" * 64] * 2, "bytes": 1 << 25}, "format_version": 3}, "files.graph.py"),
        ({"files__graph.py": {"pieces": ["0" * 64], "bytes": 9}, "format_version": 3}, "files.graph.py.pieces"),
        ({"files__graph.py": {"pieces": ["0" * 64] * 2, "bytes": 1 << 25}, "format_version": 2}, "files.graph.py"),
        ({"files": {"../x": {"sha256": "0" * 64, "bytes": 1}}, "weights": []}, "files.../x"),
    ],
)
def test_a_wrong_configuration_is_named_by_file_and_field(saved, changes, field):
    reseal(saved, **changes)
    assert refused(saved).where == f"{saved / 'config.json'}" + (f": {field}" if field else "")


def test_a_newer_format_names_the_version_to_install(saved):
    reseal(saved, format_version=VERSION + 1, hatify_version="7.1.0")
    assert refused(saved).fix == 'pip install "hatify>=7.1.0"'
    reseal(saved, format_version=VERSION + 1, hatify_version="7; rm -rf /")
    assert refused(saved).fix == "pip install --upgrade hatify"


NO_JSON = ["", "[]", "{", "3", "null", "NaN", "[" * 5000, '{"a": 1e999}', '{"format": "hatify", "format": "hatify"}']


@pytest.mark.parametrize("text", NO_JSON)
@pytest.mark.parametrize("name", ["config.json", "model.json"])
def test_a_file_that_is_no_json(saved, text, name):
    (saved / name).write_text(text)
    if name == "model.json":
        reseal(saved)
    assert name in refused(saved).where


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 100, "link", "directory"])
def test_a_missing_or_broken_file_is_named(saved, content):
    for name in sorted(set(os.listdir(saved)) - {"README.md"}):
        kept = (saved / name).read_bytes()
        (saved / name).unlink()
        if content == "link":
            (saved.parent / "elsewhere").write_bytes(kept)
            (saved / name).symlink_to(saved.parent / "elsewhere")
        elif content == "directory":
            (saved / name).mkdir()
        elif content is not None:
            (saved / name).write_bytes(content)
        assert name in refused(saved).where
        if content == "directory":
            (saved / name).rmdir()
        (saved / name).unlink(missing_ok=True)
        (saved / name).write_bytes(kept)
    hatify.load(saved)


@FUZZ
@given(data=st.data())
def test_one_changed_byte_anywhere_is_refused(original, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("byte") / "saved"
    shutil.copytree(original, path)
    name = data.draw(st.sampled_from(sorted(os.listdir(original))))
    content = bytearray((path / name).read_bytes())
    how = data.draw(st.sampled_from(["change", "cut", "append"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "change":
        content[place] ^= data.draw(st.integers(1, 255))
    content = content[:place] if how == "cut" else content + b" " if how == "append" else content
    (path / name).write_bytes(content)
    if name == "config.json":  # its digest is of what it says, not of how it is laid out
        try:
            if json.loads(bytes(content)) == json.loads((original / name).read_bytes()):
                return
        except ValueError:
            pass
    if name == "README.md":  # nothing of it is loaded
        with pytest.warns(ArtifactWarning, match=f"{path / name}"):
            hatify.load(path)
        return
    assert name in refused(path).where or name == "config.json"


@pytest.mark.parametrize("content", [None, b"", "# My model\n", "same size", "link", "directory"])
def test_a_model_card_may_be_edited_and_loading_says_so(saved, content):
    card = saved / "README.md"
    kept = card.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        wanted = hatify.load(saved).state_dict()  # as it was written: silence
    card.unlink()
    if content == "link":
        (saved.parent / "elsewhere").write_bytes(kept)
        card.symlink_to(saved.parent / "elsewhere")
    elif content == "directory":
        card.mkdir()
    elif content is not None:
        card.write_bytes(kept.replace(b"hatify", b"HATIFY") if content == "same size" else content.encode() if content else b"")
    with pytest.warns(ArtifactWarning) as caught:
        hat = hatify.load(saved)
    assert len(caught) == 1 and str(card) in str(caught[0].message) and caught[0].filename == __file__
    assert all(torch.equal(value, wanted[key]) for key, value in hat.state_dict().items())


def test_no_other_file_may_be_edited_even_if_nothing_of_it_is_loaded(saved):
    text = (saved / "graph.py").read_text()
    (saved / "graph.py").write_text(text.replace("hatify", "HATIFY", 1))
    assert refused(saved).where == str(saved / "graph.py")
    (saved / "graph.py").write_text(text)
    reseal(saved, **{"files__README.md": ...})
    assert refused(saved).where == f"{saved / 'config.json'}: files"


@pytest.fixture
def nothing_runs(monkeypatch):
    """The doors through which data becomes code. Generated code of checked graphs is compiled; nothing is imported, evaluated or opened."""
    import pickle
    import subprocess

    def door(*args, **kwargs):
        raise AssertionError(f"called with {args[:1]}")

    for owner, name in (
        (builtins, "eval"),
        (os, "system"),
        (subprocess, "Popen"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, door)


ENVIRON = {"kind": "dict", "type": "os:environ", "keys": [], "children": []}
LIST = {"kind": "constant", "value": ["str", "ls"]}
POPEN = {"kind": "dataclass", "type": "subprocess:Popen", "keys": [["str", "args"]], "children": [LIST]}
NUMBERS = [None, True, -1, 0, 1, 2**31, 2**62, 1e300, 0.5]
TEXTS = ["", "x", "..", "../../etc/passwd", "__class__", "a.b", "self.x", 'x"); import os', "if", "aten.from_file.default",
         "aten.add_.Tensor", "os.system", "python.attribute", "training"]  # fmt: skip
OTHERS = [[], {}, [0], {"node": "zz"}, {"tuple": []}, {"slice": [0, 1, 2]}, {"dtype": "save"}, [[[[[[]]]]]], ENVIRON, POPEN]
VALUES = [*NUMBERS, *TEXTS, *OTHERS]


def mutate(tree, draw):
    """One change somewhere in a JSON tree."""
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = keys[draw(st.integers(0, len(keys) - 1))]
        if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 4)):
            place = place[key]
            continue
        how = draw(st.sampled_from(["replace", "delete", "other", "twice", "rename"]))
        if how == "delete":
            del place[key]
        elif how == "other":
            place[key] = copy.deepcopy(place[keys[draw(st.integers(0, len(keys) - 1))]])
        elif how == "twice" and isinstance(place, list):
            place.insert(key, copy.deepcopy(place[key]))
        elif how == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(["x", "..", 'a"b', "__class__", "forward", "0"]))] = place.pop(key)
        else:
            place[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        return


def loads_or_is_refused(path):
    start = time.perf_counter()
    try:
        hat = hatify.load(path)
    except ArtifactError as error:
        assert str(path) in str(error.where), error
    else:
        assert isinstance(hat, hatify.HATModel)
    assert time.perf_counter() - start < 20


@FUZZ
@given(data=st.data())
def test_a_changed_description_with_right_digests_is_refused_or_loads(original, tmp_path_factory, nothing_runs, data):
    path = tmp_path_factory.mktemp("json") / "saved"
    shutil.copytree(original, path)
    name = data.draw(st.sampled_from(["model.json"] * 4 + ["config.json", "model.safetensors.index.json"]))
    tree = json.loads((path / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(tree, data.draw)
    if name == "config.json":
        (path / name).write_text(json.dumps(seal(tree)))
    else:
        (path / name).write_text(json.dumps(tree))
        reseal(path)
    loads_or_is_refused(path)


@FUZZ
@given(data=st.data())
def test_a_changed_header_with_right_digests_is_refused_or_loads(original, tmp_path_factory, nothing_runs, data):
    path = tmp_path_factory.mktemp("header") / "saved"
    shutil.copytree(original, path)
    name = data.draw(st.sampled_from(sorted(n for n in os.listdir(original) if n.endswith(".safetensors"))))
    content = (path / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    mutate(tree, data.draw)
    header = json.dumps(tree).encode()
    claimed = data.draw(st.sampled_from([len(header)] * 6 + [0, 2**63, len(header) + 1]))
    (path / name).write_bytes(claimed.to_bytes(8, "little") + header + content[8 + length :])
    reseal(path)
    loads_or_is_refused(path)


def test_memory_is_not_taken_for_what_is_not_there(saved):
    content = (saved / "gates.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    tree["ids"] = {"dtype": "I32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    header = json.dumps(tree).encode()
    (saved / "gates.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    reseal(saved)
    assert "gates.safetensors: ids" in refused(saved).where


@pytest.mark.parametrize("part", ["weight", "state"])
def test_a_name_that_two_tensors_would_have_is_refused(saved, part):
    tree = json.loads((saved / "model.json").read_text())
    entries = tree["modules"]
    if part == "weight":  # a buffer like a parameter
        number = next(n for n, entry in enumerate(entries) if entry["path"] == "conv")
        entries[number]["buffers"] = {"weight": {"dtype": "F32", "shape": [4, 3, 3, 3]}}
        where = f"modules[{number}].buffers.weight"
    else:  # a buffer like the marks of finished tasks
        number = next(n for n, entry in enumerate(entries) if entry["kind"] == "masker")
        entries[number]["buffers"] = {"_extra_state": entries[number]["state"]}
        where = f"modules[{number}].state"
    (saved / "model.json").write_text(json.dumps(tree))
    reseal(saved)
    assert refused(saved).where == f"{saved / 'model.json'}: {where}"


def test_the_code_of_the_directory_is_never_run(saved):
    (saved / "graph.py").write_text("raise SystemExit")
    reseal(saved)
    hatify.load(saved)


def test_names_are_not_imported(saved, monkeypatch):
    tree = json.loads((saved / "model.json").read_text())
    tree["outputs"]["eval"]["type"] = tree["outputs"]["train"]["type"] = "antigravity:Thing"
    (saved / "model.json").write_text(json.dumps(tree))
    reseal(saved)
    hat = hatify.load(saved)
    out = hat(torch.randn(2, 3, 6, 6))
    assert "antigravity" not in sys.modules and out.logits.shape == (2, 3)


@pytest.mark.parametrize("fixed", [2, [0], [[]], [["x", 0]], ["x"]])
def test_a_field_that_is_no_list_is_named(saved, fixed):
    tree = json.loads((saved / "model.json").read_text())
    tree["sizes"]["fixed"] = fixed
    (saved / "model.json").write_text(json.dumps(tree))
    reseal(saved)
    assert refused(saved).where.startswith(f"{saved / 'model.json'}: sizes.fixed")


@pytest.mark.parametrize(
    "target, args",
    [("python.add", [1]), ("python.neg", []), ("python.getitem", [[1], 0, 0]), ("math.sqrt", []), ("torch.sym_ite", [True]),
     ("python.round", [1.5, 1, 1]), ("hatify.by_mode", [])],
)  # fmt: skip
def test_an_operator_of_python_takes_its_own_number_of_arguments(saved, target, args):
    tree = json.loads((saved / "model.json").read_text())
    nodes = tree["graphs"]["eval"]
    number = next(n for n, node in enumerate(nodes) if node["op"] != "placeholder")
    nodes.insert(number, {"name": "extra", "op": "call_function", "target": target, "args": args})
    (saved / "model.json").write_text(json.dumps(tree))
    reseal(saved)
    assert refused(saved).where == f"{saved / 'model.json'}: graphs.eval[{number}]"


@pytest.mark.parametrize("files", ["model-*", "example_inputs*"])
def test_a_number_too_large_for_the_wanted_type_is_named_by_file_and_tensor(saved, files):
    name = min(file.name for file in saved.glob(f"{files}.safetensors"))
    state = load_file(saved / name)
    key = next(key for key, tensor in state.items() if tensor.is_floating_point() and tensor.numel())
    save_file({**state, key: torch.full_like(state[key], 1e30)}, saved / name)
    reseal(saved)
    hatify.load(saved)
    assert refused(saved, dtype=torch.float16).where == f"{saved / name}: {key}"


def constant(tag, text):
    return {"kind": "constant", "value": [tag, text]}


def returned(path, kind, name, *fields, parts=None):
    """What the model returns, where its directory describes the result as something else: first the logits, then constants."""
    tree = json.loads((path / "model.json").read_text())
    children = parts or [{"kind": "tensor"}, *[constant("int", "1") for _ in fields[1:]]]
    structure = {"kind": kind, "type": name, "keys": [["str", field] for field in fields], "children": children}
    tree["outputs"] = {"eval": structure, "train": structure}
    (path / "model.json").write_text(json.dumps(tree))
    reseal(path)
    return hatify.load(path)(torch.randn(2, 3, 6, 6))


def test_results_are_records_and_no_other_class_of_a_library_is_made(saved):
    import transformers
    from torchvision.models.googlenet import GoogLeNetOutputs
    from transformers.modeling_outputs import ImageClassifierOutput

    late = "TrainingArguments"
    out = returned(saved, "dataclass", f"transformers:{late}", "output_dir")
    assert type(out).__name__ == late and type(out).__module__ != "transformers.training_args" and out.output_dir.shape == (2, 3)
    assert late not in vars(transformers)
    assert type(returned(saved, "dict", "transformers.modeling_outputs:ImageClassifierOutput", "logits")) is ImageClassifierOutput
    other = returned(saved, "dict", "transformers.modeling_outputs:ImageClassifierOutput", "other")
    assert type(other) is not ImageClassifierOutput and list(other) == ["other"]
    fields = GoogLeNetOutputs._fields
    assert type(returned(saved, "namedtuple", "torchvision.models.googlenet:GoogLeNetOutputs", *fields)) is GoogLeNetOutputs
    assert type(returned(saved, "namedtuple", "torchvision.models.googlenet:GoogLeNetOutputs", "x")) is not GoogLeNetOutputs
    two = [{"kind": "tensor"}, constant("int", "1")]
    assert type(returned(saved, "sequence", "torch.return_types:max", parts=two)) is torch.return_types.max
    assert type(returned(saved, "sequence", "torch.return_types:max")) is not torch.return_types.max
    assert type(returned(saved, "dataclass", "builtins:dict", "x")).__name__ == "dict"  # a stand-in of that name


@pytest.mark.parametrize(
    "kind, name, fields",
    [
        ("namedtuple", "m:1abc", ["x"]),
        ("dict", "m:1abc", ["x"]),
        ("namedtuple", "m:Out", ["x", "x"]),
        ("dataclass", "m:Out", ["x", "x"]),
        ("dict", "m:Out", ["x", "x"]),
        ("namedtuple", "m:Out", ["\uff49\uff46"]),  # Python reads it as `if`
        ("dataclass", "m:Out", ["\uff49\uff46"]),
        ("dataclass", "m:Out", ["__class__"]),
        ("tuple", None, ["x"]),
    ],
)
def test_a_result_of_no_possible_class_is_refused(saved, kind, name, fields):
    with pytest.raises(ArtifactError) as caught:
        returned(saved, kind, name, *fields)
    assert caught.value.where == f"{saved / 'model.json'}: outputs.eval"


def test_a_constant_has_no_parts(saved):
    with pytest.raises(ArtifactError, match="no parts"):
        returned(saved, "dict", "m:Out", "x", parts=[{**constant("int", "1"), "children": [{"kind": "tensor"}]}])


@pytest.mark.parametrize("how", [["dtype", "loaded_late"], {"dtype": "loaded_late"}, "inputs"])
def test_no_part_of_torch_is_imported_by_a_name(saved, how, monkeypatch):
    monkeypatch.setattr(torch, "__getattr__", lambda name: pytest.fail(f"asked for {name}"))
    if how == "inputs":
        reseal(saved, example_inputs=[{"dtype": "loaded_late", "shape": [2]}])
    else:
        tree = json.loads((saved / "model.json").read_text())
        if isinstance(how, dict):
            tree["graphs"]["eval"][2]["args"] = [how]
        else:
            tree["outputs"]["eval"]["children"][0] = constant(*how)
        (saved / "model.json").write_text(json.dumps(tree))
        reseal(saved)
    refused(saved)


def test_names_of_modules_do_not_reach_the_generated_code():
    for name in ('a"b', "a'b", "a\\b", "a\nb", "a;b", "a(b", "a{b", "a.b", ""):
        assert fields.NAME.fullmatch(name) is None
    for name in ("conv1", "0", "my layer", "a-b", "größe"):
        assert fields.NAME.fullmatch(name)
