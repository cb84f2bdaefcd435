"""probekit's batched logistic regression."""

from typing import Any

import numpy as np
import torch
from probekit.fitters.batch.logistic import fit_logistic_batch
from serve import serve


class Probekit:
    """A round is {"file": .npz with X (n, d) and y (L, n), "C"}: one probe a label set."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])

    def prepare(self, round: dict[str, Any]) -> Any:
        with np.load(round["file"]) as file:
            X, y = torch.from_numpy(file["X"]), torch.from_numpy(file["y"].astype(np.float32))
        return X[None].expand(len(y), -1, -1), y, round["C"]

    def run(self, work: Any) -> Any:
        X, y, C = work
        return fit_logistic_batch(X, y, c_param=C, normalize=False)

    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        return {"coef": np.asarray(result.weights, np.float64).tolist()}


if __name__ == "__main__":
    serve(Probekit)
