"""Fuzzing that is led by coverage: `python fuzzing.py root|commit|claim|requests LAKE [libFuzzer's options]`.

What anybody may have stored, or may send: read, or refused in words. Any other error ends the process with a trace of it, and
with a file of the bytes that led to it.
"""

import asyncio
import copy
import json
import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris
import numpy as np

with atheris.instrument_imports(include=["hiddenlake"]):
    from hiddenlake.cache.errors import HiddenlakeError
    from hiddenlake.cache.service.app import make_app
    from hiddenlake.cache.service.serving import make_parts
    from hiddenlake.cache.service.settings import load_settings
    from hiddenlake.cache.store.backend import open_backend
    from hiddenlake.cache.store.claims import read_claim
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.cache.store.signing import sign
    from hiddenlake.probing.service.routers import make_routers

FILES = {"root": "zarr.json", "commit": "commits/0.json", "claim": "claims/0"}
PROBLEM = {"type", "message", "remedy", "request_id"}

ACTIVATIONS, SAMPLES, TOKENS, RANGE, READ, RESOLVE = range(6)

# What is right, to begin with. A byte in front of it says which of these it is.
REQUESTS = {
    ACTIVATIONS: [b"site=resid_post&layer=3&position=last_q&dtype=float32&format=raw&check=false", b"site=embed&position=-%31"],
    SAMPLES: [b"label=judge&value=0.5&offset=1&limit=5", b"text=a+b&limit=2", b"key=key-0003"],
    TOKENS: [b"id=3&captured=true&limit=4"],
    RANGE: [b"bytes=0-9", b"bytes=-5", b"bytes=7-", b"bytes=0-1,3-4"],
    READ: [
        b'{"capture": "both", "site": "resid_post", "layers": [0, 3], "tokens": [0, -1], "samples": ["key-0003", 1]}',
        b'{"capture": "cells", "site": "mlp_act", "positions": ["last_q", "-1"], "format": "raw", "check": false}',
        b'{"capture": "tokens", "site": "embed", "tokens": "all", "samples": [0], "dtype": "float32"}',
    ],
    RESOLVE: [
        b'{"model": "m", "inputs": [{"text": "a"}, {"messages": [{"role": "user", "content": "b"}]}], "sites": ["mlp_out"]}',
        b'{"inputs": [{"token_ids": [1, 2], "answer_ids": [3]}], "generation": null, "layers": [0], "positions": ["last_q"]}',
        b'{"inputs": [{"text": "a"}], "generation": {"max_new_tokens": 4, "temperature": 0.5, "samples": 2, "stop": ["x"]}}',
    ],
}  # fmt: skip

ODD = (
    None, True, 0, 1, -1, 2**31, 2**64, 10**40, 0.5, float("nan"), float("inf"), "", "x", "../..", "\0", "\ud800", [], {}, [None],
    [[]], {"": None}, ["a"] * 1000, "x" * 10_000,
)  # fmt: skip


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """One part of a JSON document changed, which leaves it one; otherwise bytes, as libFuzzer does."""
    chance = random.Random(seed)
    try:
        document = json.loads(data[1:])
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not document or chance.random() < 0.2:
        return atheris.Mutate(data, most)
    owner, name = _place(document, chance)
    how = chance.random()
    if how < 0.2:
        del owner[name]
    elif how < 0.4:
        other, elsewhere = _place(document, chance)
        owner[name] = copy.deepcopy(other[elsewhere])
    elif how < 0.6 and isinstance(owner[name], int):
        owner[name] += chance.choice((-1, 1, 1 << chance.randrange(70), -(1 << chance.randrange(70))))
    else:
        owner[name] = chance.choice(ODD)
    return (data[:1] + json.dumps(document).encode())[:most]


def _place(document: dict, chance: random.Random) -> tuple[Any, Any]:
    """(dict or list, name or index) of something in a document, at any depth alike."""
    owner: Any = document
    while True:
        name = chance.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        if not isinstance(owner[name], dict | list) or not owner[name] or chance.random() < 0.3:
            return owner, name
        owner = owner[name]


class Stored:
    """One of a capture's files holds anything, with a checksum that is right if it can have one."""

    def __init__(self, lake: Path, name: str) -> None:
        self.folder = lake / "both"
        self.file = self.folder / name
        self.whole = self.file.read_bytes()

    def seeds(self) -> Iterator[bytes]:
        yield b"\0" + self.whole
        with suppress(KeyError):
            yield b"\1" + json.dumps(json.loads(self.whole)["attributes"]["hiddenlake"]).encode()

    def __call__(self, data: bytes) -> None:
        self.file.write_bytes(self._signed(data[1:], facts=data[:1] == b"\1"))
        try:
            with suppress(HiddenlakeError):
                read_claim(open_backend(self.folder), "claims/0")
            with suppress(HiddenlakeError):
                self._read()
        finally:
            self.file.write_bytes(self.whole)

    def _signed(self, raw: bytes, facts: bool) -> bytes:
        """facts : whether these are a root's own attributes."""
        try:
            found = json.loads(raw)
            if isinstance(found, dict):
                found.pop("crc32c", None)
                found = sign(found)
            if facts:
                document = json.loads(self.whole)
                document["attributes"]["hiddenlake"] = found
                found = document
            return json.dumps(found).encode()
        except (ValueError, RecursionError):
            return raw

    def _read(self) -> None:
        capture = open_capture(self.folder)
        snapshot = capture.snapshot
        capture.samples()
        for site, file in snapshot.layout.files.items():
            snapshot.read_cells(site, [[0]] * len(file.outer), np.arange(min(len(capture), 2)), "float32")


class Requests:
    """What comes behind the gate: a query, a range, a body."""

    def __init__(self, lake: Path) -> None:
        settings = load_settings({"max_wait": "0.01", "max_read": "8KiB", "log_level": "error"})[0]
        parts = make_parts(lake, settings)
        self.key = parts.keys.add("fuzzing", "admin", None).encode()
        self.app = make_app(parts, make_routers(lake))
        self.loop = asyncio.new_event_loop()
        self.file = f"/v1/zarr/cells/resid_post/{min((lake / 'cells' / 'resid_post').glob('c*')).name}"

    def seeds(self) -> Iterator[bytes]:
        for kind, texts in REQUESTS.items():
            for text in texts:
                yield bytes([kind]) + text

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        kind, text = data[0] % len(REQUESTS), data[1:]
        status, body = self.loop.run_until_complete(self._ask(kind, text))
        assert status < 500, (status, body)
        assert status < 400 or json.loads(body).keys() >= PROBLEM, (status, body)
        if text in REQUESTS[kind]:  # but there is no model here
            assert status == 404 if kind == RESOLVE else status < 300, (text, status, body)

    async def _ask(self, kind: int, text: bytes) -> tuple[int, bytes]:
        path = {
            ACTIVATIONS: "/v1/captures/cells/activations", SAMPLES: "/v1/captures/cells/samples",
            TOKENS: "/v1/captures/both/tokens", RANGE: self.file, READ: "/v1/activations:read", RESOLVE: "/v1/activations:resolve",
        }[kind]  # fmt: skip
        posted = kind in (READ, RESOLVE)
        headers = [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer " + self.key)]
        if kind == RANGE:
            headers.append((b"range", text.translate(None, b"\r\n\0")))
        if posted:
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST" if posted else "GET",
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "headers": headers,
            "query_string": text if kind in (ACTIVATIONS, SAMPLES, TOKENS) else b"", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }  # fmt: skip
        asked = [{"type": "http.request", "body": text if posted else b"", "more_body": False}]
        answered: list[dict] = []

        async def receive() -> dict:
            if not asked:
                await asyncio.Event().wait()
            return asked.pop()

        async def send(message: dict) -> None:
            answered.append(message)

        await self.app(scope, receive, send)
        assert answered[0]["type"] == "http.response.start"
        return answered[0]["status"], b"".join(message.get("body", b"") for message in answered[1:])


def main() -> None:
    name, lake, *options = sys.argv[1:]
    target = Stored(Path(lake), FILES[name]) if name in FILES else Requests(Path(lake))
    corpus = Path(lake).parent / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(corpus)], target, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
