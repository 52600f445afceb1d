"""What a converted network costs beside the one it came from: training step, evaluation, memory.

    python benchmarks/overhead.py                             # all models below, one thread
    python benchmarks/overhead.py resnet18@32x32 --threads 2 --rounds 15 --json
    python benchmarks/overhead.py vit_tiny_patch16_224:depth=24@224x2 --measure train,eval --tasks 1,10,100
    python benchmarks/overhead.py resnet18@32x32 --compile    # both compiled
    python benchmarks/overhead.py resnet18@32x32 --profile    # and what the difference is spent on, by operator

A model is timm's name (or ``bert``: a small transformers BERT), arguments of its constructor, image size or tokens, and batch size.

Original and converted run in one process, interleaved round by round, so that a busy machine slows both; a figure is the median of the
rounds' ratios (converted / original), with the quartiles. On Linux glibc gives large tensors' memory back to the system, and which of the
two networks then pays for new pages is chance; so preload jemalloc, as PyTorch's tuning guide recommends, and have it keep what it has:

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1 python benchmarks/overhead.py

A figure of rounds with many page faults says so. Two tasks with random masks, half of the channels live, are finished and
locked before the measured one is trained.

    train       forward, cross entropy, backward, optimizer step (SGD with momentum), regularization included
    decay       the same with AdamW and weight decay, which moves locked weights and is undone every step
    eval        forward with a finished task, no gradients
    none        forward without a task
    memory      highest memory that torch holds during a training step, of each
    tasks       (--tasks 1,10,100) the same for other numbers of tasks
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hatify

MODELS = (
    "resnet50@224x8",
    "resnet18@32x32",
    "vit_small_patch16_224@224x8",
    "convnext_tiny@224x8",
    "swin_tiny_patch4_window7_224@224x8",
    "efficientnet_b0@224x8",
    "densenet121@224x8",
    "mixer_s32_224@224x8",
    "bert@128x8",
)
MEASURES = ("train", "decay", "eval", "none")
CLASSES = 10
MANY_PAGES = 1000


class Classifier(nn.Module):
    """A transformers BERT of four layers with a classifier, ids in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        size = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
        self.bert = BertForSequenceClassification(BertConfig(**size, num_labels=CLASSES))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bert(ids).logits


def build(text: str) -> tuple[nn.Module, torch.Tensor]:
    """The model and the batch that ``name[:key=number,...]@SIZExBATCH`` stands for."""
    model, _, shape = text.partition("@")
    name, _, arguments = model.partition(":")
    size, batch = (int(n) for n in shape.split("x"))
    if name == "bert":
        return Classifier(), torch.randint(0, 30000, (batch, size))
    import timm

    given = {key: int(value) for key, value in (pair.split("=") for pair in arguments.split(",") if pair)}
    return timm.create_model(name, num_classes=CLASSES, **given), torch.randn(batch, 3, size, size)


def prepared(model: nn.Module, inputs: torch.Tensor, tasks: int) -> hatify.HATModel:
    """Converted, with up to two tasks finished."""
    example = None if inputs.dtype.is_floating_point and inputs.shape[-1] == 224 else inputs[:2]
    hat = hatify.convert(model, tasks=tasks, verify=False, example_inputs=example)
    with torch.no_grad():
        for masker in hat.maskers.values():
            for embedding in masker.embeddings:
                embedding.normal_()
    for task in range(min(2, tasks - 1)):
        with hat.learning(task, schedule="constant"):
            pass
    return hat


def clock_of() -> Callable[[], float]:
    """Seconds; of one thread those of the processor, in which other processes do not count."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def ratios(rounds: int, original: Callable[[], None], converted: Callable[[], None]) -> dict[str, float]:
    """Median and quartiles of converted / original over interleaved rounds, after three of warming up, and page faults of each."""

    def spent_by(run: Callable[[], None]) -> tuple[float, int]:
        start, pages = clock(), page_faults()
        run()
        return clock() - start, page_faults() - pages

    clock = clock_of()
    pairs = [(*spent_by(original), *spent_by(converted)) for _ in range(rounds + 3)][3:]
    before, pages_before, after, pages_after = (list(figures) for figures in zip(*pairs))
    low, middle, high = statistics.quantiles((b / a for a, b in zip(before, after)), n=4)
    return {
        "ratio": middle,
        "low": low,
        "high": high,
        "original_ms": 1e3 * statistics.median(before),
        "page_faults": statistics.median(pages_after),
        "page_faults_of_original": statistics.median(pages_before),
    }


def page_faults() -> int:
    """Pages of memory that this process was given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def spent(run: Callable[[], None], times: int = 5) -> dict[str, float]:
    """Milliseconds of a run by operator, that of others called within left out; ``Python and the rest`` is what no operator takes."""
    from torch.profiler import ProfilerActivity, profile

    run()
    clock = clock_of()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = clock()
        for _ in range(times):
            run()
        took = clock() - start
    found = {event.key: event.self_cpu_time_total / 1e3 / times for event in recorded.key_averages()}
    return {**found, "Python and the rest": 1e3 * took / times - sum(found.values())}


def peak_of(step: Callable[[], None]) -> int:
    """Highest memory during a step, above what was there before, as torch's allocator counts it. Bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = highest = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def measure(
    name: str, tasks: int, rounds: int, wanted: Collection[str] = MEASURES, compiled: bool = False, profiled: bool = False
) -> dict[str, Any]:
    """The wanted figures of one model."""
    torch.manual_seed(0)
    model, inputs = build(name)
    hat = prepared(model, inputs, tasks)
    labels = torch.randint(0, CLASSES, (len(inputs),))
    current = min(2, tasks - 1)
    found: dict[str, Any] = {"model": name, "tasks": tasks, "threads": torch.get_num_threads()}

    def compare(key: str, rounds: int, original: Callable[[], None], converted: Callable[[], None]) -> None:
        found[key] = ratios(rounds, original, converted)
        if profiled:
            before, after = spent(original), spent(converted)
            found[key]["more_ms"] = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {**before, **after}}

    def step(network: Callable, optimizer: Any, extra: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            loss = F.cross_entropy(network(inputs), labels) + extra()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    networks = tuple(torch.compile(n, fullgraph=True) for n in (model, hat)) if compiled else (model, hat)
    model.train(), hat.train()
    optimizers = {
        "train": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
        "decay": lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.05),
    }
    for key, make in optimizers.items():
        if key not in wanted:
            continue
        mine = make(hat.parameters())
        run = hat.begin_task(current, mine, steps_per_epoch=1000)
        plain, converted = step(networks[0], make(model.parameters()), lambda: 0.0), step(networks[1], mine, run.regularization)
        compare(key, rounds, plain, converted)
        if key == "train":
            for parameter in (*model.parameters(), *hat.parameters()):
                parameter.grad = None  # freed within the step, they would count or not, as the allocator remembers them
            a, b = peak_of(plain), peak_of(converted)
            found["memory"] = {"ratio": b / a, "original_mb": a / 2**20}
        hat.abandon_task()
    model.eval(), hat.eval()
    calls = {"eval": {"task": 0}, "none": {}}
    with torch.no_grad():
        for key, task in calls.items():
            if key in wanted:
                compare(key, 2 * rounds, lambda: networks[0](inputs), lambda task=task: networks[1](inputs, **task))
    return found


def explain(found: dict[str, Any]) -> None:
    """Prints the operators that a converted model spends most more on, and least; and where memory was on its way."""
    for key in MEASURES:
        pages = [found.get(key, {}).get(name, 0) for name in ("page_faults", "page_faults_of_original")]
        if max(pages) > MANY_PAGES:
            print(f"  {key}: {pages[0]:.0f} page faults a round, {pages[1]:.0f} of the original; see --help", flush=True)
        more = sorted(found.get(key, {}).get("more_ms", {}).items(), key=lambda item: -item[1])
        shown = [f"{name} {ms:+.1f}" for name, ms in (*more[:10], *more[-3:])]
        if shown:
            print(f"  {key}, {found[key]['original_ms']:.0f} ms: " + ", ".join(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=", ".join(MODELS))
    parser.add_argument("--tasks", default="3")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", default=",".join(MEASURES), help="some of " + ", ".join(MEASURES))
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) of both")
    parser.add_argument("--profile", action="store_true", help="milliseconds more or less than the original, by operator")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    wanted = given.measure.split(",")
    torch.set_num_threads(given.threads)
    if not given.json:
        print(f"{'model':36} tasks  train              decay              eval               none               memory")
    for name in given.models:
        for tasks in (int(t) for t in given.tasks.split(",")):
            found = measure(name, tasks, given.rounds, wanted, given.compile, given.profile)
            if given.json:
                print(json.dumps(found), flush=True)
                continue
            cells = [
                f"{found[k]['ratio']:.3f} ({found[k]['low']:.3f}-{found[k]['high']:.3f})" if k in found else f"{'-':19}"
                for k in MEASURES
            ]
            cells.append(f"{found['memory']['ratio']:.3f}" if "memory" in found else "-")
            print(f"{name:36} {tasks:5}  " + "  ".join(cells), flush=True)
            explain(found)


if __name__ == "__main__":
    main()
