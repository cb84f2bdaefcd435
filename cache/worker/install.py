"""Wires taps, staging and recorder into one vLLM worker. The contact with vLLM's V1 runner is here."""

import functools
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.families import family_of
from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.worker import taps
from hiddenlake.cache.worker.plan import Plan
from hiddenlake.cache.worker.recorder import Recorder
from hiddenlake.cache.worker.staging import Staging


def install_recorder(worker: Any, plan_json: dict[str, Any]) -> None:
    """Install the taps and follow the runner's steps. Called right after the model is loaded."""
    plan = Plan.from_json(plan_json)
    runner = worker.model_runner
    family = family_of(runner.model_config.hf_config.architectures)
    model = runner.model
    table = TapTable(plan.sites, plan.layers, plan.n_layers)
    embedding = model.get_submodule(family.embed).weight
    buffers = taps.TapBuffers(
        len(table), plan.max_rows, embedding.shape[1], getattr(torch, plan.dtype), runner.device
    )
    taps.install(model, family, table, buffers)
    recorder = Recorder(runner, plan, table, Staging(buffers, plan.ring_rows), embedding)
    runner.hiddenlake_family = family
    worker.hiddenlake_recorder = recorder
    _follow_v1(runner, recorder)


def _follow_v1(runner: Any, recorder: Recorder) -> None:
    """V1: `_prepare_inputs` runs when the batch's order is final and before the forward pass."""
    if not isinstance(runner, GPUModelRunner):
        raise CaptureError(
            f"vLLM's {type(runner).__module__}.{type(runner).__name__} was not tested with capture: "
            f"set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    prepare_inputs = runner._prepare_inputs
    execute_model = runner.execute_model

    @functools.wraps(prepare_inputs)
    def prepare_inputs_and_map(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.before_forward(scheduler_output)
        return prepare_inputs(scheduler_output, *args, **kwargs)

    @functools.wraps(execute_model)
    def execute_model_and_collect(*args: Any, **kwargs: Any) -> Any:
        output = execute_model(*args, **kwargs)
        recorder.after_forward()
        return output

    runner._prepare_inputs = prepare_inputs_and_map
    runner.execute_model = execute_model_and_collect
