"""Card: the README.md of an export, which the Hugging Face hub shows as a dataset's card."""

import json

from hiddenlake.cache.exchange.plan import Shards, shard_name
from hiddenlake.cache.exchange.selection import Selection


def card(selection: Selection, shards: Shards) -> str:
    """Markdown behind a YAML header that makes the hub's viewer, and `load_dataset`, read the index."""
    identity = selection.capture.identity
    model = identity.get("model")
    model = model.get("name") if isinstance(model, dict) else model
    part = selection.parts[0]
    sites = list(dict.fromkeys(part.site for part in selection.parts))
    layers = sorted({part.layer for part in selection.parts if part.layer is not None})
    lines = [
        "---",
        "configs:",
        "- config_name: index",
        "  data_files: index.parquet",
        "tags:",
        "- activations",
        "- interpretability",
        "---",
        "",
        f"# Activations of {model}",
        "",
        f"{len(selection)} samples; sites {', '.join(sites)}; layers {', '.join(map(str, layers)) or 'none'} "
        f"(0-based blocks); {selection.dtype}, bit for bit as stored. Written by hiddenlake.",
        "",
        "`index.parquet` has one row a sample in task order: prompt, answer, token ids, labels, and where its "
        "activations lie. `manifest.json` has each file's size and SHA-256.",
        "",
    ]
    if shards.cells:
        name = shard_name(part.name, 1, len(shards.cells), "safetensors")
        lines += [
            f"Cells: `{name}` and its like hold one tensor, `activations` (sample, position, width); a sample is row "
            f"`shard_row` of shard `shard`. Positions: {', '.join(selection.positions)}. An absent position has "
            f"`token_index` -1 and is NaN; a pooled one has -2.",
            "",
        ]
    if shards.tokens:
        name = shard_name(f"tokens/{part.name}", 1, len(shards.tokens), "safetensors")
        lines += [
            f"Tokens ({selection.tokens}): `{name}` and its like hold `activations` (token, width); a sample's are "
            f"`token_count` rows from `token_row` on of shard `token_shard`.",
            "",
        ]
    lines += [
        "Value identity:",
        "",
        "```json",
        json.dumps(identity, indent=1, ensure_ascii=False, sort_keys=True),
        "```",
        "",
    ]
    return "\n".join(lines)
