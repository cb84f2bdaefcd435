"""Encoder: texts to token ids, by the models' own tokenizers, in a process of its own: they import torch, a server does not."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hiddenlake.cache.errors import BadInputError, StoreError


class Encoder:
    """Starts its process when it is first asked. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def encode(self, model: str, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """(prompt, given) of each input, as {"prompt": ids, "given": ids or None}.

        model : its path.  inputs : each with `messages` or `text`, and perhaps `answer`.

        Raises BadInputError for what the model's template refuses, StoreError where its tokenizer cannot be read.
        """
        found = self._ask({"model": model, "inputs": list(inputs)})
        if "error" in found:
            raise (BadInputError if found["kind"] == "input" else StoreError)(found["error"])
        return found["ids"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            for attempt in (0, 1):
                if self._process is None or self._process.poll() is not None:
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", "hiddenlake.cache.service.encoder"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                try:
                    self._process.stdin.write(json.dumps(question) + "\n")
                    self._process.stdin.flush()
                    if line := self._process.stdout.readline():
                        return json.loads(line)
                except (BrokenPipeError, ValueError):
                    pass
                self._stop()
                if attempt:
                    raise StoreError("the process that makes token ids of texts has ended twice: send `token_ids`")
        raise AssertionError

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()
            self._process = None


def encode(model: Any, item: dict[str, Any]) -> dict[str, Any]:
    """One input's ids. model : a Model. Raises BadInputError."""
    tokenizer = model.tokenizer
    if "messages" in item:
        if model.chat_template is None:
            raise BadInputError("this model has no chat template: send `text` or `token_ids`")
        try:
            text = tokenizer.apply_chat_template(item["messages"], add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it likes, and may quote the messages
            raise BadInputError(
                f"the model's chat template refuses these messages ({type(error).__name__}): check their roles and order"
            ) from error
        # the template already holds the special tokens
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = tokenizer(item["text"])["input_ids"]
    given = tokenizer(item["answer"], add_special_tokens=False)["input_ids"] if item.get("answer") is not None else None
    return {"prompt": list(prompt), "given": None if given is None else list(given)}


def _answer(models: dict[str, Any], path: str, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """models : that were read, by path. No answer quotes an input, or says where a model lies."""
    from hiddenlake.cache.model import load_model

    try:
        if path not in models:
            models[path] = load_model(path)
    except Exception as error:
        print(json.dumps({"event": "no tokenizer", "error": str(error)}), file=sys.stderr)
        what = f"the model's tokenizer cannot be read here ({type(error).__name__}): send `token_ids`"
        return {"error": what, "kind": "model"}
    try:
        return {"ids": [encode(models[path], item) for item in inputs]}
    except BadInputError as error:
        return {"error": str(error), "kind": "input"}
    except Exception as error:
        return {"error": f"the model's tokenizer refuses an input ({type(error).__name__})", "kind": "input"}


def main() -> None:
    """A line of JSON in, a line of JSON out, until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr
    models: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        out.write(json.dumps(_answer(models, question["model"], question["inputs"])) + "\n")
        out.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt, BrokenPipeError):
        main()
