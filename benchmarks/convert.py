"""What a conversion costs: seconds per step, peak memory, copies of weights.

    python benchmarks/convert.py                            # resnet50 and vit_base_patch16_224
    python benchmarks/convert.py swin_tiny_patch4_window7_224 torchvision:resnet18 --json
    python benchmarks/convert.py --depths 3,6,12,24         # how the time grows with the number of nodes

Each model is converted in three fresh processes, `verify=False`, `verify=True` and `inplace=True` (which
does not verify), since a process does not give memory back reliably; a fourth runs one training step of the
model itself (forward and backward on the example inputs), to compare the proof with. Each converts a tiny network
first, so that imports and lazily built tables are not charged to the model: they are the column `imports`.

    imports MB       resident memory after that tiny conversion: Python, torch, torch.export, sympy, timm, hatify
    peak / model     highest resident memory during `convert`, above what was resident just before it (the
                     model included), over the bytes of the model's parameters and buffers. Freed memory that
                     the allocator has not given back to the system counts
    kept / model     what is still resident above it afterwards, once the allocator has given back what is free:
                     the graph, the gate table and the report are in it
    copies           bytes of the result's parameters and buffers that live in no storage of the original,
                     over the bytes of the model: task-indexed copies and masks count, shared weights do not
    own memory       the same, counting each piece of memory once and none that the original reads too: a copy shares
                     memory until one side is written, and only then costs something
    weight copies    as `own memory`, counting only tensors under a key of the original with the original's shape
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "vit_base_patch16_224")
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {"verify": False, "inplace": False},
    "verified": {"verify": True, "inplace": False},
    "inplace": {"verify": False, "inplace": True},
}
STEP = "its own step"
STEPS = ("capture", "analyse", "rewrite", "verify")


def measure(text: str, tasks: int, verify: bool, inplace: bool) -> dict[str, Any]:
    """Convert one model in this process and return what it cost. Bytes and seconds."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    import hatify
    from hatify.sources import parse_source

    torch.set_num_threads(2)
    torch.manual_seed(0)
    _warm_up(tasks, verify, inplace)
    imports = _resident()
    model = parse_source(text).build(pretrained=False)
    state = dict(_state(model))
    shapes = {name: tensor.shape for name, tensor in state.items()}
    # Weak references: an `inplace` conversion must be free to drop the original, and while they live no new
    # storage can get an old one's identity. (The object is compared, not `data_ptr`, which is 0 once freed.)
    originals = [StorageWeakRef(storage) for storage in _storages(state.values())]
    shared = {original.cdata for original in originals}
    addresses = set(_memory(state.values()))
    model_bytes = sum(storage.nbytes() for storage in _storages(state.values()))
    del state

    before = time.perf_counter()
    with _peak_memory() as memory:
        hat = hatify.convert(model, tasks=tasks, verify=verify, inplace=inplace)
    total = time.perf_counter() - before

    result = dict(_state(hat))
    new = [storage for storage in _storages(result.values()) if storage._cdata not in shared]
    under_old_key = [tensor for name, tensor in result.items() if tensor.shape == shapes.get(name)]

    seconds = {step: float(value) for step, value in hat.report.seconds.items()}
    if hat.verification is not None:
        spent = hat.verification.seconds
        seconds.setdefault("verify", sum(spent.values()) if isinstance(spent, dict) else float(spent))
    return {
        "seconds": {**seconds, "total": total},
        "model_bytes": model_bytes,
        "import_bytes": imports,
        "peak_bytes": memory["peak"],
        "kept_bytes": memory["kept"],
        "new_bytes": sum(storage.nbytes() for storage in new),
        "own_bytes": sum(size for address, size in _memory(result.values()).items() if address not in addresses),
        "copied_bytes": sum(size for address, size in _memory(under_old_key).items() if address not in addresses),
    }


def measure_step(text: str, tasks: int) -> dict[str, Any]:
    """One forward and backward of the model itself, in train mode, on its example inputs. Bytes and seconds."""
    import torch

    from hatify.calling import flatten
    from hatify.conversion import example_call
    from hatify.sources import parse_source

    torch.set_num_threads(2)
    torch.manual_seed(0)
    _warm_up(tasks, False, False)
    imports = _resident()
    model = parse_source(text).build(pretrained=False).train()
    model_bytes = sum(storage.nbytes() for storage in _storages(t for _, t in _state(model)))
    args, kwargs = example_call(model, None)
    before = time.perf_counter()
    with _peak_memory() as memory:
        sum(out.float().sum() for out in flatten(model(*args, **kwargs))[0] if out.requires_grad).backward()
    seconds = {"total": time.perf_counter() - before}
    return {"seconds": seconds, "model_bytes": model_bytes, "import_bytes": imports, **{f"{k}_bytes": v for k, v in memory.items()}}


def curve(depths: Iterable[int], tasks: int) -> None:
    """Prints what conversions of vision transformers of so many blocks take, in processor time, in which other processes do not count."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    import hatify

    torch.set_num_threads(1)
    _warm_up(tasks, False, False)
    print("blocks  nodes  seconds  ms per node")
    for depth in depths:
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=depth, num_heads=3, num_classes=10)
        before = time.process_time()
        hat = hatify.convert(model, tasks=tasks, example_inputs=torch.randn(2, 3, 32, 32), verify=False)
        seconds, nodes = time.process_time() - before, len(hat.graph.nodes)
        print(f"{depth:6} {nodes:6} {seconds:8.2f} {1e3 * seconds / nodes:12.1f}", flush=True)


def _warm_up(tasks: int, verify: bool, inplace: bool) -> None:
    """A tiny conversion: everything is imported that a conversion imports."""
    import torch

    import hatify

    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    hatify.convert(tiny, tasks=tasks, example_inputs=torch.randn(2, 3, 8, 8), verify=verify, inplace=inplace)


def _resident() -> int:
    """Resident memory, with what is free given back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _state(module: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter and buffer, those left out of the state dict included."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _storages(tensors: Iterable[Any]) -> list[Any]:
    """The distinct storages of the tensors."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
    return list(found.values())


def _memory(tensors: Iterable[Any]) -> dict[int, int]:
    """Address and bytes of each distinct piece of memory. (`data_ptr()` would part what is shared until written.)"""
    import torch

    found: dict[int, int] = {}
    for tensor in tensors:
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        found[torch._C._data_address(whole)] = whole.nbytes
    return found


@contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """Fill `peak` with the highest resident memory of the block above that at its start, `kept` with what stays. Bytes.

    The kernel's own high-water mark is exact where it may be reset; a sampling thread covers the rest.
    """
    _resident()  # else freed memory of the build hides new allocations
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start, mark = _status("VmRSS"), _status("VmHWM")
    resettable = mark <= start + 2**22
    samples = [start]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(_status("VmRSS"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    memory = {"peak": 0, "kept": 0}
    try:
        yield memory
    finally:
        done.set()
        sampler.join()
        samples.append(_status("VmRSS"))
        if resettable:
            samples.append(_status("VmHWM"))
        memory["peak"] = max(samples) - start
        memory["kept"] = _resident() - start


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def run(text: str, variant: str, tasks: int) -> dict[str, Any]:
    """`measure` in a fresh process; {"error": last lines} where it fails."""
    command = [sys.executable, __file__, text, "--tasks", str(tasks), "--child", variant]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        return {"error": "\n".join(done.stderr.strip().splitlines()[-4:]) or f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="hatify.convert")
    for column in (
        "model",
        "variant",
        *STEPS,
        "total s",
        "imports MB",
        "model MB",
        "peak / model",
        "kept / model",
        "copies",
        "own memory",
        "weight copies",
    ):
        table.add_column(column, justify="left" if column in ("model", "variant") else "right")
    errors = []
    for text, variants in results.items():
        for variant, row in variants.items():
            if "error" in row:
                table.add_row(text, variant, *["-"] * (len(table.columns) - 3), "failed")
                errors.append(f"{text}, {variant}:\n{row['error']}")
                continue
            size, seconds = row["model_bytes"], row["seconds"]
            steps = [f"{seconds[step]:.2f}" if step in seconds else "-" for step in STEPS]
            keys = ("peak_bytes", "kept_bytes", "new_bytes", "own_bytes", "copied_bytes")
            ratios = [f"{row[key] / size:.3f}" if key in row else "-" for key in keys]
            megabytes = [f"{row[key] / 1e6:.1f}" for key in ("import_bytes", "model_bytes")]
            table.add_row(text, variant, *steps, f"{seconds['total']:.2f}", *megabytes, *ratios)
    console = Console()
    console.width = max(console.width, 180)  # a pipe or a narrow terminal would cut the numbers
    console.print(table)
    for error in errors:
        console.print(escape(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="as in `hatify convert MODEL`")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print bytes and seconds as JSON instead of a table")
    parser.add_argument("--child", choices=(*VARIANTS, STEP), help=argparse.SUPPRESS)
    parser.add_argument("--depths", help="convert vision transformers of so many blocks instead: 3,6,12,24")
    options = parser.parse_args()
    if options.depths:
        curve((int(n) for n in options.depths.split(",")), options.tasks)
        return
    if options.child:
        text, variant = options.models[0], VARIANTS.get(options.child)
        print(json.dumps(measure_step(text, options.tasks) if variant is None else measure(text, options.tasks, **variant)))
        return
    results = {text: {variant: run(text, variant, options.tasks) for variant in (*VARIANTS, STEP)} for text in options.models}
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)
    sys.exit(any("error" in row for variants in results.values() for row in variants.values()))


if __name__ == "__main__":
    main()
