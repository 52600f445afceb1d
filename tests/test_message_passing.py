"""Graph networks: messages along edges are added up at nodes, channel by channel."""

from __future__ import annotations

import pytest
import torch
from tasks import draw_masks, finish, same
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.gates.rules import RULES
from hatify.verification import measure_drift


class Graph(nn.Module):
    """Two rounds of messages; ``how`` the sums are written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.enter, self.message, self.update = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head, self.how = nn.Linear(12, 3), how

    def summed(self, nodes: Tensor, messages: Tensor, into: Tensor) -> Tensor:
        if self.how == "index_add to zeros":
            return torch.zeros_like(nodes).index_add(0, into, messages)
        if self.how == "index_add_ to nodes":
            return nodes.clone().index_add_(0, into, messages, alpha=0.5)
        if self.how == "transposed":
            return torch.zeros_like(nodes).t().index_add(1, into, messages.t()).t()
        return torch.zeros_like(nodes).scatter_add(0, into.unsqueeze(1).expand_as(messages), messages)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        nodes = torch.tanh(self.enter(x))
        for _ in range(2):
            messages = torch.relu(self.message(nodes[edges[0]]))
            nodes = torch.tanh(self.update(self.summed(nodes, messages, edges[1])) + 0.1)
        return self.head(nodes)


HOWS = ("index_add to zeros", "index_add_ to nodes", "transposed", "scatter_add")


def converted(how: str) -> tuple[HATModel, Graph, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, inputs = Graph(how), (torch.randn(7, 5), torch.randint(0, 7, (2, 20)))
    return hatify.convert(model, tasks=2, example_inputs=inputs), model, inputs


@pytest.mark.parametrize("how", HOWS)
def test_channels_keep_their_gates(how: str) -> None:
    hat, model, inputs = converted(how)
    assert not hat.report.unknown_operators
    other = torch.randn(11, 5), torch.randint(0, 11, (2, 9))
    assert same(hat(*other), model(*other))
    draw_masks(hat)
    finish(hat, 0)
    live = {name: hat.maskers[name].live(0) for name in hat.maskers}
    lock = hat.locks([0])["update.weight"]
    columns = live["message"] | live["enter"] | live["update"] if "nodes" in how else live["message"]
    assert torch.equal(lock, live["update"][:, None] & columns[None]), "no more is locked than a task reads"
    plain = hatify.extract(hat, 0, slim=True)
    assert torch.allclose(plain(*other), hat.eval()(*other, task=0), atol=1e-5)


@pytest.mark.parametrize("how", HOWS)
def test_each_lock_is_needed(how: str) -> None:
    hat, _, _ = converted(how)
    for name in ("enter.weight", "message.weight", "update.weight"):
        assert measure_drift(hat, without_locks=[name])[0] > 0


@pytest.mark.parametrize("how", ["index_add to zeros", "scatter_add"])
def test_without_the_rule_all_channels_count(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("index_add", "scatter_add"):
        monkeypatch.delitem(RULES.rules, name)
    hat, _, _ = converted(how)
    assert hat.report.unknown_operators
    draw_masks(hat)
    finish(hat, 0)
    assert bool(hat.locks([0])["update.weight"].any(0).all())


def test_sums_across_channels_count_all_of_them() -> None:
    class Across(nn.Module):
        """Channels are added to one another as data says: none keeps its gate."""

        def __init__(self) -> None:
            super().__init__()
            self.enter, self.update, self.head = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor, to: Tensor) -> Tensor:
            h = torch.tanh(self.enter(x))
            return self.head(self.update(torch.zeros_like(h).index_add(1, to, h)))

    torch.manual_seed(0)
    hat = hatify.convert(Across(), tasks=2, example_inputs=(torch.randn(4, 5), torch.randint(0, 12, (12,))))
    draw_masks(hat)
    finish(hat, 0)
    assert not bool(hat.maskers["enter"].live(0).all())
    assert bool(hat.locks([0])["update.weight"].any(0).all())
