"""The verbs that the driver calls in vLLM's worker: canary, store, stored, drop, stats. Mixed into the worker class."""

from typing import Any

import numpy as np
import torch

from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.worker.plan import Placement
from hiddenlake.cache.worker.recorder import Recorder
from hiddenlake.cache.worker.storing import Storing


class CaptureExtension:
    """`worker_extension_cls`. Every argument and result is plain JSON. Each rank answers for the taps that it has."""

    hiddenlake_recorder: Recorder | None = None
    hiddenlake_storing: Storing
    hiddenlake_table: TapTable

    def hiddenlake_canary(self, key: str, token: int, sampled: int, last: int) -> dict[str, Any]:
        """Judge the taps by one finished prompt.

        token : the last prompt token, whose row decides the first answer token.
        sampled : that answer token.
        last : the last token of the sequence, which must have been fed too.

        Returns {"taps": their number, "dead": those that left nothing, "logprob": of `sampled` computed from the
        captured stream of the last layer through the model's own norm and head, None where there is no last layer,
        "last": whether the last token has a row, "unused": names of adapters' weights that no module of this rank
        took}, or {"error": why there is nothing to judge}.
        """
        recorder = self.hiddenlake_recorder
        if recorder is None:
            return {"error": "no taps were installed when the model was loaded"}
        rows = recorder.staging.wait(recorder.staging.mark()) or recorder.rows(key, [token])
        values = None if isinstance(rows, str) else self._floats(rows[0])
        canary = self.hiddenlake_table.canary
        stream = None if canary is None or values is None else values[canary.offset : canary.end]
        logprob = _logprob(self, stream, sampled)  # before anything returns: in it the ranks wait for each other
        if values is None:
            return {"error": rows}
        dead, taps = [], list(self.hiddenlake_table.taps())
        for site, layer, offset, width in taps:
            tapped = values[offset : offset + width]
            if not tapped.isfinite().all() or not (tapped != 0).any():
                dead.append(f"{site} {layer}")
        return {
            "taps": len(taps),
            "dead": dead,
            "logprob": logprob,
            "last": not isinstance(recorder.rows(key, [last]), str),
            "unused": _unused(self.model_runner.get_model()),
        }

    def hiddenlake_store(
        self, handles: list[dict[str, Any]], placements: list[dict[str, Any]]
    ) -> list[tuple[str, str | None]]:
        """Start to copy finished samples into shards. Returns what was finished meanwhile, as hiddenlake_stored."""
        self.hiddenlake_storing.submit(handles, [Placement.from_json(placement) for placement in placements])
        return self.hiddenlake_storing.done(wait=False)

    def hiddenlake_stored(self, wait: bool) -> list[tuple[str, str | None]]:
        """(key, None or the cause of its failure) of each placement that was finished since the last call."""
        return self.hiddenlake_storing.done(wait)

    def hiddenlake_drop(self, keys: list[str]) -> None:
        """Forget samples: their rows are free again."""
        for key in keys:
            self._recorder.drop(key)

    def hiddenlake_stats(self) -> dict[str, int]:
        """{"free": free rows of the ring, "books": samples in flight, "recomputed": rows that preemption or rejected
        drafts made vLLM compute again, "spilled": rows that went to the scratch file, "device_bytes": of the taps'
        buffers on a GPU}."""
        recorder = self._recorder
        buffers = recorder.staging.buffers
        return {
            "free": recorder.ring.free,
            "books": len(recorder.books),
            "recomputed": recorder.recomputed,
            "spilled": recorder.spilled,
            "device_bytes": buffers.nbytes if buffers.out.is_cuda else 0,
        }

    def _floats(self, bits: np.ndarray) -> torch.Tensor:
        values = torch.from_numpy(bits.view(np.int16) if bits.dtype == np.uint16 else bits)
        return values.view(self._recorder.ring.arena.dtype).float()

    @property
    def _recorder(self) -> Recorder:
        assert self.hiddenlake_recorder is not None, "the canary lets no run start without taps"
        return self.hiddenlake_recorder


def _unused(model: torch.nn.Module) -> list[str]:
    """vLLM passes over weights of an adapter whose module it does not have, and says nothing."""
    manager = getattr(model, "lora_manager", None)
    if manager is None:
        return []
    return [
        name for adapter in manager.list_adapters().values() for name in adapter.loras if name not in manager.modules
    ]


@torch.inference_mode()
def _logprob(worker: Any, stream: torch.Tensor | None, sampled: int) -> float | None:
    """Log-probability of a token, by the model's own norm and head from the stream leaving its last layer.

    stream : (hidden,), or None in a rank that does not have it. Every rank of the last pipeline stage takes part, since
        each has a part of the head; the others have no result.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    if not get_pp_group().is_last_rank:
        return None
    runner = worker.model_runner
    model = runner.get_model()
    norm = model.get_submodule(runner.hiddenlake_family.norm)
    if stream is None:
        stream = torch.zeros(runner.model_config.get_hidden_size())
    stream = get_tp_group().broadcast(stream.to(runner.device, runner.dtype)[None])
    logits = model.compute_logits(norm(stream))
    return None if logits is None else float(logits[0].float().log_softmax(-1)[sampled])
