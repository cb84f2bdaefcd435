"""Readable: how a capture is asked by name, for sites, layers, positions and samples, wherever its values come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.coverage import EMBED, Coverage
from hiddenlake.cache.store.moment import Dtype, Moment

if TYPE_CHECKING:
    import pyarrow
    import torch
    import xarray


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """Token-level activations of several samples, one behind the other.

    values : (layer, token, width), without layer for a single one or a site that has none; as stored, or float32.
    offsets : (sample + 1,) int64; tokens offsets[i] to offsets[i + 1] are those of the i-th sample that was asked for.
    token_index : (token,) int32, index into the sample's prompt + answer.
    """

    values: np.ndarray
    offsets: np.ndarray
    token_index: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(sample,) tokens of each sample."""
        return np.diff(self.offsets)


class Readable(ABC):
    """What a capture on disk and one behind a service have in common.

    path : the folder or the URL.  snapshot : what it shows, until it is refreshed.
    """

    path: str
    snapshot: Moment

    def __repr__(self) -> str:
        c = self.coverage
        tokens = f"tokens {c.tokens}, " if c.tokens else ""
        return (
            f"<hiddenlake capture {self.path}: {len(self)} samples, {len(c.layers)} layers, "
            f"{len(c.positions)} positions, {tokens}sites {', '.join(c.sites)}, {c.dtype}>"
        )

    def __len__(self) -> int:
        return len(self.snapshot.keys)

    @property
    def identity(self) -> dict[str, Any]:
        """The value identity, as its writer gave it."""
        return self.snapshot.identity

    @property
    def coverage(self) -> Coverage:
        return self.snapshot.coverage

    @property
    def keys(self) -> list[str]:
        """Keys of the committed samples in task order: by (index, sample_index)."""
        return self.snapshot.keys.tolist()

    def samples(self) -> "pyarrow.Table":
        """All committed samples in task order, with the columns of `tables.SAMPLE_COLUMNS`. Raises CorruptError."""
        return self.snapshot.samples()

    @abstractmethod
    def labels(self) -> dict[str, "pyarrow.Table"]:
        """Tables of labels that were added later, by name: a column `key`, and values."""

    def read(
        self,
        site: str,
        layer: int | Iterable[int] | None = None,
        position: str | int | Iterable[str | int] | None = None,
        samples: str | int | Iterable[str | int] | None = None,
        dtype: Dtype = "stored",
        check: bool = True,
        out: np.ndarray | None = None,
        device: str | None = None,
    ) -> "np.ndarray | torch.Tensor":
        """Activations, checked against their checksums.

        site : a site of the coverage, or `embed`.
        layer : block index, or several, or None for all.
        position : name, or several, or None for all.
        samples : key, or row in task order, or several of either, or None for all.
        dtype : `stored` for the capture's own (ml_dtypes.bfloat16, float16 or float32), `float32` for it widened exactly.
        check : False skips the checksums, for measurements only.
        out : memory for the result, of its dtype and its whole shape, C-contiguous; it is filled and returned.
        device : `cuda`, `cuda:1` or `cpu`: a torch tensor there, copied through pinned memory, asynchronously. Without
            check, and where GPUDirect Storage works, whole chunks of all samples go straight to the GPU.

        Returns (layer, position, sample, width), (position, sample, width) for a site without layers; a single layer,
        position or sample loses its axis. A cell whose token is absent is NaN.

        Raises UnknownNameError for what was not captured, naming what was; CorruptError where the bytes are
        not those that were committed.
        """
        snapshot = self.snapshot
        (layers, positions, rows), (one_layer, one_position, one_sample) = self.axes(
            site, layer, position, samples, dtype, snapshot
        )
        gone = (*one_layer, one_position, one_sample)
        if out is not None:
            whole = [len(axis) for axis in (*layers, positions, rows)]
            out = _unsqueeze(out, [size for size, one in zip(whole, gone, strict=True) if not one], whole)
        squeezed = tuple(0 if one else slice(None) for one in gone)
        if device is not None:
            if out is not None:
                raise ValueError("both `out` and `device` are given: name one place for the result")
            return snapshot.send_cells(site, [*layers, positions], rows, dtype, check, device)[squeezed]
        return snapshot.read_cells(site, [*layers, positions], rows, dtype, check, out)[squeezed]

    def axes(
        self,
        site: str,
        layer: Any = None,
        position: Any = None,
        samples: Any = None,
        dtype: Dtype = "stored",
        snapshot: Moment | None = None,
    ) -> tuple[tuple[list[list[int]], list[int], np.ndarray], tuple[list[bool], bool, bool]]:
        """What `read` is asked for, as numbers along the axes of a snapshot, and which axes are a single one.

        Returns ((indices along the layer axis, or nothing for a site without layers), indices along the position axis,
        (sample,) rows), (the same, whether it is a single one). Raises UnknownNameError.
        """
        snapshot = snapshot or self.snapshot
        c = snapshot.coverage
        if not c.positions:
            raise UnknownNameError(f"{self.path} has no positions, only tokens ({c.tokens}): use `read_tokens`")
        layers, one_layer = self.layer_axis(snapshot, site, layer, dtype)
        hint = f"; it holds the tokens {c.tokens} too, which `read_tokens` reads" if c.tokens else ""
        positions, one_position = _select("position", position, c.positions, self.path, hint)
        rows, one_sample = self.rows(samples, snapshot)
        return (layers, positions, rows), (one_layer, one_position, one_sample)

    def cell_names(self, site: str, layers: Any = None, positions: Any = None) -> list[tuple[int | None, str]]:
        """(layer, position) of every cell of a site that was asked for, layer by layer; see `read`."""
        c = self.coverage
        found, _ = self.layer_axis(self.snapshot, site, layers, "stored")
        names = [c.layers[i] for i in found[0]] if found else [None]
        chosen, _ = _select("position", positions, c.positions, self.path)
        return [(layer, c.positions[i]) for layer in names for i in chosen]

    def cells(
        self, site: str, layers: Any = None, positions: Any = None, samples: Any = None, **how: Any
    ) -> "Iterator[tuple[int | None, str, Any]]":
        """Cells one after the other, read ahead: see `prefetch.iterate_cells`."""
        from hiddenlake.cache.store.prefetch import iterate_cells

        return iterate_cells(self, site, layers, positions, samples, **how)

    def read_tokens(
        self,
        site: str,
        layer: int | Iterable[int] | None = None,
        samples: str | int | Iterable[str | int] | None = None,
        tokens: slice | None = None,
        dtype: Dtype = "stored",
        check: bool = True,
    ) -> TokenRows:
        """Token-level activations, checked against their checksums.

        site : a site of the coverage, or `embed`.
        layer : block index, or several, or None for all.
        samples : key, or row in task order, or several of either, or None for all.
        tokens : of each sample's stored tokens, e.g. slice(-5, None) for the last five; None for all.
        dtype : `stored` for the capture's own (ml_dtypes.bfloat16, float16 or float32), `float32` for it widened exactly.
        check : False skips the checksums, for measurements only.

        Returns TokenRows, whose values are (layer, token, width). A single layer loses its axis.

        Raises UnknownNameError for what was not captured, naming what was; CorruptError where the bytes are
        not those that were committed.
        """
        snapshot = self.snapshot
        layers, one_layer, rows, offsets = self.token_axes(site, layer, samples, tokens, dtype, snapshot)
        block = snapshot.read_tokens(site, layers, rows, dtype, check)
        return TokenRows(
            block[tuple(0 if one else slice(None) for one in one_layer)], offsets, snapshot.token_index[rows]
        )

    def token_axes(
        self, site: str, layer: Any, samples: Any, tokens: slice | None, dtype: Dtype, snapshot: Moment
    ) -> tuple[list[list[int]], list[bool], np.ndarray, np.ndarray]:
        """What `read_tokens` is asked for, as numbers along the axes of a snapshot.

        Returns (indices along the layer axis, or nothing; whether that axis goes; (token,) rows among all tokens;
        TokenRows.offsets). Raises UnknownNameError.
        """
        c = snapshot.coverage
        if c.tokens is None:
            raise UnknownNameError(f"{self.path} has no tokens, only positions ({', '.join(c.positions)}): use `read`")
        layers, one_layer = self.layer_axis(snapshot, site, layer, dtype)
        chosen, _ = self.rows(samples, snapshot)
        lengths = snapshot.token_length[chosen].tolist()
        ranges = [range(length)[tokens] if tokens is not None else range(length) for length in lengths]
        numbers = [np.arange(r.start, r.stop, r.step) for r in ranges]
        starts = snapshot.token_offsets[chosen]
        rows = [start + found for start, found in zip(starts.tolist(), numbers, strict=True)]
        offsets = np.cumsum([0, *map(len, numbers)], dtype=np.int64)
        return layers, one_layer, np.concatenate([np.empty(0, np.int64), *rows]), offsets

    def layer_axis(self, snapshot: Moment, site: str, layer: Any, dtype: Dtype) -> tuple[list[list[int]], list[bool]]:
        """(indices along the layer axis, whether that axis goes), or nothing for a site without layers."""
        c = snapshot.coverage
        if site not in c.widths:
            raise UnknownNameError(f"{self.path} has no site {site!r}: it has {', '.join([*c.sites, EMBED])}")
        if dtype not in ("stored", "float32"):
            raise UnknownNameError(f"unknown dtype {dtype!r}: expected `stored` or `float32`")
        if not SITES[site].layered:
            if layer is not None:
                raise UnknownNameError(f"site {site!r} has no layers, but layer {layer!r} was asked for: leave it out")
            return [], []
        layers, one = _select("layer", layer, c.layers, self.path)
        return [layers], [one]

    def rows(self, samples: Any, snapshot: Moment | None = None) -> tuple[np.ndarray, bool]:
        """(rows in task order, whether it is a single one) of keys or rows, or of all for None.

        Raises UnknownNameError for a sample that is not there.
        """
        snapshot = snapshot or self.snapshot
        count = len(snapshot.keys)
        if samples is None:
            return np.arange(count), False
        one = isinstance(samples, str) or not isinstance(samples, Iterable)
        rows = []
        for sample in [samples] if one else samples:
            row = snapshot.row_of.get(sample, -1) if isinstance(sample, str) else sample
            row = int(row) if isinstance(row, (int, np.integer)) else -1
            if not 0 <= row < count:
                raise UnknownNameError(
                    f"{self.path} has no sample {sample!r}: it has {count} samples, numbered in task order from 0, "
                    f"{'and no key yet' if not count else f'with keys like {snapshot.keys[0]!r}'}"
                )
            rows.append(row)
        return np.array(rows, dtype=np.int64), one

    def dataset(self, dtype: Dtype = "float32", *, tokens: bool = False) -> "xarray.Dataset":
        """The capture as a lazy xarray.Dataset: its cells, or its tokens; see `view.dataset`, `view.token_dataset`."""
        from hiddenlake.cache.store import view

        return view.token_dataset(self, dtype) if tokens else view.dataset(self, dtype)


def _unsqueeze(out: np.ndarray, shape: list[int], whole: list[int]) -> np.ndarray:
    """A caller's memory, with the axes that the result loses. shape, whole : without the width."""
    if list(out.shape[:-1]) != shape or not out.flags.c_contiguous:
        raise ValueError(f"out has shape {out.shape}: expected {(*shape, '...')}, C-contiguous")
    return out.reshape(*whole, out.shape[-1])


def _select(axis: str, wanted: Any, names: tuple[Any, ...], path: str, hint: str = "") -> tuple[list[int], bool]:
    """(indices along an axis, whether the axis goes)."""
    if wanted is None:
        return list(range(len(names))), False
    known = {name: i for i, name in enumerate(names)}
    one = isinstance(wanted, str) or not isinstance(wanted, Iterable)
    found = []
    for value in [wanted] if one else wanted:
        number = None
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            # Positions from the start or the end are numbers to a user and names in the store.
            number = known.get(str(value) if axis == "position" else int(value))
        elif isinstance(value, str):
            number = known.get(value)
        if number is None:
            raise UnknownNameError(
                f"{path} has no {axis} {value!r}: it has {', '.join(map(str, known))}; a capture with other coverage "
                f"needs another folder{hint}"
            )
        found.append(number)
    return found, one
