"""The verbs that the driver calls in vLLM's worker: canary, store, drop, stats. Mixed into the worker class."""

from typing import Any

import numpy as np
import torch

from hiddenlake.cache.worker.plan import Placement
from hiddenlake.cache.worker.recorder import Recorder


class CaptureExtension:
    """`worker_extension_cls`. Every argument and result is plain JSON."""

    hiddenlake_recorder: Recorder | None = None

    def hiddenlake_canary(self, key: str, token: int, sampled: int, last: int) -> dict[str, Any]:
        """Judge the taps by one finished prompt.

        token : the last prompt token, whose row decides the first answer token.
        sampled : that answer token.
        last : the last token of the sequence, which must have been fed too.

        Returns {"dead": taps that left nothing, "logprob": of `sampled` computed from the captured stream of
        the last layer through the model's own norm and head, "last": whether the last token has a row}, or
        {"error": why there is nothing to judge}.
        """
        recorder = self.hiddenlake_recorder
        if recorder is None:
            return {"error": "no taps were installed when the model was loaded"}
        rows = recorder.row(key, token)
        if rows is None:
            book = recorder.books.get(key)
            return {"error": (book.cause if book else None) or "the prompt left no row"}
        values = torch.from_numpy(rows.view(np.int16) if rows.dtype == np.uint16 else rows.copy())
        values = values.view(recorder.staging.arena.dtype).float()
        alive = values.isfinite().all(1) & (values != 0).any(1)
        dead = [f"{site} {layer}" for (site, layer), a in zip(recorder.table.pairs, alive.tolist(), strict=True) if not a]
        return {
            "dead": dead,
            "logprob": _logprob(recorder, values[-1], sampled),
            "last": recorder.row(key, last) is not None,
        }

    def hiddenlake_store(self, handle: dict[str, Any], placements: list[dict[str, Any]]) -> list[str | None]:
        """Copy finished samples into a shard's buffer and forget them.

        Returns None, or the cause of the failure, for each.
        """
        recorder = self.hiddenlake_recorder
        assert recorder is not None, "the canary lets no run start without taps"
        causes = [recorder.store(Placement(**placement), handle) for placement in placements]
        self.hiddenlake_drop([placement["key"] for placement in placements])
        return causes

    def hiddenlake_drop(self, keys: list[str]) -> None:
        """Forget samples: their rows are free again."""
        recorder = self.hiddenlake_recorder
        assert recorder is not None, "the canary lets no run start without taps"
        for key in keys:
            recorder.drop(key)

    def hiddenlake_stats(self) -> dict[str, int]:
        """{"free": free slots of the arena, "books": samples in flight, "recomputed": rows that preemption or
        rejected drafts made vLLM compute again}."""
        recorder = self.hiddenlake_recorder
        assert recorder is not None, "the canary lets no run start without taps"
        return {"free": recorder.staging.free, "books": len(recorder.books), "recomputed": recorder.recomputed}


@torch.inference_mode()
def _logprob(recorder: Recorder, stream: torch.Tensor, sampled: int) -> float:
    """Log-probability of a token, by the model's own norm and head from the stream leaving its last layer."""
    runner = recorder.runner
    model = runner.model
    norm = model.get_submodule(runner.hiddenlake_family.norm)
    hidden = norm(stream.to(runner.device, runner.dtype)[None])
    logits = model.compute_logits(hidden)[0].float()
    return float(logits.log_softmax(-1)[sampled])
