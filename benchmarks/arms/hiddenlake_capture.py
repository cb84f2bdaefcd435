"""hiddenlake: one engine, and a capture a round, flushed to disk and committed."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve import expect, serve

from hiddenlake.cache.capture import Summary, run_job, start_engine
from hiddenlake.cache.job import Job, plan_job
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.reader import Capture, open_capture

Rows = dict[str, list[float]]


@dataclass
class Stories:
    """Requests for stories. The exact answer is the hero's name, so that the late positions are found too."""

    questions: list[Question]
    name: str = "stories"
    rules: str = "the hero is named 1"

    def judge(self, question: Question, answer: str) -> Judgement:
        [hero] = question.answers
        named = hero in answer
        return Judgement(named, hero if named else None)


class Hiddenlake:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.out = Path(spec["out"])
        job = self._plan(spec["texts"], spec["max_new_tokens"])
        self.request = job.request
        self.engine = start_engine("vllm", job.request, job.prompts[0].token_ids)

    def _plan(self, texts: list[str], max_new_tokens: int) -> Job:
        heroes = [next(hero for hero in self.spec["heroes"] if hero in text) for text in texts]
        questions = [Question(i, text, (hero,)) for i, (text, hero) in enumerate(zip(texts, heroes, strict=True))]
        return plan_job(
            self.spec["model"],
            Stories(questions),
            sites=self.spec["sites"],
            positions=self.spec["positions"],
            dtype="bfloat16",
            max_new_tokens=max_new_tokens,
        )

    def prepare(self, round: dict[str, Any]) -> Job:
        shutil.rmtree(self.out, ignore_errors=True)
        job = self._plan(round["texts"], round["max_new_tokens"])
        expect("prompt ids", [list(prompt.token_ids) for prompt in job.prompts], round["ids"])
        # planned for all rounds' prompts, of which this round's may not hold the longest
        return replace(job, request=self.request)

    def run(self, job: Job) -> Summary:
        return run_job(job, out=self.out, engine=self.engine)

    def report(self, round: dict[str, Any], summary: Summary) -> dict[str, Any]:
        expect("failures", summary.causes, {})
        capture = open_capture(self.out)
        samples = capture.samples()
        lengths = [len(ids) for ids in round["ids"]]
        expect("prompts", samples["prompt_length"].to_pylist(), lengths)
        expect("tokens", sum(samples["total_length"].to_pylist()), sum(lengths) + summary.tokens)
        read = self._tokens if capture.coverage.tokens else self._cells
        cells, rows = read(capture, round["layer"])
        width = capture.coverage.widths["embed"]
        nbytes = cells * len(capture.coverage.layers) * len(self.spec["sites"]) * width * 2
        return {"tokens": summary.tokens, "bytes": nbytes, "rows": rows}

    def _cells(self, capture: Capture, layer: int) -> tuple[int, Rows]:
        """How many (sample, position) there are, and the first prompt's last row of each site."""
        cells = sum(index >= 0 for indices in capture.samples()["token_index"].to_pylist() for index in indices)
        return cells, {
            site: capture.read(site, layer, "last_q", 0, dtype="float32").tolist() for site in _layered(capture)
        }

    def _tokens(self, capture: Capture, layer: int) -> tuple[int, Rows]:
        """How many (sample, token) there are, and the first prompt's last row of each site."""
        samples = capture.samples()
        lengths = samples["total_length"].to_pylist()
        expect("tokens of each sample", capture.read_tokens("embed").lengths.tolist(), lengths)
        last = samples["prompt_length"][0].as_py() - 1
        return sum(lengths), {
            site: capture.read_tokens(site, layer, 0, dtype="float32").values[last].tolist()
            for site in _layered(capture)
        }


def _layered(capture: Capture) -> list[str]:
    return [site for site in capture.coverage.sites if SITES[site].layered]


if __name__ == "__main__":
    serve(Hiddenlake)
