"""Schedules: what they accept, and what they refuse."""

import pytest

from lightning_gcfreeze import FreezeSchedule


def test_stages_given_as_lists_become_tuples():
    """As YAML gives them."""
    assert FreezeSchedule([[10, 0.5], [20, 0.8]]) == FreezeSchedule(((10, 0.5), (20, 0.8)))
    assert FreezeSchedule([(10, 5), (20, 2)], monotone=False).stages == ((10, 5), (20, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([[]], ValueError, "`stages` must not be empty"),
        (["auto"], TypeError, "`stages` must be a list, got 'auto'"),
        ([[(10, 0.5, 1)]], TypeError, r"`stages\[0\]` must be a pair \(t, k\), got \(10, 0.5, 1\)"),
        ([[(10, 0.5), 20]], TypeError, r"`stages\[1\]` must be a pair \(t, k\), got 20"),
        ([[(0, 0.5)]], ValueError, r"`stages\[0\]\[0\]` must be at least 1, got 0"),
        ([[(10, 1.5)]], ValueError, r"`stages\[0\]\[1\]` as a float is a fraction"),
        ([[(10, 0.5), (10, 0.6)]], ValueError, "must have rising steps t, got t=10 before t=10"),
        ([[(10, 5), (20, 0.6)]], TypeError, "all give k as a count or all as a fraction, got 5 and 0.6"),
        ([[(10, 0.5), (20, 0.4)]], ValueError, "goes from k=0.5 down to k=0.4.*monotone=False"),
        ([[(10, 0.5)], "yes"], TypeError, "`monotone` must be True or False"),
    ],
)
def test_stages_that_are_no_schedule_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        FreezeSchedule(*arguments)


def test_growing_schedule_adds_as_much_at_each_of_its_stages():
    stages = FreezeSchedule.growing(100, 190, 0.9).stages
    assert [t for t, _ in stages] == list(range(100, 191, 10))
    assert [k for _, k in stages] == pytest.approx([0.09 * i for i in range(1, 11)])
    assert FreezeSchedule.growing(3, 5, 1.0, stages=2) == FreezeSchedule([(3, 0.5), (5, 1.0)])
    for k in (0.5, 0.87, 0.91, 0.47):
        assert FreezeSchedule.growing(7, 16, k).stages[-1] == (16, k)  # a stage a step


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((100, 105, 0.9), ValueError, "`end` must be at least 109, got 105"),
        ((0, 105, 0.9), ValueError, "`begin` must be at least 1"),
        ((10, 105, 1.5), ValueError, r"`k` as a float is a fraction and must lie in \[0, 1\], got 1.5"),
        ((10, 105, 0.0), ValueError, "`k` must be above 0"),
        ((10, 105, 0.9, 1), ValueError, "`stages` must be at least 2"),
        ((10.5, 105, 0.9), TypeError, "`begin`"),
    ],
)
def test_growing_schedule_of_wrong_arguments_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        FreezeSchedule.growing(*arguments)
