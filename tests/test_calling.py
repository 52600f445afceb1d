import copy
import json
import os
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hatify.calling import Signature, Structure, flatten, unflatten
from hatify.errors import CallError

Pair = namedtuple("Pair", "left right")


@dataclass
class Batch:
    image: torch.Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Frozen:
    image: torch.Tensor


def tensors(count):
    return [torch.full((2,), float(i)) for i in range(count)]


a, b, c = tensors(3)

VALUES = [
    a,
    (a,),
    [a, (b, None)],
    {"x": a, "y": [b]},
    OrderedDict(z=a, y=b),
    {3: a, True: b, None: c},
    Pair(a, {"k": b}),
    Batch(a, 2.0),
    Frozen(b),
    torch.max(torch.ones(2, 3), dim=1),
    (None, True, 1, 1.5, "text", torch.float16, torch.device("cpu"), torch.Size([2, 3])),
    (float("inf"), float("nan")),
    (),
    {},
]


def same(left, right):
    mine, structure = flatten(left)
    theirs, other = flatten(right)
    return type(left) is type(right) and structure == other and all(x is y for x, y in zip(mine, theirs))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(flatten(value)[1]))
def test_unflatten_undoes_flatten(value):
    leaves, structure = flatten(value)
    assert structure.leaves == len(leaves)
    assert same(unflatten(leaves, structure), value)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(flatten(value)[1]))
def test_json_keeps_the_structure(value):
    leaves, structure = flatten(value)
    again = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert again == structure
    read = unflatten(leaves, again)
    if (
        type(value).__module__ == __name__
    ):  # a class of the user's own is not looked up by the name in a file: one with its parts stands in
        mine, theirs = vars(value) if hasattr(value, "__dict__") else value._asdict(), read
        assert type(read) is not type(value) and type(read).__name__ == type(value).__name__
        assert all(flatten(getattr(theirs, name))[0] == flatten(part)[0] for name, part in mine.items())
    else:
        assert same(read, value)


def test_transformers_outputs_come_back_with_their_attributes():
    from transformers import modeling_outputs as outputs

    value = outputs.BaseModelOutputWithPooling(last_hidden_state=a, hidden_states=(b, c))
    leaves, structure = flatten(value)
    again = unflatten(leaves, Structure.from_json(structure.to_json()))
    assert again.last_hidden_state is a and again.pooler_output is None
    assert list(again.keys()) == ["last_hidden_state", "hidden_states"]


def test_constants_differ_by_type():
    kinds = [flatten(value)[1] for value in (1, 1.0, True, "1")]
    assert len(set(kinds)) == 4


@pytest.mark.parametrize("bad", [object(), {1, 2}, nn.ReLU(), 1j, slice(1)])
def test_other_values_are_refused_by_place(bad):
    with pytest.raises(CallError) as caught:
        flatten({"batch": [a, bad]}, "inputs")
    assert caught.value.where == "inputs['batch'][1]"


def test_reading_a_structure_imports_no_module_of_the_files_choosing():
    data = {"kind": "dict", "type": "antigravity:Dict", "keys": [], "children": []}
    read = unflatten([], Structure.from_json(data))
    assert "antigravity" not in sys.modules
    assert isinstance(read, dict) and type(read).__name__ == "Dict"
    data["type"] = "os:system"
    read = unflatten([], Structure.from_json(data))
    assert isinstance(read, dict) and type(read) is not os.system


@pytest.mark.parametrize("data", [None, [], {}, {"kind": "set"}, {"kind": "constant", "value": ["code", "1"]}])
def test_broken_json_is_refused(data):
    with pytest.raises(CallError):
        Structure.from_json(data)


# Calls


def plain(x, mask=None, *, scale=1.0):
    pass


def variadic(x, *images, flag=True, **extras):
    pass


CALLS = [
    (plain, (a,), {}),
    (plain, (a, b), {"scale": 2.0}),
    (plain, (), {"mask": b, "x": a}),
    (plain, ({"k": [a, b]},), {"mask": None}),
    (variadic, (a, b, c), {"flag": False, "late": a}),
    (variadic, (a,), {"q": b, "p": {"n": c}}),
]


@pytest.mark.parametrize("forward, args, kwargs", CALLS)
def test_rebuild_gives_the_captured_call(forward, args, kwargs):
    signature, leaves = Signature.from_call(forward, args, kwargs)
    again_args, again_kwargs = signature.rebuild(leaves)
    assert same(again_args, args)
    assert again_kwargs.keys() == kwargs.keys()
    assert all(same(again_kwargs[key], kwargs[key]) for key in kwargs)
    assert len(signature.bind(again_args, again_kwargs)) == len(leaves)


@pytest.mark.parametrize("forward, args, kwargs", CALLS)
def test_names_are_unique_identifiers(forward, args, kwargs):
    signature, leaves = Signature.from_call(forward, args, kwargs)
    assert len(set(signature.names)) == len(signature.names) == len(leaves)
    assert all(name.isidentifier() for name in signature.names)


def test_names_say_what_the_tensor_is():
    signature, _ = Signature.from_call(plain, ({"image": a, "in": (b, c)},), {})
    assert signature.names == ["x_image", "x_in_0", "x_in_1"]
    assert Signature.from_call(variadic, (a, b), {"class": c})[0].names == ["x", "images_0", "class_"]


def test_any_spelling_of_the_same_call_binds_alike():
    signature, leaves = Signature.from_call(plain, (a, b), {})
    spellings = [((a, b), {}), ((a,), {"mask": b}), ((), {"mask": b, "x": a}), ((a, b), {"scale": 1.0})]
    for args, kwargs in spellings:
        assert all(x is y for x, y in zip(signature.bind(args, kwargs), leaves, strict=True))


def test_dict_keys_may_come_in_any_order():
    signature, _ = Signature.from_call(plain, ({"p": a, "q": b},), {})
    assert [id(t) for t in signature.bind(({"q": b, "p": a},), {})] == [id(a), id(b)]
    signature, _ = Signature.from_call(variadic, (a,), {"p": b, "q": c})
    assert [id(t) for t in signature.bind((a,), {"q": c, "p": b})] == [id(a), id(b), id(c)]


def test_an_argument_left_out_takes_its_default():
    signature, _ = Signature.from_call(plain, (a,), {"scale": 1.0, "mask": None})
    assert signature.bind((a,), {}) == [a]


@pytest.mark.parametrize(
    "args, kwargs, place, says",
    [
        ((), {}, "argument x", "missing"),
        ((a,), {}, "argument mask", "captured was tensor"),
        ((a, b), {"scale": 2.0}, "argument scale", "default 1.0"),
        ((a, b), {"scale": 1}, "argument scale", "default 1.0"),
        ((a, b), {"skale": 2.0}, "argument skale", "did you mean 'scale'"),
        ((a, (b,)), {}, "argument mask", "given is (tensor,)"),
        ((a, None), {}, "argument mask", "given is None"),
        ((a, b, c), {}, "forward", "too many positional"),
        ((a,), {"x": a}, "forward", "multiple values"),
    ],
)
def test_other_calls_are_refused_by_argument(args, kwargs, place, says):
    signature, _ = Signature.from_call(plain, (a, b), {})
    with pytest.raises(CallError) as caught:
        signature.bind(args, kwargs)
    assert caught.value.where.startswith(place)
    assert says in str(caught.value)
    assert caught.value.fix


def test_a_tensor_where_the_default_was_captured_is_refused():
    signature, _ = Signature.from_call(plain, (a,), {})
    with pytest.raises(CallError, match="example_inputs"):
        signature.bind((a, b), {})


def test_variadic_arguments_are_refused_by_name():
    signature, _ = Signature.from_call(variadic, (a, b), {"p": c})
    for args, kwargs, place in [
        ((a,), {"p": c}, "argument images"),
        ((a, b, b), {"p": c}, "argument images"),
        ((a, b), {}, "argument p"),
        ((a, b), {"p": c, "q": c}, "argument q"),
    ]:
        with pytest.raises(CallError) as caught:
            signature.bind(args, kwargs)
        assert caught.value.where == place
    bare, _ = Signature.from_call(variadic, (a,), {})
    with pytest.raises(CallError):
        bare.bind((a, b), {})
    with pytest.raises(CallError):
        bare.bind((a,), {"p": c})


def test_the_inner_place_is_named():
    signature, _ = Signature.from_call(plain, ({"p": [a, b]},), {})
    with pytest.raises(CallError) as caught:
        signature.bind(({"p": [a, None]},), {})
    assert caught.value.where == "argument x['p'][1]"


def test_a_call_that_forward_does_not_take_is_no_example():
    with pytest.raises(CallError, match="did you mean 'mask'"):
        Signature.from_call(plain, (a,), {"maks": b})
    with pytest.raises(CallError, match="missing a required argument"):
        Signature.from_call(plain, (), {})


def test_a_signature_copies_with_its_model():
    signature, leaves = Signature.from_call(nn.Linear(2, 2).forward, (a,), {})
    assert copy.deepcopy(signature).bind((a,), {}) == leaves
