"""How vLLM is started for a capture: versions, settings, refusals. What differs between versions is said here."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from hiddenlake.cache.engines.adapter import check_adapter
from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.errors import BadInputError, CaptureError

# Version -> model runner -> where it was tested; the first runner is the one that is used. CI tests a CPU;
# benchmarks/gpu tests CUDA builds.
TESTED_VERSIONS = {"0.32.0": {"V1": "CPU"}}

CPU_OPTIONS = {
    "max_num_seqs": 64,  # more at once no longer raise throughput there
    "enforce_eager": True,  # compiling takes minutes there and wins little
    # a share of the machine's memory there; the default, 0.92, refuses to start beside other programs
    "gpu_memory_utilization": 0.4,
}

# Engine arguments that change what is captured or how rows are laid out, and the values that were tested.
_TESTED = {
    "data_parallel_size": (1,),
    "prefill_context_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "enable_expert_parallel": (False,),
    "enable_dbo": (False,),
    "nnodes": (1,),
    "async_scheduling": (None, True, False),
    "kv_cache_dtype": ("auto",),
}

# Engine arguments that follow from the capture itself.
_OURS = {
    "model", "dtype", "max_model_len", "disable_log_stats", "worker_extension_cls", "scheduler_cls",
    "additional_config", "enable_lora", "max_lora_rank", "max_loras", "lora_dtype", "lora_target_modules",
    "revision", "hf_overrides", "quantization", "quantization_config",
}  # fmt: skip

# Engine arguments of every vLLM with taps, beside the plan in its additional_config.
TAP_ARGUMENTS = {
    "worker_extension_cls": "hiddenlake.cache.worker.extension.CaptureExtension",
    "scheduler_cls": "hiddenlake.cache.worker.scheduler.last_token_scheduler",
}

# Of the canary's answer: a first token, and a last one that must be fed.
CANARY_TOKENS = 2

# How long a killed engine may go unnoticed.
_DEATH_SECONDS = 0.5


def import_vllm() -> Any:
    """The vllm package. Raises CaptureError without it, or with a version that was not tested."""
    # stdout is data: vLLM logs there unless told otherwise, and at length
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise CaptureError(
            f"vLLM cannot be imported ({error}): install `hiddenlake[vllm]`, or use --engine transformers"
        ) from error
    check_version(vllm.__version__)
    return vllm


def choose_environment() -> None:
    """Have an engine that is about to start run what was tested, unless its user has chosen otherwise."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", str(int(_tested_runners()[0] == "V2")))
    # vLLM 0.32 rounds activations to 8 bits, too, on CPUs that have instructions for it: see install_recorder
    os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")


def _tested_runners() -> list[str]:
    import vllm

    return list(TESTED_VERSIONS[_release(vllm.__version__)])


def _release(version: str) -> str:
    """Without what builds add to it: 0.32.0+cpu."""
    return version.split("+")[0]


def check_version(version: str) -> None:
    """Raise CaptureError for a version of vLLM that was not tested."""
    if _release(version) not in TESTED_VERSIONS:
        raise CaptureError(
            f"vLLM {version} was not tested: install {' or '.join(TESTED_VERSIONS)}, or use --engine transformers"
        )


def engine_options(request: Request) -> dict[str, Any]:
    """vLLM's engine arguments for a capture, without those that `start` sets. Raises CaptureError, BadInputError."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    given = request.options
    if unknown := sorted(given.keys() - {field.name for field in fields(EngineArgs)}):
        raise BadInputError(f"vLLM has no engine argument {', '.join(unknown)}: see its EngineArgs")
    if ours := sorted(given.keys() & _OURS):
        raise BadInputError(f"vLLM's {', '.join(ours)} is set by hiddenlake: leave it out of the engine options")
    _check_tested(given)
    if given.get("speculative_config"):
        _check_drafts(given["speculative_config"].get("method"))
    cpu = current_platform.is_cpu()
    # off a CPU, vLLM compiles and captures graphs as shipped
    options = (CPU_OPTIONS if cpu else {"max_num_seqs": 256}) | given
    sampling = request.decoding.sampling
    # a captured request never reads the prefix cache; what feeds a last token behind a stop string does, and questions
    # about answers, which begin alike
    options.setdefault("enable_prefix_caching", bool(sampling.stop or request.ask_length or request.varying))
    if cpu and (request.ask_length or request.varying or not sampling.greedy):
        options |= _whole_prompts(request)
    if request.lora is not None:
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": check_adapter(request.lora, request.model)}
    return options


def longest_sequence(request: Request) -> int:
    """Tokens for which vLLM must have positions."""
    # one position more than the answer needs, since the last token is fed too; and room for a canary of one token
    # vLLM's way of not drafting near the end of its context asks for CUDA, also on a CPU: the end is kept out of reach,
    # which is one step's drafts beyond those that a step checks
    drafts = 2 * (request.options.get("speculative_config") or {}).get("num_speculative_tokens", 0)
    return min(request.model.context, max(request.max_length, request.ask_length, 1 + CANARY_TOKENS) + 1 + drafts)


def _whole_prompts(request: Request) -> dict[str, Any]:
    """vLLM 0.32 rewinds a seeded generator behind a part of a prompt, which CPU generators cannot."""
    longest = longest_sequence(request)
    budget = request.options.get("max_num_batched_tokens", max(4096, longest))
    why = "on a CPU, vLLM cannot take the prompts of sampled answers, or of replies, in parts"
    if request.options.get("enable_chunked_prefill"):
        raise CaptureError(f"vLLM's enable_chunked_prefill=True: {why}; leave it out")
    if budget < longest:
        raise CaptureError(
            f"vLLM's max_num_batched_tokens={budget} is less than the longest sequence, {longest} tokens: {why}; leave "
            f"it out, or raise it"
        )
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": budget}


def check_config(config: Any) -> None:
    """Raise CaptureError for a VllmConfig that others made and that was not tested with capture."""
    check_runner(config)
    _check_tested(vars(config.parallel_config) | {"kv_cache_dtype": config.cache_config.cache_dtype})
    if config.lora_config is not None:
        raise CaptureError(
            "vLLM's enable_lora was not tested beside captured requests: on a CPU, vLLM 0.32 computes them with the "
            "adapter of another request in their batch; leave it out, or capture with `hiddenlake capture --lora`"
        )
    if config.speculative_config is not None:
        _check_drafts(config.speculative_config.method)
        if config.use_v2_model_runner:
            raise CaptureError("speculative decoding was not tested with vLLM's V2 model runner: turn one of them off")
    if config.model_config.logprobs_mode != "raw_logprobs":
        raise CaptureError(
            f"vLLM's logprobs_mode={config.model_config.logprobs_mode} leaves no log-probabilities under the model itself, "
            f"which are stored: leave it at raw_logprobs"
        )


def check_runner(config: Any) -> None:
    runner, tested = "V2" if config.use_v2_model_runner else "V1", _tested_runners()
    if runner not in tested:
        raise CaptureError(
            f"this version of vLLM was not tested with capture on its {runner} model runner, only on "
            f"{' and '.join(tested)}: start it with VLLM_USE_V2_MODEL_RUNNER={int(tested[0] == 'V2')}"
        )


def _check_tested(given: Mapping[str, Any]) -> None:
    for name, tested in _TESTED.items():
        if given.get(name, tested[0]) not in tested:
            raise CaptureError(f"vLLM's {name}={given[name]} was not tested with capture: leave it at {tested[0]}")


def _check_drafts(method: str | None) -> None:
    if method != "ngram":
        raise CaptureError(f"vLLM's speculative decoding by {method} was not tested with capture: use ngram, or none")


def provenance(config: Any) -> dict[str, Any]:
    """What is kept with each commit of an engine with this VllmConfig."""
    import vllm
    from vllm.platforms import current_platform

    return {
        "engine": "vllm",
        "vllm": vllm.__version__,
        "device": "cpu" if current_platform.is_cpu() else current_platform.get_device_name(),
        "enforce_eager": config.model_config.enforce_eager,
        "ranks": config.parallel_config.world_size,
    }


def start(config: Any) -> Any:
    """An LLMEngine with this VllmConfig. Raises CaptureError."""
    try:
        engine = _from_config(config)
    except RuntimeError as error:
        raise CaptureError(f"vLLM did not start: {error}") from error
    _wake_on_death(engine)
    return engine


def _from_config(config: Any) -> Any:
    """Build an LLMEngine from a finished configuration; separate process unless VLLM_ENABLE_V1_MULTIPROCESSING=0."""
    from vllm import envs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    return LLMEngine(
        vllm_config=config,
        executor_class=Executor.get_class(config),
        log_stats=False,
        multiprocess_mode=envs.VLLM_ENABLE_V1_MULTIPROCESSING,
    )


def load_adapter(engine: Any, adapter: Any) -> None:
    """Have the workers load a LoRARequest's adapter. Raises CaptureError for one that vLLM does not take."""
    try:
        engine.add_lora(adapter)
    except Exception as error:
        raise CaptureError(f"vLLM cannot load the adapter {adapter.lora_path}: {error}") from error


@contextmanager
def reported_death() -> Iterator[None]:
    """Turn the death of vLLM's engine into a CaptureError."""
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


def is_ready(engine: Any) -> bool:
    """Whether the engine's process has sent outputs that `step` would return at once."""
    queue = getattr(engine.engine_core, "outputs_queue", None)  # an engine in this process has none
    return queue is not None and not queue.empty()
