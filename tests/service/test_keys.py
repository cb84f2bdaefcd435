"""Keys: made, listed and revoked by command; kept as digests alone; compared with all there are."""

import base64
import os
import re
import secrets
import stat
import threading
import time

import httpx
import pytest

from hiddenlake.cache.service import keys as keys_module
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.keys import SCOPES, Keys

from .conftest import add_key, hiddenlake, problem


def files(lake):
    return sorted((lake / ".hiddenlake").iterdir())


def test_add_list_and_revoke(lake):
    key = add_key(lake, "notebook")
    assert re.fullmatch(r"hl_[A-Za-z0-9_-]{43}", key)
    admin = add_key(lake, "ops", "admin", "them")
    assert admin != key
    listed = hiddenlake("keys", "ls", lake, "--json").stdout
    import json

    rows = json.loads(listed)
    assert [(row["name"], row["scopes"], row["tenant"]) for row in rows] == [
        ("notebook", ["read"], None), ("ops", ["read", "compute", "admin"], "them"),
    ]  # fmt: skip
    assert key not in listed and admin not in listed and "hash" not in rows[0]
    table = hiddenlake("keys", "ls", lake)
    assert "notebook" in table.stdout and key not in table.stdout
    assert hiddenlake("keys", "revoke", lake, rows[0]["id"]).returncode == 0
    again = hiddenlake("keys", "revoke", lake, rows[0]["id"])
    assert again.returncode and "no key has the id" in again.stderr and "Traceback" not in again.stderr
    assert [row["revoked"] is None for row in json.loads(hiddenlake("keys", "ls", lake, "--json").stdout)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "x" * 65, "a/b", "../x", "é", "a\nb", "٣"])
@pytest.mark.parametrize("which", ["name", "tenant"])
def test_names_that_are_none(lake, which, name):
    keys = Keys(Database(lake))
    with pytest.raises(Exception, match=which):
        keys.add(**({"name": "x"} | {which: name}))
    with pytest.raises(Exception, match="scope"):
        keys.add("x", "root")
    assert keys.list() == []


def test_only_digests_are_kept(lake):
    """In the file, its log and its index, while they are open."""
    database = Database(lake)
    key = Keys(database).add("x")
    for file in files(lake):
        data = file.read_bytes()
        for secret in (key, key[3:], key.encode().hex(), base64.b64encode(key.encode()).decode()):
            assert secret.encode() not in data, file
    assert len(files(lake)) == 3


def test_the_files_are_the_users_own(lake):
    umask = os.umask(0)
    try:
        (lake / ".hiddenlake").mkdir(mode=0o777)
        (lake / ".hiddenlake" / "service.sqlite").touch(0o666)
        Keys(Database(lake)).add("x")
    finally:
        os.umask(umask)
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert mode(lake / ".hiddenlake") == 0o700
    assert {file.name: mode(file) for file in files(lake)} == {
        "service.sqlite": 0o600, "service.sqlite-shm": 0o600, "service.sqlite-wal": 0o600,
    }  # fmt: skip


def test_a_database_that_leads_elsewhere_or_is_none(lake, tmp_path):
    (lake / ".hiddenlake").mkdir()
    (lake / ".hiddenlake" / "service.sqlite").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="service.sqlite"):
        Database(lake)
    assert not (tmp_path / "elsewhere").exists()
    (lake / ".hiddenlake" / "service.sqlite").unlink()
    (lake / ".hiddenlake" / "service.sqlite").write_bytes(secrets.token_bytes(8192))
    with pytest.raises(Exception, match="cannot be used.*captures stay as they are"):
        Database(lake)


@pytest.mark.parametrize("scope", SCOPES)
def test_scopes_include_those_before_them(lake, scope):
    keys = Keys(Database(lake))
    caller = keys.caller(keys.add("x", scope))
    assert [caller.may(one) for one in SCOPES] == [SCOPES.index(one) <= SCOPES.index(scope) for one in SCOPES]
    assert not caller.may("root") and not caller.may("")


def test_a_key_is_compared_with_all_there_are(lake, monkeypatch):
    """Whether it is the first, the last or none: always as many comparisons, none of which ends early."""
    keys = Keys(Database(lake))
    known = [keys.add(f"k{i}") for i in range(5)] + [keys.add_temporary()]
    calls = []

    monkeypatch.setattr(keys_module.secrets, "compare_digest", lambda a, b: calls.append((a, b)) or a == b)
    for key in [*known, "", None, "hl_", "x" * 1000, "\udcff"]:
        calls.clear()
        found = keys.caller(key)
        assert (found is not None) == (key in known)
        assert len(calls) == len(known) and len({len(a) for pair in calls for a in pair}) == 1


def test_keys_of_threads_that_came_and_went(lake):
    """What one connection remembers of the database's version never stands for another's."""
    keys = Keys(Database(lake))
    key, other = keys.add("a"), keys.add("b")
    seen = []

    def ask():
        seen.append(keys.caller(key) is not None)
        keys._database.close()

    for turn in range(20):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        if turn == 9:
            Keys(Database(lake)).revoke(next(row["id"] for row in keys.list() if row["name"] == "a"))
    assert seen == [True] * 10 + [False] * 10
    assert keys.caller(other)


# In a running server.


def test_every_way_to_send_a_key(server):
    ask = lambda **kwargs: httpx.get(f"{server.url}/v1/captures", **kwargs, timeout=60)
    basic = base64.b64encode(f"anybody:{server.key}".encode()).decode()
    for value in (f"Bearer {server.key}", f"bearer {server.key}", f"Basic {basic}", f"Bearer  {server.key}"):
        assert ask(headers={"Authorization": value}).status_code == 200
    assert ask(auth=("", server.key)).status_code == 200
    wrong = [
        {"headers": {"Authorization": value}}
        for value in (
            server.key,
            f"Token {server.key}",
            f"Bearer {server.key}x",
            f"Bearer {server.key[:-1]}",
            "Bearer",
            "Basic",
        )
    ]
    wrong += [{"params": {name: server.key}} for name in ("key", "api_key", "token", "access_token", "authorization")]
    wrong += [{"headers": {"X-Api-Key": server.key}}, {"cookies": {"key": server.key}}, {"auth": (server.key, "")}]
    for kwargs in wrong:
        response = ask(**kwargs)
        problem(response, 401, "no_key")
        assert server.key not in response.text + str(response.headers)
    response = ask(headers={"Authorization": "Bearer hl_CANARY"})
    assert "CANARY" not in response.text + str(response.headers) + server.text()
    assert server.key not in server.text()


def test_a_key_counts_and_ends_at_once(server):
    """Made and revoked by other processes."""
    key = add_key(server.lake, "short")
    ask = lambda: (
        httpx.get(f"{server.url}/v1/captures", headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code
    )
    assert ask() == 200
    [id] = [row["id"] for row in Keys(Database(server.lake)).list() if row["name"] == "short"]
    assert hiddenlake("keys", "revoke", server.lake, id).returncode == 0
    assert ask() == 401


def test_without_a_key_it_does_not_listen_beyond_this_machine(lake, serve):
    for host in ("0.0.0.0", "::", "localhost.example", "127.0.0.1.example"):
        done = hiddenlake("serve", lake, "--host", host, "--port", "0")
        assert (
            done.returncode and "no key" in done.stderr and "keys add" in done.stderr and "Traceback" not in done.stderr
        )
    key = add_key(lake, "x")
    one = serve(lake, "--host", "0.0.0.0", key=key)
    url = one.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/captures", timeout=60).status_code == 401
    assert httpx.get(f"{url}/v1/captures", headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code == 200
    assert "key, for this run" not in one.text()


def test_a_revoked_key_is_none(lake):
    keys = Keys(Database(lake))
    keys.add("x")
    keys.revoke(keys.list()[0]["id"])
    done = hiddenlake("serve", lake, "--host", "0.0.0.0", "--port", "0")
    assert done.returncode and "no key" in done.stderr


def test_the_key_of_one_run(lake, serve):
    """Printed once, kept nowhere, and gone with the process."""
    one = serve(lake)
    [key] = set(re.findall(r"hl_[A-Za-z0-9_-]{43}", one.text()))
    assert one.text().count(key) == 1
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{one.url}/v1/captures", headers=headers, timeout=60).status_code == 200
    for file in files(lake):
        assert key.encode() not in file.read_bytes()
    one.stop()
    other = serve(lake)
    assert key not in other.text()
    assert httpx.get(f"{other.url}/v1/captures", headers=headers, timeout=60).status_code == 401


def test_an_address_of_this_machine_that_is_not_the_usual_one(lake, serve):
    one = serve(lake, "--host", "127.0.0.5")
    key = re.search("hl_[A-Za-z0-9_-]+", one.text())[0]
    assert one.url.startswith("http://127.0.0.5:")
    assert (
        httpx.get(f"{one.url}/v1/captures", headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code == 200
    )


@pytest.mark.slow
def test_how_long_a_wrong_key_takes_says_nothing(lake):
    """As long as a right one takes, within what a machine that is shared allows."""
    keys = Keys(Database(lake))
    known = [keys.add(f"k{i}") for i in range(200)]

    def seconds(key):
        best = float("inf")
        for _ in range(50):
            start = time.perf_counter()
            keys.caller(key)
            best = min(best, time.perf_counter() - start)
        return best

    for _ in range(5):
        found = [seconds(key) for key in (known[0], known[-1], known[0][:-1] + "x", "hl_" + "a" * 43)]
        if max(found) < 1.5 * min(found):
            return
    raise AssertionError(found)
