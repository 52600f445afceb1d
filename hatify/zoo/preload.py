"""Imported once by the server that the sweep's processes are forked from: seconds of imports that each of them would spend."""

import importlib
import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for _name in ("torch", "torch.export", "timm", "torchvision", "hatify.conversion", "hatify.verification", "hatify.zoo.proving"):
    if importlib.util.find_spec(_name.partition(".")[0]) is not None:
        importlib.import_module(_name)

from hatify.zoo.records import imported_files  # noqa: E402

imported_files()  # their digests as they are now: a file that is edited while the sweep runs is not what ran
