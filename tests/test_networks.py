"""Every hand-written network: parity to the bit in both modes, gradients included, drift 0, and checks that can fail."""

from __future__ import annotations

import pytest
import torch
from controls import assert_checks_can_fail
from networks import NETWORKS

import hatify
from hatify.calling import flatten

EVAL_ONLY = {"layer_drop", "batchnorm_variants"}
"""Train mode branches on a random number, or reads a counter's value: said so, captured in eval mode."""


@pytest.mark.parametrize("name", NETWORKS)
def test_promises_hold(name: str) -> None:
    network = NETWORKS[name]
    model = network.make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hat = hatify.convert(model, 3, example_inputs=network.inputs(2))
    proof = hat.verification
    assert proof.ok
    assert proof.parity == proof.parity_no_grad == proof.drift == 0.0
    expected = (None, None) if name in EVAL_ONLY else (0.0, 0.0)
    assert (proof.parity_train, proof.gradients) == expected
    assert len(proof.batch_sizes) > 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the user's model was changed"
    assert modes == [m.training for m in model.modules()]
    assert [k for k in hat.state_dict() if k in before] == list(before), "keys, or their order, differ from the original's"
    assert_checks_can_fail(hat)


@pytest.mark.parametrize("name", NETWORKS)
def test_at_another_batch_size_against_the_original_itself(name: str) -> None:
    network = NETWORKS[name]
    model = network.make().eval()
    hat = hatify.convert(network.make(), 2, example_inputs=network.inputs(2), verify=False).eval()
    inputs = network.inputs(5)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    torch.manual_seed(0)
    expected = flatten(model(*args, **kwargs))[0]
    torch.manual_seed(0)
    got = flatten(hat(*args, **kwargs))[0]
    assert len(expected) == len(got) and all(torch.equal(a, b) for a, b in zip(expected, got))
