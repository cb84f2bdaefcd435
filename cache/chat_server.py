"""Chat server: questions to a model behind an OpenAI-compatible server, many at a time."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from concurrent import futures
from typing import Any
from urllib.parse import urlsplit

from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.inquiry import Ask, Reply, ServedModel

# Requests at a time: enough for a server that batches, and few enough for one that queues.
_AT_ONCE = 32

# A reply is short, but waits for its turn in a queue of as many.
_SECONDS = 300

# A server that is busy, or starts again, is asked once more after so many seconds.
_PAUSES = (1, 5, 20)
_PASSING = {408, 429, 500, 502, 503, 504}

# How servers say that a question is too long: OpenAI and vLLM, llama.cpp.
_TOO_LONG = re.compile(r"context[ _](length|size)", re.IGNORECASE)


def find_served(url: str) -> ServedModel:
    """The model that a server names at URL/models, where URL ends in /v1 as a rule; of several, URL#NAME says which.

    A key is taken from the environment variable OPENAI_API_KEY. Raises BadInputError, and CaptureError for a server that
    does not answer.
    """
    base, _, wanted = url.partition("#")
    base = base.rstrip("/")
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise BadInputError(f"{url!r} is no address of a server: expected one like http://localhost:8000/v1")
    found = _request(f"{base}/models")
    try:
        names = [str(model["id"]) for model in found["data"]]
    except (KeyError, TypeError) as error:
        raise CaptureError(f"{base}/models names no models: expected an OpenAI-compatible server") from error
    if wanted and wanted not in names:
        raise BadInputError(f"{base} does not serve {wanted!r}: it has {', '.join(names) or 'no model'}")
    if not wanted and len(names) != 1:
        raise BadInputError(
            f"{base} serves {', '.join(names) or 'no model'}: expected one model, or its name behind the address, like "
            f"{base}#{names[0] if names else 'NAME'}"
        )
    return ServedModel(base, wanted or names[0])


class ChatAsker:
    """A served model is asked: see Asker. Its replies can be made again as far as its server heeds seeds."""

    steps = False

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self._pool = futures.ThreadPoolExecutor(_AT_ONCE, "hiddenlake-ask")
        self._replies: dict[futures.Future[Reply | None], str] = {}

    def ask(self, key: str, ask: Ask, seed: int | None) -> bool:
        self._replies[self._pool.submit(_ask, self.served, ask, seed)] = key
        return True

    def replies(self, wait: bool) -> list[tuple[str, Reply | None]]:
        done, _ = futures.wait(self._replies, None if wait else 0, futures.FIRST_COMPLETED)
        return [(self._replies.pop(reply), reply.result()) for reply in done]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _ask(served: ServedModel, ask: Ask, seed: int | None) -> Reply | None:
    """None where the server says that the question is too long for the model. Raises CaptureError."""
    sampling = ask.sampling
    body: dict[str, Any] = {
        "model": served.name,
        "messages": [{"role": "user", "content": ask.text}],
        "max_tokens": ask.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    body |= {"stop": list(sampling.stop)} if sampling.stop else {}
    body |= {"seed": seed} if seed is not None else {}
    body |= {"top_k": sampling.top_k} if sampling.top_k else {}  # not OpenAI's, but most servers'
    url = f"{served.url}/chat/completions"
    found = _request(url, body)
    if found is None:
        return None
    try:
        [choice] = found["choices"]
        text, usage = choice["message"]["content"] or "", found["usage"]
        return Reply(text, choice["finish_reason"] == "stop", usage["prompt_tokens"], usage["completion_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise CaptureError(
            f"{url} replied {str(found)[:200]!r}: expected one chat completion with its usage"
        ) from error


def _request(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON of a reply, or None where what was asked is too long. Raises CaptureError."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    for pause in (*_PAUSES, None):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=_SECONDS) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            if error.code in (400, 413) and _TOO_LONG.search(said):
                return None
            cause, passing = f"{error.code}: {said.strip()[:200]}", error.code in _PASSING
        except (OSError, http.client.HTTPException) as error:
            cause, passing = str(error), True
        except ValueError as error:
            cause, passing = f"what is not JSON ({error})", False
        if not passing or pause is None or body is None:
            raise CaptureError(
                f"{url} answered {cause}: what was complete is stored, and the same command goes on from there"
            )
        time.sleep(pause)
