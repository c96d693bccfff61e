"""What the arguments that `Settled` and `Growth` have replaced become."""

import pytest

from lightning_gcfreeze import Growth, Settled
from lightning_gcfreeze.planning.deprecated import from_deprecated


@pytest.mark.parametrize(
    ("given", "expected", "warning"),
    [
        (("auto", 0.5, 9, None, None), (Settled(max_t0=9), 0.5), r"`max_t0` .*use `t0=Settled\(max_t0=9\)`"),
        ((5, "auto", None, 0.1, None), (5, Growth(0.1)), r"use `k=Growth\(max_loss_increase=0.1\)`"),
        ((5, "auto", None, None, "v"), (5, Growth(monitor="v")), r"use `k=Growth\(monitor='v'\)`"),
        ((5, "auto", None, 0.1, "v"), (5, Growth(0.1, "v")), r"Growth\(max_loss_increase=0.1, monitor='v'\)`"),
    ],
)
def test_deprecated_arguments_warn_with_their_replacement(given, expected, warning):
    with pytest.warns(DeprecationWarning, match=warning):
        assert from_deprecated(*given) == expected


def test_arguments_without_deprecated_ones_stay_as_they_are():
    for t0, k in (("auto", "auto"), (5, 0.5), (None, None), (Settled(), Growth())):
        assert from_deprecated(t0, k, None, None, None) == (t0, k)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((5, 0.5, 9, None, None), ValueError, r"`max_t0=9` needs `t0='auto'`, got t0=5.*Settled\(max_t0=9\)"),
        ((Settled(), 0.5, 9, None, None), ValueError, "`max_t0=9` needs `t0='auto'`, got t0=Settled"),
        ((None, None, 9, None, None), ValueError, "`max_t0=9` needs `t0='auto'`, got t0=None"),
        ((5, 0.5, None, None, "v"), ValueError, r"`monitor='v'` needs `k='auto'`, got k=0.5.*Growth\(monitor='v'\)"),
        ((5, 9, None, 0.1, "v"), ValueError, "`max_loss_increase=0.1` and `monitor='v'` needs `k='auto'`, got k=9"),
        (("auto", 0.5, 0, None, None), ValueError, "`max_t0` must be at least 1, got 0"),
        ((5, "auto", None, -0.1, None), ValueError, "`max_loss_increase` must be above 0, got -0.1"),
    ],
)
def test_deprecated_arguments_that_do_not_fit_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        from_deprecated(*given)
