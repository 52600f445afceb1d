"""Parts of a network in another mode than the whole. A layer follows its own flag; what stands between layers in the graph follows the
network's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

from hatify.errors import CallError
from hatify.rewrite.graph import by_mode
from hatify.rewrite.scope import Scope


def parts_that_ask(network: nn.Module, graphs: Sequence[fx.Graph], room: str) -> dict[str, nn.Module]:
    """The containers whose own code asks for the mode, by path: of one graph those of the operators that are given it, of two all.

    Args:
        room: the name of what the conversion added, which has no code of the original's.
    """
    parts = {
        path: part for path, part in network.named_modules() if path and isinstance(part, Scope) and path.partition(".")[0] != room
    }
    if len(graphs) > 1:
        return parts
    asked = [node for graph in graphs for node in graph.nodes if node.op == "get_attr" and node.target == "training"]
    readers = [user for node in asked for user in node.users]
    readers = [user for reader in readers for user in (reader.users if reader.target is by_mode else (reader,))]
    scopes = {node.meta.get("scope", "") for node in readers}
    return {path: part for path, part in parts.items() if path in scopes}


def check_modes(parts: Mapping[str, nn.Module], training: bool, own: Iterable[str]) -> None:
    """Before a call of a network in train mode (or eval mode). ``own`` are the parts that the original leaves in the other mode.

    Raises:
        CallError: a part is in the other mode, and what it does by mode is in the graph.
    """
    for path, part in parts.items():
        if part.training != training and path not in own:
            mode, other = ("train", "eval") if training else ("eval", "train")
            raise CallError(
                f"{path} is in {other} mode, and the network in {mode} mode",
                where=path,
                why=f"its own code asks for the mode, and there is one answer in the graph: it would run as in {mode} mode",
                fix=f"hat.{mode}(), and then the mode of single layers (dropouts, norms), each of which follows its own",
            )
