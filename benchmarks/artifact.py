"""Save and load of a converted model against safetensors' own ``save_file`` and ``load_file`` on the same tensors, taken in turns.

    python benchmarks/artifact.py [MODEL] [--tasks 10] [--rounds 5]

Seconds are medians; peaks are what the process's memory grows by, measured in a process of its own for each way.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="vit_base_patch16_224")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(*options.peak)
        return
    import timm

    import hatify

    work = Path(tempfile.mkdtemp(prefix="hatify-benchmark-"))
    try:
        sizes = {}
        for tasks in (1, options.tasks):
            hat = hatify.convert(timm.create_model(options.model), tasks=tasks, verify=False, inplace=True)
            hatify.save(hat, work / f"{tasks}")
            sizes[tasks] = on_disk(work / f"{tasks}")
        times(hat, work, options.rounds)
        print("\npeak memory, MiB above the imports")
        for what in ("load", "save"):
            for way in ("hatify", "plain"):
                command = [sys.executable, __file__, "--peak", what, way, str(work / f"{options.tasks}")]
                print(f"{what} {way:7}", subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        explain(sizes, options.tasks)
    finally:
        shutil.rmtree(work)


def times(hat, work: Path, rounds: int) -> None:
    import hatify

    state = {k: v.detach() for k, v in hat.state_dict().items()}
    path = work / "plain.safetensors"
    ways = {
        "save plain": lambda: save_file(state, path),
        "save plain, flushed": lambda: (save_file(state, path), flush(path)),
        "save hatify": lambda: hatify.save(hat, work / "timed", overwrite=True),
        "load plain (maps the file)": lambda: load_file(path),
        "load plain, each page read": lambda: [touch(v) for v in load_file(path).values()],
        "one sha256 of the file": lambda: hashlib.sha256(memoryview(mapped(path))).hexdigest(),
        "one BLAKE3 of the file": lambda: blake3(memoryview(mapped(path))).hexdigest(),
        "load plain, own memory": lambda: {k: v.clone() for k, v in load_file(path).items()},
        "load hatify": lambda: hatify.load(work / "timed"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            held = way()
            seconds[name].append(time.perf_counter() - start)
            del held
            gc.collect()
            trim()
    print(f"{sum(v.nbytes for v in state.values()) / 2**20:.0f} MiB of tensors; median seconds of {rounds}, fastest")
    for name, found in seconds.items():
        print(f"{name:28} {statistics.median(found):.2f} {min(found):.2f}")


def trim() -> None:
    """Gives freed memory back to the system, so that every way takes fresh memory, as a process does that loads one model; else it finds
    what the way before left, or not, by chance."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back is not None:
        give_back(ctypes.c_size_t(0))


def touch(tensor: torch.Tensor) -> None:
    tensor.view(-1)[:: 4096 // tensor.element_size()].sum()


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def peak(what: str, way: str, path: str) -> None:
    import hatify
    import hatify.artifact.description  # what the first call imports is not its memory

    if what == "save":
        hat = hatify.load(path)
        state = {k: v.detach() for k, v in hat.state_dict().items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    before = resident("VmRSS")
    if what == "load":
        held = (
            hatify.load(path) if way == "hatify" else {k: v.clone() for k, v in load_file(Path(path, "model.safetensors")).items()}
        )
    elif way == "hatify":
        held = hatify.save(hat, f"{path}-peak", overwrite=True)
    else:
        held = save_file(state, f"{path}-peak.safetensors")
    print(f"{(resident('VmHWM') - before) / 1024:.0f}")
    del held


def resident(field: str) -> int:
    """KiB of memory that the process has, or had at most."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1])


def on_disk(path: Path) -> dict[str, int]:
    """Bytes by what they are for."""
    description = json.loads((path / "model.json").read_text())
    room = description["room"]
    found: dict[str, int] = {}

    def add(line: str, size: int) -> None:
        found[line] = found.get(line, 0) + size

    for module in description["modules"]:
        for name, entry in {**module.get("parameters", {}), **module.get("buffers", {})}.items():
            if not isinstance(entry, dict):
                continue
            size = torch.Size(entry["shape"]).numel() * (8 if entry["dtype"] == "I64" else 4)
            where = f".{module['path']}.{name}."
            if ".embeddings." in where and "masker" in where:
                add("mask embeddings", size)
            elif f".{room}." in where:
                add("task copies of raw parameters, constants", size)
            elif ".tasks." in where:
                head = any(p["role"] == "head" and f".{p['path']}." in where for p in description["plans"]["layers"].values())
                add("task copies of heads" if head else "task copies of norms and other layers", size)
            else:
                add("the original's own tensors", size)
    for file in sorted(path.iterdir()):
        if not file.name.startswith("model") or file.suffix == ".json":
            add(file.name, file.stat().st_size)
    weights = sum(f.stat().st_size for f in path.glob("model*.safetensors"))
    inside = sum(size for line, size in found.items() if not Path(path, line).exists())
    add("headers and marks of finished tasks", weights - inside)
    return found


def explain(sizes: dict[int, dict[str, int]], tasks: int) -> None:
    print(f"\n{'MiB on disk':44} {'1 task':>9} {f'{tasks} tasks':>9}")
    for line in sizes[tasks]:
        print(f"{line:44} {sizes[1].get(line, 0) / 2**20:9.2f} {sizes[tasks][line] / 2**20:9.2f}")
    print(f"{'all':44} {sum(sizes[1].values()) / 2**20:9.2f} {sum(sizes[tasks].values()) / 2**20:9.2f}")


if __name__ == "__main__":
    main()
