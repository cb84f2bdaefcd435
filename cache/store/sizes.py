"""Sizes of shards: samples and tokens a shard, so that reads are long, a crash loses little and the buffers fit."""

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.shard_file import ShardFile

# Below this a read is dominated by its fixed costs; 256 samples of SmolLM2 and 32 of an 8B model reach it.
CHUNK_BYTES = 256 * 1024

# One site's file in a token shard: it is written in one go, and what an unfinished one holds is lost in a crash.
TOKEN_FILE_BYTES = 64 << 20

# Most samples a shard beside tokens. What is lost in a crash are samples whose shard was not full, and here each may
# have cost hundreds of rows: 64 answers of a hundred tokens are about four token shards of SmolLM2.
TOKEN_SAMPLES = 64


def choose_layout(
    coverage: Coverage,
    planned: int,
    buffer_bytes: int,
    shard_samples: int | None = None,
    shard_tokens: tuple[int, int] | None = None,
    codec: str = "none",
) -> Layout:
    """The layout of a new capture.

    B, and T, is the smallest power of two that makes the narrowest site's chunk at least 256 KiB. A token shard has
    as many chunks along the token axis as keep every site's file within 64 MiB. B is no larger than the planned
    samples need, nor than TOKEN_SAMPLES beside tokens. Whichever shard is the larger is made smaller until two buffers
    of each fit in `buffer_bytes`.

    planned : samples.
    shard_samples, shard_tokens : B, and (T, tokens a shard), where they should not be chosen.

    Raises StoreError when not even one sample and one token a shard fit.
    """
    narrowest = min(ShardFile((1,), 1, width, coverage.dtype).row_bytes for width in coverage.widths.values())
    rows = _power_of_two(-(-CHUNK_BYTES // narrowest))
    limits = [rows] * bool(coverage.positions) + [TOKEN_SAMPLES] * bool(coverage.tokens)
    samples = shard_samples or min(*limits, _power_of_two(max(1, planned)))
    chunk, chunks = 0, 0
    if coverage.tokens:
        chunk, chunks = shard_tokens or (rows, 0)
        largest = max(file.size for file in Layout(coverage, 1, chunk, chunk).token_files.values())
        chunks = chunks // chunk or TOKEN_FILE_BYTES // largest or 1
    while True:
        layout = Layout(coverage, samples, chunk, chunk * chunks, codec)
        smaller_samples = shard_samples is None and samples > 1 and bool(layout.files)
        smaller_tokens = shard_tokens is None and chunk * chunks > 1
        if layout.buffer_bytes <= buffer_bytes or not (smaller_samples or smaller_tokens):
            break
        if smaller_samples and not (smaller_tokens and layout.token_shard_bytes > layout.shard_bytes):
            samples //= 2
        elif chunks > 1:
            chunks //= 2
        else:
            chunk //= 2
    check_buffers(layout, buffer_bytes)
    return layout


def check_buffers(layout: Layout, buffer_bytes: int) -> None:
    """Raise StoreError unless two buffers of each kind fit in `buffer_bytes`."""
    if layout.buffer_bytes <= buffer_bytes:
        return
    c = layout.coverage
    what = []
    if layout.files:
        what.append(
            f"two shard buffers of {layout.samples} samples a shard x {len(c.layers)} layers x {len(c.positions)} "
            f"positions x {len(c.sites)} sites"
        )
    if layout.token_files:
        what.append(
            f"two shard buffers of {layout.shard_tokens} tokens a shard x {len(c.layers)} layers x {len(c.sites)} sites"
        )
    raise StoreError(
        f"{' and '.join(what)} take {layout.buffer_bytes / 2**20:.1f} MiB, but the buffer may take "
        f"{buffer_bytes / 2**20:.1f} MiB: allow more buffer memory, or capture fewer layers, positions or sites"
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
