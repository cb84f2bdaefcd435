"""The paper's taxonomy of errors: what many answers to one question say of how its model fails. Pure.

K answers are drawn. Wrong ones are grouped by their exact answers; those without one are a group of their own. A question may
be of several types, or of none. Thresholds are the paper's shares of its K = 30, rounded down (`resamples_utils.py` of its
code); with fewer than some 12 answers they fall together, and hardly say anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TYPES = {
    "A": "refuses: no exact answer, more often than any other answer",
    "B1": "always right",
    "B2": "mostly right: half of the answers, some wrong",
    "C1": "mostly the same wrong answer: half of the answers, none right",
    "C2": "mostly the same wrong answer, some right",
    "D": "competing: right and the most frequent wrong answer within a sixth of each other, each more than a sixth",
    "E1": "many wrong answers: a third as many as answers were drawn, none right",
    "E2": "many wrong answers, some right",
}

# What the paper's Table 2 shows of them: unions.
UNIONS = {"B": ("B1", "B2"), "C": ("C1", "C2"), "E": ("E1", "E2")}


@dataclass(frozen=True, slots=True)
class Tally:
    """The answers to one question.

    drawn : K.  right : how many are.  wrong : sizes of the groups of wrong answers, larger first.
    silent : wrong answers without an exact answer.
    """

    drawn: int
    right: int
    wrong: tuple[int, ...]
    silent: int

    @property
    def largest_wrong(self) -> int:
        """Size of the largest group of wrong answers, or of those without an exact answer."""
        return max((*self.wrong, self.silent))

    @property
    def distinct_wrong(self) -> int:
        """How many groups of wrong answers there are; no answer is one."""
        return len(self.wrong) + (self.silent > 0)


def group_sizes(names: Sequence[str], first_come: bool = False) -> tuple[int, ...]:
    """Sizes of the groups of exact answers, larger first: one that holds another, ignoring case, is in its group.

    Groups are connected: whatever order the answers came in, they are the same. first_come : as in the paper's code, where an
    answer is counted in each earlier group whose first answer it holds or is held by, so that sizes may sum up to more.
    """
    if first_come:
        groups: dict[str, int] = {}
        for name in names:
            fitting = [name] if name in groups else [g for g in groups if _alike(name.lower(), g.lower())]
            for group in fitting or [name]:
                groups[group] = groups.get(group, 0) + 1
        return tuple(sorted(groups.values(), reverse=True))
    spelled = [name.strip().lower() for name in names]
    members: list[set[str]] = []
    for name in dict.fromkeys(spelled):
        joined = [group for group in members if any(_alike(name, other) for other in group)]
        members = [group for group in members if group not in joined] + [{name}.union(*joined)]
    return tuple(sorted((sum(name in group for name in spelled) for group in members), reverse=True))


def _alike(one: str, other: str) -> bool:
    return one in other or other in one


def tally(correct: Sequence[bool], exact: Sequence[str | None], first_come: bool = False) -> Tally:
    """Count one question's answers.

    correct, exact : one an answer; None where it has no exact answer.  first_come : see `group_sizes`.
    """
    said = [name for right, name in zip(correct, exact, strict=True) if not right]
    named = [name for name in said if name is not None and name.strip()]
    return Tally(len(correct), sum(map(bool, correct)), group_sizes(named, first_come), len(said) - len(named))


def types_of(counted: Tally) -> frozenset[str]:
    """Which of TYPES a question is of."""
    half, third, sixth = counted.drawn // 2, counted.drawn // 3, counted.drawn // 6
    right, largest, distinct = counted.right, counted.largest_wrong, counted.distinct_wrong
    refuses = counted.silent > right and counted.silent == largest
    same = largest >= half and not refuses
    found = {
        "A": refuses,
        "B1": right == counted.drawn,
        "B2": right >= half and distinct > 0,
        "C1": same and right == 0,
        "C2": same and right > 0,
        "D": abs(right - largest) <= sixth and right > sixth and largest > sixth,
        "E1": distinct >= third and right == 0,
        "E2": distinct >= third - 1 and right > 0,
    }
    return frozenset(name for name, holds in found.items() if holds)
