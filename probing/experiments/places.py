"""Places: what the paper asks of a model for one task, and where its captures, grids and pictures lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.capture import Summary, Watcher, run_job
from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.job import Job, plan_job
from hiddenlake.cache.model import load_model
from hiddenlake.probing.tasks.paper import paper_task

# The paper samples with Hugging Face's generate, whose default this is; temperature and top_p are 1.
_TOP_K = 50

# Of a capture whose texts and log-probabilities are wanted, and no activations: one row a sample of a site without layers,
# at a token that is known before anything is generated, so that nothing waits for the answer and no last token is fed.
LEAST = {"sites": ("final_norm",), "positions": ("last_q",)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one task's files lie. folder : of all tasks and models.  name : of this one."""

    folder: Path
    name: str

    @property
    def capture(self) -> Path:
        """Of the greedy answers."""
        return self.folder / "lake" / self.name

    def other(self, kind: str) -> Path:
        """A capture beside it."""
        return self.folder / "lake" / f"{self.name}-{kind}"

    def grid(self, kind: str) -> Path:
        return self.folder / "grids" / f"{self.name}-{kind}.zarr"

    def table(self, kind: str) -> Path:
        return self.folder / f"{self.name}-{kind}.json"

    def picture(self, kind: str) -> Path:
        return self.folder / f"{self.name}-{kind}.png"


def paper_job(
    task: str,
    model: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    strict: bool = False,
    extractor: str | None = None,
    sites: Sequence[str] = ("mlp_out",),
    layers: str | Sequence[int] = "all",
    positions: Sequence[str] | None = None,
    samples: int | None = None,
    dtype: str | None = None,
    options: dict[str, Any] | None = None,
) -> Job:
    """What the paper asks of a model for one task: its prompts, positions and longest answers.

    data, limit, strict, extractor : see `paper_task`.  sites, layers, dtype, options : see `plan_job`.
    positions : the columns of the task's heatmap by default.
    samples : so many answers a question, as the paper draws them again; None for the greedy one. All are as long as the
        greedy ones may be, where the paper cuts those of `math` at 100 tokens.
    """
    found = paper_task(task, load_model(model, dtype), data, limit, strict, extractor)
    return plan_job(
        model,
        found,
        sites=sites,
        layers=layers,
        positions=found.data_set.positions if positions is None else positions,
        dtype=dtype,
        max_new_tokens=found.data_set.max_new_tokens,
        sampling=Sampling(stop=found.stop) if samples is None else Sampling(1.0, top_k=_TOP_K, stop=found.stop),
        samples=1 if samples is None else samples,
        options=options,
    )


def capture_task(job: Job, out: Path, *, engine: str = "vllm", watcher: Watcher | None = None) -> Summary:
    """Capture what is left of a task. Raises KeyboardInterrupt where that was interrupted: the same call goes on."""
    summary = run_job(job, out=out, engine=engine, watcher=watcher)
    if summary.interrupted:
        raise KeyboardInterrupt
    return summary


def place_of(folder: str | Path, job: Job) -> Place:
    """Of a task and a model."""
    return Place(Path(folder), f"{job.identity.task}-{job.identity.model.replace('/', '-')}")
