"""Attach: captures from a vllm.LLM that its user built and goes on using as before."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Self

from hiddenlake.cache.engines import vllm_setup as setup
from hiddenlake.cache.engines.vllm_canary import canary_arguments, canary_params, judge_canary
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.vllm_server.answers import ANSWER_KEY, Answers, tail_params
from hiddenlake.cache.vllm_server.collector import Collector, Judge
from hiddenlake.cache.vllm_server.intake import CAPTURE, LAYERS_ARG, POSITIONS_ARG, SITES_ARG, Intake, Offer, Ticket
from hiddenlake.cache.vllm_server.states import Asked, State
from hiddenlake.cache.vllm_server.taps import Taps, check_ring, find_taps, make_taps, served_model
from hiddenlake.cache.vllm_server.workers import Workers
from hiddenlake.cache.worker.plan import CANARY

GIB = 1 << 30

# Of one attached engine: any prompt will do.
_CANARY_PROMPT = "Which country is the city of Paris in?"


def taps(
    model: str,
    *,
    sites: str | Sequence[str] = ("mlp_out",),
    layers: str | Sequence[int] = "all",
    dtype: str | None = None,
    ring_bytes: int = 2 * GIB,
    spill: str | Path | None = None,
) -> dict[str, Any]:
    """Keyword arguments that put taps into a vllm.LLM: `vllm.LLM(**hiddenlake.taps("path/to/model"), ...)`.

    sites, layers : what may be captured once it is attached.
    dtype : `bfloat16`, `float16` or `float32`; default the checkpoint's own.
    ring_bytes : host memory in which rows wait for the end of their answers.
    spill : folder for a scratch file of what the ring has no place for; default the system's folder for such.

    Raises BadInputError, UnknownNameError.
    """
    planned = _plan(model, sites, layers, dtype, ring_bytes, spill)
    return {"model": planned.model.path, "dtype": planned.model.dtype, **planned.arguments()}


def attach(
    llm: Any,
    *,
    out: str | Path,
    sites: str | Sequence[str] | None = None,
    layers: str | Sequence[int] | None = None,
    positions: str | Sequence[str | int] = ("last_q", "first_answer", "-1"),
    judge: Judge | None = None,
    rules: str | None = None,
    ring_bytes: int = 2 * GIB,
    buffer_bytes: int = 2 * GIB,
    shard_samples: int = 64,
) -> "Attached":
    """Capture every answer that a vllm.LLM gives from now on, until it is detached.

    `llm.generate` and `llm.chat` work as before and return the same. An LLM that was built with `taps` is captured
    from at little cost; one that was built without them only where it runs eagerly (enforce_eager=True), and then
    the last token of each answer takes a request of its own.

    llm : idle, built without LoRA adapters, and with no images in what it is asked.
    out : the capture's folder, made if absent.
    sites, layers : some of what is tapped, by default all of it; without taps, what to tap.
    judge : called with prompt and answer as text, returns a Judgement; positions of an exact answer need it.
    rules : name and version of the judge, part of the value identity.
    ring_bytes : host memory for waiting rows, where the taps are made now.
    buffer_bytes, shard_samples : memory for shards, and samples in each.

    Raises CaptureError where it is too late for taps or they may not be trusted, BadInputError, UnknownNameError,
    StoreError for a folder that holds something else.
    """
    setup.import_vllm()
    if (judge is None) != (rules is None):
        raise BadInputError("a judge and its rules go together: `rules` is the judge's name and version, e.g. 'mine 1'")
    engine = llm.llm_engine
    config = engine.vllm_config
    if "step" in vars(engine):
        raise CaptureError("this LLM is attached already: detach it first")
    if engine.has_unfinished_requests():
        raise CaptureError("this LLM has unfinished requests: wait for them before it is attached")
    setup.check_config(config)
    found = find_taps(config) or getattr(engine, "hiddenlake_taps", None)
    feeds_last = found is not None and not hasattr(engine, "hiddenlake_taps")
    if found is None:
        found = _tap_late(engine, sites, layers, ring_bytes)
    check_ring(config, found.plan.ring_rows, found.row_bytes)
    if "://" in str(out):
        raise BadInputError(
            f"out {str(out)!r}: an attached LLM captures into a local folder: name one, and copy it later"
        )
    path = Path(out).absolute()
    offer = Offer(
        lake=path.parent,
        model=served_model(found.model, config),
        sites=found.plan.sites,
        layers=found.plan.layers,
        positions=tuple(map(str, _names(positions))),
        row_bytes=found.row_bytes,
        max_request_bytes=None,  # the spill takes what the ring does not
        buffer_bytes=buffer_bytes,
        shard_samples=shard_samples,
        rules=rules,
    )
    asked = {CAPTURE: path.name, POSITIONS_ARG: _names(positions)}
    if sites is not None:
        asked[SITES_ARG] = _names(sites)
    if layers is not None:
        asked[LAYERS_ARG] = _names(layers)
    attached = Attached(engine, Intake(offer), asked, judge, feeds_last)
    attached.start()
    return attached


class Attached:
    """An LLM whose answers are captured. As a context manager it detaches in the end. Made by `attach`.

    path : the capture's folder.
    """

    def __init__(
        self, engine: Any, intake: Intake, asked: dict[str, Any], judge: Judge | None, feeds_last: bool
    ) -> None:
        self.path = intake.offer.lake / asked[CAPTURE]
        self._engine, self._intake, self._asked, self._feeds_last = engine, intake, asked, feeds_last
        config = engine.vllm_config
        self._workers = Workers(self._call, config.parallel_config.world_size)
        self._collector = Collector(intake.offer, self._workers, setup.provenance(config), judge)
        self._add, self._step, self._abort = engine.add_request, engine.step, engine.abort_request
        self._answers: dict[str, Answers] = {}
        self._tails: dict[str, str] = {}
        self._unfed: dict[str, int] = {}
        self._ended: list[Answers] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def start(self) -> None:
        """Check the taps, open the capture, and follow the engine from now on. Raises HiddenlakeError."""
        self._check_canary()
        self._collector.open(*self._intake.coverage(self._asked))
        self._engine.add_request = self._add_request
        self._engine.step = self._step_and_take
        self._engine.abort_request = self._abort_request

    def keys(self, output: Any) -> list[str]:
        """The keys of a RequestOutput's samples, in its answers' order. Raises BadInputError where it has none."""
        try:
            return output.kv_transfer_params[ANSWER_KEY]["keys"]
        except (TypeError, KeyError) as error:
            raise BadInputError("this output names no samples: expected one of an LLM while it was attached") from error

    def state(self, key: str) -> State:
        """Of one sample: pending, committed, or failed and why. Raises BadInputError for another's key."""
        found = self._collector.states.get(key)
        if found is None:
            raise BadInputError(f"sample {key} is not known here: expected a key that `keys` gave")
        return found

    @property
    def failures(self) -> dict[str, str]:
        """key -> why it could not be stored."""
        return self._collector.states.failures()

    def flush(self) -> None:
        """Publish everything that has finished."""
        self._collector.flush()

    def detach(self) -> None:
        """Publish, and leave the LLM as it was. Warns of samples that failed. A second call does nothing."""
        if vars(self._engine).get("step") != self._step_and_take:
            return
        del self._engine.add_request, self._engine.step, self._engine.abort_request
        self._abort([*self._tails])
        self._drop(list(self._answers), "the LLM was detached before the answer was finished")
        self._collector.close()
        if failed := self.failures:
            warnings.warn(
                f"{len(failed)} samples were not stored, the first because: {next(iter(failed.values()))}", stacklevel=2
            )

    def _call(self, verb: str, *arguments: Any) -> list[Any]:
        return self._engine.collective_rpc(verb, args=arguments)

    def _check_canary(self) -> None:
        model = self._intake.offer.model
        _, ids = model.encode(_CANARY_PROMPT)
        [answer] = self._run(CANARY, ids, canary_params()).outputs
        if not self._feeds_last:
            self._run(f"{CANARY}-last", [*ids, *answer.token_ids], tail_params(CANARY))
        reports = self._call("hiddenlake_canary", *canary_arguments(ids, answer.token_ids))
        judge_canary(reports, answer.logprobs[0][answer.token_ids[0]].logprob, model.dtype)
        self._call("hiddenlake_drop", [CANARY])

    def _run(self, name: str, ids: Sequence[int], params: Any) -> Any:
        self._add(name, {"type": "token", "prompt_token_ids": list(ids)}, params)
        while True:
            for output in self._step():
                if output.finished:
                    return output

    # In place of the engine's own. What goes wrong with a capture never stops a generation.

    def _add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **settings: Any) -> str:
        if not hasattr(params, "max_tokens"):  # of a pooling model: nothing is generated
            return self._add(request_id, prompt, params, *args, **settings)
        ticket = self._ticket(prompt, params)
        internal = self._add(request_id, prompt, ticket.prepare(params, self._feeds_last), *args, **settings)
        self._collector.states.begin(Asked(request_id, ticket.capture, ticket.keys), ())
        self._answers[request_id] = Answers(ticket, params)
        return internal

    def _ticket(self, prompt: Any, params: Any) -> Ticket:
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise CaptureError("an attached LLM captures prompts of text or token ids: detach it first")
        return self._intake.ticket(self._asked, prompt["prompt_token_ids"], params.n, params.max_tokens)

    def _step_and_take(self) -> list[Any]:
        outputs = []
        for output in self._step():
            if (request := self._tails.pop(output.request_id, None)) is not None:
                self._unfed[request] -= 1
                self._finish_fed(request)
                continue
            outputs.append(output)
            if answers := self._answers.get(output.request_id):
                answers.take(output)
                if output.finished:
                    self._feed_last(output.request_id, answers)
        if self._ended:
            self._ended, ended = [], self._ended
            self._collector.finish(ended)
        if not self._engine.has_unfinished_requests():  # a call to the workers waits for the step that they are in
            self._collector.work()
        return outputs

    def _feed_last(self, request: str, answers: Answers) -> None:
        unfed = answers.unfed(self._intake.offer.model.context, self._feeds_last)
        self._unfed[request] = len(unfed)
        for key, sequence in unfed:
            self._tails[f"{key}-last"] = request
            self._add(f"{key}-last", {"type": "token", "prompt_token_ids": sequence}, tail_params(key))
        self._finish_fed(request)

    def _finish_fed(self, request: str) -> None:
        if self._unfed[request] == 0:
            del self._unfed[request]
            self._ended.append(self._answers.pop(request))

    def _abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        self._abort(request_ids, internal)
        names = {name.rpartition("-")[0] if internal else name for name in request_ids}
        self._drop([name for name in self._answers if name in names], "the request was aborted")

    def _drop(self, requests: Sequence[str], cause: str) -> None:
        for request in requests:
            self._collector.drop(self._answers.pop(request).ticket.keys, cause)


def _plan(
    model: str,
    sites: str | Sequence[str],
    layers: str | Sequence[int],
    dtype: str | None,
    ring_bytes: int,
    spill: str | Path | None = None,
) -> Taps:
    return make_taps(
        str(model), sites=_names(sites), layers=layers, dtype=dtype, ring_bytes=ring_bytes, spill=spill or gettempdir()
    )


def _tap_late(
    engine: Any, sites: str | Sequence[str] | None, layers: str | Sequence[int] | None, ring_bytes: int
) -> Taps:
    """Put taps into an engine that is running. Raises CaptureError where its model can no longer be tapped."""
    config = engine.vllm_config
    if not config.model_config.enforce_eager:
        raise CaptureError(
            "it is too late for this LLM: its model was compiled, and its graphs were captured, without taps; build it "
            "with vllm.LLM(**hiddenlake.taps(model), ...), or with enforce_eager=True"
        )
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    planned = _plan(
        config.model_config.model, sites or ("mlp_out",), "all" if layers is None else layers, dtype, ring_bytes
    )
    try:
        engine.collective_rpc("hiddenlake_tap", args=(planned.plan.to_json(),))
    except Exception as error:
        raise CaptureError(
            f"this LLM's model cannot be tapped ({error}): vLLM must have loaded hiddenlake's plugin, so leave "
            f"VLLM_PLUGINS unset, or name hiddenlake in it"
        ) from error
    engine.hiddenlake_taps = planned
    return planned


def _names(value: str | Sequence[Any]) -> list[Any]:
    return value.split(",") if isinstance(value, str) else list(value)
