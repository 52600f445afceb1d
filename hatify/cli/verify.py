"""``hatify verify``: the proof, run again on a saved model."""

from __future__ import annotations

import json

import typer

from .failures import FAILED, failures
from .saved import DebugOption, DirArgument, FactoryOption, JsonOption, load_saved
from .steps import working

__all__ = ["verify"]


def verify(directory: DirArgument, factory: FactoryOption = None, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Prove parity and zero drift for the model in DIR, as it is now.

    Exit code 1 if a promise does not hold. DIR is not changed.
    """
    with failures(debug):
        with working(debug) as steps:
            hat = load_saved(steps, directory, factory)
            steps("verify")
            from .. import verify as prove

            proof = prove(hat)
        if as_json:
            typer.echo(json.dumps(proof.to_dict(), indent=2, default=str))
        else:
            from .render import print_proof

            print_proof(proof)
        if not proof.ok:
            raise typer.Exit(FAILED)
