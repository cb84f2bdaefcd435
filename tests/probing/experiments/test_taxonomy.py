"""Which answers are one, and which types of error that makes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.probing.experiments.taxonomy import TYPES, UNIONS, Tally, group_sizes, tally, types_of

NAMES = st.lists(
    st.sampled_from(["Paris", "paris", "Paris, France", "France", "Rome", "Roma", "rom", "Oslo"]), max_size=12
)


@given(NAMES, st.randoms())
def test_groups_hold_every_answer_once_whatever_their_order(names, random):
    mixed = random.sample(names, len(names))
    assert group_sizes(names) == group_sizes(mixed) and sum(group_sizes(names)) == len(names)


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        ([], ()),
        (["Paris", "paris ", "Rome"], (2, 1)),
        (["Paris, France", "Paris", "France", "Rome"], (3, 1)),  # the first holds both of the others
        (["Paris", "France"], (1, 1)),
        (["Roma", "Oslo", "rom", "Rome"], (3, 1)),
    ],
)
def test_an_answer_that_holds_another_is_the_same(names, sizes):
    assert group_sizes(names) == sizes


def test_the_papers_groups_follow_the_order_and_may_count_twice():
    assert group_sizes(["Paris", "France", "Paris, France"], first_come=True) == (2, 2)
    assert group_sizes(["Paris, France", "Paris", "France"], first_come=True) == (3,)
    assert group_sizes(["Paris", "paris", "Rome", "Paris"], first_come=True) == (3, 1)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([None, "", "Rome", "Oslo", "Bern"])), min_size=1, max_size=40))
def test_every_answer_is_right_or_in_a_group_or_silent(answers):
    correct, exact = zip(*answers, strict=True)
    found = tally(correct, exact)
    assert found.drawn == len(answers) == found.right + sum(found.wrong) + found.silent
    assert found.right == sum(correct) and types_of(found) <= set(TYPES)


@pytest.mark.parametrize(
    ("right", "wrong", "silent", "types"),
    [
        (30, (), 0, {"B1"}),
        (20, (10,), 0, {"B2"}),
        (15, (15,), 0, {"B2", "C2", "D"}),
        (0, (20, 4, 3, 2, 1), 0, {"C1"}),
        (2, (20, 8), 0, {"C2"}),
        (14, (12, 4), 0, {"D"}),
        (5, (5,) * 5, 0, set()),  # a sixth is not more than a sixth
        (6, (6,) * 4, 0, {"D"}),
        (0, (3,) * 10, 0, {"E1"}),
        (0, (4,) * 6 + (2,) * 3, 0, set()),  # nine are not ten where none is right
        (2, (4,) * 4 + (2,) * 6, 0, {"E2"}),
        (10, (4, 4, 3, 3, 2, 2, 1, 1), 0, set()),
        (9, (4, 4, 3, 3, 2, 2, 1, 1, 1), 0, {"E2"}),
        (4, (6,), 20, {"A"}),  # no answer is never "the same wrong answer"
        (8, (15,), 7, {"C2"}),
        (12, (8,), 10, {"D"}),
        (0, (), 30, {"A"}),
    ],
)  # fmt: skip
def test_the_types_of_thirty_answers(right, wrong, silent, types):
    assert right + sum(wrong) + silent == 30
    assert types_of(Tally(30, right, wrong, silent)) == types


@given(st.integers(0, 30), st.lists(st.integers(1, 30), max_size=12), st.integers(0, 30))
def test_some_types_exclude_each_other(right, wrong, silent):
    found = types_of(Tally(right + sum(wrong) + silent, right, tuple(sorted(wrong, reverse=True)), silent))
    for one, other in [("A", "C1"), ("A", "C2"), ("B1", "B2"), ("C1", "C2"), ("E1", "E2"), ("C1", "D"), ("E1", "D")]:
        if right + sum(wrong) + silent >= 6:
            assert not {one, other} <= found


def test_unions_are_of_types():
    assert all(set(parts) <= set(TYPES) for parts in UNIONS.values())
