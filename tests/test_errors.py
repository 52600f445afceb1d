import copy
import pickle

import pytest

from hatify import errors
from hatify.errors import HatifyError


def test_a_full_error_has_four_lines_in_reading_order():
    error = HatifyError("it broke", where="layer1.0.conv1", why="no rule", fix="hatify.register(MyConv)")
    assert str(error).splitlines() == [
        "it broke",
        "  where: layer1.0.conv1",
        "  why:   no rule",
        "  fix:   hatify.register(MyConv)",
    ]


def test_absent_parts_take_no_line():
    assert str(HatifyError("it broke")) == "it broke"
    assert str(HatifyError("it broke", fix="mend it")).splitlines() == ["it broke", "  fix:   mend it"]


def test_several_lines_stay_under_their_label():
    lines = str(HatifyError("it broke", fix="one\ntwo")).splitlines()
    assert lines[1].index("one") == lines[2].index("two")


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_a_hatify_error_and_survives_copy_and_pickle(name):
    cls = getattr(errors, name)
    assert issubclass(cls, HatifyError)
    error = cls("it broke", where="here", why="because", fix="mend it")
    for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is cls
        assert str(again) == str(error)


def test_a_place_loses_the_folder_of_its_library_and_no_bracket():
    told = "in f (/home/a b/venv/lib/python3.11/site-packages/lib/model.py:3 in forward)"
    assert errors.without_place("cannot be traced (/v/lib/site-packages/lib/model.py:3)") == "cannot be traced (lib/model.py:3)"
    assert errors.without_place(told).endswith("lib/model.py:3 in forward)") and "site-packages" not in errors.without_place(told)
