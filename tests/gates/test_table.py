"""The algebra's laws: expressions that mean the same are the same integer, and integers mean what max and min say."""

from __future__ import annotations

import torch
from expressions import SIZES, atoms, build, direct, gated, random_masks, trees, value
from hypothesis import given, settings
from hypothesis import strategies as st

from hatify.gates import CONST, TOP, GateTable
from hatify.gates.rules import RULES
from hatify.gates.table import MAX_ATOMS, MAX_ATOMS_MIXED

operators = st.sampled_from(["or", "and"])
seeds = st.integers(0, 50)
settings.register_profile("laws", max_examples=150, deadline=None, derandomize=True)
settings.load_profile("laws")


def other(op: str) -> str:
    return "and" if op == "or" else "or"


@given(trees, seeds, st.booleans())
def test_an_expression_is_worth_max_and_min_of_its_masks(tree, seed: int, binary: bool) -> None:
    table, masks = GateTable(), random_masks(seed, binary)
    expected = direct(tree, masks)
    got = value(table, torch.tensor([build(table, tree)]), masks)
    assert got.tolist() == [1.0 if expected is None else expected]


def test_or_and_and_are_told_apart() -> None:
    table, masks = GateTable(), {"a": torch.tensor([0.0, 1.0, 0.0]), "b": torch.ones(4)}
    zero, one = build(table, ("atom", "a", 0)), build(table, ("atom", "a", 1))
    either, both = table.pair("or", zero, one), table.pair("and", zero, one)
    assert value(table, torch.tensor([either, both]), masks).tolist() == [1.0, 0.0]


@given(operators, trees, trees, trees)
def test_associative(op: str, a, b, c) -> None:
    table = GateTable()
    x, y, z = (build(table, t) for t in (a, b, c))
    assert table.pair(op, x, table.pair(op, y, z)) == table.pair(op, table.pair(op, x, y), z)


@given(operators, trees, trees)
def test_commutative_and_idempotent(op: str, a, b) -> None:
    table = GateTable()
    x, y = build(table, a), build(table, b)
    assert table.pair(op, x, y) == table.pair(op, y, x)
    assert table.pair(op, x, x) == x
    assert table.pair(op, x, table.pair(op, x, y)) == table.pair(op, x, y)


@given(operators, atoms, gated)
def test_absorption_of_an_atom_is_seen(op: str, a, b) -> None:
    table = GateTable()
    x, y = build(table, a), build(table, b)
    assert table.pair(op, x, table.pair(other(op), x, y)) == x


@given(operators, gated, gated, seeds)
def test_absorption_of_anything_holds_in_value(op: str, a, b, seed: int) -> None:
    table, masks = GateTable(), random_masks(seed)
    x, y = build(table, a), build(table, b)
    absorbed = table.pair(op, x, table.pair(other(op), x, y))
    assert torch.equal(value(table, torch.tensor([absorbed]), masks), value(table, torch.tensor([x]), masks))


@given(operators, trees)
def test_const_takes_on_the_other_gate(op: str, a) -> None:
    table = GateTable()
    x = build(table, a)
    assert table.pair(op, CONST, x) == table.pair(op, x, CONST) == x


@given(trees)
def test_top_absorbs_a_sum_and_is_neutral_in_a_product(a) -> None:
    table = GateTable()
    x = build(table, a)
    assert table.pair("or", TOP, x) == TOP
    assert table.pair("and", TOP, x) == (TOP if x == CONST else x)


@given(operators, st.lists(gated, min_size=1, max_size=5))
def test_join_all_is_a_fold_in_any_order(op: str, several) -> None:
    table = GateTable()
    ids = [build(table, t) for t in several]
    assert table.join_all(op, ids) == table.join_all(op, ids[::-1]) == table.join_all(op, [*ids, CONST])


def test_join_all_of_nothing_is_const() -> None:
    assert GateTable().join_all("or", []) == CONST


@given(operators, st.lists(trees, min_size=3, max_size=3), st.lists(trees, min_size=2, max_size=2))
def test_combine_broadcasts_pair(op: str, rows, columns) -> None:
    table = GateTable()
    a = torch.tensor([build(table, t) for t in rows]).reshape(3, 1)
    b = torch.tensor([build(table, t) for t in columns]).reshape(1, 1, 2)
    got = table.combine(op, a, b)
    assert got.shape == (1, 3, 2) and got.dtype == torch.int64
    expected = [[table.pair(op, int(x), int(y)) for y in b.flatten()] for x in a.flatten()]
    assert got[0].tolist() == expected


@given(operators, st.lists(trees, min_size=4, max_size=6), st.lists(trees, min_size=4, max_size=6))
def test_combine_makes_the_expressions_that_pair_makes_in_its_order(op: str, left, right) -> None:
    whole, single = GateTable(), GateTable()
    sides = []
    for table in (whole, single):
        sides.append([torch.tensor([build(table, t) for t in side]) for side in (left, right)])
    (a, b), (c, d) = sides
    got = whole.combine(op, a[:, None], b[None])
    pairs = sorted({(x, y) for x in c.tolist() for y in d.tolist()})
    made = {pair: single.pair(op, *pair) for pair in pairs}
    assert got.tolist() == [[made[x, y] for y in d.tolist()] for x in c.tolist()]
    assert whole.keys == single.keys and whole.parts == single.parts


@given(trees)
def test_the_atoms_of_an_expression_are_those_of_its_parts(tree) -> None:
    table = GateTable()
    build(table, tree)
    for gate, (key, parts) in enumerate(zip(table.keys, table.parts)):
        expected = {key[1:]} if key[0] == "atom" else set() if parts is None else set().union(*map(table.atoms_in, parts))
        assert table.atoms_in(gate) == expected


@given(st.lists(gated, min_size=1, max_size=12), seeds)
def test_bounds_are_no_smaller_than_the_or(several, seed: int) -> None:
    table, masks = GateTable(), random_masks(seed)
    ids = [build(table, t) for t in several]
    highest = max(direct(t, masks) for t in several)
    for bound in (table.bounded_or(ids), table.common(ids)):
        assert value(table, torch.tensor([bound]), masks).item() >= highest


@given(st.lists(gated, min_size=1, max_size=MAX_ATOMS_MIXED))
def test_a_small_or_is_exact(several) -> None:
    table = GateTable()
    ids = [build(table, t) for t in several]
    assert table.bounded_or(ids) == table.join_all("or", ids)


def test_a_large_or_keeps_what_all_have_in_common() -> None:
    table = GateTable()
    shared = int(table.atoms("a", 1)[0])
    channels = table.atoms("b", MAX_ATOMS_MIXED + 1)
    ids = table.combine("and", channels, torch.tensor([shared])).tolist()
    assert table.bounded_or(ids) == shared
    assert table.bounded_or(channels.tolist()) == TOP
    assert table.common([*ids, TOP]) == TOP


@given(st.lists(st.lists(st.one_of(gated, st.just(("const",))), min_size=3, max_size=3), min_size=1, max_size=6))
def test_along_a_dimension_each_line_is_joined(rows) -> None:
    table = GateTable()
    ids = torch.tensor([[build(table, t) for t in row] for row in rows])
    assert torch.equal(table.or_along(ids, 1), torch.tensor([[table.join_all("or", row)] for row in ids.tolist()]))
    assert torch.equal(table.or_along(ids, 0), torch.tensor([[table.join_all("or", column) for column in ids.T.tolist()]]))
    assert torch.equal(table.common_along(ids, 1), torch.tensor([[table.common(row)] for row in ids.tolist()]))


def test_along_a_dimension_too_many_atoms_leave_what_all_have_in_common() -> None:
    table = GateTable()
    shared, many = table.atoms("a", 2)[:, None], table.atoms("b", MAX_ATOMS)
    ids = torch.cat([table.combine("and", shared, many), torch.full((2, 1), CONST)], 1)  # a position that nobody reads says nothing
    assert torch.equal(table.or_along(ids, 1), shared)
    assert table.or_along(many[None], 1).item() == table.join_all("or", many.tolist())


def test_size_limits_depend_on_how_many_dimensions_vary() -> None:
    table = GateTable()
    wide = table.join_all("or", table.atoms("a", MAX_ATOMS + 1).tolist())
    mixed = table.join_all("or", table.atoms("b", MAX_ATOMS_MIXED + 1).tolist())
    assert table.too_large(torch.tensor([[wide]]))
    assert not table.too_large(torch.tensor([[mixed, TOP]]))
    assert table.too_large(torch.tensor([[mixed, TOP], [TOP, TOP]]))


def test_atoms_that_stand_in_an_expression_twice_count_once() -> None:
    table = GateTable()
    a, b = (table.join_all("or", table.atoms(name, MAX_ATOMS // 2).tolist()) for name in "ab")
    c = table.join_all("or", table.atoms("c", 1).tolist())
    nested = table.pair("and", table.pair("or", table.pair("and", a, b), c), table.pair("or", a, c))
    assert len(table.atoms_in(nested)) == MAX_ATOMS + 1 and table.too_large(torch.tensor([nested]))
    small = table.pair("and", table.pair("or", table.pair("and", a, c), b), a)
    assert len(table.atoms_in(small)) == MAX_ATOMS + 1 and table.too_large(torch.tensor([small]))
    twice = table.pair("or", table.pair("and", a, c), table.pair("and", a, int(table.atoms("d", 1))))
    assert len(table.atoms_in(twice)) == MAX_ATOMS // 2 + 2 and not table.too_large(torch.tensor([twice]))


def test_an_expression_that_reads_another_one_twice_again_and_again_is_no_larger_for_it() -> None:
    table = GateTable()
    steps = 70
    gate = int(table.atoms("start", 1))
    for a, b in zip(table.atoms("a", steps).tolist(), table.atoms("b", steps).tolist()):
        gate = table.pair("or", table.pair("and", gate, a), table.pair("and", gate, b))  # counted twice: 2**70 in the end
    assert len(table.atoms_in(gate)) == 2 * steps + 1 and not table.too_large(torch.tensor([gate]))
    wide = table.join_all("or", [gate, *table.atoms("c", MAX_ATOMS - 2 * steps).tolist()])
    assert len(table.atoms_in(wide)) == MAX_ATOMS + 1 and table.too_large(torch.tensor([wide]))


def test_atoms_are_interned_once() -> None:
    table = GateTable()
    first = table.atoms("a", 3)
    assert torch.equal(first, table.atoms("a", 3))
    assert torch.equal(first, table.atoms("a", 5)[:3])
    assert not set(first.tolist()) & set(table.atoms("b", 3).tolist())


def test_maskers_of_an_expression() -> None:
    table = GateTable()
    a, b = table.atoms("a", 3), table.atoms("b", 3)
    assert table.maskers(table.combine("or", a, b)) == ["a", "b"]
    assert table.maskers(torch.tensor([CONST, TOP])) == []


def test_describe_gathers_channels_into_ranges() -> None:
    table = GateTable()
    a, b = table.atoms("conv1", 8), table.atoms("conv3", 8)
    assert table.describe(a) == "conv1[0:8]"
    assert table.describe(table.combine("or", a, b)) == "conv1[0:8] | conv3[0:8]"
    assert table.describe(torch.tensor([TOP])) == "TOP"
    assert table.describe(torch.cat([a[:4], torch.tensor([CONST]), b[2:5]])) == "conv1[0:4], CONST, conv3[2:5]"
    assert table.describe(a.repeat_interleave(3)) == "conv1[0:8]"
    nested = table.combine("and", table.combine("or", a, b), table.atoms("gate", 8))
    assert table.describe(nested) == "(conv1[0:8] | conv3[0:8]) & gate[0:8]"


def test_describe_cuts_long_lists() -> None:
    table = GateTable()
    text = table.describe(table.atoms("conv", 20)[::2])
    assert text.endswith("…") and text.count("conv") == 4


def test_sizes_of_the_random_expressions_match_their_tables() -> None:
    assert all(len(mask) == SIZES[name] for name, mask in random_masks(0).items())


def test_every_rule_is_of_an_operator_that_exists() -> None:
    operators = {schema.name.partition("::")[2].partition(".")[0] for schema in torch._C._jit_get_all_schemas()}
    rooms = (torch, torch.nn.functional, torch.Tensor)
    assert RULES.rules
    assert [name for name in RULES.rules if name not in operators and not any(hasattr(room, name) for room in rooms)] == []
