"""Single arguments: which values pass, what is returned, and what an error says."""

from fractions import Fraction

import numpy as np
import pytest

from lightning_gcfreeze import _checks


@pytest.mark.parametrize("value", [2, 7, np.int64(7)], ids=repr)
def test_integer_in_range_is_returned_as_an_int_of_python(value):
    """Also if it is an integer of NumPy: checkpoints have only ints of Python."""
    checked = _checks.integer("t0", value, at_least=2)
    assert type(checked) is int
    assert checked == value


@pytest.mark.parametrize("value", [True, 3.0, "3", None, np.float64(3)], ids=repr)
def test_value_that_is_no_integer_is_refused(value):
    """A bool, a whole float and a string that looks like a number are no integers; the error names the type."""
    with pytest.raises(TypeError, match=rf"`t0` must be an int of at least 1, got .* \({type(value).__name__}\)\."):
        _checks.integer("t0", value, at_least=1)


@pytest.mark.parametrize("value", [0, -5])
def test_integer_below_the_bound_is_refused(value):
    """The error names the argument, the bound and the value."""
    with pytest.raises(ValueError, match=rf"`every` must be at least 1, got {value}\."):
        _checks.integer("every", value, at_least=1)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0, int),
        (10**12, int),
        (np.int32(3), int),
        (0.0, float),
        (1.0, float),
        (np.float32(0.5), float),
        (Fraction(1, 4), float),
    ],
    ids=repr,
)
def test_count_is_returned_as_an_int_and_fraction_as_a_float(value, kind):
    """1 is one element and 1.0 all of them, so the kind must survive the check."""
    checked = _checks.count_or_fraction("k", value)
    assert type(checked) is kind
    assert checked == value


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [1]], ids=repr)
def test_value_that_is_neither_count_nor_fraction_is_refused(value):
    """The error says what both forms mean."""
    with pytest.raises(TypeError, match=r"`k` must be an int \(a count .*\) or a float in \[0, 1\] \(a fraction"):
        _checks.count_or_fraction("k", value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1, r"counts elements, so it must be at least 0, got -1"),
        (-0.1, r"must lie in \[0, 1\], got -0\.1\. A count is given as an int"),
        (1.5, r"must lie in \[0, 1\], got 1\.5\. A count is given as an int"),
        (100.0, r"got 100\.0\. A count is given as an int"),
        (float("nan"), r"must lie in \[0, 1\], got nan"),
        (float("inf"), r"must lie in \[0, 1\], got inf"),
    ],
)
def test_count_or_fraction_out_of_range_is_refused(value, text):
    """A float above 1 was probably meant as a count: the error says how to give one."""
    with pytest.raises(ValueError, match=text):
        _checks.count_or_fraction("k", value)


def test_allowed_name_passes():
    """It is returned as it is."""
    assert _checks.one_of("hold", "restore", ["restore", "compact"]) == "restore"


@pytest.mark.parametrize("value", ["Restore", "", None, 3, ["restore"]], ids=repr)
def test_name_that_is_not_allowed_is_refused_with_the_allowed_names(value):
    """The error lists every allowed name; an unhashable value gets it too."""
    with pytest.raises(ValueError, match=r"`hold` must be one of 'restore', 'compact', got"):
        _checks.one_of("hold", value, ["restore", "compact"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("*.weight", ("*.weight",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())],
    ids=repr,
)
def test_patterns_are_returned_as_a_tuple(value, expected):
    """One string is one pattern; no patterns are not the same as None."""
    assert _checks.patterns("include", value) == expected


@pytest.mark.parametrize("value", [3, [1, 2], {"a": 1}, ["a", None], b"a"], ids=repr)
def test_value_that_is_no_pattern_is_refused(value):
    """The error shows the value."""
    with pytest.raises(TypeError, match=r"`exclude` must be a parameter-name pattern or a list of them, got"):
        _checks.patterns("exclude", value)
