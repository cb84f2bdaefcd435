"""The Zarr v3 metadata of a capture: the zarr.json of the root, of each group and of each array."""

from typing import Any

from hiddenlake.cache.positions import POOLS
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.codecs import ZSTD_LEVEL
from hiddenlake.cache.store.layout import ROW_CRC, SCALE, TOKENS, Layout
from hiddenlake.cache.store.shard_file import ShardFile

_BYTES = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_FP8_NAN = 0x7F
_STRINGS = [{"name": "vlen-utf8"}, {"name": "crc32c"}]


def arrays(layout: Layout, shards: int, token_shards: int) -> dict[str, dict[str, Any]]:
    """The zarr.json of every array and sub-group, by path.

    shards, token_shards : lengths of the sample axis and of the token axis, in shards.
    """
    c, B, N = layout.coverage, layout.samples, layout.samples * shards
    L, P = len(c.layers), len(c.positions)
    documents = ({SCALE: _group()} if layout.codec == "fp8" else {}) | {
        ROW_CRC: _group(),
        "sample": _array((N,), "string", (B,), "", ("sample",), _STRINGS, "sample key, empty in a free slot"),
        "committed": _array((N,), "bool", (B,), False, ("sample",), _BYTES, "whether the slot holds a sample"),
    }
    if L:
        documents["layer"] = _array((L,), "int64", (L,), 0, ("layer",), _BYTES, "0-based block index")
    if P:
        axes = ("position", "sample")
        for site, file in layout.files.items():
            documents |= _activations("", site, file, (*file.outer, B), (*file.outer, N), axes)
        # Captures without poolings keep the words that they were made with.
        token = "index into prompt + answer, -1 if absent" + ", -2 if pooled" * any(p in POOLS for p in c.positions)
        inside = "whether the token lies in the answer"
        documents |= {
            "position": _array((P,), "string", (P,), "", ("position",), _STRINGS, "named token"),
            "token_index": _array((P, N), "int32", (P, B), -1, axes, _BYTES, token),
            "in_answer": _array((P, N), "bool", (P, B), False, axes, _BYTES, inside),
        }
    if c.tokens:
        K, start = layout.shard_tokens, "where the sample's tokens start, -1 if it has none"
        documents |= {
            TOKENS: _group(part=c.tokens.part, every=c.tokens.every),
            f"{ROW_CRC}/{TOKENS}": _group(),
            **({f"{SCALE}/{TOKENS}": _group()} if layout.codec == "fp8" else {}),
            f"{TOKENS}/sample_start": _array((N,), "int64", (B,), -1, ("sample",), _BYTES, start),
            f"{TOKENS}/sample_length": _array((N,), "int32", (B,), 0, ("sample",), _BYTES, "tokens of the sample"),
        }
        for site, file in layout.token_files.items():
            layers = file.outer[:-1]
            documents |= _activations(f"{TOKENS}/", site, file, (*layers, K), (*layers, K * token_shards), ("token",))
    return documents


def root(layout: Layout, shards: int, token_shards: int, facts: dict[str, Any]) -> dict[str, Any]:
    """The capture's zarr.json: `facts` under one attribute, and the metadata of every array, consolidated."""
    return _group(hiddenlake=facts) | {
        "consolidated_metadata": {
            "kind": "inline",
            "must_understand": False,
            "metadata": dict(sorted(arrays(layout, shards, token_shards).items())),
        },
    }


def _group(**attributes: Any) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _activations(
    group: str, site: str, file: ShardFile, shard: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """A site's array and its row checksums. shard, shape : in rows, without the width."""
    names = (("layer",) if SITES[site].layered else ()) + axes
    inner = (*(1 for _ in shard[:-1]), file.rows, file.width)
    lossy = file.codec == "fp8"
    documents = {
        f"{group}{site}": _array(
            (*shape, file.width),
            "uint8" if lossy else file.dtype,
            (*shard, file.width),
            _FP8_NAN if lossy else "NaN",
            (*names, SITES[site].width),
            [_sharding(inner, file.codec)],
            SITES[site].meaning,
        ),
        f"{ROW_CRC}/{group}{site}": _array(shape, "uint32", shard, 0, names, _BYTES, "crc32c of each row's bytes"),
    }
    if lossy:
        # Zarr's list of data types has no float8_e4m3fn, and an e4m3 that means other numbers.
        documents[f"{group}{site}"]["attributes"] |= {"encoding": "float8_e4m3fn", "scale": f"{SCALE}/{group}{site}"}
        meaning = "what each row of codes is to be multiplied with"
        documents[f"{SCALE}/{group}{site}"] = _array(shape, "float32", shard, "NaN", names, _BYTES, meaning)
    return documents


def _sharding(inner: tuple[int, ...], codec: str) -> dict[str, Any]:
    zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(inner),
            "codecs": [_BYTES[0], zstd, _BYTES[1]] if codec == "zstd" else _BYTES,
            "index_codecs": _BYTES,
            "index_location": "end",
        },
    }


def _array(
    shape: tuple[int, ...],
    data_type: str,
    chunk: tuple[int, ...],
    fill: Any,
    names: tuple[str, ...],
    codecs: list[dict[str, Any]],
    meaning: str,
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # Dots: all shards of an array lie in one folder, which is fsynced once a shard.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": {"long_name": meaning},
        "dimension_names": list(names),
    }
