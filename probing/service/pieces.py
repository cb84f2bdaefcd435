"""Pieces: the text of each of a sample's tokens, where the model's tokenizer lies on this machine."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from hiddenlake.cache.demo_model import default_folder
from hiddenlake.cache.service.lake import NAME


class Pieces(BaseModel):
    """The text of each of a sample's tokens."""

    pieces: list[str] | None = Field(description="One for each token id; null where no tokenizer gives them.")
    reason: str | None = Field(description="Why there are none.")


def pieces(token_ids: list[int], prompt_length: int, prompt: str, answer: str, model: str, lake: Path) -> Pieces:
    """The tokens' texts, by the model's own tokenizer if it lies on this machine, and only if they make up the stored texts.

    The tokenizer is looked for in LAKE/tokenizers/MODEL/tokenizer.json, among hiddenlake's own models, and in Hugging
    Face's cache. Nothing is loaded from the network.
    """
    try:
        tokenizer = _tokenizer(model, lake)
    except ImportError:
        return Pieces(pieces=None, reason="the package `tokenizers` is not installed on the server")
    if tokenizer is None:
        return Pieces(pieces=None, reason=f"the server has no tokenizer of {model}: it may lie in LAKE/tokenizers/")
    found = _decode(tokenizer, token_ids)
    before, after = "".join(found[:prompt_length]), "".join(found[prompt_length:])
    # Special tokens may stand before a prompt and behind an answer, in whose texts they do not.
    if not before.endswith(prompt) or answer.strip() not in after:
        return Pieces(pieces=None, reason=f"the server's tokenizer of {model} does not give the stored texts")
    return Pieces(pieces=found, reason=None)


def _decode(tokenizer: Any, ids: list[int]) -> list[str]:
    """A text a token. Where several tokens make up one character, the last of them has it."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, id) or "" for id in ids]


def _tokenizer(model: str, lake: Path) -> Any:
    """Raises ImportError."""
    from tokenizers import Tokenizer  # noqa: F401 - said before a file is looked for

    return next((_load(file) for file in _places(model, lake) if file.is_file()), None)


@lru_cache(maxsize=4)
def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _places(model: str, lake: Path) -> list[Path]:
    # A model's name stands in a capture, which may be anybody's: each part is looked at before it becomes a path's.
    parts = model.split("/")
    if len(parts) > 2 or not all(NAME.fullmatch(part) for part in parts):
        return []
    folders = [lake / "tokenizers" / Path(*parts)]
    if default_folder().name == model:
        folders.append(default_folder())
    files = [folder / "tokenizer.json" for folder in folders]
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "tokenizer.json")
    except (ImportError, ValueError):  # it is not installed, or this is no name of the hub's
        return files
    return [*files, Path(cached)] if isinstance(cached, str) else files
