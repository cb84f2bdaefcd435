"""Row map of vLLM's V1 runner: which request and which token each row of the batch is."""

from collections.abc import Iterator
from typing import Any


def batch_rows(runner: Any, scheduler_output: Any) -> Iterator[tuple[str, int, int, int]]:
    """(internal request id, first row, first token index, number of tokens) of each request in the batch.

    Valid between the runner's `_update_states` and the end of the step: the batch's order is final then, and
    `num_computed_tokens_cpu` still counts the tokens before this step. Tokens of one request are consecutive.

    Raises RuntimeError when the rows do not add up to the scheduled tokens: the batch is not understood.
    """
    batch = runner.input_batch
    row = 0
    computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
    for request_id, start in zip(batch.req_ids, computed, strict=False):
        n = scheduler_output.num_scheduled_tokens[request_id]
        yield request_id, row, start, n
        row += n
    if row != scheduler_output.total_num_scheduled_tokens:
        raise RuntimeError(
            f"the batch has {row} rows, but {scheduler_output.total_num_scheduled_tokens} tokens are scheduled"
        )
