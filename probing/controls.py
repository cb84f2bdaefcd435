"""Controls: what a probe finds where there is nothing to find, or nothing but the token or its place.

Shape letters: P positions, N samples.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.splits import seeded_hash

# By which fit_grid knows them.
CONTROLS = ("token", "place", "random", "task")

# Of what each feature of `place_features` is.
PLACE = (
    "prompt length", "answer length", "log prompt length", "log answer length", "token index", "log token index",
    "index in the answer", "tokens behind it", "log tokens behind it", "share of the answer before it",
)  # fmt: skip


def shuffle_labels(
    label: np.ndarray,
    index: Sequence | np.ndarray,
    *,
    groups: Sequence | np.ndarray | None = None,
    n: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """Permutations of the labels: what a probe finds in them is what it finds in noise.

    label : (sample,) bool, or the number of the class.  index : (sample,) distinct names, e.g. the task index.
    groups : (sample,) names of what belongs together, where samples of one group may be alike; each its own by default.

    Groups are permuted, and the labels of each stay in a row: single labels that wander make a null in which fewer samples
    are independent than there are, and p-values that are too small (exchangeable blocks: Winkler et al. 2015, NeuroImage
    123). With groups of one size whole groups change places; where sizes differ, a row of labels may be cut at its end.

    Which label goes where is a function of (seed, groups, index), whatever the order of the samples. Every
    cell of a grid gets the same permutation, so that the largest of many cells has an honest null.

    Returns (n, sample), of the labels' dtype.
    """
    label = np.asarray(label)
    names = [str(name) for name in index]
    of = names if groups is None else [str(name) for name in groups]
    canonical = np.asarray(sorted(range(len(names)), key=lambda i: (of[i], names[i])), int)
    out = np.empty((n, len(label)), label.dtype)
    for r in range(n):
        mixed = sorted(canonical, key=lambda i: (seeded_hash(seed, "shuffle", r, of[i]), of[i], names[i]))
        out[r, canonical] = label[mixed]
    return out


def token_types(data: xr.Dataset) -> np.ndarray:
    """(P, N) int64, the token id at each position; -1 where there is no token, or a pooled one.

    data : of a capture.  Raises ProbeError where it has no token ids.
    """
    if "token_ids" not in data:
        raise ProbeError("the samples have no `token_ids`: leave the controls `random` and `task` out")
    index = data.token_index.transpose("position", "sample").values
    out = np.full(index.shape, -1, np.int64)
    for sample, ids in enumerate(data.token_ids.values):
        there = index[:, sample] >= 0
        out[there, sample] = np.asarray(ids)[index[there, sample]]
    return out


def control_task(types: np.ndarray, positive: np.ndarray, inside: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Labels that are a function of the token alone: what a probe finds in them, it can find by memorising.

    Hewitt and Liang (2019, "Designing and Interpreting Probes with Control Tasks"): every token type gets a random label;
    a probe is selective by as much as its own task is above this one. Here the types of a position, in a random order,
    are positive until about as many samples are as of the label.

    types : (P, N) int, -1 where there is none.  positive : (N,) bool.  inside : (P, N) bool, the samples that count.

    Returns (P, N) bool, a function of (seed, the tokens, the labels), whatever the order of the samples. With fewer than
    two types at a position all are negative: it has no such task.
    """
    out = np.zeros(types.shape, bool)
    for p, (row, use) in enumerate(zip(types, inside & (types >= 0), strict=True)):
        names, count = np.unique(row[use], return_counts=True)
        if len(names) < 2:
            continue
        order = sorted(range(len(names)), key=lambda i: seeded_hash(seed, "control task", names[i]))
        held = np.cumsum(count[order])[:-1]
        last = int(np.abs(held - positive[use].sum()).argmin())
        out[p] = use & np.isin(row, names[order[: last + 1]])
    return out


def place_features(data: xr.Dataset) -> xr.DataArray:
    """(position, sample, hidden) float32: where the token stands, in the numbers of PLACE, and nothing of what it is.

    data : of a capture. Of a pooled position only the lengths are known, and the rest is 0; NaN where there is no token.
    """
    index = data.token_index.transpose("position", "sample").values.astype(np.float64)
    prompt, total = (data[name].values.astype(np.float64) for name in ("prompt_length", "total_length"))
    prompt, answer, behind = (np.broadcast_to(one, index.shape) for one in (prompt, total - prompt, total - 1 - index))
    inside = index - prompt
    features = [
        prompt, answer, np.log(prompt), np.log1p(answer), index, np.log1p(np.maximum(index, 0)), inside, behind,
        np.log1p(np.maximum(behind, 0)), inside / np.maximum(answer, 1),
    ]  # fmt: skip
    out = np.stack(features, axis=-1)
    out[index < -1, 4:] = 0.0
    out[index == -1] = np.nan
    return xr.DataArray(
        out.astype(np.float32), dims=("position", "sample", "hidden"), coords={"position": data.position}
    )


def random_features(types: np.ndarray, width: int, *, seed: int, positions: np.ndarray) -> xr.DataArray:
    """(position, sample, hidden) float32, lazy: a random vector for each token type, as wide as the site.

    An embedding that was never trained: it knows which token it is as well as `embed` does, and nothing of what tokens have
    in common (random encoders as a baseline: Zhang and Bowman 2018, Wieting and Kiela 2019). Standard normal, a function of
    (seed, token) alone; NaN where there is no token.

    types : (P, N) int, -1 where there is none.  positions : (P,) names.
    """
    lazy = indexing.LazilyIndexedArray(_RandomRows(types, width, seed))
    return xr.DataArray(xr.Variable(("position", "sample", "hidden"), lazy), coords={"position": positions})


class _RandomRows(BackendArray):
    """Made when they are asked for: those of all positions are as much as a layer of the capture."""

    def __init__(self, types: np.ndarray, width: int, seed: int) -> None:
        self.types, self.seed = types, seed
        self.shape, self.dtype = (*types.shape, width), np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> np.ndarray:
        types = self.types[key[:2]]
        names, which = np.unique(types, return_inverse=True)
        rows = np.full((len(names), self.shape[2]), np.nan, np.float32)
        for row, name in zip(rows, names.tolist(), strict=True):
            if name >= 0:
                np.random.default_rng([self.seed, 0xE3BED, name]).standard_normal(out=row, dtype=np.float32)
        return rows[which.reshape(types.shape)][..., key[2]]
