"""n-gram speculative decoding: rejected drafts leave no row, accepted ones leave theirs."""

import numpy as np
import pytest

from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER
from hiddenlake.cache.samples import Question

from .captures import TOLERANCE, assert_greedy, capture_all, generate, recorder_of, running, scheduler_of, worst_errors
from .conftest import COUNTRIES, SITES, ListTask

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DRAFTS = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
}
WORDS = ("red green blue", "one two three four", "north east south west", "do re mi fa so")


def make_repeating_task() -> ListTask:
    """Prompts with n-grams that the answers repeat, at length or in one sentence that ends: some drafts are right."""
    lists = [f"Continue this list, without any other word: {(words + ' ') * 12}" for words in WORDS]
    facts = [
        f"The city of {city} is in {country}. " * 4 + f"Which country is {city} in? Answer in one sentence."
        for city, country in list(COUNTRIES.items())[:6]
    ]
    return ListTask([Question(i, text, ("is in",)) for i, text in enumerate(lists + facts)])


def count_drafts(scheduler) -> dict[str, int]:
    """{"drafted", "accepted"}: tokens, as vLLM counts them from here on."""
    counts = {"drafted": 0, "accepted": 0}
    make_stats = scheduler.make_spec_decoding_stats

    def count(*args, num_draft_tokens, num_accepted_tokens, **kwargs):
        counts["drafted"] += num_draft_tokens
        counts["accepted"] += num_accepted_tokens
        return make_stats(*args, num_draft_tokens=num_draft_tokens, num_accepted_tokens=num_accepted_tokens, **kwargs)

    scheduler.make_spec_decoding_stats = count
    return counts


@pytest.fixture(scope="module")
def runs(demo_model_folder, module_path):
    """{with drafts?: (capture, counts)}; counts of vLLM's own, and of the worker."""
    found = {}
    for drafts in (True, False):
        job = plan_job(
            demo_model_folder, make_repeating_task(), sites=SITES, positions=[*PAPER, "first_answer", "60"],
            dtype="float32", max_new_tokens=24, options=DRAFTS if drafts else {},
        )  # fmt: skip
        with running(job) as engine:
            counts = count_drafts(scheduler_of(engine))
            [empty] = engine.stats()
            answers = generate(engine, job.prompts)
            length = {p.key: len(p.token_ids) + len(answers[p.key].answer_ids) for p in job.prompts}
            counts["beyond"] = sum(
                token >= length[key] for key, book in recorder_of(engine).books.items() for token in book.slots
            )
            engine.abort([p.key for p in job.prompts])
            capture, _ = capture_all(job, engine, module_path / str(drafts))
            [after] = engine.stats()
            counts |= {
                "recomputed": after["recomputed"],
                "lost": empty["free"] - after["free"],
                "books": after["books"],
            }
        found[drafts] = capture, counts
    return found


def test_drafts_were_accepted_and_rejected(runs):
    counts = runs[True][1]
    print(f"\n{counts}")
    assert counts["accepted"] > 0 and counts["drafted"] > counts["accepted"]
    assert counts["recomputed"] > 0, "rows of rejected drafts are computed again"
    assert counts["beyond"] > 0, "drafts behind the end must have left rows, or their trimming is not tested"
    assert runs[False][1]["drafted"] == runs[False][1]["recomputed"] == 0


def test_rows_equal_hugging_face(runs, reference):
    worst = worst_errors(runs[True][0], reference)
    print(f"\nworst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE
    assert_greedy(runs[True][0], reference, 4)


def test_answers_are_those_without_drafts(runs):
    ours, plain = (runs[drafts][0].samples().to_pylist() for drafts in (True, False))
    for found, expected in zip(ours, plain, strict=True):
        assert [found[name] for name in ("token_ids", "answer", "finish_reason")] == [
            expected[name] for name in ("token_ids", "answer", "finish_reason")
        ]
        np.testing.assert_allclose(found["logprobs"], expected["logprobs"], atol=1e-4)


def test_the_last_token_has_its_row(runs):
    capture = runs[True][0]
    samples = capture.samples().to_pylist()
    assert {s["finish_reason"] for s in samples} == {"stop", "length"}
    assert all(s["token_index"][capture.coverage.positions.index("-1")] == s["total_length"] - 1 for s in samples)
    assert np.isfinite(capture.read("resid_post", position="-1", dtype="float32")).all()


def test_the_ring_is_as_it_was(runs):
    assert runs[True][1]["lost"] == runs[True][1]["books"] == 0
