"""Starts the service inside vLLM's server, once its engine has passed the canary."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

from hiddenlake.cache.engines.vllm_canary import canary_arguments, canary_params, judge_canary
from hiddenlake.cache.engines.vllm_setup import check_config, provenance
from hiddenlake.cache.vllm_server.collector import Collector
from hiddenlake.cache.vllm_server.intake import Intake, Offer
from hiddenlake.cache.vllm_server.service import Service
from hiddenlake.cache.vllm_server.taps import check_ring, served_model
from hiddenlake.cache.vllm_server.workers import Workers
from hiddenlake.cache.worker.plan import CANARY
from hiddenlake.cache.worker.plugin import CONFIG_KEY

# A call of a worker's verb waits for the step that the engine is in.
_CALL_SECONDS = 60.0

# Any prompt will do.
_CANARY_PROMPT = "Which country is the city of Paris in?"


async def start_service(engine: Any, offer: Offer) -> Service:
    """Put a service in front of an AsyncLLM. Raises CaptureError when its taps may not be trusted."""
    config = engine.vllm_config
    check_config(config)
    check_ring(config, config.additional_config[CONFIG_KEY]["ring_rows"], offer.row_bytes)
    offer = replace(offer, model=served_model(offer.model, config))
    await _check_canary(engine, offer)
    loop = asyncio.get_running_loop()

    def call(verb: str, *arguments: Any) -> list[Any]:
        return asyncio.run_coroutine_threadsafe(engine.collective_rpc(verb, args=arguments), loop).result(_CALL_SECONDS)

    workers = Workers(call, config.parallel_config.world_size)
    service = Service(engine.generate, Intake(offer), Collector(offer, workers, provenance(config)))
    engine.generate = service.generate
    shutdown, thread = engine.shutdown, threading.get_ident()

    def close_and_shutdown(timeout: float | None = None) -> None:
        engine.shutdown = shutdown
        try:
            if threading.get_ident() != thread:  # the loop itself cannot wait for what needs it
                service.close()
        finally:
            shutdown(timeout=timeout)

    engine.shutdown = close_and_shutdown
    return service


async def _check_canary(engine: Any, offer: Offer) -> None:
    _, ids = offer.model.encode(_CANARY_PROMPT)
    prompt = {"type": "token", "prompt_token_ids": list(ids)}
    async for output in engine.generate(prompt, canary_params(), CANARY):
        [answer] = output.outputs
    reports = await engine.collective_rpc("hiddenlake_canary", args=canary_arguments(ids, answer.token_ids))
    judge_canary(reports, answer.logprobs[0][answer.token_ids[0]].logprob, offer.model.dtype)
    await engine.collective_rpc("hiddenlake_drop", args=([CANARY],))
