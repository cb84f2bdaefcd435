"""Cells: some activations as a .npz file, or one cell as a table for the eye."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hiddenlake.cache.errors import BadInputError, StoreError
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.reader import Capture


def write_npz(capture: Capture, path: Path, site: str, layer: int | None = None, position: str | None = None) -> None:
    """Write activations with their keys and labels.

    The file has `activations`, float32, (layer, position, sample, hidden) without the axes that were named;
    `layer`, `position`; and per sample `key`, `index`, `correct`. Samples are in task order.
    """
    if path.suffix != ".npz":
        raise BadInputError(f"cannot write {path}: expected a name that ends in .npz")
    samples = capture.samples()
    arrays = {
        "activations": capture.read(site, layer, position, dtype="float32"),
        "layer": np.array(capture.coverage.layers if layer is None else [layer]),
        "position": np.array(capture.coverage.positions if position is None else [position]),
        "key": np.array(capture.keys),
        "index": samples["index"].to_numpy(),
        "correct": samples["correct"].to_numpy(zero_copy_only=False),
    }
    # Beside its place first: neither Ctrl-C nor a full disk leaves half a file under its name.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}: check the folder and its free space") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def cell_table(capture: Capture, site: str, layer: int | None, position: str | None, rows: int) -> list[dict[str, Any]]:
    """The first samples of one cell: key, label, token index, L2 norm and first values of the activation."""
    layered = site not in SITES or SITES[site].layered
    if position is None or (layered and layer is None):
        raise BadInputError("a table shows one cell: name --position and --layer, or write all to a file with --out")
    keys = capture.keys[:rows]
    values = capture.read(site, layer, position, samples=keys, dtype="float32")
    samples = capture.samples()
    column = capture.coverage.positions.index(position)
    table = []
    for key, row, sample in zip(keys, values, samples.slice(0, rows).to_pylist(), strict=True):
        absent = bool(np.isnan(row).all())
        table.append(
            {
                "key": key,
                "index": sample["index"],
                "correct": sample["correct"],
                "token": sample["token_index"][column],
                "norm": None if absent else round(float(np.linalg.norm(row)), 4),
                "values": None if absent else [round(float(x), 4) for x in row[:4]],
            }
        )
    return table
