"""Embedding: rows of a model's token embedding, for imports whose source did not keep the input of block 0."""

import json
from pathlib import Path

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.tensor_file import DTYPES, TensorFile
from hiddenlake.cache.exchange.values import FLOATS
from hiddenlake.cache.families import family_of

_COMPUTE = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"], "float32": DTYPES["F32"]}


class Embedding:
    """A model folder's embedding table, mapped and not loaded.

    width : hidden size.  n_layers : blocks of the model.

    Raises BadInputError where the folder has none, UnknownNameError for an architecture that is not supported, and for
    one whose block 0 is fed with more than the table's row (learned positions, a factor).
    """

    def __init__(self, folder: Path, compute_dtype: str) -> None:
        config = _json(folder / "config.json")
        family = family_of(config.get("architectures"))
        if family.positions or family.normalizer:
            what = "adds positions to" if family.positions else "scales"
            raise BadInputError(
                f"{folder}: the family {family.name} {what} the token's embedding before block 0, so the table's rows are "
                f"not what block 0 was fed: import a source that has embed"
            )
        self.n_layers = config.get("num_hidden_layers")
        self._compute = _COMPUTE[compute_dtype]
        name = f"{family.embed}.weight"
        index = folder / "model.safetensors.index.json"
        file = "model.safetensors"
        if index.exists():
            file = _json(index).get("weight_map", {}).get(name)
            if not isinstance(file, str) or Path(file).name != file:
                raise BadInputError(f"{index} names no file of the folder for {name!r}: it names {file!r}")
        # followed here: the hub's own cache is made of links
        self.path = (folder / file).resolve()
        with TensorFile(self.path) as weights:
            table = weights.tensor(name, FLOATS)
            if len(table.shape) != 2:
                raise BadInputError(
                    f"{self.path}: tensor {name!r} has the shape {table.shape}: expected (token, hidden)"
                )
            self.width = table.shape[1]
            raw = np.memmap(weights.path, np.uint8, "r", table.start, (table.nbytes,))
            self._rows = raw.view(DTYPES[table.dtype]).reshape(table.shape)

    def rows(self, token_ids: np.ndarray, where: str) -> np.ndarray:
        """(token, hidden) in the compute dtype; rounded to it as an engine rounds weights when it loads them."""
        if token_ids.size and int(token_ids.max()) >= len(self._rows):
            raise BadInputError(
                f"{where}: token id {int(token_ids.max())}, but {self.path} has {len(self._rows)} embeddings: pass the "
                f"model that was captured"
            )
        return np.asarray(self._rows[token_ids]).astype(self._compute)


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: {error}: expected a Hugging Face folder with safetensors weights") from error
    if not isinstance(found, dict):
        raise BadInputError(f"{path} is no JSON object: expected a Hugging Face folder with safetensors weights")
    return found
