"""What a commit must be to be used with its capture's layout: checked before anything that it names is opened."""

from collections.abc import Iterable, Iterator

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.commits import ChunkRecord, Commit, FileRecord, remedy
from hiddenlake.cache.store.layout import Layout

# Of a table of samples, for each of them: far more than a million tokens with their log-probabilities take.
_TABLE_BYTES = 64 << 20


def check_commits(place: Backend, layout: Layout, commits: Iterable[Commit]) -> None:
    """Raise CorruptError, naming the commit, unless all of them fit the layout and no sample is in two of them."""
    seen: dict[str, int] = {}
    for commit in commits:
        problem = next(problems_of(layout, commit), None)
        for key in commit.keys:
            if key is not None and seen.setdefault(key, commit.shard) != commit.shard:
                problem = problem or f"sample {key!r} is in shard {seen[key]} too"
        if problem:
            raise CorruptError(f"{place}/commits/{commit.shard}.json: {problem}: {remedy(place, [commit.shard])}")


def problems_of(layout: Layout, commit: Commit) -> Iterator[str]:
    """What is wrong with one commit, most basic first: what follows may rest on it."""
    if not commit.files and not any(key is not None for key in commit.keys) and not commit.token_shards:
        return  # given up by a writer that was taken for dead
    B = layout.samples
    slots = [len(commit.keys), len(commit.order), len(commit.spans)]
    if slots != [B, B, B if layout.token_files else 0]:
        yield f"lists {slots[0]} keys, {slots[1]} places in the order and {slots[2]} spans for {B} slots"
        return
    there = [key is not None for key in commit.keys]
    if there != [pair is not None for pair in commit.order]:
        yield "lists other slots in its order than it has keys"
    if len({key for key in commit.keys if key is not None}) != sum(there):
        yield "lists a key twice"
    if commit.token_shards and not layout.token_files:
        yield "lists token shards, but the capture has none"
        return
    most = layout.shard_tokens // layout.chunk_tokens if layout.token_files else 0
    if not all(0 < columns <= most for columns in commit.token_shards.values()):
        yield f"lists token shards of {sorted(set(commit.token_shards.values()))[-1]} chunks: expected 1 to {most}"
    yield from _files(layout, commit)
    yield from _spans(layout, commit, there)


def _files(layout: Layout, commit: Commit) -> Iterator[str]:
    # Before names are made up for each of them.
    if len(commit.token_shards) > len(commit.files):
        yield f"lists {len(commit.token_shards)} token shards, but {len(commit.files)} files"
        return
    expected = {*layout.files_of(commit.shard)}.union(*map(layout.token_files_of, commit.token_shards))
    if commit.files.keys() != expected:
        wrong = sorted(commit.files.keys() ^ expected)[0]
        yield f"{wrong[:200]!r} is {'missing among' if wrong in expected else 'no file of this shard, but one of'} its files"
        return
    chunks = {layout.data_file(site, commit.shard) for site in layout.files}
    for shard in commit.token_shards:
        chunks.update(layout.token_data_file(site, shard) for site in layout.token_files)
    for name, record in commit.files.items():
        if type(record) is not (ChunkRecord if name in chunks else FileRecord):
            yield f"has no {'checksums of chunks' if name in chunks else 'checksum'} of {name}"
    table = commit.files[layout.samples_file(commit.shard)]
    if table.size > _TABLE_BYTES * layout.samples:
        yield f"lists {table.size} bytes for a table of at most {layout.samples} samples"


def _spans(layout: Layout, commit: Commit, there: list[bool]) -> Iterator[str]:
    if not layout.token_files:
        return
    K, T = layout.shard_tokens, layout.chunk_tokens
    if there != [span is not None for span in commit.spans]:
        yield "lists other slots in its spans than it has keys"
    end = 0
    placed = [(*span, key) for span, key in zip(commit.spans, commit.keys, strict=True) if span and span[1]]
    for start, length, key in sorted(placed):
        if start < 0 or length > K * len(commit.token_shards):
            yield f"sample {key}: {length} tokens from {start} on do not fit {len(commit.token_shards)} token shards"
            return
        if start < end:
            yield f"sample {key}: its tokens overlap another sample's in token shard {start // K}"
        end = max(end, start + length)
        for shard in layout.token_shards_of(start, length):
            if min(start + length - shard * K, K) > T * commit.token_shards.get(shard, 0):
                yield f"sample {key}: token shard {shard} lacks some of its tokens"
