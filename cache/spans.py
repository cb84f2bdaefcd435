"""Spans: which tokens of an answer spell its exact answer."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def find_window(decode: Decode, ids: Sequence[int], exact_answer: str) -> tuple[int, int] | None:
    """The minimal window of tokens around the first occurrence of a string in an answer.

    decode : token ids to text; special tokens kept, no clean-up of spaces. Characters cut by the ends
        of the ids may come out as anything.
    ids : the answer's token ids.
    exact_answer : found without regard to case, at its first occurrence.

    Returns inclusive (first, last) offsets into `ids`, or None when the answer does not hold the string.
    Every token in the window holds at least one byte of the occurrence. Needs O(log len(ids)) decodes
    and as many short ones as the window is long.
    """
    text = decode(ids)
    found = find_ignoring_case(text, exact_answer.strip())
    if found is None:
        return None
    start, end = found

    # The shortest prefix of tokens that already spells the text up to the end of the occurrence.
    spelled = text[:end]
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if decode(ids[:middle]).startswith(spelled):
            high = middle
        else:
            low = middle + 1
    last = low - 1

    # The latest token from which that prefix still ends in the occurrence and what follows it in its last token.
    tail = decode(ids[: last + 1])[start:]
    # The whole prefix ends in it, so there is always one.
    first = next(k for k in range(last, -1, -1) if decode(ids[k : last + 1]).endswith(tail))
    return first, last


def find_ignoring_case(text: str, wanted: str) -> tuple[int, int] | None:
    """(start, end) of the first occurrence of `wanted` in `text`, ignoring case, in offsets of `text`.

    Characters are lowered one by one and offsets mapped back, because str.lower() can change a
    string's length (İ becomes two characters) and depends on the neighbours (final sigma).
    """
    pattern = "".join(character.lower() for character in wanted)
    if not pattern:
        return None
    lowered, origin = [], []
    for i, character in enumerate(text):
        low = character.lower()
        lowered.append(low)
        origin += [i] * len(low)
    start = "".join(lowered).find(pattern)
    if start < 0:
        return None
    return origin[start], origin[start + len(pattern) - 1] + 1
