"""vLLM's own dumps: the files `{req_id}.safetensors` that its ExampleHiddenStatesConnector leaves, as a source.

Read from vLLM 0.32's connector and models: `hidden_states` (token, layer id, hidden) in the model's dtype and `token_ids`
(token,). Layer id k is the residual stream after k blocks, before the last norm also for the last: 0 is `embed`, k is
`resid_post` of layer k - 1. The ids of a dump are `eagle_aux_hidden_state_layer_ids` of the run, which the file does not
say; their order in the file is ascending, whatever it was there. A dump has the prompt's tokens, and those of the answer
but the last where its request asked with `include_output_tokens`; which of them were the prompt it does not say either.
"""

import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.embedding import Embedding
from hiddenlake.cache.exchange.importing import BLOCK_BYTES, Progress, no_progress
from hiddenlake.cache.exchange.records import Lines, make_sample, read_fields
from hiddenlake.cache.exchange.tensor_file import TensorFile, inside
from hiddenlake.cache.exchange.values import FLOATS, NAMES, stored_dtype, to_bits
from hiddenlake.cache.pools import Pool
from hiddenlake.cache.positions import POOLED, POOLS, parse_positions, span_of
from hiddenlake.cache.samples import Failure, Sample
from hiddenlake.cache.store.coverage import DTYPES, EMBED, Coverage

_STATES, _IDS = "hidden_states", "token_ids"
SITE = "resid_post"


class VllmDumps:
    """A folder of dumps; see `Source`. Every file's header is read, and checked, when it is made.

    folder : holds `{req_id}.safetensors`.
    layer_ids : vLLM's, ascending: one for each layer of a dump.
    compute_dtype : of the model: that of the dumps.
    samples : a JSONL file, a line a request: `request_id` and `prompt_length`, and the other fields of
        `records.read_fields`; `token_ids` may have one more than the dump, the last of the answer. A request without
        a dump is recorded as failed.
    prompts_only : instead of `samples`: all tokens of every dump are its prompt.
    model : a Hugging Face folder whose embedding table is `embed` where the dumps lack layer id 0; where they have it,
        every row is compared with the table, bit for bit.
    positions : as everywhere; `all` for token level.
    progress : is called with (done, total) while it is checked, in files.
    dtype : as stored; default the dumps' own where a capture can have it, else float32, which holds all exactly.

    Raises BadInputError.
    """

    format = "vllm"
    identity = None

    def __init__(
        self,
        folder: str | Path,
        layer_ids: Sequence[int],
        compute_dtype: str,
        *,
        samples: str | Path | None = None,
        prompts_only: bool = False,
        model: str | Path | None = None,
        positions: str | Sequence[str | int] = "all",
        dtype: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.folder = Path(folder)
        self._ids = list(layer_ids)
        if not self._ids or self._ids != sorted(set(self._ids)) or self._ids[0] < 0 or self._ids[-1] < 1:
            raise BadInputError(
                f"layer ids {self._ids}: expected vLLM's ids, ascending as in its files, each once, and one from 1 on "
                f"(k is the stream after k blocks)"
            )
        if (samples is None) != prompts_only:
            raise BadInputError(
                "a dump does not say where its prompt ends: give either samples, a JSONL file with request_id and "
                "prompt_length, or prompts_only, where no request asked for include_output_tokens"
            )
        self.compute_dtype = compute_dtype
        self._embedding = None if model is None else Embedding(Path(model), compute_dtype)
        if self._ids[0] != 0 and self._embedding is None:
            raise BadInputError(
                f"the dumps have the layer ids {self._ids} and so no embed (id 0), which every capture holds: name the "
                f"model's folder, whose embedding table has it, or dump layer id 0 too"
            )
        if self._embedding and self._embedding.n_layers is not None and self._ids[-1] > self._embedding.n_layers:
            raise BadInputError(f"layer id {self._ids[-1]}: the model has {self._embedding.n_layers} layers")
        names, tokens = parse_positions(positions)
        self.missing: list[Failure] = []
        files = self._files()
        self._lines = None if samples is None else Lines(Path(samples), ("request_id",))
        rows = self._requests(files)
        self.keys = list(rows)
        self._rows = [rows[key] for key in self.keys]
        found, width, self._tokens = self._check_headers(compute_dtype, progress)
        layers = tuple(k - 1 for k in self._ids if k)
        stored = stored_dtype(found, dtype)
        self.coverage = Coverage((SITE,), layers, names, {SITE: width, EMBED: width}, stored, tokens)
        per_row = (len(layers) + 1) * width
        kept = 0 if tokens is None else -(-self._tokens // tokens.every)
        self.elements = (len(self.keys) * len(names) + kept) * per_row
        self.files = len(self.keys)
        self.note = self._note(found)
        self.provenance = {"source": self.folder.resolve().name, "layer_ids": self._ids}

    def _note(self, found: set[str]) -> str:
        said = []
        if self._lines is None:
            said.append("no texts were given: prompts and answers stay empty")
        elif self._lines.ignored:
            said.append(f"fields that are not imported: {', '.join(sorted(self._lines.ignored))}")
        if {self.coverage.dtype} != {NAMES[name] for name in found}:
            said.append(f"stored as {self.coverage.dtype}, exactly")
        if self.missing:
            said.append(f"{len(self.missing)} requests have no dump")
        return "; ".join(said)

    def _files(self) -> dict[str, Path]:
        """Request id -> its dump, in the order of the numbers in the ids."""
        if not self.folder.is_dir():
            raise BadInputError(f"{self.folder} is no folder: expected one of vLLM's dumps, {{req_id}}.safetensors")
        names = [entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".safetensors")]
        for name in names:
            if _is_locked(self.folder / f"{name}.lock"):
                raise BadInputError(f"{self.folder / name} is still being written by vLLM: wait until it is done")
        if not names:
            raise BadInputError(f"{self.folder} holds no *.safetensors: expected vLLM's dumps")
        return {name.removesuffix(".safetensors"): inside(self.folder, name) for name in sorted(names, key=_natural)}

    def _requests(self, files: Mapping[str, Path]) -> dict[str, tuple[Path, int]]:
        """Request id -> (its dump, its row: of the JSONL file, or in order)."""
        if self._lines is None:
            return {key: (path, row) for row, (key, path) in enumerate(files.items())}
        rows: dict[str, tuple[Path, int]] = {}
        lost: set[str] = set()
        for row, line, where in self._lines.scan():
            key = line.get("request_id")
            if not isinstance(key, str) or key in rows or key in lost:
                raise BadInputError(f"{where}: request_id is {key!r}: expected a string that no other line has")
            fields = read_fields(line, where)
            if key in files:
                rows[key] = files[key], row
            else:
                lost.add(key)
                cause = f"{self.folder} has no dump of it: vLLM could not write it, or it was removed"
                self.missing.append(Failure(key, row if fields["index"] is None else fields["index"], cause, 1))
        if without := files.keys() - rows.keys():
            raise BadInputError(f"{self._lines.path} has no line for the request {min(without)!r}, which has a dump")
        return rows

    def _check_headers(self, compute_dtype: str, progress: Progress) -> tuple[set[str], int, int]:
        """(dtypes, hidden size, tokens of all dumps)."""
        dtypes, widths, tokens = set(), set(), 0
        for done, (path, _) in enumerate(self._rows):
            progress(done, len(self._rows))
            with TensorFile(path) as file:
                states, ids = file.tensor(_STATES, FLOATS), file.tensor(_IDS, ("I64", "I32"))
            if len(states.shape) != 3 or ids.shape != states.shape[:1] or 0 in states.shape:
                raise BadInputError(
                    f"{path}: {_STATES} {states.shape} and {_IDS} {ids.shape}: expected (token, layer id, hidden) and "
                    f"(token,), at least one token"
                )
            if states.shape[1] != len(self._ids):
                raise BadInputError(f"{path} has {states.shape[1]} layers, but {len(self._ids)} layer ids: {self._ids}")
            if NAMES[states.dtype] != compute_dtype:
                raise BadInputError(
                    f"{path} is {NAMES[states.dtype]}, but the model's compute_dtype was given as {compute_dtype}: vLLM "
                    f"dumps what the model computes in"
                )
            dtypes.add(states.dtype)
            widths.add(states.shape[2])
            tokens += states.shape[0]
        if len(widths) > 1 or (self._embedding and widths != {self._embedding.width}):
            given = f", and the model's {self._embedding.width}" if self._embedding else ""
            raise BadInputError(f"{self.folder}: hidden sizes {sorted(widths)}{given}: expected dumps of one model")
        return dtypes, widths.pop() if widths else 1, tokens

    def sample(self, number: int) -> Sample:
        path, row = self._rows[number]
        with TensorFile(path) as file:
            ids = file.read(_IDS).tolist()
        if min(ids) < 0 or max(ids) >= 2**31:
            raise BadInputError(f"{path}: {_IDS} from {min(ids)} to {max(ids)}: expected token ids")
        line, where = ({}, str(path)) if self._lines is None else self._lines.read(row)
        fields: dict[str, Any] = read_fields(line, where)
        fields["key"] = self.keys[number]
        if fields["index"] is None:
            fields["index"] = row
        if self._lines is None:
            fields["prompt_length"] = len(ids)
        given = fields["token_ids"]
        if given is None:
            fields["token_ids"] = ids
        elif given[: len(ids)] != ids or len(given) > len(ids) + 1:
            raise BadInputError(
                f"{where}: its {len(given)} token_ids are not the {len(ids)} of {path}, with or without one more"
            )
        lacking = len(fields["token_ids"]) > len(ids)
        if lacking:
            fields["status"] = "the dump lacks the last token, which vLLM never fed"
        elif fields["status"] != "complete":
            raise BadInputError(
                f"{where}: status is {fields['status']!r}, but the dump has all token_ids: leave it out"
            )
        return make_sample(fields, self.coverage, where, lacks_last=lacking)

    def token_count(self, number: int, sample: Sample) -> int:
        return len(self._kept(sample))

    def _kept(self, sample: Sample) -> range:
        """Token indices that are stored."""
        kept = self.coverage.tokens.indices(sample.prompt_length, sample.total_length)
        there = sample.total_length - (sample.status != "complete")
        return kept[:-1] if kept and kept[-1] >= there else kept

    def cells(self, number: int, sample: Sample) -> dict[str, np.ndarray]:
        found: list[dict[str, np.ndarray]] = []
        with TensorFile(self._rows[number][0]) as file:
            for name, token in zip(self.coverage.positions, sample.token_index, strict=True):
                if token == POOLED:
                    found.append(self._pooled(file, number, sample, name))
                else:
                    # an absent position's row is not looked at
                    found.append(self._read(file, sample, range(max(token, 0), max(token, 0) + 1)))
        return {site: np.concatenate([rows[site] for rows in found], axis=-2) for site in (SITE, EMBED)}

    def _pooled(self, file: TensorFile, number: int, sample: Sample, name: str) -> dict[str, np.ndarray]:
        """(layer, 1, width) and (1, width)."""
        span = self._span(number, sample, name)
        how = POOLS[name][0]
        # pooled as a capture pools: in float64, then rounded to what is stored, to nearest even
        bits, kind, _ = DTYPES[self.coverage.dtype]
        pools = {site: Pool([how]) for site in (SITE, EMBED)}
        shapes = {}
        for block in self._blocks(file, sample, span):
            for site, rows in block.items():
                shapes[site] = (*rows.shape[:-2], 1, rows.shape[-1])
                wide = np.ascontiguousarray(rows).view(kind).astype(np.float32)
                pools[site].add(wide.reshape(-1, *rows.shape[-2:]).swapaxes(0, 1).reshape(rows.shape[-2], -1))
        return {site: pool.result(how).astype(kind).view(bits).reshape(shapes[site]) for site, pool in pools.items()}

    def _span(self, number: int, sample: Sample, name: str) -> range:
        window = None
        if POOLS[name][1] == "exact_answer":
            line, where = self._lines.read(self._rows[number][1])
            window = tuple(read_fields(line, where)["exact_answer_tokens"])
        return span_of(name, sample.prompt_length, sample.total_length, window)

    def tokens(self, number: int, sample: Sample, first: int, count: int) -> Iterator[Mapping[str, np.ndarray]]:
        with TensorFile(self._rows[number][0]) as file:
            yield from self._blocks(file, sample, self._kept(sample)[first : first + count])

    def _blocks(self, file: TensorFile, sample: Sample, tokens: range) -> Iterator[dict[str, np.ndarray]]:
        row_bytes = file.tensors[_STATES].nbytes // max(1, file.tensors[_STATES].shape[0])
        step = max(1, BLOCK_BYTES // (row_bytes * max(1, tokens.step)))
        return (self._read(file, sample, tokens[start : start + step]) for start in range(0, len(tokens), step))

    def _read(self, file: TensorFile, sample: Sample, tokens: range) -> dict[str, np.ndarray]:
        """(layer, token, width) and (token, width) of some tokens, at least one."""
        where = f"{file.path}, tokens {tokens[0]} to {tokens[-1]}"
        states = file.read(_STATES, tokens[0], tokens[-1] + 1)[:: tokens.step]
        bits = to_bits(states, self.coverage.dtype, where)
        embed = None if self._ids[0] else bits[:, 0]
        if self._embedding is not None:
            ids = np.array(sample.token_ids[tokens.start : tokens.stop : tokens.step], np.int64)
            table = to_bits(self._embedding.rows(ids, where), self.coverage.dtype, where)
            if embed is not None and not np.array_equal(_plain(embed), _plain(table)):
                bad = int(np.flatnonzero((_plain(embed) != _plain(table)).any(axis=-1))[0])
                raise BadInputError(
                    f"{file.path}: layer id 0 of token {tokens[bad]} is not the embedding of its id {int(ids[bad])}: the "
                    f"dump's rows and token_ids do not belong together, or the model is another one"
                )
            embed = table
        return {SITE: bits[:, self._ids[0] == 0 :].swapaxes(0, 1), EMBED: embed}


def _plain(bits: np.ndarray) -> np.ndarray:
    """Bits that compare as bits."""
    return np.ascontiguousarray(bits).view(np.uint32 if bits.itemsize == 4 else np.uint16)


def _natural(name: str) -> list[Any]:
    """Orders `req-2` before `req-10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]


def _is_locked(lock: Path) -> bool:
    """Whether vLLM holds a dump's lock. The file stays when the dump is done."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
