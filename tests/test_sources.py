import subprocess
import sys
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from hatify.errors import CheckpointError, ExampleInputsError, UnknownModelError
from hatify.sources import Source, find_example_inputs, load_checkpoint, parse_source

FACTORY = """
import torch
def make(img_size=None, pretrained=False):
    model = torch.nn.Linear(img_size or 3, 2)
    model.was_pretrained = pretrained
    return model
def plain():
    return torch.nn.Linear(3, 2)
def no_model():
    return 3
"""


@pytest.fixture
def factory_module(tmp_path, monkeypatch):
    (tmp_path / "user_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "user_factory"
    sys.modules.pop("user_factory", None)


def net():
    return nn.Sequential(OrderedDict(body=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), head=nn.Linear(4, 2)))


# Names


@pytest.mark.parametrize(
    "text, kind, name",
    [
        ("resnet10t", "timm", "resnet10t"),
        ("timm:resnet10t", "timm", "resnet10t"),
        ("test_resnet.r160_in1k", "timm", "test_resnet.r160_in1k"),
        ("torchvision:resnet18", "torchvision", "resnet18"),
    ],
)
def test_names_are_read(text, kind, name):
    source = parse_source(text)
    assert (source.kind, source.name) == (kind, name)
    assert parse_source(source.text) == source
    assert Source.from_json(source.to_json()) == source


@pytest.mark.parametrize(
    "text, near",
    [
        ("resnet51", "resnet50"),
        ("test_resnet.r160", "test_resnet.r160_in1k"),
        ("torchvision:resnet17", "torchvision:resnet18"),
        ("user_factory:mkae", "user_factory:make"),
    ],
)
def test_a_near_miss_is_suggested(text, near, factory_module):
    with pytest.raises(UnknownModelError) as caught:
        parse_source(text)
    assert near in caught.value.fix


@pytest.mark.parametrize("text", ["", "%$", "nope.nope:make", "transformers:/no/such/dir", "user_factory:"])
def test_other_unknown_names_say_what_to_write(text, factory_module):
    with pytest.raises(UnknownModelError) as caught:
        parse_source(text)
    assert caught.value.fix


def test_an_import_error_inside_the_users_module_is_not_called_an_unknown_name(tmp_path, monkeypatch):
    (tmp_path / "user_broken.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnknownModelError, match="cannot be imported") as caught:
        parse_source("user_broken:make")
    assert "no_such_library" in caught.value.why


@pytest.mark.parametrize("data", [None, [], {}, {"kind": "pickle", "name": "x"}, {"kind": "timm", "name": 3}])
def test_a_broken_stored_source_is_refused(data):
    with pytest.raises(UnknownModelError):
        Source.from_json(data)


# Building


def test_a_model_is_built_as_the_library_gives_it():
    torch.manual_seed(0)
    ours = parse_source("test_resnet").build()
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet")
    assert ours.training == theirs.training
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_image_size_reaches_models_of_one_size_and_spares_the_others():
    assert parse_source("test_vit", img_size=64).build().patch_embed.img_size == (64, 64)
    assert parse_source("test_resnet", img_size=64).build() is not None
    assert parse_source("torchvision:vit_b_16", img_size=64).build().image_size == 64
    assert parse_source("torchvision:squeezenet1_1", img_size=64).build() is not None


def test_a_factory_gets_the_options_that_it_takes(factory_module):
    assert parse_source("user_factory:make", img_size=5).build().in_features == 5
    assert parse_source("user_factory:plain", img_size=5).build().in_features == 3
    assert parse_source("user_factory:make").build(pretrained=True).was_pretrained
    with pytest.raises(CheckpointError, match="no pretrained weights"):
        parse_source("user_factory:plain").build(pretrained=True)
    with pytest.raises(UnknownModelError, match="does not give a model"):
        parse_source("user_factory:no_model").build()


def test_a_transformers_source_outlives_its_directory(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    directory = tmp_path / "bert"
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(directory)
    source = parse_source(f"transformers:{directory}")
    again = source.build(pretrained=True)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    for path in directory.iterdir():
        path.unlink()
    rebuilt = Source.from_json(source.to_json()).build()
    assert type(rebuilt) is type(model) and rebuilt.classifier.out_features == 3


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(CheckpointError, match="no network"):
        Source("timm", "test_resnet").build(pretrained=True)


def test_no_model_library_is_imported_for_a_plain_model():
    code = (
        "import sys, torch; from hatify.sources import find_example_inputs\n"
        "try: find_example_inputs(torch.nn.Linear(3, 2))\n"
        "except Exception as e: print(type(e).__name__)\n"
        "print(sorted({'timm', 'torchvision', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["ExampleInputsError", "[]"]


# Checkpoints


WRAPPED = [
    dict,
    lambda state: {"module." + key: value for key, value in state.items()},
    lambda state: {"module._orig_mod." + key: value for key, value in state.items()},
    lambda state: {"state_dict": dict(state), "epoch": 3},
    lambda state: {"model": {"module." + key: value for key, value in state.items()}},
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_checkpoints_are_unwrapped(tmp_path, wrap):
    state = wrap(net().state_dict())
    torch.save(state, tmp_path / "weights.pt")
    loads(tmp_path / "weights.pt", state)


@pytest.mark.parametrize("wrap", WRAPPED[:3])  # files of safetensors hold tensors alone
def test_checkpoints_of_safetensors_are_unwrapped(tmp_path, wrap):
    state = wrap(net().state_dict())
    save_file(state, tmp_path / "weights.safetensors")
    loads(tmp_path / "weights.safetensors", state)


def loads(path, state):
    model = net()
    load_checkpoint(model, path)
    values = [value for value in _leaves(state) if isinstance(value, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values, strict=True))


def _leaves(state):
    for value in state.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]


def test_tied_weights_may_be_stored_once(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    saved, model = tied(), tied()
    state = saved.state_dict()
    del state["1.weight"]
    save_file(state, tmp_path / "tied.safetensors")
    load_checkpoint(model, tmp_path / "tied.safetensors")
    assert torch.equal(model[1].weight, saved[0].weight)


def test_a_checkpoint_of_another_model_is_refused_whole(tmp_path):
    state = net().state_dict()
    state["head.weight"] = torch.zeros(7, 4)
    state["extra"] = torch.zeros(1)
    del state["body.bias"]
    torch.save(state, tmp_path / "other.pt")
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "other.pt")
    for text in (
        "missing (1): body.bias",
        "unexpected (1): extra",
        "head.weight: (7, 4) in the file, (2, 4)",
    ):
        assert text in caught.value.why
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(range(256)), b"PK\x03\x04" + bytes(60)])
def test_a_file_that_is_no_checkpoint(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(net(), path)
    assert caught.value.where == str(path) and caught.value.fix


@pytest.mark.parametrize("value", [3, [torch.zeros(1)], {}, {"a": 3}])
def test_a_torch_file_without_weights(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(net(), tmp_path / "x.pt")


def test_a_pickled_model_is_refused_without_running_it(tmp_path):
    torch.save(net(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="Python objects") as caught:
        load_checkpoint(net(), tmp_path / "model.pt")
    assert "state_dict()" in caught.value.fix


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(net(), tmp_path / "nope.pt")
    with pytest.raises(CheckpointError, match="directory"):
        load_checkpoint(net(), tmp_path)


# Example inputs


def runs(model, **options):
    args, kwargs = find_example_inputs(model, **options)
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    return args, kwargs


def test_timm_says_the_size():
    (image,), kwargs = runs(timm.create_model("test_resnet"))
    assert image.shape == (2, 3, 160, 160) and kwargs == {}
    assert runs(timm.create_model("test_vit", img_size=64, in_chans=1), batch=3)[0][0].shape == (3, 1, 64, 64)
    assert runs(timm.create_model("test_resnet"), img_size=32)[0][0].shape == (2, 3, 32, 32)


def test_a_subclass_of_the_user_is_known_by_its_base():
    class Mine(timm.models.ResNet):
        pass

    model = Mine(timm.models.resnet.BasicBlock, (1, 1, 1, 1))
    with pytest.raises(ExampleInputsError):
        find_example_inputs(model)  # no configuration: it does not say
    model.pretrained_cfg = {"input_size": (3, 64, 64), "first_conv": "conv1"}
    assert runs(model)[0][0].shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("squeezenet1_1", (2, 3, 224, 224)),
        ("inception_v3", (2, 3, 299, 299)),
        ("r3d_18", (2, 3, 16, 112, 112)),
        ("s3d", (2, 3, 16, 224, 224)),
        ("swin3d_t", (2, 3, 16, 112, 112)),
        ("mvit_v1_b", (2, 3, 16, 224, 224)),
    ],
)
def test_torchvision_families(name, shape):
    import torchvision

    kwargs = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    (x,), _ = find_example_inputs(model)
    assert x.shape == shape


def test_transformers_say_their_main_input():
    import transformers

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=12, **tiny))
    _, kwargs = runs(text)
    assert kwargs["input_ids"].shape == (2, 12) and kwargs.get("use_cache", False) is False
    endless = transformers.XLNetModel(transformers.XLNetConfig(vocab_size=50, d_model=8, n_layer=1, n_head=2, d_inner=8))
    assert endless.config.max_position_embeddings == -1 and runs(endless)[1]["input_ids"].shape == (2, 16)
    vision = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **tiny))
    assert runs(vision)[1]["pixel_values"].shape == (2, 3, 32, 32)
    t5 = transformers.T5Model(transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert set(runs(t5)[1]) == {"input_ids", "decoder_input_ids", "use_cache"}


def test_the_same_values_every_time_in_the_models_dtype():
    model = timm.create_model("test_resnet").to(torch.bfloat16)
    (first,), _ = find_example_inputs(model)
    (second,), _ = find_example_inputs(model)
    assert torch.equal(first, second) and first.dtype == torch.bfloat16
    state = torch.get_rng_state()
    find_example_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_module_needs_them_and_the_error_is_the_call():
    with pytest.raises(ExampleInputsError) as caught:
        find_example_inputs(net())
    assert "hatify.convert(model, example_inputs=torch.randn(2, 3, 224, 224))" in caught.value.fix
    assert "tuple" in caught.value.fix and "dict" in caught.value.fix
    assert find_example_inputs(net(), img_size=8)[0][0].shape == (2, 3, 8, 8)


def test_detectors_take_a_list_of_images_and_their_backbones_a_batch():
    detector = torchvision.models.get_model("fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None)
    (images,), _ = find_example_inputs(detector, 2, 64)
    assert [image.shape for image in images] == [(3, 64, 64)] * 2
    (batch,), _ = find_example_inputs(detector.backbone, 2, 64)
    assert batch.shape == (2, 3, 64, 64)


def test_a_first_layer_that_sees_blocks_of_pixels_does_not_say_how_many_channels_an_image_has():
    with torch.device("meta"):
        folded, one = timm.create_model("tresnet_m"), timm.create_model("resnet18", in_chans=1)
    assert find_example_inputs(folded)[0][0].shape[1] == 3
    assert find_example_inputs(one)[0][0].shape[1] == 1
