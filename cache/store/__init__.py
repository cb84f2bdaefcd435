"""The store: one capture's shards, commits and samples on disk, written, read, viewed and verified."""

from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.layout import shard_samples
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.shard import Shard, attach
from hiddenlake.cache.store.writer import Writer, open_writer
from hiddenlake.cache.store.zarr_import import register_when_zarr_is_imported

__all__ = [
    "Capture",
    "Coverage",
    "Shard",
    "Writer",
    "attach",
    "open_capture",
    "open_writer",
    "register_when_zarr_is_imported",
    "shard_samples",
]
