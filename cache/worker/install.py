"""Wires taps, staging and recorder into one vLLM worker. The contact with vLLM's runners is here."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.families import family_of
from hiddenlake.cache.pools import Check
from hiddenlake.cache.rows import TapTable, find_fault, tap_table
from hiddenlake.cache.worker import rows_v1, rows_v2, taps
from hiddenlake.cache.worker.bits import as_bits
from hiddenlake.cache.worker.hooks import Embedding
from hiddenlake.cache.worker.logprobs import install_logprobs
from hiddenlake.cache.worker.orphan import exit_with_parent
from hiddenlake.cache.worker.plan import Plan
from hiddenlake.cache.worker.recorder import Recorder
from hiddenlake.cache.worker.staging import make_staging
from hiddenlake.cache.worker.storing import Storing


def install_recorder(worker: Any, plan_json: dict[str, Any]) -> None:
    """Install the taps and follow the runner's steps. Called right after the model is loaded."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    exit_with_parent()
    plan = Plan.from_json(plan_json)
    runner = worker.model_runner
    model = runner.get_model()  # without what replays its graphs
    if any(getattr(module, "use_w4a8", False) for module in model.modules()):
        raise CaptureError(
            "vLLM rounds the activations of this model to 8 bits, though its quantisation is one of weights alone: set "
            "VLLM_CPU_INT4_W4A8=0 before it is started"
        )
    family = family_of(runner.model_config.hf_config.architectures)
    stage, tensor = get_pp_group(), get_tp_group()
    inner = model.get_submodule(family.layers.rpartition(".")[0])
    table = tap_table(
        plan.sites,
        plan.layers,
        plan.widths,
        plan.n_layers,
        owned=range(inner.start_layer, inner.end_layer),
        rank=tensor.rank_in_group,
        ranks=tensor.world_size,
    )
    buffers, staging = make_staging(
        plan.max_rows or runner.max_num_tokens, plan.ring_rows, table, getattr(torch, plan.dtype), runner.device
    )
    taps.install(model, family, table, buffers)
    _count_memory(runner, buffers)
    # every rank of the first stage takes part in reading a split embedding
    embedding = Embedding(model, family, tensor.rank_in_group) if stage.is_first_rank else None
    recorder = Recorder(plan, staging, _follow(runner), _checker(table, embedding))
    worker.hiddenlake_recorder = recorder
    worker.hiddenlake_storing = Storing(recorder, table)
    worker.hiddenlake_table = table
    runner.hiddenlake_family = family
    runner.hiddenlake_recorder = recorder
    if runner.device.type == "cpu" and not plan.shared and stage.is_last_rank:
        install_logprobs(runner.sampler)
    if stage.world_size > 1 and not stage.is_first_rank and getattr(runner, "intermediate_tensors", None) is None:
        # vLLM 0.32 makes these in a profiling run that the CPU runner leaves out in eager mode
        runner.intermediate_tensors = model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )


def _count_memory(runner: Any, buffers: taps.TapBuffers) -> None:
    """Have vLLM leave the buffers' bytes to them when it sizes the KV cache.

    vLLM 0.25 adds up what it knows of; 0.32 takes all that the device has lost since its start, and prints this.
    """
    if buffers.out.is_cuda:
        runner.model_memory_usage += buffers.nbytes


def _checker(table: TapTable, embedding: Embedding | None) -> Check:
    """The check that every stored row passes: see find_fault."""

    def check(ids: Sequence[int], tokens: Sequence[int], rows: np.ndarray) -> str | None:
        expected = None if table.embed is None else as_bits(embedding(list(ids), list(tokens)).cpu())
        return find_fault(table, rows, expected)

    return check


def _follow(runner: Any) -> Any:
    """Wrap the runner's steps. Returns its row map.

    The batch's order must be final and the forward pass not begun when the recorder is told of it.
    """
    # by name, because importing the V2 runner needs Triton
    modules = {base.__module__ for base in type(runner).__mro__}
    v1 = "vllm.v1.worker.gpu_model_runner" in modules
    if v1:
        prepare, rows_of = "_prepare_inputs", functools.partial(rows_v1.batch_rows, runner)
    elif "vllm.v1.worker.gpu.model_runner" in modules:
        prepare, rows_of = "prepare_inputs", rows_v2.batch_rows
    else:
        raise CaptureError(
            f"vLLM's {type(runner).__module__}.{type(runner).__name__} was not tested with capture: use a dense or "
            f"mixture-of-experts decoder on vLLM's V1 or V2 GPU runner, or on the CPU"
        )
    prepare_inputs = getattr(runner, prepare)
    execute_model = runner.execute_model

    @functools.wraps(prepare_inputs)
    def prepare_inputs_and_map(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if v1:
            runner.hiddenlake_recorder.before_forward(scheduler_output)
            return prepare_inputs(scheduler_output, *args, **kwargs)
        batch = prepare_inputs(scheduler_output, *args, **kwargs)
        runner.hiddenlake_recorder.before_forward(scheduler_output, batch)
        return batch

    @functools.wraps(execute_model)
    def execute_model_and_collect(*args: Any, **kwargs: Any) -> Any:
        output = execute_model(*args, **kwargs)
        runner.hiddenlake_recorder.after_forward()
        return output

    setattr(runner, prepare, prepare_inputs_and_map)
    runner.execute_model = execute_model_and_collect
    return rows_of
