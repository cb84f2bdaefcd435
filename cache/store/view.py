"""A capture as a lazy xarray.Dataset: named coordinates, samples in task order, labels beside them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.positions import ABSENT, in_answer
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.coverage import DTYPES, EMBED
from hiddenlake.cache.store.device import Allocate, Staging, to_array
from hiddenlake.cache.store.moment import Dtype, Moment
from hiddenlake.cache.store.readable import Readable

if TYPE_CHECKING:
    import pyarrow

# `key` is the coordinate; `slot` and `checksum` are the store's own business.
_COLUMNS = (
    "index", "sample_index", "group", "prompt", "answer", "answers", "correct", "exact_answer", "exact_answer_valid",
    "token_ids", "logprobs", "prompt_length", "total_length", "finish_reason", "status",
)  # fmt: skip


class Lazy(BackendArray):
    """One site of one snapshot. Indexing reads what is asked for, checked. It can be pickled and shared by threads.

    read : (site, indices along each leading axis, rows, dtype) -> block; one of the snapshot's methods.
    """

    def __init__(
        self,
        read: Callable[..., np.ndarray],
        site: str,
        shape: tuple[int, ...],
        stored: str,
        dtype: Dtype,
        allocate: Allocate | None = None,
    ) -> None:
        self.read, self.site, self.shape, self.stored, self.wanted = read, site, shape, stored, dtype
        self.dtype = np.dtype(np.float32) if dtype == "float32" else DTYPES[stored][1]
        self.allocate = allocate

    def as_stored(self, allocate: Allocate) -> "Lazy":
        """The same, in the capture's own dtype, read into other memory."""
        return Lazy(self.read, self.site, self.shape, self.stored, "stored", allocate)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        *outer, rows = (
            np.atleast_1d(np.arange(length)[index]) for length, index in zip(self.shape[:-1], key[:-1], strict=True)
        )
        out = None
        if self.allocate is not None:
            out = self.allocate((*map(len, outer), len(rows), self.shape[-1]), self.dtype)
        block = self.read(self.site, outer, rows, self.wanted, out=out)
        squeezed = tuple(0 if isinstance(index, (int, np.integer)) else slice(None) for index in key[:-1])
        return block[(*squeezed, key[-1])]


def dataset(capture: Readable, dtype: Dtype = "float32") -> xr.Dataset:
    """The cells of a capture's committed samples, in task order.

    dtype : `float32` widens bfloat16 exactly as it is read; `stored` gives ml_dtypes.bfloat16, with which
        xarray can do little more than select.

    Returns a Dataset with the coordinates layer (int), position (name) and sample (key), and the variables

        each site                (layer, position, sample, hidden), lazy; NaN where the token is absent. `embed` and
                                 `final_norm` have no layer; the last axis of `attn_z` is `d_attn`, that of `mlp_act`
                                 is `d_mlp`
        token_index, in_answer   (position, sample) int32, -1 where absent, -2 where pooled; bool
        index, group, correct... (sample,) the columns of samples/; token_ids, logprobs, answers hold sequences,
                                 and exact_answer is null (xarray's NaN) where none was found
        <name>                   (sample,) labels/<name>.parquet; <name>_<column> where it has several columns

    Later commits do not show up in it: refresh the capture and take another one. Raises CorruptError, and
    BadInputError for a capture that holds tokens only.
    """
    snapshot = capture.snapshot
    positions = snapshot.coverage.positions
    if not positions:
        raise BadInputError(f"{capture.path} has no positions, only tokens: take dataset(tokens=True)")
    table = snapshot.samples()
    lengths = table["prompt_length"].to_numpy()
    index = np.array(_sequences(table["token_index"]), np.int32).reshape(-1, len(positions)).T
    inside = in_answer(positions, index, lengths) & (index != ABSENT)
    variables = _sites(snapshot, snapshot.read_cells, ("position", "sample"), (len(positions), len(table)), dtype)
    variables |= {"token_index": (("position", "sample"), index), "in_answer": (("position", "sample"), inside)}
    return _dataset(capture, snapshot, variables, {"position": np.array(positions, dtype=object)}, table)


def token_dataset(capture: Readable, dtype: Dtype = "float32") -> xr.Dataset:
    """The tokens of a capture's committed samples, in task order, one sample's behind the other's, without holes.

    dtype : as in `dataset`.

    Returns a Dataset with the coordinates layer (int) and sample (key), on each token sample_key, sample_row (of the
    sample, in task order), token_index (into prompt + answer), token_id and in_answer, and the variables

        each site                     (layer, token, hidden), lazy; widths and layers as in `dataset`
        sample_start, sample_length   (sample,) int64, where each sample's tokens lie on the axis `token`
        index, group, correct...      (sample,) the columns of samples/, and labels, as in `dataset`

    Raises CorruptError, and BadInputError for a capture that holds no tokens.
    """
    snapshot = capture.snapshot
    if snapshot.coverage.tokens is None:
        raise BadInputError(f"{capture.path} holds no tokens, only positions: take dataset()")
    table = snapshot.samples()
    lengths, offsets, index = snapshot.token_length, snapshot.token_offsets, snapshot.token_index
    row = np.repeat(np.arange(len(lengths)), lengths)
    ids = [np.empty(0, np.int32), *_sequences(table["token_ids"])]
    first = np.cumsum([0, *map(len, ids[1:])])[:-1]
    variables = _sites(snapshot, snapshot.read_tokens, ("token",), (len(index),), dtype)
    variables |= {"sample_start": ("sample", offsets[:-1]), "sample_length": ("sample", lengths)}
    coordinates = {
        "sample_key": ("token", snapshot.keys[row]),
        "sample_row": ("token", row),
        "token_index": ("token", index),
        "token_id": ("token", np.concatenate(ids)[first[row] + index]),
        "in_answer": ("token", index >= table["prompt_length"].to_numpy()[row]),
    }
    return _dataset(capture, snapshot, variables, coordinates, table)


def _sites(
    snapshot: Moment,
    read: Callable[..., np.ndarray],
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: Dtype,
) -> dict[str, xr.Variable]:
    """Each site as a lazy variable. axes, shape : between the layers and the width."""
    if dtype not in ("stored", "float32"):
        raise BadInputError(f"unknown dtype {dtype!r}: expected `stored` or `float32`")
    coverage = snapshot.coverage
    variables = {}
    for site in (*coverage.sites, EMBED):
        layers = {"layer": len(coverage.layers)} if SITES[site].layered else {}
        lazy = Lazy(read, site, (*layers.values(), *shape, coverage.widths[site]), coverage.dtype, dtype)
        variables[site] = xr.Variable(
            (*layers, *axes, SITES[site].width),
            indexing.LazilyIndexedArray(lazy),
            {"long_name": SITES[site].meaning},
        )
    return variables


@xr.register_dataarray_accessor("hl")
class Accessor:
    """What hiddenlake adds to DataArrays of activations: `data.mlp_out.sel(layer=13).hl.to_gpu()`."""

    def __init__(self, array: xr.DataArray) -> None:
        self._array = array

    def to_gpu(self, device: str = "cuda") -> xr.DataArray:
        """The same DataArray with CuPy float32 values on a GPU, as cuML takes them.

        Of a lazy one of `Readable.dataset()` the stored values are read into pinned memory and widened on the GPU; of any
        other its values are copied. device : also `cpu`, for the same without a GPU, with NumPy values.

        Raises StoreError where torch, CuPy or the device is missing.
        """
        staging = Staging(device)
        values = np.asarray(self._stored(staging))
        tensor = staging.send(values).float().contiguous()
        return self._array.copy(data=to_array(tensor))

    def _stored(self, staging: Staging) -> Any:
        lazy = lazy_of(self._array)
        if lazy is None:
            return np.ascontiguousarray(self._array.values, np.float32)
        return indexing.LazilyIndexedArray(lazy.array.as_stored(staging.allocate), lazy.key).get_duck_array()


def lazy_of(array: xr.DataArray) -> indexing.LazilyIndexedArray | None:
    """The Lazy of a capture below a DataArray that was not read yet, and which part of it; None for any other."""
    lazy = array.variable._data
    while lazy is not None and not isinstance(lazy, indexing.LazilyIndexedArray):
        lazy = getattr(lazy, "array", None)  # xarray's own wrappers: a cache, copy on write
    return lazy if lazy is not None and isinstance(lazy.array, Lazy) else None


def _dataset(
    capture: Readable,
    snapshot: Moment,
    variables: dict[str, Any],
    coordinates: dict[str, Any],
    table: "pyarrow.Table",
) -> xr.Dataset:
    """With the columns of samples/ and the labels beside the activations."""
    variables = variables | {name: ("sample", _values(table[name])) for name in _COLUMNS}
    for name, values in labels_of(capture, snapshot).items():
        if name in variables or name in coordinates:
            raise BadInputError(f"labels/{name}.parquet: the capture has a variable {name!r} already: rename the file")
        variables[name] = ("sample", values)
    coordinates = coordinates | {"sample": snapshot.keys}
    if snapshot.coverage.layers:
        coordinates["layer"] = np.array(snapshot.coverage.layers, np.int64)
    return xr.Dataset(variables, coordinates, _flat(capture.identity) | {"capture": str(capture.path)})


def _values(column: "pyarrow.ChunkedArray") -> np.ndarray:
    """A column as NumPy: numbers and booleans as such, strings and sequences as objects."""
    import pyarrow as pa

    if pa.types.is_list(column.type):
        kind = column.type.value_type
        whole = not column.null_count and not any(chunk.flatten().null_count for chunk in column.chunks)
        if whole and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return _objects(_sequences(column))
        # A label may hold anything.
        return _objects([None if value is None else tuple(value) for value in column.to_pylist()])
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _objects(column.to_pylist())
    return column.to_numpy()


def _sequences(column: "pyarrow.ChunkedArray") -> list[np.ndarray]:
    """Each row's list of numbers as an array."""
    return [
        values
        for chunk in column.chunks
        if len(chunk)
        for values in np.split(chunk.flatten().to_numpy(), np.cumsum(chunk.value_lengths().to_numpy())[:-1])
    ]


def _objects(values: list[Any]) -> np.ndarray:
    """(n,) object, also where all values have one length, which np.array would make a second axis of."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def labels_of(capture: Readable, snapshot: Moment) -> dict[str, np.ndarray]:
    """Label columns in task order; a sample without a label gets null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = {}
    keys = pa.array(snapshot.keys.tolist(), pa.string())
    for name, table in capture.labels().items():
        labelled = table["key"].combine_chunks()
        if len(pc.unique(labelled)) != len(labelled):
            raise BadInputError(f"labels/{name}.parquet: a key occurs twice: label each sample once")
        rows = pc.index_in(keys, labelled)
        for label, column in label_columns(name, table).items():
            found[label] = _values(table[column].take(rows))
    return found


def label_columns(name: str, table: "pyarrow.Table") -> dict[str, str]:
    """variable -> column of a table of labels: its name alone where it has one column, else with the column's."""
    columns = [column for column in table.column_names if column != "key"]
    return {name if len(columns) == 1 else f"{name}_{column}": column for column in columns}


def variable_names(capture: Readable) -> set[str]:
    """Names that labels cannot have: variables and coordinates of `dataset` and `token_dataset`."""
    own = {"sample", "layer", "position", "token", "token_index", "in_answer", "token_id", "sample_key", "sample_row"}
    return {*own, "sample_start", "sample_length", *_COLUMNS, *capture.coverage.widths}


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots, so that the attributes survive a trip to Zarr or netCDF."""
    flat = {}
    for name, value in document.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
