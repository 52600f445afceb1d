"""What every test starts from: no network, one thread (the suite runs in two processes), the same seeds."""

from __future__ import annotations

import os
import random

# Before any import of huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

from hatify.capture import repeats

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Seed every global generator, so that a test gives the same numbers alone and in the suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the blocks that are copied, in the order of eval and train mode."""
    seen: list[str] = []
    repeat = repeats._Block._repeat
    monkeypatch.setattr(repeats._Block, "_repeat", lambda block, *rest: seen.append(block.path) or repeat(block, *rest))
    return seen
