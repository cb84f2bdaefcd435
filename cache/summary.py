"""Summary: what a run did, and who hears of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hiddenlake.cache.estimate import Estimate
from hiddenlake.cache.inquiry import Asked
from hiddenlake.cache.samples import Prompt


@dataclass(slots=True)
class Summary:
    """What a run did.

    planned : samples of the task.  present : committed before the run.  committed, failed : by this run.
    elsewhere : reserved by another writer that is still running.
    correct : of the committed.  bytes : written.  causes : why samples failed, by key.
    tokens : generated.  seconds : of generation and capture, engine start not counted.
    asked : what a language model was asked about answers.
    """

    path: str
    planned: int
    present: int
    committed: int = 0
    failed: int = 0
    elsewhere: int = 0
    correct: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    asked: Asked = field(default_factory=Asked)
    causes: dict[str, str] = field(default_factory=dict)


class Watcher:
    """Hears of a run's progress. The default is silent."""

    def planned(self, cost: Estimate, summary: Summary) -> None:
        """Before the engine starts."""

    def started(self) -> None:
        """The engine is up and its canary has passed."""

    def progressed(self, summary: Summary) -> None:
        """Samples have been stored, or have failed."""

    def published(self) -> None:
        """What was stored has been published before its shard was full."""

    def left(self, prompts: Sequence[Prompt]) -> None:
        """Prompts that are not worked on here: another writer works on them, or they are committed."""
