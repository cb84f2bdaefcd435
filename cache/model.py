"""Model: what must be known of a model before it is loaded: shape, tokenizer, and which weights it has."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError, CaptureError, UnknownNameError
from hiddenlake.cache.families import Family, family_of
from hiddenlake.cache.identity import digest
from hiddenlake.cache.quantization import scheme_of

# What engines compute in, and bytes of an element.
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Model:
    """A causal language model, without its weights.

    path : hub id or local folder, as the engines take it.
    widths : kind of width -> elements, as in `Site.width`; without `d_mlp` where the family has none.
    context : most tokens that a sequence may have.  vocabulary : token ids are below it.
    quantization : what its quantisation is called (see quantization.py), or None.
    end_ids : tokens that end an answer.
    weights : the hub's commit, or `sha256:` and the hash of the local weight files.
    """

    path: str
    name: str
    weights: str
    family: Family
    n_layers: int
    widths: dict[str, int]
    context: int
    vocabulary: int
    dtype: str
    quantization: str | None
    end_ids: tuple[int, ...]
    tokenizer: Any

    @property
    def chat_template(self) -> str | None:
        """Hash of the chat template, or None for a base model."""
        template = self.tokenizer.chat_template
        return digest(template) if template else None

    @property
    def itemsize(self) -> int:
        """Bytes of an element of dtype."""
        return DTYPES[self.dtype]

    def encode(self, question: str) -> tuple[str, tuple[int, ...]]:
        """(prompt text, token ids) of one user turn.

        A model with a chat template gets it with the generation prompt; a base model gets the plain text.
        """
        if self.chat_template is None:
            return question, tuple(self.tokenizer(question)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        # the template already holds the special tokens
        return text, tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Any) -> str:
        """Text of some ids, special tokens kept: offsets in it belong to tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode_answer(self, ids: Any) -> str:
        """Text of an answer as a reader sees it, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_model(path: str | os.PathLike[str], dtype: str | None = None) -> Model:
    """Read a model's config and tokenizer, and identify its weights. Loads no weights.

    path : a Hugging Face folder, or a hub id (which must be in the local hub cache, or reachable).
    dtype : `bfloat16`, `float16` or `float32`; default the checkpoint's own.

    Raises BadInputError when there is no such model or its dtype cannot be stored, UnknownNameError for an
    architecture, variant or quantisation that is not supported, CaptureError without transformers.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    except ImportError as error:
        raise CaptureError(
            f"models are read with transformers, which cannot be imported ({error}): install `hiddenlake[vllm]` or "
            f"`hiddenlake[transformers]`"
        ) from error
    path = str(path)
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInputError(
            f"model {path!r} could not be read ({first}): expected a Hugging Face folder with config.json and "
            f"a tokenizer, or the id of a model on the hub; `hiddenlake demo-model` prints one that needs no hub"
        ) from error
    family = family_of(getattr(config, "architectures", None))
    family.check_config(config)
    checkpoint = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype = dtype or checkpoint
    if dtype not in DTYPES:
        raise BadInputError(
            f"dtype {dtype} cannot be stored: expected one of {', '.join(DTYPES)}; pass --dtype to choose one"
        )
    quantization = _quantization(config, family)
    if quantization is not None and dtype != "bfloat16":
        raise BadInputError(f"quantised weights were not tested with {dtype}: pass --dtype bfloat16")
    try:
        end = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        end = config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    local = Path(path).is_dir()
    return Model(
        path=path,
        name=Path(path).resolve().name if local else path,
        weights=hash_weights(Path(path)) if local else _hub_commit(path, config),
        family=family,
        n_layers=config.num_hidden_layers,
        widths=family.widths(config),
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        dtype=dtype,
        quantization=quantization,
        end_ids=tuple(ends),
        tokenizer=tokenizer,
    )


def _quantization(config: Any, family: Family) -> str | None:
    """What the checkpoint's quantisation is called, or None. Raises UnknownNameError for one that was not tested."""
    # the second name is an older one
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if found is None:
        return None
    if not family.adapted:
        raise UnknownNameError(
            f"quantised weights were not tested in the family {family.name}: use the unquantised checkpoint"
        )
    return scheme_of(found if isinstance(found, dict) else found.to_dict())


def _hub_commit(path: str, config: Any) -> str:
    commit = getattr(config, "_commit_hash", None)
    if not commit:
        raise BadInputError(
            f"the hub commit of model {path!r} is not known, so its activations could not be told from another "
            f"revision's: download the model and pass its folder"
        )
    return commit


def hash_weights(folder: Path, config: str = "config.json") -> str:
    """`sha256:` and the hash over the (name, size, SHA-256) of a folder's weight files and its config.

    Hashes of single files are remembered by (path, size, mtime) under the user's cache folder, since a 70B
    model takes minutes to read.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder} is no folder: expected one with {config} and weight files")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf") or p.name == config)
    if not any(p.suffix != ".json" for p in files):
        raise BadInputError(f"{folder} holds no weight files: expected *.safetensors or *.bin beside {config}")
    memory_path = cache_folder() / "weight-hashes.json"
    try:
        memory = json.loads(memory_path.read_text())
    except (OSError, ValueError):
        memory = {}
    stamps = {p: f"{p.resolve()}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files}
    missing = [p for p in files if stamps[p] not in memory]
    if missing:
        with ThreadPoolExecutor() as pool:
            memory.update(zip((stamps[p] for p in missing), pool.map(_hash_file, missing), strict=True))
        memory_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory_path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(memory))
        temporary.replace(memory_path)
    return "sha256:" + digest([[p.name, p.stat().st_size, memory[stamps[p]]] for p in files])


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where hiddenlake keeps what it can make again: $HIDDENLAKE_CACHE, else ~/.cache/hiddenlake."""
    return Path(os.environ.get("HIDDENLAKE_CACHE") or Path.home() / ".cache" / "hiddenlake")
