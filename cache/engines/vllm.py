"""vLLM: generates in continuous batches while the taps in its worker capture."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from hiddenlake.cache import positions
from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.samples import Generation, Prompt
from hiddenlake.cache.worker.plan import CANARY, KEY_ARG, LAST_TOKEN_ARG, Placement, Plan
from hiddenlake.cache.worker.plugin import CONFIG_KEY

TESTED_VERSIONS = ("0.32.0",)

_CPU_OPTIONS = {
    "max_num_seqs": 64,  # more at once no longer raise throughput there
    "enforce_eager": True,  # compiling takes minutes there and wins little
    # a share of the machine's memory there; the default, 0.92, refuses to start beside other programs
    "gpu_memory_utilization": 0.4,
}

# Engine arguments that change what is captured or how rows are laid out, and were not tested.
_UNTESTED = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "speculative_config": None,
    "quantization": None,
    "enable_lora": False,
    "enable_prefix_caching": False,
}

# Engine arguments that follow from the capture itself.
_OURS = {
    "model", "dtype", "max_model_len", "disable_log_stats", "worker_extension_cls", "scheduler_cls", "additional_config",
}  # fmt: skip

# Samples in flight a sequence of the batch: enough that the engine never waits for the driver, and few enough to
# leave work for other writers.
_QUEUE = 4

# How long a killed engine may go unnoticed.
_DEATH_SECONDS = 0.5

# Enough for a first token, and a last one that must be fed.
_CANARY_TOKENS = 2

# |log-probability by the captured stream - by the engine|. A wrong row is off by whole units; the spread is
# rounding in norm and head, once a row and once in a batch.
_CANARY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class VllmEngine:
    """An LLMEngine whose worker has the taps, driven step by step. See Engine for the interface."""

    def __init__(self, request: Request) -> None:
        vllm = _import_vllm()
        _refuse_untested(vllm.__version__, request.options)
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._request = request
        rows = request.rows_per_sample
        admitted = request.ring_bytes // request.row_bytes // rows
        if admitted < 1:
            raise CaptureError(
                f"--ring-bytes {request.ring_bytes} is too small: one sample needs {rows} rows of "
                f"{request.row_bytes} bytes, {rows * request.row_bytes} in all; raise it, or capture fewer sites, "
                f"layers or new tokens"
            )
        cpu = current_platform.is_cpu()
        # off a CPU, vLLM compiles and captures graphs as shipped
        options = (_CPU_OPTIONS if cpu else {"max_num_seqs": 256}) | request.options
        options["max_num_seqs"] = min(options["max_num_seqs"], admitted)
        self._in_flight_limit = min(admitted, _QUEUE * options["max_num_seqs"])
        self._engine = self._start(options, ring_rows=self._in_flight_limit * rows)
        self._sampling = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_new_tokens,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            stop_token_ids=list(request.model.end_ids),
            skip_reading_prefix_cache=True,
        )
        self._in_flight: set[str] = set()
        self.provenance = {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "device": "cpu" if cpu else current_platform.get_device_name(),
            "enforce_eager": self._engine.vllm_config.model_config.enforce_eager,
        }

    def _start(self, options: dict[str, Any], ring_rows: int) -> Any:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # the row map of the V2 runner is not built
        if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
            raise CaptureError("vLLM's V2 model runner was not tested with capture: unset VLLM_USE_V2_MODEL_RUNNER")
        request = self._request
        if unknown := sorted(options.keys() - {field.name for field in fields(EngineArgs)}):
            raise BadInputError(f"vLLM has no engine argument {', '.join(unknown)}: see its EngineArgs")
        if ours := sorted(options.keys() & _OURS):
            raise BadInputError(f"vLLM's {', '.join(ours)} is set by hiddenlake: leave it out of the engine options")
        arguments = EngineArgs(
            model=request.model.path,
            dtype=request.model.dtype,
            # one position more than the answer needs: the last token is fed too
            max_model_len=min(request.model.context, request.max_length + 1),
            enable_prefix_caching=False,
            disable_log_stats=True,
            worker_extension_cls="hiddenlake.cache.worker.extension.CaptureExtension",
            **{name: value for name, value in options.items() if name != "enable_prefix_caching"},
        )
        config = arguments.create_engine_config()
        scheduler = config.scheduler_config
        name = "LastTokenAsyncScheduler" if scheduler.async_scheduling else "LastTokenScheduler"
        scheduler.scheduler_cls = f"hiddenlake.cache.worker.scheduler.{name}"
        plan = Plan(
            sites=request.sites,
            layers=request.layers,
            n_layers=request.model.n_layers,
            positions=request.positions,
            dtype=request.model.dtype,
            ring_rows=ring_rows,
            max_rows=min(
                scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max(1, request.prompt_rows)
            ),
        )
        # hashed by vLLM into its compile cache's key, so that a graph without these taps is never reused
        config.additional_config = {**config.additional_config, CONFIG_KEY: plan.to_json()}
        try:
            engine = _engine_from_config(LLMEngine, config)
        except RuntimeError as error:
            raise CaptureError(f"vLLM did not start: {error}") from error
        _wake_on_death(engine)
        return engine

    def check_canary(self, prompt_ids: Sequence[int]) -> None:
        """Send one prompt through, and refuse to go on unless every tap answers for it.

        Hooks that never fire raise nothing. So every tap must have left a finite row that is not all zero, the
        stream captured behind the last layer must give, through the model's own norm and head, the
        log-probability that the engine itself reports, and the last token must have been fed.

        Raises CaptureError.
        """
        ids = tuple(prompt_ids)
        self._add(CANARY, ids, min(_CANARY_TOKENS, self._request.max_new_tokens), last_token=True)
        finished: list[Generation] = []
        while not finished:
            finished = self.step()
        answer = finished[0]
        last = len(ids) + len(answer.answer_ids) - 1
        report = self._call("hiddenlake_canary", CANARY, len(ids) - 1, answer.answer_ids[0], last)
        if "error" in report:
            raise CaptureError(f"the canary failed, so nothing is captured: {report['error']}")
        if report["dead"]:
            raise CaptureError(
                f"the canary failed, so nothing is captured: {len(report['dead'])} of {len(self._request.table)} taps "
                f"left no values (first: {report['dead'][0]}); the taps must be in the model before it is compiled"
            )
        difference = abs(report["logprob"] - answer.logprobs[0])
        if not difference <= _CANARY_TOLERANCE[self._request.model.dtype]:
            raise CaptureError(
                f"the canary failed, so nothing is captured: the stream behind the last layer gives the first answer "
                f"token the log-probability {report['logprob']:.4f}, the engine {answer.logprobs[0]:.4f}; this vLLM "
                f"lays its batches out differently than the tested {', '.join(TESTED_VERSIONS)}"
            )
        if not report["last"]:
            raise CaptureError(
                "the canary failed, so nothing is captured: the last token was not fed; this vLLM does not run "
                f"the last-token scheduler as the tested {', '.join(TESTED_VERSIONS)} do"
            )
        self._call("hiddenlake_drop", [CANARY])
        self._in_flight.discard(CANARY)

    def has_room(self) -> bool:
        return len(self._in_flight) < self._in_flight_limit

    def submit(self, prompt: Prompt) -> None:
        last_token = positions.may_mean_last_token(self._request.positions)
        self._add(prompt.key, prompt.token_ids, self._request.max_new_tokens, last_token)

    def _add(self, key: str, ids: Sequence[int], max_tokens: int, last_token: bool) -> None:
        params = self._sampling.clone()
        params.max_tokens = max_tokens
        params.extra_args = {KEY_ARG: key, LAST_TOKEN_ARG: int(last_token)}
        self._engine.add_request(key, {"prompt_token_ids": list(ids)}, params)
        self._in_flight.add(key)

    def step(self) -> list[Generation]:
        finished = self._finished()
        # The engine runs ahead in its own process: take all that is ready, since each call to its worker waits
        # for the step that it is in.
        while _is_ready(self._engine):
            finished += self._finished()
        return finished

    def _finished(self) -> list[Generation]:
        with _reported_death():
            outputs = self._engine.step()
        return [self._generation(output) for output in outputs if output.finished]

    def _call(self, verb: str, *arguments: Any) -> Any:
        """Call a verb of the worker's CaptureExtension."""
        with _reported_death():
            [result] = self._engine.collective_rpc(verb, args=arguments)
        return result

    def _generation(self, output: Any) -> Generation:
        if output.num_cached_tokens:
            raise CaptureError(
                f"{output.num_cached_tokens} tokens of a captured request came from the prefix cache: their rows were "
                f"not computed"
            )
        [answer] = output.outputs
        ids = tuple(answer.token_ids)
        return Generation(
            key=output.request_id,
            answer_ids=ids,
            logprobs=tuple(step[token].logprob for step, token in zip(answer.logprobs, ids, strict=True)),
            finish_reason=str(answer.finish_reason),
        )

    def store(self, handle: dict[str, Any], placements: Sequence[Placement]) -> list[str | None]:
        causes = self._call("hiddenlake_store", handle, [placement.to_json() for placement in placements])
        self._in_flight.difference_update(placement.key for placement in placements)
        return causes

    def stats(self) -> dict[str, int]:
        """What the worker counts: see CaptureExtension.hiddenlake_stats."""
        return self._call("hiddenlake_stats")

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _import_vllm() -> Any:
    # stdout is data: vLLM logs there unless told otherwise, and at length
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise CaptureError(
            f"vLLM cannot be imported ({error}): install `hiddenlake[vllm]`, or use --engine transformers"
        ) from error
    return vllm


class PlainVllm:
    """vLLM as it is shipped, without taps: what capture is compared with."""

    def __init__(self, request: Request) -> None:
        _import_vllm()
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        options = dict(request.options)
        if current_platform.is_cpu():
            options = _CPU_OPTIONS | options
        self._llm = LLM(
            model=request.model.path,
            dtype=request.model.dtype,
            max_model_len=request.max_length,
            **options,
        )
        self._sampling = SamplingParams(
            temperature=0.0, max_tokens=request.max_new_tokens, stop_token_ids=list(request.model.end_ids)
        )

    def generate(self, prompts: Sequence[Prompt]) -> int:
        """Generate an answer to each prompt. Returns the number of tokens generated."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(p.token_ids)} for p in prompts], self._sampling, use_tqdm=False
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _engine_from_config(engine_class: Any, config: Any) -> Any:
    """Build an LLMEngine from a finished configuration; separate process unless VLLM_ENABLE_V1_MULTIPROCESSING=0."""
    from vllm import envs
    from vllm.v1.executor import Executor

    return engine_class(
        vllm_config=config,
        executor_class=Executor.get_class(config),
        log_stats=False,
        multiprocess_mode=envs.VLLM_ENABLE_V1_MULTIPROCESSING,
    )


@contextmanager
def _reported_death() -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise CaptureError(
            "vLLM's engine died: its own message, if it left one, stands above; what was complete is stored, and "
            "the same command goes on from there"
        ) from error


def _wake_on_death(engine: Any) -> None:
    """Let calls that wait for an engine process fail when it is killed: vLLM 0.32 notes the death and waits on."""
    client = engine.engine_core
    if not hasattr(client, "outputs_queue"):
        return  # the engine is in this process

    from vllm.v1.engine.exceptions import EngineDeadError

    def watch() -> None:
        while not client.resources.engine_dead:
            time.sleep(_DEATH_SECONDS)
        client.outputs_queue.put_nowait(EngineDeadError())
        for future in list(client.utility_results.values()):
            if not future.done():
                future.set_exception(EngineDeadError())

    threading.Thread(target=watch, name="hiddenlake-engine-watch", daemon=True).start()


def _is_ready(engine: Any) -> bool:
    """Whether the engine's process has sent outputs that `step` would return at once."""
    queue = getattr(engine.engine_core, "outputs_queue", None)  # an engine in this process has none
    return queue is not None and not queue.empty()


def _refuse_untested(version: str, options: dict[str, Any]) -> None:
    if version.split("+")[0] not in TESTED_VERSIONS:
        raise CaptureError(
            f"vLLM {version} was not tested: install {' or '.join(TESTED_VERSIONS)}, or use --engine transformers"
        )
    for name, tested in _UNTESTED.items():
        if options.get(name, tested) != tested:
            raise CaptureError(
                f"vLLM's {name}={options[name]} was not tested with capture: leave it at {tested}"
            )
