"""``timm.create_model("hat_...")``: timm's own calls give converted models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

import hatify
import hatify.timm_models
from hatify.errors import ConversionError

SMALL = "hat_test_resnet"


def _original() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return timm.create_model("test_resnet").eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160)


def test_every_name_has_a_hat_version() -> None:
    plain = {name for name in timm.list_models() if not name.startswith("hat_")}
    assert len(plain) > 1000
    assert set(timm.list_models("hat_*")) == {f"hat_{name}" for name in plain}
    tagged = {name for name in timm.list_models(pretrained=True) if not name.startswith("hat_")}
    assert set(timm.list_models("hat_*", pretrained=True)) == {f"hat_{name}" for name in tagged}
    known = timm.models.get_pretrained_cfg("hat_resnet18")
    assert known.hf_hub_id == timm.models.get_pretrained_cfg("resnet18").hf_hub_id


def test_registering_is_quick() -> None:
    """In a fresh process: names only, no graph, no warning. Processor time, since the machine may be busy."""
    code = (
        "import time, warnings, timm, hatify.modules\nwarnings.simplefilter('error')\nstart = time.process_time()\n"
        "import hatify.timm_models, sys\nspent = time.process_time() - start\n"
        "assert spent < 0.2, spent\nassert 'hatify.conversion' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_papers_figure_2(image: torch.Tensor) -> None:
    hat = timm.create_model(SMALL, num_tasks=5)
    assert isinstance(hat, hatify.HATModel) and hat.config.num_tasks == 5
    assert hat.verification.ok and hat.verification.parity == 0 and hat.verification.drift == 0
    assert hat.eval()(image, task=4).shape == (2, 1000)
    out = hat(hatify.HATPayload(image, task_id=1))
    assert isinstance(out, hatify.HATPayload)
    assert timm.data.resolve_model_data_config(hat)["input_size"] == (3, 160, 160)


def test_options_of_timm_of_the_masks_and_of_the_conversion(image: torch.Tensor) -> None:
    hat = timm.create_model(
        SMALL,
        tasks=[2, 3],
        num_classes=7,
        mask_init="normal",
        max_mask_scale=50.0,
        heads="task-indexed",
        locking="paper",
        verify=False,
    )
    assert hat.config.mask_init == "normal" and hat.config.max_mask_scale == 50.0 and hat.settings["locking"] == "paper"
    hat.eval()
    assert hat(image).shape == (2, 7) and hat(image, task=0).shape == (2, 2) and hat(image, task=1).shape == (2, 3)
    assert hat.verification is None
    with pytest.raises(ConversionError, match="say the same"):
        timm.create_model(SMALL, num_tasks=2, tasks=[2, 2])
    with pytest.raises(ConversionError, match="mask_init"):
        timm.create_model(SMALL, mask_init="zeros")
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model(SMALL, no_such_option=1)


@pytest.mark.parametrize("how", ["pretrained", "checkpoint"])
def test_weights_go_to_every_copy(how: str, image: torch.Tensor, tmp_path) -> None:
    original = _original()
    path = tmp_path / "weights.safetensors"
    save_file(original.state_dict(), path)
    if how == "pretrained":
        hat = timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_tasks=2, verify=False)
    else:
        hat = timm.create_model(SMALL, checkpoint_path=str(path), num_tasks=2, verify=False)
    hat.eval()
    with torch.no_grad():
        assert torch.equal(hat(image), original(image))
        assert torch.equal(hat(image, task=1), original(image)), "all masks are open, and every copy has the weights"
    changed = original.state_dict()
    changed["fc.weight"] = changed["fc.weight"] + 1
    hat.load_state_dict(changed)
    assert torch.equal(hat.state_dict()["fc.weight"], changed["fc.weight"])


def test_what_is_no_checkpoint_of_the_original_is_refused() -> None:
    hat = timm.create_model(SMALL, num_tasks=2, verify=False)
    before = {key: value.clone() for key, value in hat.state_dict().items()}
    less = dict(list(_original().state_dict().items())[:-1])
    with pytest.raises(RuntimeError, match="Missing key"):
        hat.load_state_dict(less)
    assert all(torch.equal(value, before[key]) for key, value in hat.state_dict().items() if key not in less)
