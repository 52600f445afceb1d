"""Stopping in the middle of a task and going on later, with the same bits as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hatify.errors import TaskError
from hatify.learning.free import FreeWeights
from hatify.learning.network import network_of
from hatify.learning.protection import Protection

if TYPE_CHECKING:
    from hatify.learning.session import Learning


def state_of(run: Learning) -> dict[str, Any]:
    """What it takes, beside the network's and the optimizer's state, to go on: plain data and tensors."""
    return {
        "task": run.task,
        "step": run.step,
        "skipped": run.skipped,
        "finished": sorted(network_of(run.network).finished),
        "locking": sorted(run.locking),
        "retraining": run.retraining,
        "old": run.guard.protection.state() if run.retraining else {},
        "free": None if run.guard.free is None else run.guard.free.state(),
        "statistics": run.statistics.state(),
    }


def resume(run: Learning, state: Mapping[str, Any]) -> None:
    """Puts a session that has just begun where ``state`` was taken.

    Raises:
        TaskError: it is another task's, or the network is in another state.
    """
    network = network_of(run.network)
    finished = network.finished
    if state["task"] != run.task:
        raise TaskError(f"the state is of task {state['task']}, the session of task {run.task}", fix=f"task={state['task']}")
    if set(state["finished"]) != finished:
        raise TaskError(
            f"the state was taken with the tasks {state['finished']} finished; here it is {sorted(finished)}",
            fix="load the network's state before the session begins",
        )
    run.step, run.locking, run.retraining = state["step"], set(state["locking"]), state["retraining"]
    run.skipped_before = run.guard.steps.skipped - state["skipped"]
    if run.retraining:
        run.guard.resume(Protection.resumed(network, state["old"], finished))
        run.guard.narrow(run.locking, finished)
    else:
        run.guard.refresh()
    run.guard.free = None if state["free"] is None else FreeWeights.resumed(network, state["free"])
    run.give_back = run.guard.free is not None
    run.statistics.resume(state["statistics"])
