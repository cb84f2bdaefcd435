"""The queue: each answer has one worker that lives, and what nobody can compute ends with its cause."""

import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from hiddenlake.cache.identity import Decoding
from hiddenlake.cache.service import clock
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.jobs import Jobs
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.plans import Offer, Plan
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.work import Group, Wanted, Work

IDENTITY = {
    "model": "m", "weights": "sha256:1", "quantization": None, "lora": None, "compute_dtype": "float32",
    "stored_dtype": "float32", "chat_template": None, "position_rules": 1,
}  # fmt: skip
OFFER = Offer("/m", IDENTITY, ("mlp_out",), (0, 1), {"mlp_out": 8, "embed": 8}, "float32", 100, 100, 1000)
PLAN = Plan(("mlp_out",), (0, 1), ("last_q",), None, Decoding(4))
GROUP = Group(PLAN.id, "")
CALLER = Caller("k", "k", frozenset({"read", "compute"}))

# A worker that joins, takes what there is with a lease of so many seconds, and stands there.
WORKER = """
import sys, time
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.work import Work
sys.path.insert(0, sys.argv[3])
from test_work import GROUP, OFFER
work = Work(Database(sys.argv[1]))
work.join("other", OFFER)
print(len(work.take("other", OFFER.id, GROUP, 1000, float(sys.argv[2]))), flush=True)
time.sleep(600)
"""


def wanted(n, start=0):
    return [Wanted(f"key-{i}", (1, 2, 900 + i), None, None, 10) for i in range(start, start + n)]


@pytest.fixture
def work(tmp_path):
    found = Work(Database(tmp_path))
    found.lake = tmp_path
    found.join("me", OFFER)
    return found


@pytest.fixture
def other(work):
    """other(lease) -> a worker in a process of its own that holds all there was."""
    from pathlib import Path

    started = []

    def start(lease):
        command = [sys.executable, "-c", WORKER, str(work.lake), str(lease), str(Path(__file__).parent)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert int(started[-1].stdout.readline()) > 0
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def states(work):
    return work.counts()


def test_what_is_asked_for_twice_is_queued_once(work):
    assert work.add(OFFER, PLAN, "", wanted(3)) == work.add(OFFER, PLAN, "", wanted(3))
    assert states(work) == {"pending": 3} and work.waiting_bytes() == 30
    work.add(OFFER, PLAN, "them", wanted(1))
    work.add(OFFER, replace(PLAN, layers=(0,)), "", wanted(1))
    assert states(work) == {"pending": 5}


def test_no_answer_is_taken_twice(work):
    work.add(OFFER, PLAN, "", wanted(300))

    def take(n):
        mine = Work(Database(work.lake))
        return [one.wanted.key for one in mine.take(f"w{n}", OFFER.id, GROUP, 7, 60)]

    with ThreadPoolExecutor(6) as pool:
        taken = Counter(key for keys in pool.map(take, range(60)) for key in keys)
    assert len(taken) == 300 and set(taken.values()) == {1}
    assert states(work) == {"leased": 300} and work.oldest(OFFER.id) is None


def test_the_oldest_is_taken_first_and_as_it_was_asked_for(work):
    asked = [Wanted("a", (5, 6), (7,), None, 1), Wanted("b", (8,), None, 123, 2), Wanted("c", (9,), (), None, 3)]
    work.add(OFFER, PLAN, "", asked)
    assert work.oldest(OFFER.id) == GROUP and work.plan(GROUP.plan) == PLAN
    assert [one.wanted for one in work.take("me", OFFER.id, GROUP, 2, 60)] == asked[:2]
    assert [one.wanted for one in work.take("me", OFFER.id, GROUP, 2, 60)] == asked[2:]
    assert work.oldest("another model") is None


def test_who_lives_keeps_what_it_has(work):
    work.add(OFFER, PLAN, "", wanted(2))
    work.take("me", OFFER.id, GROUP, 2, 60)
    assert work.reclaim(3) == 0 and states(work) == {"leased": 2}
    work.beat("me", 60, 0.5)
    assert work.workers()[0]["ring"] == 0.5 and work.workers()[0]["holds"] == 2


def test_what_a_dead_worker_had_is_anybodys_at_once(work, other):
    work.add(OFFER, PLAN, "", wanted(4))
    process = other(600)
    assert work.reclaim(3) == 0
    process.kill()
    process.wait()
    assert work.reclaim(3) == 4 and states(work) == {"pending": 4}
    assert [one.attempts for one in work.take("me", OFFER.id, GROUP, 9, 60)] == [1] * 4


def test_a_worker_that_stands_still_is_ended_before_others_go_on(work, other):
    work.add(OFFER, PLAN, "", wanted(4))
    process = other(1.0)
    process.send_signal(signal.SIGSTOP)
    assert work.reclaim(3) == 0 and process.poll() is None
    time.sleep(1.1)
    assert work.reclaim(3) == 4
    assert process.wait(5) == -signal.SIGKILL


def test_what_workers_die_over_fails_in_the_end(work, other):
    [number] = work.add(OFFER, PLAN, "", wanted(1))
    job = Jobs(work._database).add([number], CALLER)
    for attempt in (1, 2):
        process = other(600)
        process.kill()
        process.wait()
        assert work.reclaim(2) == 1
        assert states(work) == ({"pending": 1} if attempt == 1 else {"failed": 1})
    found = Jobs(work._database).get(job, CALLER)
    assert found.state == "failed" and found.causes == ["2 workers ended while they computed it"]
    work.add(OFFER, PLAN, "", wanted(1))
    assert states(work) == {"pending": 1}, "what is asked for anew is tried anew"


def test_a_worker_that_ends_in_order_has_not_died_over_its_work(work):
    work.add(OFFER, PLAN, "", wanted(1))
    for _ in range(3):
        assert [one.attempts for one in work.take("me", OFFER.id, GROUP, 1, 60)] == [0]
        work.leave("me")
        work.join("me", OFFER)


def test_a_lease_is_no_matter_of_the_time_of_day(work, other, monkeypatch):
    work.add(OFFER, PLAN, "", wanted(1))
    other(600)
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
        assert work.reclaim(3) == 0


def test_after_a_boot_work_waits_anew(work, monkeypatch):
    work.add(OFFER, PLAN, "", wanted(2))
    work.take("me", OFFER.id, GROUP, 1, 600)
    with work._database.write() as cursor:
        cursor.execute("UPDATE models SET seen = 0")
    monkeypatch.setattr(clock, "boot", lambda: "another boot")
    monkeypatch.setattr(clock, "started", lambda pid=None: "another process")
    assert work.reclaim(3) == 1 and work.give_up(5.0) == 0
    assert states(work) == {"pending": 2} and work.oldest_wait() < 5.0


def test_nothing_waits_for_ever(work):
    numbers = work.add(OFFER, PLAN, "", wanted(2))
    job = Jobs(work._database).add(numbers, CALLER)
    assert work.give_up(0.05) == 0, "a worker lives"
    time.sleep(0.1)
    assert work.give_up(0.05) == 2
    found = Jobs(work._database).get(job, CALLER)
    assert found.state == "failed" and found.causes == ["no worker of this model came to compute it"]


def test_who_lost_the_lease_can_say_that_it_is_there_but_not_that_it_failed(work):
    work.add(OFFER, PLAN, "", wanted(2))
    one, two = work.take("me", OFFER.id, GROUP, 2, 60)
    work.leave("me")
    work.join("next", OFFER)
    work.take("next", OFFER.id, GROUP, 2, 60)
    work.finish("me", [(one, "capture")], [(two, "it failed")])
    assert states(work) == {"done": 1, "leased": 1}
    assert work.totals()["answers"] == 1 and work.totals()["bytes"] == 10


def test_no_prompt_stays_in_the_files_once_it_is_computed(work):
    canary = tuple(range(700000, 700400))
    work.add(OFFER, PLAN, "", [Wanted("a", canary, None, None, 1), Wanted("b", canary, None, None, 1)])
    written = b", ".join(str(i).encode() for i in canary[100:110])

    def files():
        return b"".join(path.read_bytes() for path in (work.lake / ".hiddenlake").iterdir())

    assert written in files()
    one, two = work.take("me", OFFER.id, GROUP, 2, 60)
    work.finish("me", [(one, "capture")], [(two, "it failed")])
    work._database.tidy()
    assert written not in files() and b"700123" not in files()


def test_a_job_that_is_cancelled_leaves_what_others_want(work):
    jobs = Jobs(work._database)
    first, second = work.add(OFFER, PLAN, "", wanted(3)), work.add(OFFER, PLAN, "", wanted(3, start=2))
    mine, theirs = jobs.add(first, CALLER), jobs.add(second, replace(CALLER, id="other"))
    work.take("me", OFFER.id, GROUP, 1, 60)
    found = jobs.cancel(mine, CALLER)
    assert found.state == "cancelled" and (found.leased, found.pending, found.failed) == (1, 1, 1)
    with pytest.raises(Problem):
        jobs.cancel(theirs, CALLER)
    assert jobs.get(theirs, replace(CALLER, id="other")).pending == 3
    assert [job.id for job in jobs.newest(CALLER, 10)] == [mine]
    assert len(jobs.newest(replace(CALLER, scopes=frozenset({"admin"})), 10)) == 2
