"""hiddenlake on a GPU: any version and model runner of vLLM is tried, tested or not."""

import os
from dataclasses import dataclass
from typing import Any

from gpu_facts import Replays, facts
from hiddenlake_capture import Hiddenlake
from serve import serve

from hiddenlake.cache.capture import Summary
from hiddenlake.cache.engines import vllm_setup
from hiddenlake.cache.job import Job, plan_job
from hiddenlake.cache.samples import Judgement, Question


@dataclass
class Words:
    """Random words. The exact answer is one in the middle, so that every position is there."""

    questions: list[Question]
    name: str = "words"
    rules: str = "the middle word 1"

    def judge(self, question: Question, answer: str) -> Judgement:
        words = answer.split()
        return Judgement(True, words[len(words) // 2])


class HiddenlakeOnGpu(Hiddenlake):
    def __init__(self, spec: dict[str, Any]) -> None:
        import vllm

        runner = "V2" if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1" else "V1"
        vllm_setup.TESTED_VERSIONS[vllm.__version__.split("+")[0]] = {runner: "in this run"}
        self.replays = Replays()
        super().__init__(spec)

    def _plan(self, texts: list[str], max_new_tokens: int) -> Job:
        return plan_job(
            self.spec["model"],
            Words([Question(i, text, ()) for i, text in enumerate(texts)]),
            sites=self.spec["sites"],
            positions=self.spec["positions"],
            dtype="bfloat16",
            max_new_tokens=max_new_tokens,
            ring_bytes=self.spec["ring_bytes"],
            options=self.spec["options"],
        )

    def report(self, round: dict[str, Any], summary: Summary) -> dict[str, Any]:
        counted, self.replays.count = self.replays.count, 0
        request, config = self.request, self.engine._engine.vllm_config
        [stats] = self.engine.stats()
        waited = sum(request.rows(len(ids)) for ids in round["ids"]) * request.row_bytes
        return super().report(round, summary) | facts(config) | {
            "home": waited, "device_bytes": stats["device_bytes"], "replays": counted,
            "batch": config.scheduler_config.max_num_seqs,
        }  # fmt: skip


if __name__ == "__main__":
    serve(HiddenlakeOnGpu)
