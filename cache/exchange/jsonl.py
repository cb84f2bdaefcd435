"""safetensors + JSONL: a line a sample, which names the tensors that hold its activations, as a source.

    {"key": "q-17", "token_ids": [1, 5, 9, 2], "prompt_length": 3, "prompt": "...", "answer": "...", "correct": true,
     "activations": {"resid_post": {"file": "a.safetensors", "tensor": "h", "row": 17}, "embed": {...}},
     "tokens": {"resid_post": {"file": "t/{layer}.safetensors", "tensor": "h", "rows": [120, 124]}, "embed": {...}}}

`activations` are cells: (layer, position, width), or with `row` that row of a tensor with one more axis in front; `tokens`
are the stored tokens: `rows` of (token, layer, width). Where `file` or `tensor` has `{layer}`, each layer has a tensor of
its own, and the layer axis is left out, as it is for sites without layers. Files lie in the folder of the JSONL file.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.embedding import Embedding
from hiddenlake.cache.exchange.importing import BLOCK_BYTES, Progress, no_progress
from hiddenlake.cache.exchange.records import Lines, make_sample, read_fields
from hiddenlake.cache.exchange.tensor_file import Tensor, TensorFile, inside
from hiddenlake.cache.exchange.values import FLOATS, stored_dtype, to_bits
from hiddenlake.cache.positions import POOLS, parse_positions
from hiddenlake.cache.samples import Failure, Sample
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.coverage import EMBED, Coverage

# Files that are kept open: a sample of many layers may have a file for each.
_OPEN_FILES = 256


@dataclass(frozen=True, slots=True)
class Reference:
    """Where one site's activations of one sample lie. layers : None where they are not split by layer.

    first, last : rows along the first axis, or None for a whole tensor without such an axis.
    """

    file: str
    tensor: str
    first: int | None
    last: int | None
    layers: tuple[int, ...] | None

    def places(self) -> list[tuple[str, str]]:
        """(file, tensor) of each layer, or the only one."""
        if self.layers is None:
            return [(self.file, self.tensor)]
        return [(self.file.replace("{layer}", str(n)), self.tensor.replace("{layer}", str(n))) for n in self.layers]


class TensorFiles:
    """The safetensors files of a folder, opened when they are needed; the last few hundred stay open."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: set[str] = set()
        self._open: OrderedDict[str, TensorFile] = OrderedDict()

    def get(self, name: str) -> TensorFile:
        """Raises BadInputError for a name that leads out of the folder."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        file = TensorFile(inside(self.root, name))
        self.names.add(name)
        self._open[name] = file
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class JsonlSource:
    """A JSONL file and the safetensors files that it names; see `Source`. All of it is checked when it is made.

    path : the JSONL file.
    model : a Hugging Face folder whose embedding table is `embed` where the lines have none, computed in
        `compute_dtype`.
    layers : 0-based blocks, ascending, in the order of the tensors' layer axis; () where no site has layers.
    positions : names along the tensors' position axis, and `all` (`all_generated/8`, ...) where `tokens` are given.
    progress : is called with (done, total) while it is checked, in bytes.
    dtype : as stored; default the tensors' own where they have one, else float32, which holds all exactly.

    Raises BadInputError, UnknownNameError for a site or a position that does not exist.
    """

    format = "jsonl"
    identity = None

    def __init__(
        self,
        path: str | Path,
        layers: Sequence[int],
        positions: str | Sequence[str | int],
        *,
        model: str | Path | None = None,
        compute_dtype: str | None = None,
        dtype: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        path = Path(path)
        if model is not None and compute_dtype is None:
            raise BadInputError("compute_dtype is missing: it says to what the model's embeddings are rounded")
        self.compute_dtype = compute_dtype
        self._embedding = None if model is None else Embedding(Path(model), compute_dtype)
        self._check_all(
            Lines(path, ("activations", "tokens")), TensorFiles(path.parent), layers, positions, dtype, progress
        )

    def _check_all(
        self,
        lines: Lines,
        files: TensorFiles,
        layers: Sequence[int],
        positions: str | Sequence[str | int],
        dtype: str | None,
        progress: Progress,
    ) -> None:
        path, self._files, self._lines = lines.path, files, lines
        self.provenance = {"source": path.name}
        self._layers = tuple(layers)
        self._names, self._kept = parse_positions(positions)
        if self._embedding and (pooled := [name for name in self._names if name in POOLS]):
            raise BadInputError(
                f"{', '.join(pooled)}: a pooled embed is not in the model's table: give embed in the lines"
            )
        self.missing: Sequence[Failure] = ()
        widths: dict[str, int] = {}
        dtypes: set[str] = set()
        elements = 0
        keys: dict[str, int] = {}
        for row, line, where in self._lines.scan():
            fields = read_fields(line, where)
            key = fields["key"]
            if key is None or key in keys:
                raise BadInputError(f"{where}: key is {key!r}: expected a string that no other line has")
            keys[key] = row
            elements += self._check(line, fields, where, widths, dtypes)
            progress(*lines.progress)
        if not keys:
            raise BadInputError(f"{path} has no lines: expected one a sample")
        if self._embedding is not None:
            widths[EMBED] = self._embedding.width
        self.keys = list(keys)
        sites = tuple(site for site in SITES if site in widths and site != EMBED)
        try:
            self.coverage = Coverage(sites, self._layers, self._names, widths, stored_dtype(dtypes, dtype), self._kept)
        except ValueError as error:
            raise BadInputError(f"{path}: {error}") from error
        # what every line has to fit, now that it is known
        for number in range(len(self.keys)):
            self.sample(number)
        self.elements = elements
        self.files = len(self._files.names)
        ignored = ", ".join(sorted(self._lines.ignored))
        self.note = f"fields that are not imported: {ignored}" if ignored else ""

    def _check(
        self, line: Mapping[str, Any], fields: Mapping[str, Any], where: str, widths: dict[str, int], dtypes: set[str]
    ) -> int:
        """Check what a line names. Returns its elements. widths, dtypes : grow by what the first line has."""
        elements = 0
        for kind, wanted in (("activations", bool(self._names)), ("tokens", self._kept is not None)):
            references = self._references(line, kind, where)
            if wanted != bool(references):
                raise BadInputError(
                    f"{where}: {kind} {'are missing' if wanted else 'are given'}, but the positions are "
                    f"{', '.join([*self._names, *([str(self._kept)] if self._kept else [])])}"
                )
            if not references:
                continue
            if (EMBED in references) == (self._embedding is not None):
                raise BadInputError(
                    f"{where}: {kind} have embed, and a model is named too: leave one out"
                    if self._embedding
                    else f"{where}: {kind} lack embed, the input of block 0, which every capture holds: add it, or name the "
                    f"model's folder, whose embedding table has it"
                )
            if widths and set(references) != set(widths):
                raise BadInputError(f"{where}: {kind} are of {sorted(references)}, others of {sorted(widths)}")
            counts = set()
            for site, reference in references.items():
                width, count = self._check_reference(site, reference, kind, where, dtypes)
                if widths.setdefault(site, width) != width:
                    raise BadInputError(f"{where}: {site} is {width} wide, in other lines {widths[site]}")
                counts.add(count)
                layers = len(self._layers) if SITES[site].layered else 1
                elements += width * layers * count
            if len(counts) > 1:
                raise BadInputError(f"{where}: {kind} have {sorted(counts)} rows: expected as many of each site")
        return elements

    def _check_reference(
        self, site: str, reference: Reference, kind: str, where: str, dtypes: set[str]
    ) -> tuple[int, int]:
        """(width, positions or tokens)."""
        shapes = set()
        for name, tensor in reference.places():
            found = self._tensor(name, tensor, where)
            dtypes.add(found.dtype)
            shape = found.shape
            if reference.first is not None:
                if not shape or not 0 <= reference.first <= reference.last <= shape[0]:
                    raise BadInputError(
                        f"{where}: {site} names rows {reference.first} to {reference.last} of {tensor!r} in {name}, "
                        f"which has the shape {shape}"
                    )
                shape = (reference.last - reference.first, *shape[1:])
            shapes.add(shape)
        split = reference.layers is not None or not SITES[site].layered
        if len(shapes) > 1:
            raise BadInputError(f"{where}: {site} has tensors of the shapes {sorted(shapes)}: expected one")
        shape = shapes.pop()
        if kind == "activations":
            axes = ("row",) * (reference.first is not None) + ("layer",) * (not split) + ("position", "width")
        else:
            axes = ("token",) + ("layer",) * (not split) + ("width",)
        expected = {"row": 1, "layer": len(self._layers), "position": len(self._names)}
        named = dict(zip(axes, shape, strict=False))
        if len(shape) != len(axes) or any(named[axis] != expected.get(axis, named[axis]) for axis in axes):
            raise BadInputError(
                f"{where}: {site} has the shape {shape}: expected "
                f"({', '.join(f'{axis} {expected[axis]}' if axis in expected else axis for axis in axes)})"
            )
        return named["width"], named.get("token", len(self._names))

    def _tensor(self, name: str, tensor: str, where: str) -> Tensor:
        try:
            return self._files.get(name).tensor(tensor, FLOATS)
        except BadInputError as error:
            raise BadInputError(f"{where}: {error}") from error

    def _references(self, line: Mapping[str, Any], kind: str, where: str) -> dict[str, Reference]:
        given = line.get(kind, {})
        if not isinstance(given, dict):
            raise BadInputError(f"{where}: {kind} is no object: expected site -> file, tensor and row")
        found = {}
        for site, place in given.items():
            if site not in SITES:
                raise BadInputError(f"{where}: unknown site {site!r}: expected one of {', '.join(SITES)}")
            extent = "row" if kind == "activations" else "rows"
            if not isinstance(place, dict) or not {"file", "tensor"} <= place.keys() <= {"file", "tensor", extent}:
                raise BadInputError(f"{where}: {kind} of {site}: expected file, tensor and {extent}")
            file, tensor, rows = place["file"], place["tensor"], place.get(extent)
            if not isinstance(file, str) or not isinstance(tensor, str):
                raise BadInputError(f"{where}: {kind} of {site}: expected file and tensor to be strings")
            if kind == "activations" and rows is not None:
                rows = [rows, rows + 1] if type(rows) is int else rows
            if (kind == "tokens" or rows is not None) and not (
                isinstance(rows, list) and len(rows) == 2 and all(type(row) is int for row in rows)
            ):
                raise BadInputError(f"{where}: {kind} of {site}: {extent} is {rows!r}: expected whole numbers from 0")
            split = "{layer}" in file or "{layer}" in tensor
            if split and not SITES[site].layered:
                raise BadInputError(f"{where}: {site} has no layers: leave out {{layer}}")
            first, last = rows or (None, None)
            found[site] = Reference(file, tensor, first, last, self._layers if split else None)
        return found

    def sample(self, number: int) -> Sample:
        line, where = self._lines.read(number)
        fields = dict(read_fields(line, where))
        if fields["index"] is None:
            fields["index"] = number
        sample = make_sample(fields, self.coverage, where)
        if self._kept is not None:
            count = self._rows(self._references(line, "tokens", where))
            complete = sample.status == "complete"
            try:
                self.coverage.check_tokens(count, sample.prompt_length, sample.total_length, complete)
            except ValueError as error:
                raise BadInputError(f"{where}: {error}") from error
        return sample

    def token_count(self, number: int, sample: Sample) -> int:
        line, where = self._lines.read(number)
        return self._rows(self._references(line, "tokens", where))

    def _rows(self, references: Mapping[str, Reference]) -> int:
        one = next(iter(references.values()))
        return one.last - one.first

    def cells(self, number: int, sample: Sample) -> dict[str, np.ndarray]:
        line, where = self._lines.read(number)
        found = {}
        for site, reference in self._references(line, "activations", where).items():
            blocks = [
                self._files.get(name).read(tensor, reference.first or 0, reference.last)
                for name, tensor in reference.places()
            ]
            if reference.first is not None:
                blocks = [block[0] for block in blocks]
            values = np.stack(blocks) if reference.layers is not None else blocks[0]
            found[site] = to_bits(values, self.coverage.dtype, f"{where}: {site}")
        if self._embedding is not None:
            # an absent position's row is not looked at
            found[EMBED] = self._embedded([sample.token_ids[max(token, 0)] for token in sample.token_index], where)
        return found

    def _embedded(self, ids: Sequence[int], where: str) -> np.ndarray:
        return to_bits(self._embedding.rows(np.array(ids, np.int64), where), self.coverage.dtype, where)

    def tokens(self, number: int, sample: Sample, first: int, count: int) -> Iterator[dict[str, np.ndarray]]:
        line, where = self._lines.read(number)
        references = self._references(line, "tokens", where)
        widths = self.coverage.widths
        row_bytes = 4 * max(widths.values()) * max(1, len(self._layers))
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(first, first + count, step):
            stop = min(start + step, first + count)
            found = {}
            for site, reference in references.items():
                blocks = [
                    self._files.get(name).read(tensor, reference.first + start, reference.first + stop)
                    for name, tensor in reference.places()
                ]
                if reference.layers is not None:
                    values = np.stack(blocks)
                else:
                    values = blocks[0].swapaxes(0, 1) if SITES[site].layered else blocks[0]
                found[site] = to_bits(values, self.coverage.dtype, f"{where}: {site}")
            if self._embedding is not None:
                chosen = self._kept.indices(sample.prompt_length, sample.total_length)[start:stop]
                found[EMBED] = self._embedded([sample.token_ids[token] for token in chosen], where)
            yield found
