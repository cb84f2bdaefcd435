"""The canary: one prompt that every tap must answer for before anything is captured.

Hooks that never fire raise nothing. So every tap must have left a finite row that is not all zero, the stream captured
behind the last layer must give, through the model's own norm and head, the log-probability that the engine itself
reports, the last token must have been fed, and vLLM must have found a place for all weights of a LoRA adapter.
"""

from collections.abc import Sequence
from typing import Any

from hiddenlake.cache.engines.vllm_setup import CANARY_TOKENS, TESTED_VERSIONS
from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.worker.plan import CANARY, KEY_ARG, LAST_TOKEN_ARG

# |log-probability by the captured stream - by the engine|. A wrong row is off by whole units; the spread is
# rounding in norm and head, once a row and once in a batch.
_TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


def canary_params() -> Any:
    """vLLM's SamplingParams of the canary's request."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=CANARY_TOKENS,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=True,
        extra_args={KEY_ARG: CANARY, LAST_TOKEN_ARG: 1},
    )


def canary_arguments(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[str, int, int, int]:
    """What the workers' hiddenlake_canary is called with once the canary's request is finished."""
    return CANARY, len(prompt_ids) - 1, answer_ids[0], len(prompt_ids) + len(answer_ids) - 1


def judge_canary(reports: Sequence[dict[str, Any]], logprob: float, dtype: str) -> None:
    """Raise CaptureError unless the taps may be trusted.

    reports : of every rank's hiddenlake_canary.  logprob : of the first answer token, by the engine.
    """
    refused = "the canary failed, so nothing is captured"
    tested = ", ".join(TESTED_VERSIONS)
    for report in reports:
        if "error" in report:
            raise CaptureError(f"{refused}: {report['error']}")
    if dead := [tap for report in reports for tap in report["dead"]]:
        raise CaptureError(
            f"{refused}: {len(dead)} of {sum(report['taps'] for report in reports)} taps left no values (first: "
            f"{dead[0]}); the taps must be in the model before it is compiled"
        )
    if unused := set.intersection(*(set(report["unused"]) for report in reports)):
        raise CaptureError(
            f"{refused}: the model has no place for {len(unused)} of the adapter's weights (first: {min(unused)}); "
            f"expected an adapter that was trained on this model"
        )
    found = next(report["logprob"] for report in reports if report["logprob"] is not None)
    if not abs(found - logprob) <= _TOLERANCE[dtype]:
        raise CaptureError(
            f"{refused}: the stream behind the last layer gives the first answer token the log-probability "
            f"{found:.4f}, the engine {logprob:.4f}; this vLLM lays its batches out differently than the tested "
            f"{tested}"
        )
    if not all(report["last"] for report in reports):
        raise CaptureError(
            f"{refused}: the last token was not fed; this vLLM does not run the last-token scheduler as the tested "
            f"{tested} do"
        )
