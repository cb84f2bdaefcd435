"""The store: one capture's shards, commits and samples on disk, written, read, viewed and verified."""

from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.readable import TokenRows
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.shard import Shard, TokenShard, attach
from hiddenlake.cache.store.sizes import choose_layout
from hiddenlake.cache.store.spans import TokenPiece, TokenSpan
from hiddenlake.cache.store.writer import Writer, open_writer
from hiddenlake.cache.store.zarr_import import register_when_zarr_is_imported

__all__ = [
    "Capture",
    "Coverage",
    "Shard",
    "TokenPiece",
    "TokenRows",
    "TokenShard",
    "TokenSpan",
    "Writer",
    "attach",
    "choose_layout",
    "open_capture",
    "open_writer",
    "register_when_zarr_is_imported",
]
