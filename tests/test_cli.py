import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import hatify
from hatify import verification
from hatify.cli.convert import short_name
from hatify.cli.main import app
from hatify.cli.tree import collapse, grow

MODEL = ["test_resnet", "--img-size", "64"]
FACTORY = """
import torch
def make():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
def interrupt():
    raise KeyboardInterrupt
def explode():
    raise ZeroDivisionError("on purpose")
def chatter():
    print("a library that talks")
    return make()
"""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("cli_factory", None)
    return tmp_path


@pytest.fixture
def factory(work):
    source = work / "src"
    source.mkdir()
    (source / "cli_factory.py").write_text(FACTORY)
    sys.path.insert(0, str(source))
    return "cli_factory"


def run(*args, code=0):
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result


def refused(*args, code=1):
    """The error on stderr of a call that must fail: short, without a traceback."""
    result = run(*args, code=code)
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) < 25
    return result.stderr


# Help


def test_help_and_version_need_no_torch():
    code = (
        "import sys\nfrom hatify.cli.main import main\n"
        "sys.argv = ['hatify', *{args}]\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = sorted({{'torch', 'timm', 'transformers', 'numpy'}} & set(sys.modules))\n"
        "assert not heavy, heavy"
    )
    for args, expected in [
        (["--help"], "convert"),
        (["convert", "--help"], "--pretrained"),
        (["inspect", "--help"], "--layer"),
        (["forget", "--help"], "--dry-run"),
        (["usage", "--help"], "--plot"),
        (["extract", "--help"], "--slim"),
        (["--version"], hatify.__version__),
    ]:
        done = subprocess.run([sys.executable, "-c", code.format(args=args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


# Converting


def test_convert_writes_a_directory_and_says_what_it_did(work):
    result = run("convert", *MODEL, "--tasks", 3)
    assert os.listdir(work) == ["test_resnet-hat3"]
    for text in (
        "test_resnet",
        "conv1",
        "HATConv2d",
        "task-indexed",
        "parameters",
        "random",
        "mask nodes",
        "fixed sizes",
        "parity, eval",
        "parity, train",
        "drift",
        "control",
        "seconds",
        "test_resnet-hat3",
    ):
        assert text in result.stdout, text
    for step in ("build", "capture", "analyse", "rewrite", "verify", "save"):
        assert f"{step} ..." in result.stderr and step in result.stdout
    hat = hatify.load(work / "test_resnet-hat3")
    assert hat.source.text == "test_resnet"


def test_weights_are_stored_in_another_type(work, factory):
    run("convert", f"{factory}:make", "--img-size", 16, "--tasks", 2, "--dtype", "bfloat16", "--out", "x")
    assert {p.dtype for p in hatify.load(work / "x").parameters()} == {torch.bfloat16}
    assert "bfloat16" in run("convert", f"{factory}:make", "--dtype", "int8", code=2).stderr
    run("verify", "x")


def test_json_is_the_only_thing_on_stdout(work, factory):
    out = run("convert", f"{factory}:chatter", "--img-size", 16, "--classes", "2,3", "--json", "--out", "x").stdout
    report = json.loads(out)
    assert report["weights"] == "random" and report["path"] == str((work / "x").resolve())
    assert report["report"]["tasks"] == 2 and report["verification"] is not None
    assert set(report["report"]["rungs"]) == {"hat", "row-locked", "task-indexed", "frozen"}


def test_a_checkpoint_is_used_and_named(work):
    import timm

    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), "weights.pt")
    result = run("convert", *MODEL, "--checkpoint", "weights.pt", "--no-verify", "--out", "x")
    assert "checkpoint weights.pt" in result.stdout and "skipped" in result.stdout
    hat = hatify.load(work / "x")
    assert torch.equal(hat.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])


def test_force_replaces_and_nothing_else_does(work):
    (work / "x").mkdir()
    (work / "x" / "mine.txt").write_text("mine")
    stderr = refused("convert", *MODEL, "--out", "x")
    assert "--force" in stderr and "build ..." not in stderr  # refused before the work
    assert os.listdir(work / "x") == ["mine.txt"]
    run("convert", *MODEL, "--out", "x", "--force", "--no-verify")
    assert "config.json" in os.listdir(work / "x") and "mine.txt" not in os.listdir(work / "x")
    assert os.listdir(work) == ["x"]


def test_a_failed_proof_writes_nothing(work, monkeypatch):
    monkeypatch.setattr(verification, "drift_and_control", lambda *arguments: (0.25, 1.0))
    for more in ((), ("--json",)):
        result = run("convert", *MODEL, *more, code=1)
        assert "a promise does not hold" in result.stderr and "drift 0.25" in result.stderr and result.stdout == ""
        assert os.listdir(work) == []


@pytest.mark.parametrize(
    "args, says",
    [
        (["resnet51"], "resnet50"),
        (["torchvision:resnet17"], "torchvision:resnet18"),
        (["transformers:nowhere"], "config.json"),
        (["nowhere:make"], "No module named"),
        (["test_resnet", "--checkpoint", "nowhere.pt"], "no such file"),
        (["test_resnet", "--checkpoint", "text.pt"], "no checkpoint"),
        (["test_resnet", "--out", "text.pt"], "is a file"),
        (["cli_factory:make"], "example_inputs=torch.randn"),
        (["cli_factory:make", "--pretrained"], "no pretrained weights"),
        (["cli_factory:mkae"], "cli_factory:make"),
    ],
)
def test_bad_input_is_one_screen(work, factory, args, says):
    (work / "text.pt").write_text("no checkpoint")
    before = sorted(os.listdir(work))
    assert says in refused("convert", *args)
    assert sorted(name for name in os.listdir(work) if name != "__pycache__") == before


@pytest.mark.parametrize(
    "args",
    [
        ["--tasks", "0"],
        ["--tasks", "many"],
        ["--classes", "2,x"],
        ["--classes", "2,0"],
        ["--classes", ""],
        ["--classes", "2,,3"],
        ["--classes", "2,3", "--tasks", "3"],
        ["--heads", "shared"],
        ["--locking", "loose"],
        ["--img-size", "0"],
        ["--pretrained", "--checkpoint", "x.pt"],
        ["--no-such-option"],
    ],
)
def test_wrong_usage_is_exit_code_2(work, args):
    refused("convert", *MODEL, *args, code=2)
    assert os.listdir(work) == []


def test_no_command_and_no_model_are_wrong_usage():
    refused("convert", code=2)
    refused("shrink", code=2)


def test_ctrl_c_leaves_nothing_behind(work, factory, monkeypatch):
    assert "interrupted" in refused("convert", f"{factory}:interrupt", code=130)
    from hatify.artifact import directory

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(directory, "write_tensors", interrupt)
    refused("convert", *MODEL, "--no-verify", code=130)
    assert os.listdir(work) == ["src"]


def test_a_full_disk_leaves_nothing_behind(work, monkeypatch):
    from hatify.artifact import directory

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "write_tensors", full)
    assert "No space left on device" in refused("convert", *MODEL, "--no-verify")
    assert os.listdir(work) == []


def test_the_unexpected_is_one_screen_too_and_debug_shows_where(factory):
    stderr = refused("convert", f"{factory}:explode")
    assert "ZeroDivisionError" in stderr and "on purpose" in stderr and "--debug" in stderr
    stderr = run("convert", f"{factory}:explode", "--debug", code=1).stderr
    assert "Traceback" in stderr and "in explode" in stderr


def test_the_console_script_finds_a_factory_of_the_working_directory(work):
    (work / "here.py").write_text(FACTORY)
    code = "import sys; sys.path = [p for p in sys.path if p]; from hatify.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(hatify.__file__))}
    args = ["convert", "here:make", "--img-size", "16", "--tasks", "2", "--no-verify"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (work / "make-hat2" / "config.json").is_file()
    assert "Warning" not in done.stderr


# Inspecting


@pytest.fixture
def saved(work):
    run("convert", *MODEL, "--tasks", 2, "--no-verify", "--out", "x")
    return "x"


def test_inspect_shows_code_gates_and_sizes(saved):
    for args in ([saved], MODEL):
        stdout = run("inspect", *args).stdout
        for text in ("def forward", "self.conv1", "# layer1", "gates", "fixed sizes"):
            assert text in stdout, text


def test_inspect_says_one_layer_in_words(saved):
    stdout = run("inspect", saved, "--layer", "layer1.0.conv1").stdout
    assert "layer1.0.conv1" in stdout and "def forward" not in stdout
    shown = json.loads(run("inspect", saved, "--layer", "layer1.0.conv1", "--json").stdout)
    assert shown["description"].strip() == stdout.strip()
    assert "layer1.0.conv1" in refused("inspect", saved, "--layer", "layer1.0.conv")


def test_inspect_gives_json(saved):
    shown = json.loads(run("inspect", saved, "--json").stdout)
    assert {"code", "nodes", "layers", "fixed_sizes"} <= shown.keys()
    assert {"name", "op", "target", "gates", "scope"} <= shown["nodes"][0].keys()


def test_inspect_refuses_what_it_cannot_read(saved, work):
    assert "did you mean" in refused("inspect", "resnet51")
    refused("inspect", saved, "--tasks", 3, code=2)
    refused("inspect", "test_resnet", "--factory", "cli_factory:make", code=2)
    (work / saved / "config.json").write_text("{}")
    assert "format" in refused("inspect", saved)


def test_inspect_takes_the_factory_of_a_saved_model(factory):
    run("convert", f"{factory}:make", "--img-size", 16, "--no-verify", "--out", "y")
    assert "def forward" in run("inspect", "y").stdout  # it needs none
    assert "def forward" in run("inspect", "y", "--factory", f"{factory}:make").stdout


# Parts


@pytest.mark.parametrize(
    "model, name",
    [
        ("resnet50", "resnet50"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("torchvision:resnet18", "resnet18"),
        ("transformers:some/dir/bert/", "bert"),
        ("package.module:make", "make"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("local-dir:..", "model"),
    ],
)
def test_the_directory_is_named_after_the_model(model, name):
    assert short_name(model) == name


def layer(path, became="HATLinear", parameters=10):
    return dict(path=path, was="Linear", became=became, rung="hat", parameters=parameters, reason=None)


def test_blocks_that_became_the_same_are_one_with_their_parameters_added():
    layers = [layer(f"blocks.{i}.{name}", parameters=i + 1) for i in range(4) for name in ("a", "b")]
    tree = collapse(grow([*layers, layer("blocks.4.a", became="TaskIndexed"), layer("head")]))
    assert list(tree.children) == ["blocks", "head"]
    blocks = tree.children["blocks"]
    assert list(blocks.children) == ["0-3", "4.a"]
    group = blocks.children["0-3"]
    assert group.count == 4
    assert [child.entries[0]["parameters"] for child in group.children.values()] == [10, 10]


def test_nested_repetitions_collapse_from_the_inside():
    layers = [layer(f"stages.{s}.{b}.conv") for s in range(2) for b in range(3)]
    stages = collapse(grow(layers)).children["stages"]
    assert list(stages.children) == ["0-1"]
    assert list(stages.children["0-1"].children) == ["0-2"]
    conv = stages.children["0-1"].children["0-2"].children["conv"]
    assert conv.entries[0]["parameters"] == 60
