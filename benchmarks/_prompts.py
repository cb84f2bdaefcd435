"""Prompts whose answers run long: requests for stories, all different."""

from itertools import product

HEROES = (
    "Alma", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Klara", "Leon",
    "Marta", "Nils", "Olga", "Paul",
)  # fmt: skip
TRADES = ("baker", "sailor", "clockmaker", "shepherd", "painter", "miner", "weaver", "gardener")
PLACES = ("a harbour town", "the high mountains", "a small island", "the old capital",
          "a village by a lake", "the edge of a desert", "a valley of mills", "the far north")  # fmt: skip
TASKS = ("must cross the sea", "finds a sealed letter", "has lost a brother", "learns to read the stars")

_STORIES = [
    f"Tell me a long story about {hero}, a {trade} from {place} who {task}. Tell it in many chapters."
    for task, place, trade, hero in product(TASKS, PLACES, TRADES, HEROES)
]


def stories(round: int, count: int) -> list[str]:
    """The prompts of a round, numbered from 0; no two rounds share one, so that no cache can know them."""
    start = round * count
    if start + count > len(_STORIES):
        raise ValueError(f"round {round} of {count} prompts: there are only {len(_STORIES)} stories")
    return _STORIES[start : start + count]
