"""What an extracted task costs: parameters, operations and latency of the slim network against the original.

    python benchmarks/extract.py                            # resnet50 and vit_base_patch16_224 at 25, 50 and 75 % live channels
    python benchmarks/extract.py resnet18 --live 0.5 --threads 2 --json

Every masker keeps a random share of its channels (drawn anew per layer, so a residual stream keeps nearly all of its channels: the
hard case). Latency is the median of interleaved runs in one process: original, slim, original, slim, ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

MODELS = ("resnet50", "vit_base_patch16_224")


def finish(hat: Any, task: int, live: float, seed: int = 0) -> None:
    """The task is finished with exactly a share ``live`` of every layer's channels."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for masker in hat.maskers.values():
            order = torch.randperm(masker.channels, generator=generator)
            embedding = torch.full((masker.channels,), -1.0)
            embedding[order[: max(1, round(live * masker.channels))]] = 1.0
            masker.embeddings[task].copy_(embedding)
            masker.finished.add(task)
    hat.finished_tasks.add(task)


def measure(text: str, shares: list[float], batch: int, runs: int) -> list[dict[str, Any]]:
    """One row per share of live channels."""
    import torch

    import hatify
    from hatify.sources import parse_source

    torch.manual_seed(0)
    model = parse_source(text).build().eval()
    hat = hatify.convert(model, tasks=len(shares), verify=False).eval()
    (example,), _ = hat.example_inputs
    x = torch.randn(batch, *example.shape[1:])
    rows = []
    for task, live in enumerate(shares):
        finish(hat, task, live, seed=task)
        start = time.perf_counter()
        slim = hatify.extract(hat, task, slim=True)
        seconds = time.perf_counter() - start
        before, after = latencies(model, slim, x, runs)
        told = slim.extraction
        rows.append(
            {
                "model": text,
                "live": live,
                "parameters": told["parameters"]["after"] / count(model),
                "flops": flops(slim, x) / flops(model, x),
                "original_ms": 1e3 * before,
                "slim_ms": 1e3 * after,
                "speedup": before / after,
                "difference": told["difference"],
                "whole": len(told["whole"]),
                "extract_seconds": seconds,
            }
        )
    return rows


def count(model: Any) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def flops(model: Any, x: Any) -> int:
    """Floating-point operations of one forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def latencies(first: Any, second: Any, x: Any, runs: int) -> tuple[float, float]:
    """Median seconds of both, run in turns."""
    import torch

    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for number in range(runs + 2):
            for held, model in zip(seconds, (first, second)):
                start = time.perf_counter()
                model(x)
                if number >= 2:  # the first runs warm up
                    held.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="as in `hatify convert MODEL`")
    parser.add_argument("--live", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    rows = [row for text in options.models for row in measure(text, options.live, options.batch, options.runs)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("model                  live  parameters  flops  original      slim  speedup  difference")
    for r in rows:
        print(
            f"{r['model']:<22} {r['live']:4.0%} {r['parameters']:11.2f} {r['flops']:6.2f} {r['original_ms']:7.1f}ms {r['slim_ms']:7.1f}ms "
            f"{r['speedup']:7.2f}x {r['difference']:11.1e}"
        )


if __name__ == "__main__":
    main()
