"""Config: the VllmConfig of a capture, and the memory that its rows will take, both known before the model is loaded."""

import os
from collections.abc import Mapping
from typing import Any

from hiddenlake.cache.engines import vllm_setup as setup
from hiddenlake.cache.engines.base import Memory, Request
from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.positions import wanted
from hiddenlake.cache.rows import tap_table
from hiddenlake.cache.worker.plan import Plan
from hiddenlake.cache.worker.plugin import CONFIG_KEY
from hiddenlake.cache.worker.staging import device_bytes

# Samples in flight a sequence of the batch: enough that the engine never waits for the driver, and few enough to
# leave work for other writers.
QUEUE = 4


def configure(request: Request) -> tuple[Any, Memory]:
    """The VllmConfig, with taps in it, that answers a request, and what its rows will take.

    As many sequences run at once as `ring_bytes` has room for. Raises CaptureError, BadInputError.
    """
    options = setup.engine_options(request)
    config = _create(request, options)
    if request.varying:
        return _configure_varying(request, config)
    scheduler = config.scheduler_config
    pools = wanted(request.positions, request.tokens, request.max_length).pools
    # rows of a pooled prompt pass through the ring, a step's worth at a time
    passing = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * request.max_length) if pools else 0
    needed = request.sample_bytes + passing * request.row_bytes
    if request.ring_bytes < needed:
        raise CaptureError(
            f"--ring-bytes {request.ring_bytes} is too small: one sample needs {request.rows_per_sample} rows of "
            f"{request.row_bytes} bytes{f', and one step up to {passing}' if passing else ''}, {needed} in all; raise "
            f"it, or capture fewer sites, layers or new tokens"
            f"{', or lower max_num_batched_tokens' if passing else ''}"
        )
    # samples without a row of their own, as in a capture of nothing but given token indices, take next to nothing
    admitted = (request.ring_bytes - passing * request.row_bytes) // max(1, request.sample_bytes)
    if admitted < scheduler.max_num_seqs:
        config = _create(
            request, options | {"max_num_seqs": admitted, "max_num_batched_tokens": scheduler.max_num_batched_tokens}
        )
        scheduler = config.scheduler_config
    samples = min(admitted, QUEUE * scheduler.max_num_seqs)
    plan = Plan(
        sites=request.sites,
        layers=request.layers,
        n_layers=request.model.n_layers,
        positions=request.positions,
        tokens=request.tokens,
        widths=request.model.widths,
        dtype=request.model.dtype,
        ring_rows=samples * request.rows_per_sample + passing,
        max_rows=_step_rows(request, config),
    )
    # hashed by vLLM into its compile cache's key, so that a graph without these taps is never reused
    config.additional_config = {**config.additional_config, CONFIG_KEY: plan.to_json()}
    return config, Memory(
        samples, request.sample_bytes, passing * request.row_bytes, *_device_memory(request, config, plan.max_rows)
    )


def _configure_varying(request: Request, config: Any) -> tuple[Any, Memory]:
    """Taps of which each sample names the rows that it needs; what it has no room for in the ring is spilled."""
    scheduler = config.scheduler_config
    ring_rows = request.ring_bytes // request.row_bytes
    if ring_rows < scheduler.max_num_batched_tokens:
        raise CaptureError(
            f"--ring-bytes {request.ring_bytes} is too small: one step may compute {scheduler.max_num_batched_tokens} rows of "
            f"{request.row_bytes} bytes; raise it, lower vLLM's max_num_batched_tokens, or tap fewer sites or layers"
        )
    plan = Plan(
        sites=request.sites,
        layers=request.layers,
        n_layers=request.model.n_layers,
        positions=(),
        tokens=None,
        widths=request.model.widths,
        dtype=request.model.dtype,
        ring_rows=ring_rows,
        max_rows=None,
        spill=request.spill,
        shared=True,
    )
    config.additional_config = {**config.additional_config, CONFIG_KEY: plan.to_json()}
    samples = QUEUE * scheduler.max_num_seqs
    device = _device_memory(request, config, scheduler.max_num_batched_tokens)
    return config, Memory(samples, ring_rows * request.row_bytes // samples, 0, *device)


def _create(request: Request, options: dict[str, Any]) -> Any:
    from vllm import EngineArgs

    arguments = EngineArgs(
        model=request.model.path,
        dtype=request.model.dtype,
        max_model_len=setup.longest_sequence(request),
        disable_log_stats=True,
        **setup.TAP_ARGUMENTS,
        **options,
    )
    setup.choose_environment()
    config = arguments.create_engine_config()
    _save_a_process(config, request.options)
    setup.check_runner(config)
    return config


def _save_a_process(config: Any, given: Mapping[str, Any]) -> None:
    """Have a CPU's only worker run in its engine's process, unless its user has chosen otherwise.

    vLLM 0.32 gives it one of its own, so that its threads can be bound to cores, and then the engine's process spins
    while the worker computes: on two cores that was a third of all CPU seconds.
    """
    from vllm.platforms import current_platform

    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind"
    parallel = config.parallel_config
    if (
        current_platform.is_cpu()
        and parallel.world_size == 1
        and not bound
        and "distributed_executor_backend" not in given
    ):
        parallel.distributed_executor_backend = "uni"


def _step_rows(request: Request, config: Any) -> int:
    """Most rows that one step can want."""
    scheduler = config.scheduler_config
    want = wanted(request.positions, request.tokens, request.max_length)
    if request.decoding.max_new_tokens == 0 or request.tokens or want.pools:
        return scheduler.max_num_batched_tokens
    drafts = config.speculative_config.num_speculative_tokens if config.speculative_config else 0
    return min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max(1 + drafts, len(want.prompt)))


def _device_memory(request: Request, config: Any, rows: int) -> tuple[int, int]:
    """(bytes of the taps' buffers on the GPU that has most of them, tokens of KV cache that they take the place of).

    Raises CaptureError for more than vLLM may have there; what the model itself leaves, vLLM finds out.
    """
    from vllm.distributed.utils import get_pp_indices
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return 0, 0
    parallel, model = config.parallel_config, config.model_config
    stages = [
        range(*get_pp_indices(request.model.n_layers, stage, parallel.pipeline_parallel_size))
        for stage in range(parallel.pipeline_parallel_size)
    ]
    tables = {
        owned: tap_table(
            request.sites, request.layers, request.model.widths, request.model.n_layers, owned=owned,
            ranks=parallel.tensor_parallel_size,
        )
        for owned in stages
    }  # fmt: skip
    # the first rank of a stage has all that its ranks have in common
    owned, table = max(tables.items(), key=lambda item: len(item[1]))
    taken = device_bytes(rows, table, request.model.itemsize)
    room = int(config.cache_config.gpu_memory_utilization * current_platform.get_device_total_memory())
    if taken > room:
        raise CaptureError(
            f"the taps' buffers need {taken / 2**30:.1f} GiB of each GPU for the {rows} rows that a step may want, and "
            f"vLLM has {room / 2**30:.1f} GiB there for all: lower max_num_batched_tokens or max_num_seqs, or capture "
            f"fewer sites or layers"
        )
    token = 2 * len(owned) * model.get_num_kv_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    return taken, taken // token
