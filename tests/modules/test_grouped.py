"""Grouped products: the operator that stands for the loops of other libraries gives their bits, and extracted networks are plain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (its operators)
from torch import Tensor, nn

import hatify
from hatify.lifecycle.extraction import plain_call
from hatify.modules.grouped import GROUPED_MM

THEIRS = torch.ops.transformers.grouped_mm_fallback
ENDS = {
    "all": [3, 5, 9, 12],
    "an expert without rows": [0, 5, 5, 12],
    "rows without an expert": [2, 4, 4, 9],
    "one row each": [1, 2, 3, 4],
}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", ENDS)
def test_the_same_bits_forward_and_backward(ends: str, dtype: torch.dtype, transposed: bool) -> None:
    weight = torch.randn(4, 9, 7, dtype=dtype) if transposed else torch.randn(4, 7, 9, dtype=dtype)
    x, offs = torch.randn(12, 7, dtype=dtype), torch.tensor(ENDS[ends], dtype=torch.int32)
    found = []
    for product in (GROUPED_MM, THEIRS):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = product(leaves[0], leaves[1].transpose(1, 2) if transposed else leaves[1], offs)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found))
    assert all(bool(a.any()) for a in found[0])


def test_the_gradient_is_right() -> None:
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3, 3, 4)))
    assert torch.autograd.gradcheck(GROUPED_MM, (x, weight, torch.tensor([2, 2, 5])))
    torch.library.opcheck(GROUPED_MM, (x.detach(), weight.detach(), torch.tensor([2, 2, 5])))


class Experts(nn.Module):
    """Each token goes through one of four matrices, by an operator that only transformers has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.router, self.fc2 = nn.Linear(10, 12), nn.Linear(12, 4), nn.Linear(12, 5)
        self.up = nn.Parameter(torch.randn(4, 12, 9) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 9, 12) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.gelu(self.fc1(x))
        weight, expert = self.router(tokens).softmax(-1).max(-1)
        expert, order = torch.sort(expert)
        offs = (expert[:, None] <= torch.arange(4)).sum(0)
        y = THEIRS(F.gelu(THEIRS(tokens[order], self.up, offs)), self.down, offs)
        return self.fc2(tokens + y[torch.argsort(order)] * weight[:, None])


@pytest.mark.parametrize("slim", [False, True])
def test_a_converted_network_needs_no_operator_of_another_library_and_an_extracted_one_none_of_ours(slim: bool) -> None:
    model, x = Experts(), torch.randn(16, 10)
    hat = hatify.convert(model, 2, example_inputs=x)
    assert hat.verification.ok
    targets = {str(n.target) for n in hat.graph.nodes}
    assert str(GROUPED_MM) in targets and not any("transformers" in t for t in targets)
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    with torch.no_grad():
        for masker in hat.maskers.values():
            masker.embeddings[0].copy_(torch.randn(masker.channels))
    with hat.train().learning(0, optimizer, schedule="constant") as run:
        (hat(x).square().mean() + run.regularization()).backward()
        optimizer.step()
    plain = hatify.extract(hat.eval(), 0, slim=slim)
    assert not any("hatify" in str(n.target) or "transformers" in str(n.target) for n in plain.graph.nodes)
    args, kwargs = plain_call(hat, [x])
    torch.testing.assert_close(plain(*args, **kwargs), hat(x, task=0))
    exported = torch.export.export(plain, args, kwargs).module()
    assert torch.equal(exported(*args, **kwargs), plain(*args, **kwargs))
    if slim:
        assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.parameters())
