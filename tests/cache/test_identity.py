"""Identity: canonical JSON, and keys that change with everything that changes a value."""

from dataclasses import replace

import pytest

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.identity import Decoding, Identity, Sampling, canonical_json, digest, sample_key

IDENTITY = Identity("m", "sha256:1", None, None, "bfloat16", "bfloat16", "t", "cities", "rule/1", Decoding(32))


def test_canonical_json_is_one_text_for_equal_values():
    assert canonical_json({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


def test_key_is_frozen():
    """A key must never change by accident: captures made before would no longer be found."""
    assert sample_key(IDENTITY, [1, 2, 3], 7, 0) == "dcd3b27968b95790e4ac3d21e60af848"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "n"), ("weights", "sha256:2"), ("quantization", "awq"), ("lora", "a"), ("compute_dtype", "float32"),
        ("stored_dtype", "float32"), ("chat_template", None), ("task", "u"), ("judge", "rule/2"),
        ("decoding", Decoding(33)), ("decoding", Decoding(32, Sampling(0.7))), ("decoding", Decoding(0)),
        ("decoding", Decoding(32, Sampling(stop=("\n",)))), ("position_rules", 2),
    ],
)  # fmt: skip
def test_every_field_of_the_identity_changes_the_key(field, value):
    assert sample_key(replace(IDENTITY, **{field: value}), [1], 0, 0) != sample_key(IDENTITY, [1], 0, 0)


def test_prompt_row_and_sample_number_change_the_key():
    keys = {sample_key(IDENTITY, ids, i, k) for ids in ([1], [1, 2]) for i in (0, 1) for k in (0, 1)}
    assert len(keys) == 8 and all(len(key) == 32 for key in keys)


@pytest.mark.parametrize("field", [{"top_p": 0.9}, {"top_k": 5}, {"seed": 1}, {"temperature": 0.8}])
def test_what_sampling_depends_on_changes_the_key(field):
    sampled = replace(IDENTITY, decoding=Decoding(32, Sampling(0.7)))
    other = replace(IDENTITY, decoding=Decoding(32, replace(Sampling(0.7), **field)))
    assert sample_key(sampled, [1], 0, 0) != sample_key(other, [1], 0, 0)


def test_a_greedy_answer_does_not_depend_on_the_seed():
    seeded = replace(IDENTITY, decoding=Decoding(32, Sampling(seed=5)))
    assert sample_key(seeded, [1], 0, 0) == sample_key(IDENTITY, [1], 0, 0)


def test_every_sample_has_a_seed_of_its_own():
    sampling = Sampling(0.7, seed=3)
    seeds = {sampling.seed_of(index, k) for index in range(50) for k in range(30)}
    assert len(seeds) == 1500 and all(0 <= seed < 2**31 for seed in seeds)
    assert Sampling().seed_of(0, 0) is None


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"stop": ("",)}]
)
def test_bad_sampling_is_refused(bad):
    with pytest.raises(BadInputError):
        Sampling(**bad)


def test_a_negative_length_is_refused():
    with pytest.raises(BadInputError, match="max_new_tokens is -1"):
        Decoding(-1)


def test_digest_has_32_hex_digits():
    assert len(digest({"a": 1})) == 32
