"""Moments: what a capture held at one time, by number along its axes; where values come from is a subclass' business."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hiddenlake.cache.store.coverage import DTYPES, Coverage
from hiddenlake.cache.store.tables import SAMPLE_COLUMNS

if TYPE_CHECKING:
    import pyarrow
    import torch

Dtype = Literal["stored", "float32"]


class Moment(ABC):
    """One moment of a capture. What is committed later does not change it, so lazy arrays may hold on to it.

    identity : the value identity.  coverage : which cells there are.
    keys : (sample,) sample keys in task order: by (index, sample_index).
    token_length : (sample,) how many tokens of each are stored one by one.
    """

    identity: dict[str, Any]
    coverage: Coverage
    keys: np.ndarray
    token_length: np.ndarray

    @abstractmethod
    def samples(self, columns: Sequence[str] = SAMPLE_COLUMNS) -> "pyarrow.Table":
        """Rows of samples/ in task order, at least these columns. Raises CorruptError."""

    @abstractmethod
    def read_cells(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool = True,
        out: np.ndarray | None = None,
        single: bool = False,
    ) -> np.ndarray:
        """Cells by number along each axis.

        outer : indices along layer and position (position alone for a site without layers), any order, repeats allowed.
        rows : (sample,) rows in task order.
        out : where they go, of the result's shape and dtype, C-contiguous; None for new memory.
        single : whether rows are read, and checked, by themselves also where reading chunks would be faster.

        Returns (*outer, sample, width): the coverage's dtype, or float32. Raises CorruptError.
        """

    @abstractmethod
    def read_tokens(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool = True,
        out: np.ndarray | None = None,
        single: bool = False,
    ) -> np.ndarray:
        """Token-level activations by number along each axis.

        outer : indices along layer, () for a site without layers; any order, repeats allowed.
        rows : (token,) among all committed tokens in task order.
        out, single : as in `read_cells`.

        Returns (*outer, token, width): the coverage's dtype, or float32. Raises CorruptError.
        """

    @abstractmethod
    def fingerprint(self, site: str) -> str:
        """32 hex digits, equal only where a site's cells are the same committed bytes."""

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def token_offsets(self) -> np.ndarray:
        """(sample + 1,) where each sample's tokens start among all committed tokens in task order."""
        return np.concatenate([[0], np.cumsum(self.token_length)])

    @cached_property
    def token_first(self) -> np.ndarray:
        """(sample,) index into its sample's prompt + answer of each one's first token that may be stored."""
        if self.coverage.tokens.part == "all_generated":
            return self.samples(["prompt_length"])["prompt_length"].to_numpy()
        return np.zeros(len(self.keys), np.int64)

    @cached_property
    def token_index(self) -> np.ndarray:
        """(token,) int32, index into its sample's prompt + answer, of each committed token in task order."""
        number = np.arange(self.token_offsets[-1]) - np.repeat(self.token_offsets[:-1], self.token_length)
        return (np.repeat(self.token_first, self.token_length) + self.coverage.tokens.every * number).astype(np.int32)

    @property
    def has_cell_tokens(self) -> bool:
        """Whether `cell_tokens` is there without a look at the store."""
        return "cell_tokens" in vars(self)

    @cached_property
    def cell_tokens(self) -> np.ndarray:
        """(position, sample) int32, each cell's index into its sample's prompt + answer; -1 where absent, -2 where pooled."""
        columns = self.samples(["token_index"])["token_index"].combine_chunks()
        flat = columns.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        return np.ascontiguousarray(flat.reshape(len(self.keys), len(self.coverage.positions)).T)

    def send_cells(
        self, site: str, outer: Sequence[Sequence[int]], rows: np.ndarray, dtype: Dtype, check: bool, device: str
    ) -> "torch.Tensor":
        """The same as `read_cells`, on a device. Values are copied as they are stored, and widened there."""
        from hiddenlake.cache.store.device import Staging

        staging = Staging(device)
        shape = (*map(len, outer), len(rows), self.coverage.widths[site])
        out = staging.allocate(shape, DTYPES[self.coverage.dtype][1])
        sent = staging.send(self.read_cells(site, outer, rows, "stored", check, out))
        return sent.float() if dtype == "float32" else sent
