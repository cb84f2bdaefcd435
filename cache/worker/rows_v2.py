"""Row map of vLLM's V2 runner: which request and which token each row of the batch is."""

from collections.abc import Iterator
from typing import Any


def batch_rows(scheduler_output: Any, input_batch: Any) -> Iterator[tuple[str, int, int, int]]:
    """(internal request id, first row, first token index, number of tokens) of each request in the batch.

    input_batch : what the runner's `prepare_inputs` returned for this step. Padding rows lie behind the last request.

    Raises RuntimeError when the batch is not understood: its rows do not add up, or it has draft tokens, with which
    the runner knows the number of computed tokens on the device only.
    """
    if input_batch.num_draft_tokens:
        raise RuntimeError("speculative decoding was not tested with vLLM's V2 model runner: turn one of them off")
    starts = input_batch.query_start_loc_np
    computed = input_batch.num_computed_tokens_np
    for i, request_id in enumerate(input_batch.req_ids[: input_batch.num_reqs]):
        n = int(starts[i + 1]) - int(starts[i])
        scheduled = scheduler_output.num_scheduled_tokens[request_id]
        if n != scheduled:
            raise RuntimeError(f"request {request_id} has {n} rows, but {scheduled} tokens are scheduled")
        yield request_id, int(starts[i]), int(computed[i]), n
    rows = int(starts[input_batch.num_reqs])
    if not rows == input_batch.num_tokens == scheduler_output.total_num_scheduled_tokens:
        raise RuntimeError(
            f"the batch has {rows} rows of {input_batch.num_tokens} tokens, but "
            f"{scheduler_output.total_num_scheduled_tokens} tokens are scheduled"
        )
