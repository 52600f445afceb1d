"""Programs over gate vectors: each element is worth its own expression, and equal parts are computed once."""

from __future__ import annotations

import torch
from expressions import SIZES, build, direct, random_masks, trees, value
from hypothesis import given, settings
from hypothesis import strategies as st

from hatify.gates import TOP, GateTable, Program, compile_gates, evaluate

laws = settings(max_examples=120, deadline=None, derandomize=True)


def nodes(program: Program) -> list[Program]:
    """All steps of a program, each object once."""
    found: dict[int, Program] = {}
    stack = [program]
    while stack:
        at = stack.pop()
        if id(at) not in found:
            found[id(at)] = at
            stack.extend(at.parts)
    return list(found.values())


@laws
@given(st.lists(trees, min_size=1, max_size=12), st.integers(0, 50), st.booleans())
def test_a_vector_is_worth_its_elements(several, seed: int, binary: bool) -> None:
    table, masks = GateTable(), random_masks(seed, binary)
    expected = [direct(t, masks) for t in several]
    got = value(table, torch.tensor([build(table, t) for t in several]), masks)
    assert got.tolist() == [1.0 if e is None else e for e in expected]
    assert got.dtype == torch.float32


@laws
@given(st.lists(trees, min_size=12, max_size=12), st.integers(0, 50))
def test_ids_are_read_in_row_major_order(several, seed: int) -> None:
    table, masks = GateTable(), random_masks(seed)
    ids = torch.tensor([build(table, t) for t in several])
    flat = value(table, ids, masks)
    assert torch.equal(value(table, ids.view(3, 4), masks).flatten(), flat)
    assert torch.equal(value(table, ids.view(3, 4).t(), masks), flat.view(3, 4).t())


@laws
@given(st.lists(trees, min_size=1, max_size=8))
def test_a_program_reads_the_maskers_that_its_gates_name(several) -> None:
    table = GateTable()
    ids = torch.tensor([build(table, t) for t in several])
    assert sorted(compile_gates(table, SIZES)(ids).maskers()) == table.maskers(ids)


def test_equal_vectors_give_the_same_program() -> None:
    table = GateTable()
    program = compile_gates(table, SIZES)
    a = table.atoms("a", 3)
    assert program(a) is program(a.clone().view(1, 3, 1))
    assert program(a) is not program(a.flip(0))


def test_a_residual_stream_shares_its_parts() -> None:
    """Depth adds one OR per block: without sharing, the k-th sum would hold all sums before it again."""
    table, depth = GateTable(), 12
    sizes = {f"block{k}": 4 for k in range(depth)}
    stream, sums = table.atoms("block0", 4), []
    for k in range(1, depth):
        stream = table.combine("or", stream, table.atoms(f"block{k}", 4))
        sums.append(stream)
    program = compile_gates(table, sizes)
    programs = [program(s) for s in sums]
    assert len({id(n) for p in programs for n in nodes(p)}) == depth + len(sums)


def test_a_memo_computes_shared_parts_once() -> None:
    table = GateTable()
    a, b = table.atoms("a", 3), table.atoms("b", 4)[:3]
    both = table.combine("or", a, b)
    program, reads, memo = compile_gates(table, SIZES), [], {}

    def mask_of(name: str) -> torch.Tensor:
        reads.append(name)
        return torch.rand(SIZES[name])

    first = evaluate(program(both), mask_of, memo)
    assert evaluate(program(both), mask_of, memo) is first
    evaluate(program(table.combine("and", both, table.atoms("b", 4)[1:])), mask_of, memo)
    assert reads.count("a") == 1


def test_another_memo_sees_changed_masks() -> None:
    table = GateTable()
    program = compile_gates(table, SIZES)(table.atoms("a", 3))
    assert evaluate(program, lambda _: torch.zeros(3), {}).tolist() == [0.0] * 3
    assert evaluate(program, lambda _: torch.ones(3), {}).tolist() == [1.0] * 3


def test_all_channels_in_order_need_no_gather() -> None:
    table = GateTable()
    program = compile_gates(table, SIZES)
    a, mask = table.atoms("a", 3), torch.rand(3)
    assert program(a).index is None and evaluate(program(a), lambda _: mask, {}) is mask
    assert program(a[:2]).index == (0, 1)  # the first channels of a larger masker are not all of it
    assert evaluate(program(a[:2]), lambda _: mask, {}).tolist() == mask[:2].tolist()


def test_gradients_go_to_the_masks_that_decide() -> None:
    """max and min pass the gradient to the deciding side alone; what decides nothing gets exact zeros."""
    table = GateTable()
    a = torch.tensor([0.2, 0.9, 0.4], requires_grad=True)
    b = torch.tensor([0.5, 0.1, 0.6, 0.0], requires_grad=True)
    ids = table.combine("or", table.atoms("a", 3), table.atoms("b", 4)[:3])
    evaluate(compile_gates(table, SIZES)(ids), {"a": a, "b": b}.__getitem__, {}).sum().backward()
    assert a.grad.tolist() == [0.0, 1.0, 0.0]
    assert b.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_top_alone_reads_no_masker() -> None:
    table = GateTable()
    program = compile_gates(table, SIZES)(torch.tensor([[TOP], [0]]))
    assert program.maskers() == set()
    assert evaluate(program, {}.__getitem__, {}).tolist() == [1.0, 1.0]
